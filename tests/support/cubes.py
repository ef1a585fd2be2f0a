"""Frames, token numbers and their cubes by brute force in numpy, for the tests of the kernels that read frames.

Dimensions: B clips, T frames, H W pixels, K chosen tokens, P values per token.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Kernels are interpreted on CPU tensors (conftest.py) and compiled for CUDA tensors.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# [B, T, H, W], patch, tubelet: one pixel, the smallest grid, odd sizes, H ≠ W, powers of two ± 1, CLIP's, production.
GEOMETRIES = [
    ((1, 1, 1, 1), 1, 1),
    ((1, 2, 4, 4), 2, 2),
    ((2, 3, 9, 6), 3, 3),
    ((2, 6, 7, 14), 7, 2),
    ((3, 4, 15, 10), 5, 1),
    ((2, 4, 16, 24), 8, 2),
    ((1, 2, 34, 17), 17, 2),
    ((1, 2, 30, 45), 15, 2),
    ((2, 2, 28, 28), 14, 1),
    ((1, 2, 64, 32), 32, 2),
    ((1, 16, 224, 224), 16, 2),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_frames(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator(seed))


def num_tokens(shape: tuple[int, ...], patch: int, tubelet: int) -> int:
    return shape[1] // tubelet * (shape[2] // patch) * (shape[3] // patch)


def random_index(shape: tuple[int, ...], patch: int, tubelet: int, seed: int = 0) -> Tensor:
    """Choose a third of each clip's tokens (at least 1, at most 40), ascending, different per clip: int32 [B, K]."""
    total = num_tokens(shape, patch, tubelet)
    count = min(max(total // 3, 1), 40)
    noise = torch.rand(shape[0], total, generator=generator(seed))
    return noise.argsort(1)[:, :count].sort(1).values.to(torch.int32)


def cut(frames: NDArray[np.uint8], index: NDArray[np.int32], patch: int, tubelet: int) -> NDArray[np.uint8]:
    """Cut out one slice per token: [T, H, W, 3], [K] → [K, P]."""
    rows, columns = frames.shape[1] // patch, frames.shape[2] // patch
    cubes = []
    for token in index.tolist():
        slot, row, column = token // (rows * columns), token // columns % rows, token % columns
        cube = frames[
            slot * tubelet : (slot + 1) * tubelet,
            row * patch : (row + 1) * patch,
            column * patch : (column + 1) * patch,
        ]
        cubes.append(cube.reshape(-1))
    return np.stack(cubes)


def cut_batch(frames: Tensor, index: Tensor, patch: int, tubelet: int) -> NDArray[np.uint8]:
    pairs = zip(frames.numpy(), index.numpy(), strict=True)
    return np.stack([cut(clip, chosen, patch, tubelet) for clip, chosen in pairs])


def assert_as_good(kernel: Tensor, reference: Tensor, exact: NDArray[np.float64]) -> None:
    """Check that the kernel's largest error is at most twice the reference's, or twice the rounding of its dtype.

    The latter because Triton's interpreter truncates to bfloat16 where a GPU rounds.
    """
    assert kernel.dtype == reference.dtype
    assert kernel.shape == reference.shape == exact.shape
    error, own = (np.abs(x.detach().cpu().double().numpy() - exact).max() for x in (kernel, reference))
    assert np.isfinite(error)
    assert error <= 2 * max(own, torch.finfo(kernel.dtype).eps / 2 * np.abs(exact).max())
