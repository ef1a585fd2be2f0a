"""Multi-head attention. This is the only file that knows xformers and cuDNN.

Dimensions: B clips, L tokens, H heads, C channels per head.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["xformers", "cudnn", "sdpa"]


def choose_attention(requested: Literal["auto"] | Backend, device: torch.device) -> Backend:
    """Return the backend to use on `device`.

    auto is xformers on CUDA and torch's scaled_dot_product_attention (sdpa) elsewhere. A backend that was requested by
    name is never replaced by another: raises ValueError if it cannot run here.
    """
    if requested == "sdpa":
        return "sdpa"
    if requested == "auto" and device.type != "cuda":
        return "sdpa"
    if device.type != "cuda":
        raise ValueError(f"{requested} attention needs a CUDA device, got {device}; use --model.attention sdpa")
    if requested == "cudnn":
        if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            raise ValueError("this build of torch has no cuDNN; use --model.attention xformers or sdpa")
        return "cudnn"
    try:
        _prepare_xformers()
    except ImportError as error:
        raise ValueError(
            f"xformers attention cannot run: {error}. Install it with pip install xformers==0.0.35, "
            "or use --model.attention sdpa"
        ) from error
    return "xformers"


def _prepare_xformers() -> None:
    """Import xformers and let it run torch's kernels. Raises ImportError if it cannot."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns that without its binary there is no attention
    from xformers.ops import fmha

    # PyPI's wheel is built for CUDA 12, and its binary does not load beside a torch for CUDA 13. xformers then rules
    # out every operator, including those that call torch's kernels and need no binary. Setting this flag brings the
    # latter back; an operator that does need the binary still reports itself as unavailable.
    fmha.common._built_with_cuda = True
    if not (fmha.flash.FwOp.is_available() or fmha.cutlass.FwOp.is_available()):
        raise ImportError(f"none of its operators runs beside torch {torch.__version__}")


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
    """Return softmax(q kᵀ / √C) v for q, k, v [B, L, H, C] as [B, L, H, C].

    Keys and values may be more than the queries. `backend` is what `choose_attention` returned.
    """
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out: Tensor = memory_efficient_attention(q, k, v)
        return out
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "cudnn":
        # Call the operator itself: torch's switches between SDPA kernels are global, and would also change the
        # scorer's attention in the loader thread.
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, torch.is_grad_enabled())[0]
        return out.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
