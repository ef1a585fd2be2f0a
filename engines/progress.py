"""Progress: a bar on a terminal, and lines where the output goes to a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar, overload

from tqdm import tqdm

_EVERY_S = 10.0  # from one line to the next
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
T = TypeVar("T")


def shows_bars() -> bool:
    """Return whether stderr is a terminal on which tqdm draws: one without a size (docker run -dt) stays empty."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).lines > 0
    except OSError:
        return True


@overload
def progress_bar(iterable: None = None, **options: Any) -> tqdm[None]: ...
@overload
def progress_bar(iterable: Iterable[T], **options: Any) -> tqdm[T]: ...
def progress_bar(iterable: Iterable[T] | None = None, **options: Any) -> tqdm[Any]:
    """Return tqdm's bar; without a terminal to show it, one that prints a line every ten seconds and at its end.

    options   of tqdm, such as total, desc, unit and disable
    """
    if shows_bars():
        return tqdm(iterable, **options)
    return _Lines(iterable, mininterval=_EVERY_S, bar_format=_LINE, **options)


class _Lines(tqdm):  # type: ignore[type-arg]  # tqdm is generic for type checkers only
    """A bar that never returns to the start of its line."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line."""
        if line := str(self) if msg is None else msg:
            self.fp.write(line + "\n")
            self.fp.flush()

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Print a line, unless tqdm only wants to draw the bar again below a message: it then holds the lock."""
        if not nolock:
            super().refresh(nolock, lock_args)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set what the next line ends with."""
        super().set_postfix_str(s, refresh=False)

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: a message is a line among lines."""

    def close(self) -> None:
        """Print the last line."""
        if not self.disable:
            self.display()
        self.leave = False
        super().close()
