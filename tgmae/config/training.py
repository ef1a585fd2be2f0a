"""How the network is optimised, what a run writes, and how a student scorer is distilled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay. All learning rates are for batch 256 and scale with batch / 256."""

    base_lr: float = 1.5e-4  # Peak learning rate.
    warmup_lr: float = 1e-6  # Learning rate of the first step.
    min_lr: float = 1e-5  # Learning rate at the end of the schedule.
    warmup_epochs: float = 40  # Epochs of linear warm-up.
    weight_decay: float = 0.05  # Weight decay of matrices; biases, norms and the mask token have none.
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's betas.
    clip_norm: float | None = None  # Clip gradients to this norm. None: no clipping.

    def __post_init__(self) -> None:
        for name in ("base_lr", "warmup_lr", "min_lr", "warmup_epochs", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--optim.{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--optim.betas must lie in [0, 1), got {self.betas}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"--optim.clip-norm must be above 0, or None for no clipping, got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on held-out clips, always the same ones."""

    split: str = "val"  # Split to validate on.
    clips: int = 128  # Clips of each data set, each of another video; they stay in host memory.
    # Epochs between two validations, and at least 16 times as many clips as one has; 0: never.
    every: float = 1.0

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"--validation.clips must be at least 1, got {self.clips}; --validation.every 0 is off")
        if not 0 <= self.every < math.inf:
            raise ValueError(f"--validation.every must be at least 0, got {self.every}")
        if not self.split:
            raise ValueError("--validation.split must name a split; --validation.every 0 is off")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written to the run folder, and how often, in optimiser steps."""

    metrics_every: int = 10  # Steps between two lines of metrics.jsonl, and of output without a terminal.
    picture_every: int = 500  # Steps between two pictures of originals, masks and reconstructions.
    checkpoint_every: int = 500  # Steps between two checkpoints.
    keep_checkpoints: int = 3  # Newest checkpoints to keep.
    tensorboard: bool = True  # Also write the metrics for TensorBoard.
    progress: bool = True  # Show a progress bar, or lines without a terminal.

    def __post_init__(self) -> None:
        for name in ("metrics_every", "picture_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"--log.{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Size and training of a student."""

    pipeline: Literal["dali", "pyav"] = "dali"  # What decodes clips; pyav is the slow, readable reference.
    hidden: int = 1024  # Width of the student's two hidden layers.
    rounds: int = 600  # Batches of clips to train on.
    clips: int = 16  # Clips per round.
    batch: int = 512  # Patches per optimiser step.
    learning_rate: float = 1e-3  # Peak learning rate of AdamW.
    check_clips: int = 64  # Held-out clips on which agreement is measured.

    def __post_init__(self) -> None:
        for name in ("hidden", "rounds", "clips", "batch", "check_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
