"""Save configurations as JSON, and read them again.

A file carries a checksum, and may be edited by hand all the same: it is then said to be no longer as it was written.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engines.files import write_atomically
from engines.sealed import open_fields, seal_fields
from tgmae.config.loss import LossConfig
from tgmae.config.run import TrainConfig

FORMAT = 1  # of to_dict
# Settings that came after the first configurations were saved, and what those meant.
LATER = {
    "clip.tag": None,
    "clip.trust_code": False,
    "data.weights": None,
    "mask.no_motion": "error",
    "parallel": "ddp",
    "activation_checkpointing": False,
    "captions": {"sources": [], "per_video": "all"},
    "loss": dataclasses.asdict(LossConfig()),
    "validation": {"split": "val", "clips": 128, "every": 0.0},
}


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON types."""
    plain = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, default=str))
    assert isinstance(plain, dict)
    return plain


def write_config(config: TrainConfig, path: Path) -> None:
    """Write a configuration atomically."""
    write_atomically(path, (json.dumps(seal_fields(to_dict(config)), indent=2) + "\n").encode())


def read_config(path: Path) -> tuple[TrainConfig, bool]:
    """Read a configuration, and return whether it is as it was written; one without a checksum counts as that.

    Raises FileNotFoundError, or ValueError for a file that is not such a configuration.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no configuration at {path}; expected a file such as RUN/config.json") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a saved configuration: {error}") from error
    plain, is_as_written = open_fields(plain) if isinstance(plain, dict) else (plain, True)
    return from_dict(plain, str(path)), is_as_written


def from_dict(plain: Any, source: str) -> TrainConfig:
    """Return the configuration that `to_dict` made these JSON types of.

    source  the file they were read from, for messages

    Raises ValueError, naming the file and the key, for unknown and missing keys and for values that are impossible.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"{source} is not a saved configuration: expected a JSON object, got {json.dumps(plain)}")
    if (found := plain.get("format", FORMAT)) != FORMAT:
        raise ValueError(
            f"{source} has format {json.dumps(found)}, and this version of tgmae reads format {FORMAT}: use the "
            "version that wrote it, or give its settings as flags"
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
    plain = {name: LATER[prefix + name] for name in names if prefix + name in LATER} | plain
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
        parts = [part for part in inner if part is not NoneType]
        fitting = [part for part in parts if (get_origin(part) is tuple) == isinstance(plain, list)]
        try:
            return _read_value((fitting or parts)[0], plain, name)
        except ValueError as error:
            if len(parts) == 1:
                raise
            kinds = " or ".join(map(_describe_kind, parts))
            raise ValueError(f"{name} must be {kinds}, got {json.dumps(plain)}") from error
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
        if inner[0] is Path:
            return "a list of paths"
        return "a list of numbers" if inner[-1] is Ellipsis else f"a list of {len(inner)} numbers"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path, as a string"}
    return words.get(kind, "a JSON object")
