"""Masks as lists of token numbers.

Dimensions: B clips, S slots, N patches per slot, V visible tokens, M masked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenMasks:
    """Which tokens the encoder sees and which ones the decoder must reconstruct.

    visible   int32 [B, V], ascending
    masked    int32 [B, M], ascending

    A token's number is slot · N + patch. In each clip the two lists together hold every number 0 … S·N-1 exactly once.
    Raises ValueError for another dtype or shape. Values are never read, so the check costs no GPU synchronisation.
    """

    visible: Tensor
    masked: Tensor

    def __post_init__(self) -> None:
        for name, index in (("visible", self.visible), ("masked", self.masked)):
            if index.dtype != torch.int32 or index.dim() != 2:
                raise ValueError(f"expected {name} int32 [B, tokens], got {index.dtype} {list(index.shape)}")
        if self.visible.shape[0] != self.masked.shape[0]:
            raise ValueError(
                f"expected visible and masked of one batch size, got {list(self.visible.shape)} and "
                f"{list(self.masked.shape)}"
            )

    def __repr__(self) -> str:
        visible, masked = list(self.visible.shape), list(self.masked.shape)
        return f"TokenMasks(visible int32 {visible}, masked int32 {masked}, {self.visible.device})"
