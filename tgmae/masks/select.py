"""Select the masked patches: the top-k scores of every slot.

Dimensions: B clips, S slots, N patches per slot.
"""

from __future__ import annotations

from torch import Tensor

from kernels.topk_mask import topk_mask
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.model.token_masks import TokenMasks


def select_masks(config: MaskConfig, model: ModelConfig, scores: Tensor) -> TokenMasks:
    """Turn scores float32 [B, S, N] into the masks of a batch, on the same device."""
    if config.order == "bottom":
        scores = -scores
    visible, masked = topk_mask(scores, config.masked_per_slot(model.patches_per_slot))
    return TokenMasks(visible=visible, masked=masked)
