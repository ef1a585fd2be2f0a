"""Processes for tests, forked from one that has imported torch and tgmae: each starts in a tenth of a second."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from tgmae.cli.train import main

_METHOD = "forkserver"


def forking_context() -> ForkServerContext:
    """Return the context. Its server starts with the first process, once for all tests of a pytest process."""
    context = multiprocessing.get_context(_METHOD)
    context.set_forkserver_preload(["tgmae.train", "tests.support.runs"])
    return context


def places_of_two() -> list[dict[str, str]]:
    """Return what torchrun would put into the environment of each of two processes, which meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": rank, "LOCAL_RANK": rank, **both} for rank in ("0", "1")]


def run_two(function: Callable[[int, str], Any], folder: Path) -> None:
    """Run `function(rank, folder)` in two processes. Raises the exception of the first that fails."""
    forking_context()
    mp.start_processes(function, (str(folder),), nprocs=2, start_method=_METHOD)


class ForkedCommand:
    """A command of tgmae-train in a process of its own that was forked, with what tests use of subprocess.Popen."""

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        """Start it. `arguments` begin with python -m tgmae.cli.train; its output goes to the file `log`."""
        self._log = log
        self._process = forking_context().Process(target=_run_command, args=(arguments[2:], str(log), environment))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return its output, stdout and stderr together, once it has ended."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s: {self._log.read_text()}"
        return self._log.read_text(), ""


def _run_command(arguments: Sequence[str], log: str, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    sys.argv = list(arguments)
    main()
