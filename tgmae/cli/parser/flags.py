"""The flags of a command: which exist, what they are called, what they hold, and which were typed.

tyro parses and converts the values. This module knows the names, so that a command can offer part of a configuration,
refuse a flag that it does not read, and suggest the flag that was meant.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from engines.config import CLIPConfig
from tgmae.config.captions import CaptionsConfig
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig, TrainConfig

# A command with `READS` offers those fields of these configurations that it names. All other fields are always offered.
_SHARED = (InputConfig, DataConfig, CaptionsConfig, ModelConfig, MaskConfig, CLIPConfig)


class UsageError(ValueError):
    """What was typed is not a valid command line. The exit code is 2, as for the errors that tyro finds."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag, or a positional argument.

    name     as typed, without the dashes: "data.num-workers"
    kind     type of the value
    value    default, or the value in a parsed command; tyro.MISSING where there is no default
    owner    dataclass that has the field
    choices  what the command accepts, where that is less than its kind says
    """

    name: str
    kind: Any
    value: Any
    owner: type
    is_positional: bool
    choices: tuple[str, ...] | None = None

    @property
    def group(self) -> str:
        """The part of the name before the dot: "data", or "" for a flag without a prefix."""
        return self.name.rpartition(".")[0]

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value, such as --data.flip and --data.no-flip."""
        return self.kind is bool

    @property
    def help(self) -> str:
        """The comment of the field, with its line breaks; "" without one.

        Rows of its table that explain choices the command does not accept are left out.
        """
        field = self.name.rpartition(".")[2].replace("-", "_")
        for owner in self.owner.__mro__:
            if dataclasses.is_dataclass(owner) and (text := _read_comments(owner).get(field)):
                refused = set(get_args(self.kind)) - set(self.choices) if self.choices else set()
                lines = text.split("\n")
                return "\n".join(line for line in lines if line[:2] != "  " or line.split()[0] not in refused)
        return ""


def list_flags(command: type, values: Any = None) -> list[Flag]:
    """Return the flags of a command, with the values of an instance or, without one, the defaults of the fields."""
    reads: Collection[str] | None = getattr(command, "READS", None)
    choices: Mapping[str, tuple[str, ...]] = getattr(command, "CHOICES", {})
    return [
        dataclasses.replace(flag, choices=choices.get(flag.name))
        for flag in _walk(command, values, "")
        if reads is None or flag.owner not in _SHARED or flag.name in reads
    ]


def _walk(config: type, values: Any, prefix: str) -> Iterator[Flag]:
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        kind, marks = hints[field.name], list[Any]()
        if get_origin(kind) is Annotated:
            kind, *marks = get_args(kind)
        value = _find_default(field) if values is None else getattr(values, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            is_flat = any(getattr(mark, "name", None) == "" for mark in marks)  # tyro.conf.arg(name="")
            yield from _walk(kind, None if value is tyro.MISSING else value, prefix if is_flat else f"{name}.")
        else:
            is_positional = tyro.conf.Positional in marks
            yield Flag(name=name, kind=kind, value=value, owner=config, is_positional=is_positional)


def _find_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is MISSING else field.default


@functools.cache
def _read_comments(config: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass: behind it, or else in the lines directly above it."""
    source = textwrap.dedent(inspect.getsource(config))
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string[1:].removeprefix(" ") for token in tokens if token.type == tokenize.COMMENT
    }
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        assert node.end_lineno is not None
        first = node.lineno
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        above = "\n".join(comments[number] for number in range(first, node.lineno))
        found[node.target.id] = comments.get(node.end_lineno, above)
    return found


def find_typed(
    prog: str, arguments: Sequence[str], flags: Sequence[Flag], hints: Mapping[str, str] | None = None
) -> list[Flag]:
    """Return which of a command's flags were typed, in the order of typing.

    hints  what to do instead of typing a flag that the command does not read

    Raises UsageError for any other flag: one that this command does not read, or one that does not exist.
    """
    named = {flag.name: flag for flag in flags if not flag.is_positional}
    typed = []
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            word = argument.partition("=")[0].removeprefix("--")
            name = word.replace("_", "-")
            flag = named.get(name) or _find_negated(name, named)
            if flag is None:
                raise UsageError(_describe_unknown(prog, word, flags, hints or {}))
            value = argument.partition("=")[2] or next(iter(arguments[place + 1 :]), "")
            if flag.choices is not None and value in get_args(flag.kind) and value not in flag.choices:
                raise UsageError(f"{prog} does not accept --{name} {value}; use {' or '.join(flag.choices)}")
            typed.append(flag)
    return typed


def _find_negated(name: str, named: dict[str, Flag]) -> Flag | None:
    """Return the switch that --no-compile or --data.no-flip turns off."""
    group, dot, last = name.rpartition(".")
    flag = named.get(f"{group}{dot}{last.removeprefix('no-')}")
    return flag if flag is not None and flag.is_switch else None


def _describe_unknown(prog: str, word: str, flags: Sequence[Flag], hints: Mapping[str, str]) -> str:
    name = word.replace("_", "-")
    if name in hints:
        return f"--{word} is not a flag of {prog}: {hints[name]}"
    if any(name == flag.name for flag in _walk(TrainConfig, None, "")):
        return f"--{word} is not a flag of {prog}, which does not read it; leave it out"
    near = find_nearest(name, [flag.name for flag in flags if not flag.is_positional])
    meant = f"; did you mean {' or '.join(f'--{flag}' for flag in near)}?" if near else ""
    return f"there is no flag --{word}{meant} ({prog} --help lists all flags)"


def find_nearest(name: str, names: Sequence[str]) -> list[str]:
    """Return those of `names` that differ from `name` in a prefix such as "data." only, or those spelt most alike."""
    last = name.rpartition(".")[2]
    lasts = [other.rpartition(".")[2] for other in names]
    same = [other for other, end in zip(names, lasts, strict=True) if end == last]
    near = _find_alike(last, lasts)
    return same or _find_alike(name, names) or [other for other, end in zip(names, lasts, strict=True) if end in near]


def _find_alike(name: str, names: Sequence[str]) -> list[str]:
    """Return the nearest of `names`, and those that are about as near."""
    near = difflib.get_close_matches(name, names, n=3)
    ratios = [difflib.SequenceMatcher(None, other, name).ratio() for other in near]
    return [other for other, ratio in zip(near, ratios, strict=True) if ratio > max(ratios) - 0.02]
