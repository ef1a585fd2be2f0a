"""The scorer that a configuration names. Without text-guided masks CLIP is not even imported."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch
from tgmae.config import InputConfig
from tgmae.data.manifest import Manifest
from tgmae.masks.config import MOTION_KINDS
from tgmae.masks.noise_scorer import NoiseScorer


class Scorer(Protocol):
    """A score for every patch; patches with the highest scores of their slot are masked.

    note   what the user should know of it, "" for nothing
    """

    note: str

    def __call__(self, clips: ClipBatch) -> Tensor:
        """float32 [B, S, N] on the training device."""
        ...


def make_scorer(config: InputConfig, manifest: Manifest, device: torch.device) -> Scorer:
    """The scores that `config.mask` names. Raises ValueError where they cannot be computed."""
    model, mask = config.model, config.mask
    if mask.kind in MOTION_KINDS:
        from tgmae.masks.motion_scorer import MotionScorer

        return MotionScorer(config, manifest, device)
    if mask.kind == "random" or mask.kind == "tube":
        return NoiseScorer(mask.kind, model.num_slots, model.patches_per_slot, device)
    if mask.scorer == "cached":
        from tgmae.masks.cached_scorer import CachedScorer

        return CachedScorer(config, manifest, device)
    from tgmae.masks.text_scorer import TextScorer

    return TextScorer(config, manifest, device)
