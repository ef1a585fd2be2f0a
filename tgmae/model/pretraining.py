"""What pretraining reads, minimises and learns.

Dimensions: B clips, T frames, H W pixels, E text embedding.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from tgmae.config.loss import LossConfig
from tgmae.model.contrastive import ContrastiveHead
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE


class Inputs(NamedTuple):
    """What a forward pass reads: frames uint8 [B, T, H, W, 3]; the text is needed by the contrastive loss only.

    text   float32 [B, E], L2-normalised        captions  int64 [B], equal where captions are equal
    """

    frames: Tensor
    masks: TokenMasks
    text: Tensor | None = None
    captions: Tensor | None = None

    def clone(self) -> Inputs:
        """Return a copy in memory of its own."""
        masks = TokenMasks(visible=self.masks.visible.clone(), masked=self.masks.masked.clone())
        text, captions = (None if part is None else part.clone() for part in (self.text, self.captions))
        return Inputs(self.frames.clone(), masks, text, captions)


class Losses(NamedTuple):
    """The losses of a forward pass, scalars on the device.

    total             what is minimised: both losses, weighted
    contrastive       over the clips of the pass in all processes, or over those of the whole step
    duplicate_pairs   pairs of these clips that have one caption
    """

    total: Tensor
    reconstruction: Tensor
    contrastive: Tensor
    duplicate_pairs: Tensor


class Pretraining(nn.Module):
    """The masked autoencoder, and the head that compares clips with captions (None where nothing does)."""

    def __init__(self, mae: VideoMAE, head: ContrastiveHead | None = None) -> None:
        super().__init__()
        self.mae, self.head = mae, head

    def parts(self) -> list[nn.Module]:
        """Return the networks whose gradients are clipped apart, the autoencoder first."""
        return [self.mae] if self.head is None else [self.mae, self.head]

    def freeze_unused(self, loss: LossConfig) -> None:
        """Take no gradient of what does not run: the decoder, where nothing is reconstructed."""
        if loss.reconstruction == 0:
            mae = self.mae
            for part in (mae.to_decoder, mae.decoder, mae.decoder_norm, mae.head):
                part.requires_grad_(False)
            mae.mask_token.requires_grad_(False)
