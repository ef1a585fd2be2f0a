"""Masks: every strategy is a score for each patch, and the top-k patches of every slot are masked.

Dimensions: B clips, S slots, N patches a slot.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.topk_mask import topk_mask
from tgmae.config import MaskConfig, ModelConfig
from tgmae.types import ClipBatch, MaskPlan


class Scorer(Protocol):
    """A score for every patch; patches with the highest scores of their slot are masked.

    note   what the user should know of it, "" for nothing
    """

    note: str

    def __call__(self, clips: ClipBatch) -> Tensor:
        """float32 [B, S, N] on the training device."""
        ...


class NoiseScorer:
    """The two masks that look at nothing but the requests' mask seeds.

    random  independent in every slot (ST-MAE)        tube  one draw, shared by all slots (VideoMAE)
    """

    note = ""

    def __init__(
        self, kind: Literal["random", "tube"], num_slots: int, patches_per_slot: int, device: torch.device
    ) -> None:
        self.num_slots, self.patches_per_slot, self.device = num_slots, patches_per_slot, device
        self.draws = num_slots if kind == "random" else 1

    def __call__(self, clips: ClipBatch) -> Tensor:
        size = (self.draws, self.patches_per_slot)
        noise = [np.random.default_rng(request.mask_seed).random(size, np.float32) for request in clips.requests]
        scores = torch.from_numpy(np.stack(noise)).to(self.device, non_blocking=True)
        return scores.expand(-1, self.num_slots, -1)


def plan_masks(config: MaskConfig, model: ModelConfig, scores: Tensor) -> MaskPlan:
    """Scores float32 [B, S, N] → the masks of a batch, on the scores' device."""
    if config.order == "bottom":
        scores = -scores
    visible, masked = topk_mask(scores, config.masked_per_slot(model.patches_per_slot))
    return MaskPlan(visible=visible, masked=masked)
