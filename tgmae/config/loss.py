"""What pretraining minimises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Duplicates = Literal["mask", "positive", "keep"]

LEAST_LEARNED_TEMPERATURE = 0.01  # Radford et al. 2021 ("CLIP"), section 2.5


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses, and how clips are contrasted with captions.

    Weights 1 and 0 are a plain masked autoencoder, 1 and 1 the paper's unified training, 0 and 1 contrastive learning
    alone, which runs no decoder.
    """

    reconstruction: float = 1.0  # Weight of the reconstruction loss.
    contrastive: float = 0.0  # Weight of the contrastive loss between clips and their captions.
    # Log the contrastive loss at weight 0, too: a head is trained on features that pass no gradient to the encoder.
    observe_contrastive: bool = False
    # Temperature of the contrastive loss, its first value if it is learned. The paper names none; .1 is SimCLR's.
    temperature: float = 0.1
    learn_temperature: bool = False  # Learn the temperature, as CLIP does; it never falls below .01.
    # What clips with the same caption are to each other. Words of equal text count as the same caption.
    #   mask      neither positives nor negatives: left out of the denominator
    #   positive  positives, like the clip's own caption
    #   keep      negatives, as the paper's formula has it
    duplicates: Duplicates = "mask"
    # The clips that are contrasted: those of one forward pass over all processes, or of the whole optimiser step, which
    # encodes every clip twice (gradient caching).
    contrast_over: Literal["pass", "step"] = "pass"

    def __post_init__(self) -> None:
        for name in ("reconstruction", "contrastive"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--loss.{name} must be at least 0, got {getattr(self, name)}")
        if self.reconstruction == 0 and self.contrastive == 0:
            raise ValueError("--loss.reconstruction and --loss.contrastive are both 0: there is nothing to minimise")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--loss.temperature must be above 0, got {self.temperature}")
        if self.learn_temperature and self.temperature < LEAST_LEARNED_TEMPERATURE:
            raise ValueError(
                f"--loss.temperature must be at least {LEAST_LEARNED_TEMPERATURE} where it is learned, got "
                f"{self.temperature}"
            )

    @property
    def contrasts(self) -> bool:
        """Whether clips are contrasted with captions: there is a head then, and batches need their text."""
        return self.contrastive > 0 or self.observe_contrastive

    @property
    def is_observing(self) -> bool:
        """Whether the head learns from features without teaching them."""
        return self.observe_contrastive and self.contrastive == 0

    @property
    def flag_without_contrast(self) -> str:
        """Return the flag that turns the contrastive loss off, for messages."""
        return "--loss.no-observe-contrastive" if self.is_observing else "--loss.contrastive 0"
