"""Masks: every strategy is a score for each patch, and the top-k patches of every slot are masked.

Dimensions: B clips, S slots, N patches a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.topk_mask import topk_mask
from tgmae.config import MaskConfig, ModelConfig
from tgmae.types import ClipRequest, MaskPlan


def noise_scores(kind: str, requests: Sequence[ClipRequest], num_slots: int, patches_per_slot: int) -> Tensor:
    """Scores of the two masks that look at nothing, float32 [B, S, N] on the CPU, from the requests' mask seeds.

    random  independent in every slot (ST-MAE)        tube  one draw, shared by all slots (VideoMAE)
    """
    draws = num_slots if kind == "random" else 1
    noise = [
        np.random.default_rng(request.mask_seed).random((draws, patches_per_slot), np.float32) for request in requests
    ]
    return torch.from_numpy(np.stack(noise)).expand(-1, num_slots, -1)


def plan_masks(
    config: MaskConfig, model: ModelConfig, requests: Sequence[ClipRequest], device: torch.device
) -> MaskPlan:
    """The masks of a batch, on `device`."""
    scores = noise_scores(config.kind, requests, model.num_slots, model.patches_per_slot).to(device)
    visible, masked = topk_mask(scores, config.masked_per_slot(model.patches_per_slot))
    return MaskPlan(visible=visible, masked=masked)
