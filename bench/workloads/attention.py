"""Attention backends that run on a device, and inputs for them.

Dimensions: B clips, L tokens, H heads, C channels a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgmae.model.attention import Backend, attend, choose_attention


def make_attention_inputs(batch: int, tokens: int, heads: int, width: int, device: torch.device) -> list[Tensor]:
    """Make random q, k and v [B, L, H, C] that require gradients: bfloat16 on CUDA, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (batch, tokens, heads, width // heads)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def available_attention(device: torch.device) -> list[Backend]:
    """Return sdpa and the other backends that run here. Prints why the rest do not."""
    found: list[Backend] = ["sdpa"]
    others: list[Backend] = ["xformers", "cudnn"] if device.type == "cuda" else []
    for backend in others:
        try:
            inputs = make_attention_inputs(1, 64, 2, 128, device)
            q, k, v = inputs
            out = attend(q, k, v, choose_attention(backend, device))
            torch.autograd.grad(out, inputs, out)
        except (ValueError, RuntimeError) as error:  # not installed; no kernel for this GPU
            print(f"{backend} attention is left out: {error}")
        else:
            found.append(backend)
    return found
