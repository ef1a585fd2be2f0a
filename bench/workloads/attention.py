"""Attention kernels that run on a device, and inputs for them.

Dimensions: B clips, L tokens, H heads, C channels a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import attention

from bench.harness.command_line import first_line
from tgmae.model.attention import Backend, attend, choose_attention

# The model's own backends, and what torch's scaled_dot_product_attention runs once it has been told to.
Kernel = Backend | Literal["FlashAttention 3", "FlashAttention 4"]
_REGISTERED: dict[Kernel, str] = {"FlashAttention 3": "FA3", "FlashAttention 4": "FA4"}  # torch's names for them


@contextmanager
def using_attention(kernel: Kernel) -> Iterator[Backend]:
    """Return the model's backend that runs a kernel, for as long as the context is open.

    FlashAttention 3 and 4 need packages of their own (flash_attn_interface, flash-attn-4). The switch is torch's and
    concerns the whole process, so it is for benchmarks of one thread.
    """
    if kernel not in _REGISTERED:
        yield kernel  # type: ignore[misc]  # mypy does not narrow a Literal by `in`
        return
    attention.activate_flash_attention_impl(_REGISTERED[kernel])
    try:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            yield "sdpa"
    finally:
        attention.restore_flash_attention_impl()


def make_attention_inputs(batch: int, tokens: int, heads: int, width: int, device: torch.device) -> list[Tensor]:
    """Make random q, k and v [B, L, H, C] that require gradients: bfloat16 on CUDA, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (batch, tokens, heads, width // heads)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def find_attention(device: torch.device) -> tuple[list[Kernel], list[str]]:
    """Return sdpa and the other kernels that run here, and why the rest do not."""
    found, left_out = list[Kernel](["sdpa"]), list[str]()
    others: list[Kernel] = ["xformers", "cudnn", *_REGISTERED] if device.type == "cuda" else []
    for kernel in others:
        try:
            q, k, v = inputs = make_attention_inputs(1, 64, 2, 128, device)
            with using_attention(kernel) as backend:
                out = attend(q, k, v, choose_attention(backend, device))
                torch.autograd.grad(out, inputs, out)
        except Exception as error:  # not installed; no kernel for this GPU; other projects' kernels may raise anything
            left_out.append(f"left out: {kernel} attention ({first_line(error)})")
            print(left_out[-1])
        else:
            found.append(kernel)
    return found, left_out
