"""Flags that take one path or several."""

from __future__ import annotations

from pathlib import Path

Paths = Path | tuple[Path, ...]  # several are at least two


def simplify_paths(given: Paths | None, flag: str) -> Paths | None:
    """Return a single path as itself, not as a list of one. Raises ValueError for an empty list."""
    if given == ():
        raise ValueError(f"{flag} needs a path")
    return given[0] if isinstance(given, tuple) and len(given) == 1 else given


def list_paths(given: Paths | None) -> tuple[Path, ...]:
    """Return one path or several as a tuple, empty for None."""
    return given if isinstance(given, tuple) else () if given is None else (given,)


def describe_paths(given: Paths | None) -> str:
    """Return one path or several for a sentence."""
    return " and ".join(map(str, list_paths(given)))
