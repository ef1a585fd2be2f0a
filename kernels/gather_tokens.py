"""uint8 frames + token numbers → pixel values of those tokens.

A token is a cube of `tubelet` frames × `patch` × `patch` pixels; its P = tubelet · patch² · 3 values stand in the order
(frame, row, column, channel), which is the order in memory of the frames and of VideoMAE's targets.

Dimensions: B clips, T frames, H W pixels, K chosen tokens, P values a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ImageNet statistics, with which VideoMAE normalises its input (of values in 0 … 1).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def gather_cubes(frames: Tensor, index: Tensor, patch: int, tubelet: int) -> Tensor:
    """The raw values of the chosen tokens.

    frames uint8 [B, T, H, W, 3], index int32 [B, K] → uint8 [B, K, P]
    """
    batch, num_frames, height, width, channels = frames.shape
    slots, rows, columns = num_frames // tubelet, height // patch, width // patch
    cubes = frames.view(batch, slots, tubelet, rows, patch, columns, patch, channels)
    cubes = cubes.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, slots * rows * columns, -1)
    return cubes.gather(1, index.long()[..., None].expand(-1, -1, cubes.shape[-1]))


def gather_tokens(frames: Tensor, index: Tensor, patch: int, tubelet: int, dtype: torch.dtype) -> Tensor:
    """The chosen tokens, normalised for the patch embedding: (value / 255 - mean) / std for each channel.

    frames uint8 [B, T, H, W, 3], index int32 [B, K] → `dtype` [B, K, P]
    """
    cubes = gather_cubes(frames, index, patch, tubelet)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mean = torch.tensor(MEAN, dtype=compute, device=frames.device)
    std = torch.tensor(STD, dtype=compute, device=frames.device)
    pixels = cubes.view(*cubes.shape[:-1], -1, 3).to(compute)
    return ((pixels / 255 - mean) / std).flatten(-2).to(dtype)
