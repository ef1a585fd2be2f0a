"""The help of a command: usage, examples, the flags used most, then all the others by configuration."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tyro

from tgmae.cli.parser.flags import Flag

_INDENT = 30  # column in which help texts begin
_MAX_WIDTH = 110
_NAMES = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}  # as in tyro's error messages


def draw_help(
    usage: str, about: str, examples: Sequence[str], flags: Sequence[Flag], common: Sequence[str], title: str = "flags"
) -> str:
    """Return the help of a command.

    about     what the command does: text whose lines are wrapped
    examples  command lines, each with what it does after "  # "
    common    names of the flags to list first, in that order
    title     heading of the flags without a prefix
    """
    width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
    blocks = [f"usage: {usage}", _wrap(about, width, "")]
    if examples:
        blocks.append("examples:\n" + "\n".join(_draw_example(example) for example in examples))
    positional = [flag for flag in flags if flag.is_positional]
    if positional:
        blocks.append(_draw_flags("arguments:", positional, width))
    first = sorted((flag for flag in flags if flag.name in common), key=lambda flag: common.index(flag.name))
    if first:
        blocks.append(_draw_flags("most used flags:", first, width))
    rest = [flag for flag in flags if not flag.is_positional and flag.name not in common]
    for group, members in groupby(sorted(rest, key=lambda flag: _order(flag, flags)), key=lambda flag: flag.group):
        listed = list(members)
        about = inspect.cleandoc(listed[0].owner.__doc__ or "").partition("\n\n")[0] if group else ""
        heading = f"{group}: {about}" if group else f"{'other ' * bool(first)}{title}:"
        blocks.append(_draw_flags(_wrap(heading, width, ""), listed, width))
    return "\n\n".join(blocks)


def _order(flag: Flag, flags: Sequence[Flag]) -> int:
    """Keep the groups in the order in which they first come, flags without a prefix before all others."""
    return next(place for place, other in enumerate(flags) if other.group == flag.group) + 1 if flag.group else 0


def _draw_example(example: str) -> str:
    command, _, meaning = example.partition("  # ")
    return f"  {command}\n      {meaning}" if meaning else f"  {command}"


def _draw_flags(heading: str, flags: Sequence[Flag], width: int) -> str:
    return "\n".join([heading, *(_draw_flag(flag, width) for flag in flags)])


def _draw_flag(flag: Flag, width: int) -> str:
    head = f"  {describe_flag(flag)}"
    default = describe_default(flag)
    # A table of choices follows the first sentence, and so does the default.
    first, table, rest = flag.help.partition("\n  ")
    text = _wrap(first + f" ({default})" * bool(default) + table + rest, width, " " * _INDENT)
    return f"{head:<{_INDENT}}{text.lstrip()}" if len(head) < _INDENT - 1 else f"{head}\n{text}"


def print_help(text: str) -> None:
    """Print a help text; a reader such as `head` may close the pipe before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends


def _wrap(text: str, width: int, indent: str) -> str:
    """Wrap text. An empty line stays one, and an indented line stays by itself: it is a row of a table."""
    joined: list[str] = []
    for line in text.splitlines():
        if joined and joined[-1] and line and not line.startswith(" ") and not joined[-1].startswith(" "):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    wrapped = []
    for line in joined:
        name = re.match(r" +\S+ {2,}", line)  # what follows the name of a row stays below itself
        hanging = indent + " " * (name.end() if name else 0)
        wrapped += textwrap.wrap(
            line, width, initial_indent=indent, subsequent_indent=hanging, break_on_hyphens=False
        ) or [""]  # fmt: skip
    return "\n".join(wrapped)


def describe_flag(flag: Flag) -> str:
    """Return a flag with a word for its value: "--data.stride INT", "--data.[no-]flip", "MANIFEST"."""
    if flag.is_positional:
        return flag.name.upper().replace("-", "_")
    if flag.is_switch:
        group, dot, last = flag.name.rpartition(".")
        return f"--{group}{dot}[no-]{last}"
    kind = "{" + ",".join(flag.choices) + "}" if flag.choices else _describe_kind(flag.kind)
    return f"--{flag.name} {kind}"


def _describe_kind(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (Union, UnionType):
        several = {get_args(part)[0] for part in inner if get_origin(part) is tuple and get_args(part)[-1] is Ellipsis}
        return "|".join(_describe_kind(part) for part in inner if part is not NoneType and part not in several)
    if origin is tuple:
        first = _describe_kind(inner[0])
        return f"{first} ..." if inner[-1] is Ellipsis else " ".join(map(_describe_kind, inner))
    return _NAMES[kind]


def describe_default(flag: Flag) -> str:
    """Return "default: 4" or "required"; "" for None, which the flag's help explains where it means something."""
    value = flag.value
    if value is tyro.MISSING:
        return "" if flag.is_positional else "required"
    if value is None:
        return ""
    if flag.choices and value not in flag.choices:  # the command does not accept the configuration's default
        return "required"
    if isinstance(value, bool):
        return f"default: {'on' if value else 'off'}"
    if isinstance(value, tuple):
        return f"default: {' '.join(map(str, value))}"
    return f"default: {value}" if value != "" else 'default: ""'
