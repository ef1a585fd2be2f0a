"""The processes that share one job, on one machine or several, as torchrun or Slurm's srun started them.

The main process decides what is left to do and holds the locks; the others compute and hand back their results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dali_pipelines.workers.endings import noticing_losses
from dali_pipelines.workers.meeting import find_meeting_point, join_group, read_place

if TYPE_CHECKING:  # torch takes seconds, which one process alone does without
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_PATIENCE = timedelta(days=365)  # of processes that have finished, with those that have not


@dataclass(frozen=True)
class Team:
    """This process among those that share the job.

    group  connects them; None for one process alone, and for one that neither waits for the others nor hears of them
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def divide(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of the main process's `items`: every `size`-th. What others pass is ignored."""
        shares = [list(items[rank :: self.size]) for rank in range(self.size)]
        if self.group is None:
            return shares[self.rank]
        import torch.distributed as dist

        received: list[Any] = [None]
        dist.scatter_object_list(received, shares if self.is_main else None, src=0, group=self.group)
        return list(received[0])

    def collect(self, results: list[T]) -> list[T]:
        """Return the results of all processes on the main one, when all have come here; on the others their own."""
        if self.group is None:
            return results
        import torch.distributed as dist

        gathered: list[list[T]] = [[] for _ in range(self.size)]
        dist.gather_object(results, gathered if self.is_main else None, dst=0, group=self.group)
        return [result for share in gathered for result in share] if self.is_main else results

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in the others, silently: what is wrong for all is said once."""
        if self.is_main:
            yield
            self._wait()
            return
        self._wait()
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield

    def describe(self, work: str) -> str:
        """Return the title of this process's progress bar."""
        return work if self.size == 1 else f"{work}, process {self.rank + 1} of {self.size}"

    def _wait(self) -> None:
        if self.group is not None:
            import torch.distributed as dist

            dist.barrier(self.group)


ALONE = Team()


@contextmanager
def join_team() -> Iterator[Team]:
    """Meet the other processes of the job, if there are any. They leave together, or where one of them fails.

    Inside the block, the end of another process is a PeerLost.
    """
    rank, size = read_place(os.environ)
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    if "RANK" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        if "MASTER_ADDR" not in os.environ:
            address, port = find_meeting_point(os.environ)
            os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    store = join_group("gloo", rank, size)
    try:
        with noticing_losses(rank, size, store):
            # A process that is late to start is missed after half an hour, one that is at work never.
            team = Team(rank, size, dist.new_group(timeout=_PATIENCE))
            yield team
            team._wait()  # torchrun ends a job some minutes after its first machine has nothing left to do
    finally:
        dist.destroy_process_group()
