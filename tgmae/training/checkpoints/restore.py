"""Resuming: what a checkpoint holds goes into network and optimiser, if it is of the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tgmae.config.loss import LossConfig
from tgmae.config.paths import list_paths
from tgmae.config.run import TrainConfig
from tgmae.config.saved import LATER, to_dict
from tgmae.model.sharded_files import read_tensors
from tgmae.model.weights import check_shapes
from tgmae.training.sharding import place_like

Weights = dict[str, Tensor]
Moments = dict[str, dict[str, Tensor]]  # the optimiser's state: name of a parameter → kind → tensor


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
    # Groups, and with them the order, depend on what is sharded. Checkpoints once had no names.
    ours = [name for group in name_parameters(model, optimizer) for name in group]
    theirs = [name for group in state.get("parameters") or [ours] for name in group]
    if sorted(theirs) != sorted(ours):
        differing = sorted({*theirs} ^ {*ours})
        raise ValueError(
            f"cannot resume from {path}: the optimiser's state is of other parameters than this version of tgmae "
            f"trains, {differing[:3]}. Use the version that wrote it, or start from its weights with --init-from RUN/hf"
        )
    moments = {theirs[place]: kinds for place, kinds in state["optimizer"]["state"].items()}
    if path.is_dir():
        weights, moments = _read_parts(path, model, moments)
    else:
        weights, moments = _take_parts(state["model"], model, moments)
    model.load_state_dict(weights)
    # Weight decay, betas and so on come from this run, not from the checkpoint.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": {ours.index(name): kinds for name, kinds in moments.items()}, "param_groups": groups}
    )
    return int(state["step"])


def _read_parts(path: Path, model: nn.Module, moments: Moments) -> tuple[Weights, Moments]:
    """Read from a folder what this process holds of weights and moments, whose kinds and shapes `moments` has."""
    parameters, weights = dict(model.named_parameters()), dict(model.state_dict())
    device = next(iter(weights.values())).device
    own = {
        name: {
            kind: torch.empty_like(parameters[name].detach())
            if one.shape == parameters[name].shape
            else torch.empty_like(one, device=device)
            for kind, one in kinds.items()
        }
        for name, kinds in moments.items()
    }
    read_tensors(path, dict(name_tensors(weights, own)))  # in place
    return weights, own


def _take_parts(weights: Weights, model: nn.Module, moments: Moments) -> tuple[Weights, Moments]:
    """Return what this process holds of whole weights and moments."""
    places = dict(model.state_dict())
    taken = {
        name: {kind: place_like(places[name], one) for kind, one in kinds.items()} for name, kinds in moments.items()
    }
    return {name: place_like(places[name], weight) for name, weight in weights.items()}, taken


def name_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the optimiser's parameters, group by group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def name_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    """Return the optimiser's state of each parameter that has one, by the parameter's name."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def name_tensors(weights: Weights, moments: Moments) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its name in a folder: model.NAME, and optimizer.NAME.KIND such as exp_avg."""
    for name, weight in weights.items():
        yield f"model.{name}", weight
    for name, kinds in moments.items():
        for kind, tensor in kinds.items():
            yield f"optimizer.{name}.{kind}", tensor


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
    files = {
        "student": list_paths(mask.student),
        "scores": tuple(folder / "maps.json" for folder in list_paths(mask.scores)),
    }
    used = {"student": "student", "cached": "scores"}.get(mask.scorer) if mask.kind == "tgm" else None
    return {
        name: hashlib.blake2b(b"".join(path.read_bytes() for path in paths), digest_size=16).hexdigest()
        for name, paths in files.items()
        if name == used and paths and all(path.is_file() for path in paths)
    }


def _what_must_stay(config: dict[str, Any], videos: str) -> dict[str, Any]:
    """Return the settings that decide the network's function and the order of the clips."""
    model = {name: value for name, value in _flatten(config).items() if name.startswith("model.")}
    model.pop("model.attention")
    clips = {"seed": config["seed"], "batch_size": config["batch_size"], "data.repeat": config["data"]["repeat"]}
    clips["data.weights"] = config["data"].get("weights")
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
