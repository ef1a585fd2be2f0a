"""Cores, and worker processes that do not outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

# Signals to a whole job: Ctrl-C, the polite kill, the terminal that closes, and the warning that Slurm sends before a
# time limit. A run saves and stops; its workers leave that to it.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


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
