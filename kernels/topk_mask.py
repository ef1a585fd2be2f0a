"""Scores → index lists of masked and visible tokens: the top-k patches of every slot are masked.

    scores   float32 [B, S, N]   B clips, S slots, N patches a slot
    masked   int32 [B, S·k]      token numbers slot · N + patch, ascending
    visible  int32 [B, S·(N-k)]  the other tokens, ascending

Equal scores go to the lower patch number; -0.0 equals 0.0; NaN ranks above every number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (visible, masked). Raises ValueError for another shape or a k outside 1 … N-1."""
    if scores.dim() != 3 or not scores.is_floating_point():
        raise ValueError(f"expected floating scores [B, S, N], got {scores.dtype} {list(scores.shape)}")
    batch, slots, patches = scores.shape
    if not 0 < k < patches:
        raise ValueError(f"expected 1 to {patches - 1} masked patches of {patches}, got {k}")
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    first_token = torch.arange(slots, device=scores.device)[:, None] * patches

    def tokens(patch: Tensor) -> Tensor:
        return (patch.sort(dim=-1).values + first_token).reshape(batch, -1).to(torch.int32)

    return tokens(order[..., k:]), tokens(order[..., :k])
