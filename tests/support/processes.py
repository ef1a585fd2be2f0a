"""Processes for tests, forked from one that has imported torch and tgmae: each starts in a tenth of a second."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

_METHOD = "forkserver"


def forking_context() -> ForkServerContext:
    """Return the context. Its server starts with the first process, once for all tests of a pytest process."""
    context = multiprocessing.get_context(_METHOD)
    context.set_forkserver_preload(["tgmae.train", "tests.support.runs"])
    return context


def run_two(function: Callable[[int, str], Any], folder: Path) -> None:
    """Run `function(rank, folder)` in two processes. Raises the exception of the first that fails."""
    forking_context()
    mp.start_processes(function, (str(folder),), nprocs=2, start_method=_METHOD)
