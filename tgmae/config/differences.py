"""How the configurations of several runs differ, in the words of a picture's legend."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tgmae.config.masks import MOTION_KINDS
from tgmae.config.run import TrainConfig

# Settings, or groups of them, that change where a run runs and what it writes, not what it learns.
_ELSEWHERE = (
    "run_dir", "resume", "device", "pipeline", "max_steps", "compile", "cuda_graph", "profile", "log.", "validation.",
    "data.root", "data.decode", "data.num_workers", "data.prefetch", "data.pipelines", "data.threads",
    "model.attention", "clip.engine", "clip.precision", "clip.batch", "clip.cuda_graph", "clip.cache_dir",
    "clip.trust_code",
)  # fmt: skip
_OF_TEXT = ("mask.scorer", "mask.scores", "mask.student", "mask.dense", "mask.frames_per_tubelet")
_OF_MOTION = ("mask.motion", "mask.flow", "mask.no_motion")
_OF_CONTRAST = ("loss.temperature", "loss.learn_temperature", "loss.duplicates", "loss.contrast_over")
_OF_CAPTIONS = ("clip.", "data.captions", "mask.no_caption")


def describe_differences(configs: Sequence[TrainConfig], without: Collection[str] = ()) -> list[str]:
    """Return for each configuration its values of the settings that differ, such as "tgm, γ 0.6, width 128".

    without   settings that are not compared, such as "seed"

    A setting that has no effect in a run is no difference: the folder of motion vectors beside tube masks. The words
    are "" where nothing differs.
    """
    settings = [dict(_effective(config)) for config in configs]
    names = [name for name in dict.fromkeys(name for one in settings for name in one) if name not in without]
    differing = [name for name in names if len({str(one[name]) for one in settings if name in one}) > 1]
    ends = Counter(name.rpartition(".")[2] for name in differing)

    def word(name: str, value: Any) -> str:
        if name == "mask.kind":
            return str(value)
        if name == "mask.ratio":
            return f"γ {value}"
        end = name.rpartition(".")[2]
        shown = value.name if isinstance(value, Path) else value
        return f"{(name if ends[end] > 1 else end).replace('_', ' ')} {shown}"

    order = sorted(differing, key=lambda name: not name.startswith("mask."))  # masks first
    return [", ".join(word(name, one[name]) for name in order if name in one) for one in settings]


def _effective(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Yield the settings that decide what a run learns."""
    is_tgm, contrasts = config.mask.kind == "tgm", config.loss.contrasts
    idle: tuple[str, ...] = _ELSEWHERE
    idle += () if is_tgm else _OF_TEXT
    idle += () if config.mask.kind in MOTION_KINDS else _OF_MOTION
    idle += () if contrasts else _OF_CONTRAST
    idle += () if contrasts or is_tgm else _OF_CAPTIONS
    for name, value in _flatten(dataclasses.asdict(config)):
        if not any(name == other or (other.endswith(".") and name.startswith(other)) for other in idle):
            yield name, value


def _flatten(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
