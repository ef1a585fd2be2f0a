"""The values of a command line: tyro converts them, and what it refuses is said in one line."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from itertools import dropwhile, takewhile
from typing import Any, TypeVar

import tyro

from tgmae.cli.parser.flags import Flag, UsageError
from tgmae.cli.parser.help import describe_flag

C = TypeVar("C")


def convert_values(prog: str, command: type[C], default: Any, arguments: Sequence[str], flags: Sequence[Flag]) -> C:
    """Return the command with the values that were typed.

    default  instance whose values the flags change; None for the defaults of the fields
    flags    all flags of the command

    Raises UsageError for values that are missing, of another type or impossible.
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            values: C = tyro.cli(command, prog=prog, default=default, args=arguments)
    except SystemExit as refused:
        raise UsageError(_shorten(_open_box(printed.getvalue()), prog, arguments, flags)) from refused
    sys.stderr.write(printed.getvalue())
    return values


def _open_box(text: str) -> str:
    """Return the first paragraph in tyro's box as one line. Without UTF-8 the box has dashes and no sides."""
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()[1:]]  # without the title
    return " ".join(takewhile(_has_words, dropwhile(lambda line: not _has_words(line), lines)))


def _has_words(line: str) -> bool:
    return bool(line.strip("─-"))


def _shorten(said: str, prog: str, arguments: Sequence[str], flags: Sequence[Flag]) -> str:
    """Say what tyro says in our words, where it speaks of types; our own errors as they are."""
    help_hint = f"({prog} --help lists all flags)"
    if found := re.match(r"(?:Error parsing|(?:Missing value|invalid choice .*) for argument) '?--([\w.-]+)", said):
        flag = next(flag for flag in flags if flag.name == found[1])
        return f"{_find_words(flag, arguments)} cannot be read; expected {describe_flag(flag)}"
    if found := re.match(r"Missing from [^:]+: +(\S+)", said):
        return f"{found[1]} is missing {help_hint}"
    said = re.sub(r"^Error parsing [\w.-]+: ", "", said)
    return said if said.startswith("--") else f"{said[:1].lower()}{said[1:].rstrip('.')} {help_hint}"


def _find_words(flag: Flag, arguments: Sequence[str]) -> str:
    """Return a flag and its values as they were typed last."""
    names = [argument.partition("=")[0].removeprefix("--").replace("_", "-") for argument in arguments]
    place = len(names) - 1 - names[::-1].index(flag.name)
    values = takewhile(lambda argument: not argument.startswith("--"), arguments[place + 1 :])
    return " ".join([arguments[place], *values])
