"""Writing a checkpoint together: each process its part of the tensors, by torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from engines.files import flush_to_disk
from tgmae.model.sharded_files import write_header
from tgmae.training.checkpoints.folder import describe_failure, prune_checkpoints, remove_left_overs
from tgmae.training.checkpoints.restore import name_moments, name_tensors


class ShardedWriting:
    """Writes the checkpoints of a run into `folder`, and keeps the newest ones. Every process must make one."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        # Processes agree on plans and ends in a thread, while the training step talks through a group of its own.
        self._group = dist.new_group(backend="gloo")

    def begin(self, header: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Future[None]:
        """Copy this process's part to host memory, and begin to write it. Every process must call it.

        The future is done when the folder step_<step>.dcp is there, and raises OSError, in every process, where one of
        them could not write.
        """
        path = self.folder / f"step_{header['step']:08d}.dcp"
        tensors = name_tensors(model.state_dict(), name_moments(model, optimizer))
        writing = async_save(dict(tensors), storage_writer=_Writer(path, header, self.keep), process_group=self._group)
        assert isinstance(writing, Future)
        done: Future[None] = Future()
        writing.add_done_callback(lambda written: _pass_on(written, done, path))
        return done


def _pass_on(written: Future[Metadata], done: Future[None], path: Path) -> None:
    failure = written.exception()
    if isinstance(failure, CheckpointException):
        rank, (reason, _) = min(failure.failures.items())
        text = f"{getattr(reason, 'strerror', None) or reason} (process {rank})"
        failure = OSError(describe_failure(path, text))
        if dist.get_rank() == 0:  # nobody writes any more
            remove_left_overs(path.parent)
    if failure is None:
        done.set_result(None)
    else:
        done.set_exception(failure)


class _Writer(FileSystemWriter):
    """Writes a folder under a temporary name. The first process names it when all have written their files."""

    def __init__(self, path: Path, header: dict[str, Any], keep: int) -> None:
        super().__init__(path.with_name(f"{path.name}.tmp"))
        self.final, self.header, self.keep = path, header, keep
        self.is_first = False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self.is_first = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder, before any process has a plan that it could write by."""
        if self.is_first:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            remove_left_overs(self.final.parent)
            Path(self.path).mkdir()
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch turns some failed writes into it, whose reason would not reach the others
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the folder, on the first process."""
        super().finish(metadata, results)
        write_header(Path(self.path), self.header)
        Path(self.path).rename(self.final)
        flush_to_disk(self.final.parent)
        prune_checkpoints(self.final.parent, self.keep)

    def storage_meta(self) -> StorageMeta:
        """Return nothing about the place, so that equal states make equal tables."""
        return StorageMeta()
