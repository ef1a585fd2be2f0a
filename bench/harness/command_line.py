"""The command line of a benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

Options = TypeVar("Options")


def command_name() -> str:
    """Return the module that is running, as `python -m` takes it: bench.loader."""
    script = Path(sys.argv[0])
    return f"bench.{script.parent.name if script.stem == '__main__' else script.stem}"


def run_from_shell(run: Callable[[Options], None], options: type[Options], description: str | None) -> None:
    """Parse the command line and run. An error that the user can fix ends with one line and exit status 1."""
    try:
        given = tyro.cli(options, prog=f"python -m {command_name()}", description=description)
        _keep_from_workers()  # only now: tyro reads the program's file for its help
        run(given)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"{command_name()}: {error}")


def _keep_from_workers() -> None:
    """Let worker processes start without the benchmark's own module, with which each would import torch: 800 MB.

    multiprocessing imports a program's main module again in every spawned worker, unless that has neither a spec nor a
    file. Whatever a benchmark sends to workers is therefore defined in another module.
    """
    main = sys.modules["__main__"]
    if main.__spec__ is not None and main.__spec__.name.partition(".")[0] == "bench":
        main.__spec__ = None
        del main.__file__


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters; its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
