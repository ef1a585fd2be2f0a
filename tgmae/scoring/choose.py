"""The scorer that a configuration names. Without text-guided masks CLIP is not even imported."""

from __future__ import annotations

import torch

from tgmae.config import MOTION_KINDS, InputConfig
from tgmae.manifest import Manifest
from tgmae.masking import NoiseScorer, Scorer


def make_scorer(config: InputConfig, manifest: Manifest, device: torch.device) -> Scorer:
    """The scores that `config.mask` names. Raises ValueError where they cannot be computed."""
    model, mask = config.model, config.mask
    if mask.kind in MOTION_KINDS:
        from tgmae.scoring.motion_scorer import MotionScorer

        return MotionScorer(config, manifest, device)
    if mask.kind == "random" or mask.kind == "tube":
        return NoiseScorer(mask.kind, model.num_slots, model.patches_per_slot, device)
    if mask.scorer == "cached":
        from tgmae.scoring.cached_scorer import CachedScorer

        return CachedScorer(config, manifest, device)
    from tgmae.scoring.text_scorer import TextScorer

    return TextScorer(config, manifest, device)
