"""Random masks: scores that depend on nothing but the requests' mask seeds."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch


class NoiseScorer:
    """Scores for the two random masks.

    random  independent in every slot: ST-MAE's mask, stratified by slot. ST-MAE draws from all tokens of the clip at
            once, so that the number of masked tokens varies from slot to slot.
    tube    one draw, shared by all slots (VideoMAE)
    """

    note = ""
    needs_text = False

    def __init__(
        self, kind: Literal["random", "tube"], num_slots: int, patches_per_slot: int, device: torch.device
    ) -> None:
        self.num_slots, self.patches_per_slot, self.device = num_slots, patches_per_slot, device
        self.draws = num_slots if kind == "random" else 1

    def __call__(self, clips: ClipBatch, text: Tensor | None = None) -> Tensor:
        """Return float32 [B, S, N]."""
        size = (self.draws, self.patches_per_slot)
        noise = [np.random.default_rng(request.mask_seed).random(size, np.float32) for request in clips.requests]
        scores = torch.from_numpy(np.stack(noise)).to(self.device, non_blocking=True)
        return scores.expand(-1, self.num_slots, -1)
