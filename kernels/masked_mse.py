"""Reconstruction loss on masked tokens, with targets normalised cube by cube straight from the uint8 frames.

Dimensions: B clips, M masked tokens, P values a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gather_tokens import gather_cubes


def cube_statistics(cubes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each cube and channel, of values in 0 … 1.

    cubes floating [..., P] in 0 … 1 → two of [..., 1, 3]. The deviation is the square root of the unbiased variance
    plus 1e-6, as in VideoMAE's engine_for_pretraining.py.
    """
    pixels = cubes.view(*cubes.shape[:-1], -1, 3)
    return pixels.mean(-2, keepdim=True), pixels.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6


def normalised_targets(frames: Tensor, masked: Tensor, patch: int, tubelet: int, dtype: torch.dtype) -> Tensor:
    """What the decoder must predict: uint8 [B, T, H, W, 3], int32 [B, M] → `dtype` [B, M, P]."""
    cubes = gather_cubes(frames, masked, patch, tubelet).to(dtype) / 255
    mean, deviation = cube_statistics(cubes)
    return ((cubes.view(*cubes.shape[:-1], -1, 3) - mean) / deviation).flatten(-2)


def masked_mse(prediction: Tensor, frames: Tensor, masked: Tensor, patch: int, tubelet: int) -> Tensor:
    """Mean squared error over all masked values, a scalar in float32 (float64 for a float64 prediction).

    prediction [B, M, P], frames uint8 [B, T, H, W, 3], masked int32 [B, M]. Predicting zero costs about 1.
    """
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    targets = normalised_targets(frames, masked, patch, tubelet, dtype)
    if prediction.shape != targets.shape:
        raise ValueError(f"expected a prediction {list(targets.shape)}, got {list(prediction.shape)}")
    return (prediction.to(dtype) - targets).square().mean()
