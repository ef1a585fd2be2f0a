"""The arithmetic that a device can do at most: measured by large matrix products, and by its data sheet."""

from __future__ import annotations

import torch

from bench.harness.chips import find_chip
from bench.harness.measure import now

MATMUL = "matrix product"  # name of its row


def matmul_ceiling(device: torch.device) -> float:
    """Return the TFLOP/s of the fastest of two large square matrix products, in the training step's precision.

    That is bfloat16 on CUDA and float32 on a CPU.
    """
    on_cuda = device.type == "cuda"
    dtype, repeats = (torch.bfloat16, 10) if on_cuda else (torch.float32, 2)
    best = 0.0
    for side in (4096, 8192) if on_cuda else (1024, 2048):
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        a @ b  # warm-up
        started = now(device)
        for _ in range(repeats):
            a @ b
        best = max(best, 2 * side**3 * repeats / (now(device) - started) / 1e12)
    return best


def peak_tflops(device: torch.device) -> float | None:
    """Return the data sheet's dense bfloat16 TFLOP/s; None for a CPU, and for a GPU that is not in chips.py."""
    try:
        return find_chip(torch.cuda.get_device_name(device)).tensor_tflops if device.type == "cuda" else None
    except ValueError:
        return None
