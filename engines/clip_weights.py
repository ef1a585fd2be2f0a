"""Where a CLIP's weights come from: a file that may be loaded, a tag, or a repository, and how they were trained."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from engines.config import HUB_PREFIX, CLIPConfig
from engines.towers.hub import find_file

_ZIP = b"PK\x03\x04"  # the first bytes of a zip; only then torch.load takes a file for an archive
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in the order open_clip tries them
_NO_NETWORK = (
    "Without a network, use a file: --clip.weights FILE (an open_clip or OpenAI checkpoint, .pt or .safetensors), "
    "or a folder saved by open_clip: --clip.model FOLDER"
)


@dataclass(frozen=True)
class Training:
    """How weights were trained, which no file of weights says: pixel normalisation per channel, and activation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    quick_gelu: bool

    def describe(self) -> str:
        normalisation = "OpenAI's normalisation" if self.mean == open_clip.OPENAI_DATASET_MEAN else f"mean {self.mean}"
        return f"{normalisation} and {'QuickGELU' if self.quick_gelu else 'GELU'}"


@dataclass(frozen=True)
class Weights:
    """What to tell open_clip.

    name         of the model
    pretrained   tag or file; None where `name` stands for both
    training     None where a configuration beside the weights says it
    is_code      the file is a TorchScript archive, which may be run
    note         what was assumed, "" for nothing
    """

    name: str
    pretrained: str | None = None
    training: Training | None = None
    is_code: bool = False
    note: str = ""


def find_weights(config: CLIPConfig) -> Weights:
    """Find the weights that `config` names.

    Raises ValueError for names that open_clip does not know, for weights that would run code, for those whose training
    is not known, and where the hub does not answer.
    """
    folder = config.folder
    if folder is not None:
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise ValueError(f"{folder} holds no weights (expected open_clip_model.safetensors, as open_clip saves it)")
        return Weights(f"local-dir:{folder}")
    if config.model.startswith(HUB_PREFIX):
        repository = config.model.removeprefix(HUB_PREFIX)
        for files in (("open_clip_config.json",), _HUB_FILES):
            _require_hub(config.model, repository, files)
        return Weights(config.model)
    _check_names(config)
    if Path(config.weights).is_file():
        return _describe_file(config)
    if config.tag is not None:
        raise ValueError(
            f"--clip.tag {config.tag} says how a file of weights was trained, and --clip.weights {config.weights} is "
            "a tag itself; leave out --clip.tag"
        )
    known = open_clip.get_pretrained_cfg(config.model, config.weights)
    repository, _, file = known["hf_hub"].rpartition("/")
    safe = file.rpartition(".")[0] + ".safetensors"
    _require_hub(f"{config.weights!r} of {config.model}", repository, (safe, file) if file else _HUB_FILES)
    return Weights(config.model, config.weights, _read_training(known))


def _check_names(config: CLIPConfig) -> None:
    models = open_clip.list_models()
    if config.model not in models:
        near = difflib.get_close_matches(config.model, models, n=3, cutoff=0.5)
        hub = f"; for a repository on the Hugging Face hub: --clip.model {HUB_PREFIX}{config.model}"
        raise ValueError(
            f"open_clip has no model {config.model!r}{f'; did you mean {chr(32).join(near)}?' if near else ''}"
            f"{hub if config.model.count('/') == 1 and not near else ''} "
            "(--clip.model is an open_clip name, a folder saved by open_clip, or shapes, the demo's tiny CLIP)"
        )
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if config.weights not in tags and not Path(config.weights).is_file():
        raise ValueError(
            f"no weights {config.weights!r} for {config.model}: --clip.weights is neither a file nor one of "
            f"open_clip's tags ({', '.join(tags)})"
        )


# A file: may it be loaded, and how was it trained?


def _describe_file(config: CLIPConfig) -> Weights:
    is_code = _is_torchscript(config.weights)
    is_openais = is_code and _is_openais(config.weights)
    if is_code and not is_openais and not config.trust_code:
        raise ValueError(
            f"{config.weights} is a TorchScript archive, which runs code when it is loaded, and not one that OpenAI "
            "published; use its weights alone (a .safetensors or a state dict), or, if you trust whoever made it, "
            "--clip.trust-code"
        )
    known = {tag: _read_training(open_clip.get_pretrained_cfg(config.model, tag)) for tag in _tags(config.model)}
    trained_alike = set(known.values())
    note = ""
    if is_openais:
        training = Training(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, quick_gelu=True)
    elif config.tag == "default":
        training = _default_training(config.model, is_code)
    elif config.tag is not None and config.tag not in known:
        raise ValueError(
            f"open_clip has no weights {config.tag!r} for {config.model}: --clip.tag is one of {', '.join(known)}, or "
            "default"
        )
    elif config.tag is not None:
        training = known[config.tag]
    elif is_code or len(trained_alike) < 2:
        default = _default_training(config.model, is_code)
        training = default if is_code else next(iter(trained_alike), default)
        note = (
            f"{config.weights} does not say how it was trained; assuming {training.describe()} (--clip.tag names the "
            "tag of these weights, if that is wrong)"
        )
    else:
        raise ValueError(
            f"{config.weights} does not say how it was trained, and weights of {config.model} differ in "
            "normalisation or activation; name open_clip's tag of these weights with --clip.tag "
            f"({', '.join(known)}), or use --clip.tag default for "
            f"{_default_training(config.model, is_code).describe()}"
        )
    return Weights(config.model, config.weights, training, is_code, note)


def _tags(model: str) -> list[str]:
    tags: list[str] = open_clip.list_pretrained_tags_by_model(model)
    return tags


def _read_training(known: dict[str, Any]) -> Training:
    return Training(tuple(known["mean"]), tuple(known["std"]), bool(known.get("quick_gelu")))


def _default_training(model: str, is_code: bool) -> Training:
    """Return open_clip's defaults. TorchScript is the format of OpenAI's own weights, which need QuickGELU."""
    quick_gelu = is_code or bool((open_clip.get_model_config(model) or {}).get("quick_gelu"))
    return Training(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, quick_gelu)


def _is_torchscript(path: str) -> bool:
    """Return whether torch.load would run the file as TorchScript, by its own two conditions.

    zipfile would look for an archive at the end of the file, so that anything could stand before it.
    """
    if path.endswith((".safetensors", ".npz", ".npy")):  # open_clip reads these without torch.load
        return False
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
    with contextlib.suppress(RuntimeError):  # torch says why it cannot read the archive when it loads it
        return "constants.pkl" in torch._C.PyTorchFileReader(path).get_all_records()
    return False


def _is_openais(path: str) -> bool:
    """Return whether this is one of the archives that OpenAI published, whose URLs contain their SHA-256."""
    urls = [open_clip.get_pretrained_url(model, tag) for model, tag in open_clip.list_pretrained()]
    published = {url.split("/")[-2] for url in urls if "openaipublic" in url}
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() in published


# The hub


def _require_hub(weights: str, repository: str, files: tuple[str, ...]) -> None:
    """Raise ValueError, within seconds, unless one of the files is in the hub's cache or can be downloaded."""
    try:
        find_file(repository, files)
    except ValueError as error:
        raise ValueError(f"the weights {weights} could not be downloaded: {error}. {_NO_NETWORK}") from error
