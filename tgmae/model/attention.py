"""Multi-head attention, the one file that knows xformers and cuDNN.

Dimensions: B clips, L tokens, H heads, C channels a head.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["xformers", "cudnn", "sdpa"]


def choose_attention(asked: Literal["auto"] | Backend, device: torch.device) -> Backend:
    """xformers on CUDA, torch's scaled_dot_product_attention elsewhere; a backend asked for by name is not replaced.

    Raises ValueError where the one asked for cannot run here.
    """
    if asked == "sdpa":
        return "sdpa"
    if asked == "auto" and device.type != "cuda":
        return "sdpa"
    if device.type != "cuda":
        name = "xformers" if asked == "auto" else asked
        raise ValueError(f"{name} attention has no operator for a CPU; choose --model.attention sdpa")
    if asked == "cudnn":
        if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            raise ValueError("this torch is built without cuDNN; choose --model.attention xformers or sdpa")
        return "cudnn"
    try:
        _prepare_xformers()
    except ImportError as error:
        raise ValueError(
            f"xformers attention cannot run: {error}. Install it with pip install xformers==0.0.35, "
            "or choose --model.attention sdpa"
        ) from error
    return "xformers"


def _prepare_xformers() -> None:
    """Import it and let it run on torch's kernels. Raises ImportError where it cannot."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns that without its binary there is no attention
    from xformers.ops import fmha

    # PyPI's wheel is built for CUDA 12, and its binary does not load beside a torch of CUDA 13. xformers then rules out
    # every operator, those too that call torch's kernels and need no binary. What is missing is missed all the same.
    fmha.common._built_with_cuda = True
    if not (fmha.flash.FwOp.is_available() or fmha.cutlass.FwOp.is_available()):
        raise ImportError(f"none of its operators runs beside torch {torch.__version__}")


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
    """softmax(q kᵀ / √C) v for q, k, v [B, L, H, C] → [B, L, H, C]; backend as `choose_attention` gave it."""
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out: Tensor = memory_efficient_attention(q, k, v)
        return out
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "cudnn":
        # The operator itself: torch's switches between SDPA's kernels hold for all threads, the scorer's among them.
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, torch.is_grad_enabled())[0]
        return out.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
