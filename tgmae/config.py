"""Configuration: frozen dataclasses, composed from those of the parts.

`tgmae-train PRESET --data.stride 2` changes one field of a preset. The resolved configuration is written beside every
run and inside every checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engines.config import CLIPConfig
from tgmae.data.config import DataConfig
from tgmae.masks.config import MaskConfig
from tgmae.model.config import ModelConfig
from tgmae.training.config import LogConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What decides a batch: clips, scores and masks."""

    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto uses CUDA if there is a GPU.
    seed: int = 0  # Random seed for sampling order, crops and masks, and for weight initialisation.
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)

    def __post_init__(self) -> None:
        if self.mask.kind == "tgm" and self.mask.frames_per_tubelet > self.model.tubelet_size:
            raise ValueError(
                "--mask.frames-per-tubelet must be at most --model.tubelet-size, "
                f"got {self.mask.frames_per_tubelet} and {self.model.tubelet_size}"
            )
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
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
    # give a checkpoint file.
    resume: str = "auto"
    init_from: Path | None = None  # Start from these weights: a folder in Hugging Face's VideoMAE format.
    # Precision of training. auto is bf16 autocast on CUDA and fp32 on a CPU.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    epochs: int = 800  # Passes over the videos; each pass gives --data.repeat clips of every video.
    max_steps: int | None = None  # Stop after this many optimiser steps; the schedule still spans --epochs.
    batch_size: int = 2048  # Clips per optimiser step, over all processes.
    device_batch_size: int = 64  # Clips per forward pass on one process; the rest is gradient accumulation.
    compile: bool = False  # torch.compile the transformer blocks: takes minutes at the start, needs a C++ compiler.
    cuda_graph: bool = False  # Launch forward and backward as one CUDA graph; needs one process on one GPU.
    profile: int = 0  # Steps to profile after ten steps of warm-up; writes RUN/profile (docs/profiling.md).
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "device_batch_size", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.profile < 0:
            raise ValueError(f"--profile must not be negative, got {self.profile}")
        if self.device_batch_size % self.data.repeat:
            raise ValueError(
                f"--device-batch-size must be a multiple of --data.repeat, got {self.device_batch_size} "
                f"and {self.data.repeat}"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Return the forward passes of each process in one optimiser step."""
        per_pass = self.device_batch_size * world_size
        if self.batch_size % per_pass:
            raise ValueError(
                f"--batch-size must be a multiple of --device-batch-size × processes, "
                f"got {self.batch_size} and {self.device_batch_size} × {world_size}; set both"
            )
        return self.batch_size // per_pass


FORMAT = 1  # of to_dict


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON types."""
    plain = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, default=str))
    assert isinstance(plain, dict)
    return plain


def from_dict(plain: Any, source: str) -> TrainConfig:
    """Return the configuration that `to_dict` made these JSON types of.

    source  the file they were read from, for messages

    Raises ValueError, naming the file and the key, for unknown and missing keys and for values that are impossible.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"{source} is not a saved configuration: expected a JSON object, got {json.dumps(plain)}")
    if (found := plain.get("format", FORMAT)) != FORMAT:
        raise ValueError(
            f"{source} has format {found}, and this version of tgmae reads format {FORMAT}: use the version that wrote "
            "it, or give its settings as flags"
        )
    try:
        config = _read_fields(TrainConfig, {key: value for key, value in plain.items() if key != "format"}, "")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    assert isinstance(config, TrainConfig)
    return config


def _read_fields(config: type[Any], plain: dict[str, Any], prefix: str) -> Any:
    kinds = get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    for name in plain:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {prefix}{near[0]}?" if near else "remove it"
            raise ValueError(f"there is no setting {prefix}{name}; {advice}")
    for name in names:
        if name not in plain:
            raise ValueError(f"the setting {prefix}{name} is missing; add it (tgmae-train --help lists all of them)")
    return config(**{name: _read_value(kinds[name], plain[name], prefix + name) for name in names})


def _read_value(kind: Any, plain: Any, name: str) -> Any:
    """Return a JSON value as the type of a field. Raises ValueError for a value of another type."""
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(plain, dict):
        assert isinstance(kind, type)
        return _read_fields(kind, plain, f"{name}.")
    if origin is UnionType and plain is None:
        return None
    if origin is UnionType:
        return _read_value(next(part for part in inner if part is not NoneType), plain, name)
    if origin is Literal and any(plain == value and type(plain) is type(value) for value in inner):
        return plain
    if origin is tuple and isinstance(plain, list) and (inner[-1] is Ellipsis or len(inner) == len(plain)):
        return tuple(_read_value(inner[0], value, name) for value in plain)
    if kind is Path and isinstance(plain, str):
        return Path(plain)
    if kind is float and type(plain) in (int, float):
        return plain
    if type(plain) is kind:
        return plain
    raise ValueError(f"{name} must be {_describe_kind(kind)}, got {json.dumps(plain)}")


def _describe_kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(json.dumps, get_args(kind)))}"
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return "a list of numbers" if inner[-1] is Ellipsis else f"a list of {len(inner)} numbers"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path, as a string"}
    return words.get(kind, "a JSON object")
