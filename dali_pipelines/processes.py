"""Worker processes that do not outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar, cast

Result = TypeVar("Result")


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def make_pool(num_workers: int) -> ProcessPoolExecutor:
    """Start a pool whose workers end when this process is killed.

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


def map_in_workers(work: Callable[[int], Result], rows: list[int], num_workers: int) -> Iterator[Result]:
    """Yield work(row) for each of `rows`, in order, computed a few rows ahead in worker processes.

    `work` is sent to each process once. With no workers it runs in this process.
    """
    from torch.utils.data import DataLoader, Dataset

    num_workers = min(num_workers, len(rows))  # a finished folder starts none
    return iter(
        DataLoader(
            cast("Dataset[Result]", _Rows(work, rows)), batch_size=None, num_workers=num_workers, collate_fn=_unchanged,
            multiprocessing_context="spawn" if num_workers else None, worker_init_fn=_start_worker,
        )
    )  # fmt: skip


class _Rows:
    def __init__(self, work: Callable[[int], Any], rows: list[int]) -> None:
        self.work, self.rows = work, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.work(self.rows[place])


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    end_with_parent()
