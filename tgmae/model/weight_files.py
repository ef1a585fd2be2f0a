"""Find and read files of weights: one file, a folder of one, a run, or a repository on the Hugging Face hub."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from engines.torch_files import DamagedFile, read_start, read_torch_file
from engines.towers.hub import download, find_file
from tgmae.model.sharded_files import is_sharded_folder, read_header, read_tensors, verify_tensors
from tgmae.model.weights import digest_weights

# What transformers writes, in the order in which it looks for them. An index names the files of large checkpoints.
_INDEX = ".index.json"
_PUBLISHED = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
_DEEPSPEED = "mp_rank_00_model_states.pt"  # the rest of its folder is the optimiser's
_STATE_DICTS = ("model", "module", "state_dict")  # where VideoMAE, DeepSpeed and others put it
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_EXPECTED = (
    f"expected a file of weights ({', '.join(_SUFFIXES)}), a folder with one (model.safetensors or "
    "pytorch_model.bin), a run folder, or a name on the Hugging Face hub such as MCG-NJU/videomae-base"
)


@dataclass(frozen=True, kw_only=True)
class FoundWeights:
    """A state dict as the file has it.

    path    of the file
    model   the run's settings of the network (fields of ModelConfig) where it is a checkpoint of ours, else None
    """

    path: Path
    weights: dict[str, Tensor]
    model: dict[str, Any] | None = None


def find_weights(source: str) -> FoundWeights:
    """Read the weights that `source` names, as the file has them, without running code from it.

    source   a file; a folder in Hugging Face's format, or with one file .pth or .pt; a run folder or its checkpoint, a
             file .pt or a folder .dcp; a repository OWNER/NAME on the Hugging Face hub

    Raises FileNotFoundError, ValueError (DamagedFile among them) or OSError, which say what to give instead.
    """
    path = Path(source)
    if path.is_dir() and not is_sharded_folder(path):
        path = _find_in_folder(path)
    elif not path.exists():
        path = _download(source)
    if path.name.endswith(_INDEX):
        return FoundWeights(path=path, weights=_read_shards(path))
    try:
        return _read_file(path)
    except DamagedFile as error:
        if others := [str(other) for other in _list_checkpoints(path.parent) if other != path]:
            raise DamagedFile(f"{error}. Give another checkpoint of that run: {', '.join(others)}") from error
        raise


def _find_in_folder(folder: Path) -> Path:
    """Return the file of weights in a folder: the newest checkpoint of a run, else what was exported or published."""
    for own in (folder / "checkpoints", folder):
        if steps := _list_checkpoints(own):
            return steps[-1]
    for path in (place / name for place in (folder, folder / "hf") for name in (*_PUBLISHED, _DEEPSPEED)):
        if path.is_file():
            return path
    others = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(path.name for path in others[:5]) + (" …" if len(others) > 5 else "")
        raise ValueError(f"{folder} holds {len(others)} files of weights; name one of them: {names}")
    raise FileNotFoundError(f"{folder} holds no weights; {_EXPECTED}")


def _list_checkpoints(folder: Path) -> list[Path]:
    return sorted(path for end in (".pt", ".dcp") for path in folder.glob("step_" + "[0-9]" * 8 + end))


def _download(name: str) -> Path:
    """Return the file of weights of a repository, with its config.json and shards beside it, in the hub's cache."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(f"there is no file or folder {name}; {_EXPECTED}")
    try:
        weights = find_file(name, _PUBLISHED)
    except ValueError as error:
        raise ValueError(
            f"there is no file or folder {name}, and no such weights could be downloaded: {error}. Without a network, "
            "copy config.json and model.safetensors of the repository to a folder, and give that folder"
        ) from error
    download(name, "config.json")
    path = download(name, weights)
    for shard in _list_shards(path) if weights.endswith(_INDEX) else []:
        download(name, shard)
    return path


def _list_shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(str(Path(name)) for name in names)  # Path refuses what is not a name
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{index} is not a readable index of weights: {error!r}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name in _list_shards(index):
        if not (path := index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there; copy or download it again")
        weights |= _read_file(path).weights
    return weights


def _read_file(path: Path) -> FoundWeights:
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return FoundWeights(path=path, weights=_read_safetensors(path))
    # VideoMAE's own checkpoints hold the arguments of the command that wrote them.
    try:
        found = read_torch_file(path, f"cannot read weights from {path}", (argparse.Namespace,))
    except DamagedFile as error:
        if "pickled" not in str(error):
            raise
        raise DamagedFile(
            f"{error}, which could run code; in the environment that made it, save the weights alone: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
        ) from error
    plain = found if isinstance(found, dict) else {}
    model = None
    if {"step", "model", "config"} <= plain.keys() and isinstance(plain["config"], dict):
        model = settings if isinstance(settings := plain["config"].get("model"), dict) else None
    weights = next((plain[key] for key in _STATE_DICTS if isinstance(plain.get(key), dict)), plain)
    if model is not None and any(name.startswith("mae.") for name in weights):  # beside it a head for contrast
        weights = {name.removeprefix("mae."): weights[name] for name in weights if name.startswith("mae.")}
    if not weights or not all(isinstance(n, str) and isinstance(weight, Tensor) for n, weight in weights.items()):
        raise ValueError(
            f"{path} holds no weights: expected a dictionary of names and tensors, alone or under "
            f"{' or '.join(_STATE_DICTS)}"
        )
    return FoundWeights(path=path, weights=weights, model=model)


def _read_folder(path: Path) -> FoundWeights:
    """Read the autoencoder of a checkpoint that processes wrote together."""
    header = read_header(path)
    verify_tensors(path)
    names = [name for name in header["tensors"] if name.startswith("model.mae.")]
    read = {name: torch.empty_like(header["tensors"][name], device="cpu") for name in names}
    read_tensors(path, read)
    weights = {name.removeprefix("model.mae."): weight for name, weight in read.items()}
    return FoundWeights(path=path, weights=weights, model=header["config"]["model"])


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file. Ours carry a digest, which is compared."""
    try:
        read_start(path)
        weights: dict[str, Tensor] = load_file(path)
        metadata = read_metadata(path)
    except Exception as error:  # safetensors raises exceptions of its own
        raise DamagedFile(f"cannot read weights from {path}: {error}") from error
    if "digest" in metadata and metadata["digest"] != digest_weights(weights):
        raise DamagedFile(f"cannot read weights from {path}: they are damaged (wrong checksum)")
    return weights


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings that a .safetensors file carries besides tensors."""
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        return metadata
