"""Cores, and worker processes that do not outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

# Signals to a whole job: Ctrl-C, the polite kill, the terminal that closes, and the warning that Slurm sends before a
# time limit. A run saves and stops; its workers leave that to it.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def count_cores() -> int:
    """Return the number of cores that this process may use: under torchrun its share of the machine's, at least one.

    The share is of torchrun's own cores. Where torchrun binds each process to some of them (--numa-binding), those are
    the share, unless several processes are bound to the same ones.
    """
    own, processes = os.sched_getaffinity(0), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1:
        return len(own)
    try:
        every = os.sched_getaffinity(os.getppid())
    except OSError:  # torchrun is out of sight
        every = own
    return max(min(len(own), len(own | every) // processes), 1)


@contextmanager
def hiding_main_module() -> Iterator[None]:
    """Inside the block, processes are spawned that do not import the program's main module.

    multiprocessing has each of them import it, for functions that it may define. A script would then need a guard
    (`if __name__ == "__main__":`), one read from stdin could not run, and all that it imports, such as torch, would be
    imported in every process.
    """
    main = vars(sys.modules["__main__"])
    found: dict[str, Any] = {name: main[name] for name in ("__spec__", "__file__") if name in main}
    main |= dict.fromkeys(found)
    try:
        yield
    finally:
        main |= found


def is_importing_main_module() -> bool:
    """Return whether this is a spawned process that is still importing the main module of its parent."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def make_pool(num_workers: int) -> ProcessPoolExecutor:
    """Start Python's own pool, whose workers end when this process is killed. It does not survive the death of one.

    Workers are spawned, not forked, so that none inherits a lock that is held here.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=end_with_parent)


def end_with_parent() -> None:
    """End this worker process when its parent ends, even by kill −9. Does nothing in any other process."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
