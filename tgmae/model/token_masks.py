"""Masks as token numbers.

Dimensions: B clips, S slots, N patches a slot, V visible tokens, M masked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dali_pipelines.types import describe_tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenMasks:
    """Which tokens the encoder sees and which the decoder must reconstruct.

    visible   int32 [B, V], ascending    masked   int32 [B, M], ascending

    Together they hold every token number 0 … S·N-1 once; token = slot · N + patch.
    """

    visible: Tensor
    masked: Tensor

    def __post_init__(self) -> None:
        for name, index in (("visible", self.visible), ("masked", self.masked)):
            if index.dtype != torch.int32 or index.dim() != 2:
                raise ValueError(f"expected {name} int32 [B, tokens], got {index.dtype} {list(index.shape)}")
        if self.visible.shape[0] != self.masked.shape[0]:
            raise ValueError(
                f"expected one batch size, got visible {list(self.visible.shape)} and masked {list(self.masked.shape)}"
            )

    def __repr__(self) -> str:
        return f"TokenMasks(visible {describe_tensor(self.visible)}, masked {describe_tensor(self.masked)})"
