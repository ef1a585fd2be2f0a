"""Checkpoints: written atomically, the last few kept, read without running code from the file."""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.files import replacing
from engines.torch_files import DamagedFile, read_torch_file
from tgmae.config.loss import LossConfig
from tgmae.config.run import TrainConfig
from tgmae.config.saved import LATER, to_dict
from tgmae.model.weights import check_shapes

_NAME = re.compile(r"step_(\d{8})\.pt")


FORMAT = 3  # of the file. 2 held the autoencoder alone, 1 had no number; both are still read


class Checkpoints:
    """The checkpoints of one run, in one folder.

    videos      fingerprint of the manifest, checked when resuming
    saved_step  the step of the newest checkpoint that this run wrote or resumed from
    """

    def __init__(
        self, folder: Path, config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, videos: str
    ) -> None:
        self.folder, self.config, self.model, self.optimizer, self.videos = folder, config, model, optimizer, videos
        self.saved_step = 0

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, unless it is there, and delete all but the newest ones. Raises OSError."""
        if step > self.saved_step:
            save_checkpoint(self.folder, step, self.model, self.optimizer, self.config, self.videos)
            prune_checkpoints(self.folder, self.config.log.keep_checkpoints)
            self.saved_step = step


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, videos: str
) -> Path:
    """Write folder/step_<step>.pt: a temporary file, synced to disk, then renamed.

    step     optimiser steps done            videos   fingerprint of the manifest, checked when resuming

    Raises OSError, naming the newest whole checkpoint, where the file cannot be written. Older checkpoints are not
    touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.tmp"):
        left_over.unlink()
    path = folder / f"step_{step:08d}.pt"
    state = {
        "format": FORMAT,
        "step": step,
        "videos": videos,
        "config": to_dict(config),
        "scorer": digest_scorer(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameters": _name_parameters(model, optimizer),
    }
    try:
        with replacing(path, sync=True) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch turns some failed writes into RuntimeError
        kept, reason = newest_checkpoint(folder), error.__context__ if isinstance(error, RuntimeError) else error
        raise OSError(
            f"could not write {path}: {getattr(reason, 'strerror', None) or error}. "
            + (f"{kept} is whole; make room and start again to resume from it" if kept else "no checkpoint was kept")
        ) from error
    return path


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for path in _checkpoints(folder)[:-keep]:
        path.unlink()


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of more than `step` steps, which this run does not resume from, to .old-<n>."""
    newer = [path for path in _checkpoints(folder) if int(path.stem.removeprefix("step_")) > step]
    return [path.rename(free_name(path)) for path in newer]


def free_name(path: Path) -> Path:
    """Return PATH.old-<n> with the first n that is free."""
    numbers = itertools.count(1)
    return next(old for number in numbers if not (old := path.with_name(f"{path.name}.old-{number}")).exists())


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_newest(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Read the newest checkpoint that is whole; return its path (None where there is none), content, and what is wrong.

    Raises DamagedFile where there are checkpoints and none of them is whole.
    """
    problems: list[str] = []
    for path in reversed(_checkpoints(folder)):
        try:
            return path, _read(path), problems
        except DamagedFile as error:
            problems.append(str(error))
    if problems:
        raise DamagedFile(
            f"no checkpoint in {folder} is whole: {'; '.join(problems)}. Start over with --resume never, which keeps "
            "them, or from exported weights with --init-from RUN/hf"
        )
    return None, {}, []


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises FileNotFoundError, or ValueError where the file is not a whole checkpoint; the message then offers the newest
    whole one before it.
    """
    try:
        return _read(path)
    except DamagedFile as error:
        before = [other for other in _checkpoints(path.parent) if other < path]
        if (whole := next(filter(_is_whole, reversed(before)), None)) is None:
            raise
        raise DamagedFile(f"{error}. The checkpoint before it is whole: --resume {whole}") from error


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except ValueError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; expected a file such as RUN/checkpoints/step_00000100.pt")
    state = read_torch_file(path, f"{path} is not a readable checkpoint")
    number = state.get("format", 1) if isinstance(state, dict) else 1
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {number}, but this version of tgmae reads formats up to {FORMAT}; update "
            "tgmae, or start from its weights with --init-from RUN/hf"
        )
    if not isinstance(state, dict) or not {"step", "videos", "config", "model", "optimizer"} <= state.keys():
        raise ValueError(f"{path} is not a tgmae checkpoint")
    if number < 3:
        state["model"] = {f"mae.{name}": weight for name, weight in state["model"].items()}
        state["parameters"] = [[f"mae.{name}" for name in names] for names in state.get("parameters", [])]
    return state


def restore(
    state: dict[str, Any],
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    videos: str,
) -> int:
    """Load a checkpoint's weights and optimiser state; return the steps done.

    Raises ValueError where the network has another shape (naming both) or function, and where clips would come in
    another order than in the run that is resumed.
    """
    had, has = (_learns(one) for one in (state["config"], to_dict(config)))
    if had == has:  # else the message below says more than names of weights
        check_shapes(model.state_dict(), state["model"], str(path))
    old, new = _what_must_stay(state["config"], state["videos"]), _what_must_stay(to_dict(config), videos)
    changed = [f"{name} from {old[name]} to {new[name]}" for name in old if old[name] != new[name]]
    if changed:
        raise ValueError(
            f"cannot resume from {path}, because these have changed: {'; '.join(changed)}. "
            "Start over with --resume never or another --run-dir; with --init-from RUN/hf as well, from its weights"
        )
    # torch assigns the optimiser's state to parameters by their position. Checkpoints once had no names.
    names = _name_parameters(model, optimizer)
    if (state.get("parameters") or names) != names:
        raise ValueError(
            f"cannot resume from {path}: the optimiser's state is in another order than this version of tgmae has the "
            "parameters. Use the version that wrote it, or start from its weights with --init-from RUN/hf"
        )
    model.load_state_dict(state["model"])
    # Weight decay, betas and so on come from this run, not from the checkpoint.
    fresh = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, settings in zip(optimizer.param_groups, fresh, strict=True):
        group.update(settings)
    return int(state["step"])


def _name_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the optimiser's parameters, group by group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def changed_settings(state: dict[str, Any], config: TrainConfig) -> list[str]:
    """Return the settings that differ from those of the run that wrote the checkpoint: "--data.stride 2 → 4".

    A file that decides the masks is among them if its content differs.
    """
    old, new = _flatten(LATER) | _flatten(state["config"]), _flatten(to_dict(config))
    for name in ("format", "resume", "init_from"):  # they say how the settings are written, and where to begin
        new.pop(name)
    changed = [
        f"--{name.replace('_', '-')} {old.get(name)} → {value}" for name, value in new.items() if old.get(name) != value
    ]
    before, now = state.get("scorer", {}), digest_scorer(config)  # checkpoints once had no digests
    return changed + [f"content of --mask.{name}" for name in now if before.get(name, now[name]) != now[name]]


def digest_scorer(config: TrainConfig) -> dict[str, str]:
    """Return a digest of each file that the masks of a run depend on: a student, or the description of score maps."""
    mask = config.mask
    files = {"student": mask.student, "scores": mask.scores and mask.scores / "maps.json"}
    used = {"student": "student", "cached": "scores"}.get(mask.scorer) if mask.kind == "tgm" else None
    return {
        name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for name, path in files.items()
        if name == used and path is not None and path.is_file()
    }


def _what_must_stay(config: dict[str, Any], videos: str) -> dict[str, Any]:
    """Return the settings that decide the network's function and the order of the clips."""
    model = {name: value for name, value in _flatten(config).items() if name.startswith("model.")}
    model.pop("model.attention")
    clips = {"seed": config["seed"], "batch_size": config["batch_size"], "data.repeat": config["data"]["repeat"]}
    return {**model, **clips, **_learns(config), "videos": videos}


def _learns(config: dict[str, Any]) -> dict[str, bool]:
    """Return what a run learns beside the encoder. Configurations once had no losses to choose."""
    loss = LossConfig(**config.get("loss", {}))
    return {"learning a contrastive head": loss.contrasts, "learning a decoder": loss.reconstruction > 0}


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))
