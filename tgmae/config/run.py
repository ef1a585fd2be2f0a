"""Configuration: frozen dataclasses, composed from those of the parts.

`tgmae-train PRESET --data.stride 2` changes one field of a preset. The resolved configuration is written beside every
run and inside every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engines.config import CLIPConfig
from tgmae.config.captions import CaptionsConfig
from tgmae.config.data import DataConfig
from tgmae.config.loss import LossConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.training import LogConfig, OptimConfig, ValidationConfig


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What decides a batch: clips, scores and masks."""

    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto uses CUDA if there is a GPU.
    seed: int = 0  # Random seed for sampling order, crops and masks, and for weight initialisation.
    data: DataConfig = field(default_factory=DataConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)

    def __post_init__(self) -> None:
        if self.mask.kind == "tgm" and self.mask.frames_per_tubelet > self.model.tubelet_size:
            raise ValueError(
                "--mask.frames-per-tubelet must be at most --model.tubelet-size, "
                f"got {self.mask.frames_per_tubelet} and {self.model.tubelet_size}"
            )
        for name, folders in (("scores", self.mask.scores), ("motion", self.mask.motion)):
            if isinstance(folders, tuple) and len(folders) != len(self.data.manifests):
                raise ValueError(
                    f"--mask.{name} must be one folder, or one for each manifest, got {len(folders)} for "
                    f"{len(self.data.manifests)}"
                )
        if not 0 <= self.seed < 2**63:  # torch's seeds
            raise ValueError(f"--seed must lie between 0 and 2⁶³ - 1, got {self.seed}")
        num_patches = self.model.patches_per_slot
        num_masked = self.mask.masked_per_slot(num_patches)
        if not 0 < num_masked < num_patches:
            raise ValueError(
                f"--mask.ratio {self.mask.ratio} masks {num_masked} of the {num_patches} patches of a slot "
                f"(--model.image-size {self.model.image_size}, --model.patch-size {self.model.patch_size}); "
                "at least one must be masked and one visible"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(InputConfig):
    """One pretraining run."""

    pipeline: Literal["dali", "pyav"] = "dali"  # What decodes clips; pyav is the slow, readable reference.
    run_dir: Path = Path("runs/demo")  # Folder for everything the run writes.
    # auto resumes from the newest checkpoint in --run-dir, if any; never starts over and sets an earlier run aside; or
    # give a checkpoint, a file .pt or a folder .dcp.
    resume: str = "auto"
    # Start from these weights: a folder in Hugging Face's format, a VideoMAE .pth, a run folder or its checkpoint, or a
    # name on the Hugging Face hub such as MCG-NJU/videomae-base.
    init_from: str | None = None
    # Precision of training. auto is bf16 autocast on CUDA and fp32 on a CPU.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    epochs: int = 800  # Passes over the videos, of --data.repeat clips each; with --data.weights of as many clips.
    max_steps: int | None = None  # Stop after this many optimiser steps; the schedule still spans --epochs.
    batch_size: int = 2048  # Clips per optimiser step, over all processes.
    device_batch_size: int = 64  # Clips per forward pass on one process; the rest is gradient accumulation.
    # How processes share the network: each has a copy (ddp), or a part of it (fsdp: torch's FSDP2), for networks whose
    # weights, gradients and moments do not fit into one GPU. One process alone has all of it either way.
    parallel: Literal["ddp", "fsdp"] = "ddp"
    # Keep only the inputs of each transformer block for the backward pass, which computes the rest again: less memory,
    # about a third more arithmetic.
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile the transformer blocks: takes minutes at the start, needs a C++ compiler.
    cuda_graph: bool = False  # Launch forward and backward as one CUDA graph; needs one process on one GPU.
    profile: int = 0  # Steps to profile after ten steps of warm-up; writes RUN/profile (docs/profiling.md).
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "device_batch_size", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.cuda_graph and self.activation_checkpointing:
            raise ValueError("--cuda-graph cannot record --activation-checkpointing; drop one of them")
        if self.profile < 0:
            raise ValueError(f"--profile must not be negative, got {self.profile}")
        if self.device_batch_size % self.data.repeat:
            raise ValueError(
                f"--device-batch-size must be a multiple of --data.repeat, got {self.device_batch_size} "
                f"and {self.data.repeat}"
            )

    def contrasted_clips(self, world_size: int) -> int:
        """Return the clips that the contrastive loss compares with each other."""
        return self.batch_size if self.loss.contrast_over == "step" else self.device_batch_size * world_size

    def accumulation_steps(self, world_size: int) -> int:
        """Return the forward passes of each process in one optimiser step."""
        per_pass = self.device_batch_size * world_size
        if self.batch_size % per_pass:
            raise ValueError(
                f"--batch-size must be a multiple of --device-batch-size × processes, "
                f"got {self.batch_size} and {self.device_batch_size} × {world_size}; use {self._advise(world_size)}"
            )
        return self.batch_size // per_pass

    def _advise(self, world_size: int) -> str:
        """Name what can be divided: batches near this one, a device batch, fewer processes."""
        per_pass, repeat = self.device_batch_size * world_size, self.data.repeat
        below = self.batch_size // per_pass * per_pass
        advice = [f"--batch-size {f'{below} or ' if below else ''}{below + per_pass}"]
        # The nearest share of a process that a device batch of about this size divides.
        shares = sorted(range(repeat, 2 * self.batch_size, repeat), key=lambda n: abs(n * world_size - self.batch_size))
        for share in shares:
            top = min(self.device_batch_size, share)
            fitting = next((n for n in range(top, top // 2, -1) if share % n == 0 and n % repeat == 0), None)
            if fitting:
                batch = share * world_size
                changed = "" if batch == self.batch_size else f"--batch-size {batch} "
                advice.append(f"{changed}--device-batch-size {fitting}")
                break
        fewer = (n for n in range(world_size - 1, 0, -1) if self.batch_size % (n * self.device_batch_size) == 0)
        if number := next(fewer, None):
            advice.append(f"{number} process{'es' if number > 1 else ''}")
        return ", or ".join(advice)
