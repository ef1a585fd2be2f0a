"""One process or many, as `torchrun` says."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from tqdm import tqdm

from dali_pipelines.workers.endings import PeerLost, noticing_losses
from dali_pipelines.workers.meeting import join_group
from tgmae.telemetry.watch import Phase, Watch


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    store   all processes share it, and
    watch   finds out which of them stalls; None for one process alone
    """

    rank: int
    size: int
    device: torch.device
    store: Store | None = None
    watch: Watch | None = None
    # What was sent last. Gloo's thread may still hold it, and freeing it there alone takes Python's lock, which aborts
    # a process that is just ending.
    _sent: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, on the main process only, and above the progress bar where there is one."""
        if self.is_main:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def note(self, phase: Phase, step: int = 0, forward_pass: int = 0) -> None:
        """Note what this process is doing, for the others to say where it stalls."""
        if self.watch is not None:
            self.watch.note(phase, step, forward_pass)

    def noticing_losses(self) -> AbstractContextManager[None]:
        """Inside the block, the end of another process is a PeerLost."""
        return noticing_losses(self.rank, self.size, self.store)

    def mean(self, value: float) -> float:
        """Return the mean over all processes. Every process must call it."""
        total = torch.tensor(value, dtype=torch.float64)  # on the CPU, so that no GPU has to wait
        if self.size > 1:
            self._keep(total)
            dist.all_reduce(total)
        return float(total) / self.size

    def max(self, *values: int) -> tuple[int, ...]:
        """Return the largest of each value over all processes. Every process must call it."""
        largest = torch.tensor(values, dtype=torch.int64)
        if self.size > 1:
            self._keep(largest)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return tuple(largest.tolist())

    def union(self, numbers: set[int]) -> set[int]:
        """Return the numbers of all processes together. Every process must call it."""
        if self.size == 1:
            return numbers
        gathered: list[set[int]] = [set()] * self.size
        dist.all_gather_object(gathered, numbers)
        return set().union(*gathered)

    def first(self, text: str) -> str:
        """Return the text of the first process that has one. Every process must call it."""
        if self.size == 1:
            return text
        gathered = [""] * self.size
        dist.all_gather_object(gathered, text)
        return next(filter(None, gathered), "")

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def _keep(self, tensor: torch.Tensor) -> None:
        self._sent[:] = [*self._sent[-7:], tensor]


ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def join(device: Literal["auto", "cuda", "cpu"]) -> Iterator[World]:
    """Belong to the process group that torchrun announces, or run alone.

    Inside the block, the end of another process is a PeerLost. Raises ValueError where CUDA or NCCL is missing, and
    ConnectionError where a process does not come.
    """
    chosen = choose_device(device)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(rank=rank, size=size, device=chosen)
        return
    if chosen.type == "cuda" and not dist.is_nccl_available():
        raise ValueError(
            "processes on CUDA devices talk over NCCL, which this build of torch lacks; install a build of torch with "
            "NCCL, or use --device cpu, whose processes talk over gloo"
        )
    store = join_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", rank, size)
    watch = Watch(store, rank, size)
    world = World(rank=rank, size=size, device=chosen, store=store, watch=watch)
    try:
        with world.noticing_losses():
            yield world
    except PeerLost as error:
        watch.give_up(error.reason)  # it finds out which process was lost
        if chosen.type == "cpu":
            dist.destroy_process_group()
        raise
    except BaseException:
        watch.close()
        if chosen.type == "cpu":  # NCCL would wait for processes that may be gone
            dist.destroy_process_group()
        raise
    watch.close()
    gc.collect()  # DistributedDataParallel holds the group
    dist.destroy_process_group()


def choose_device(device: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """Choose the device of this process. Raises ValueError where CUDA is asked for and missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch finds no CUDA device; tgmae-info says why")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", place % torch.cuda.device_count())  # Slurm may show each process only its own
    torch.cuda.set_device(chosen)
    return chosen
