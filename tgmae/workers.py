"""Worker processes that do not outlive their parent. Imports nothing of tgmae."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def make_pool(num_workers: int) -> ProcessPoolExecutor:
    """Spawned workers, so that no lock of this process is copied into one; they end when it is killed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=end_with_parent)


def end_with_parent() -> None:
    """In a worker process: end it when its parent ends, even by kill −9. In any other process: do nothing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
