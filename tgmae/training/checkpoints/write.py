"""Writing checkpoints: in the background, whole or not at all, the last few kept."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.files import replacing
from tgmae.config.run import TrainConfig
from tgmae.config.saved import to_dict
from tgmae.training.checkpoints.folder import FORMAT, describe_failure, prune_checkpoints, remove_left_overs
from tgmae.training.checkpoints.restore import digest_scorer, name_parameters
from tgmae.training.parallel import ALONE, World
from tgmae.training.sharding import shares_network


class Checkpoints:
    """The checkpoints of one run, in one folder. `save` copies to host memory, and a thread writes the copy.

    videos       fingerprint of the manifest, checked when resuming
    saved_step   the step of the newest checkpoint that this run has begun to write, or resumed from
    takes_all    whether every process must save, because each holds a part of the network; else the main one does
    """

    def __init__(
        self, folder: Path, config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, videos: str,
        world: World = ALONE,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.model, self.optimizer, self.videos = folder, config, model, optimizer, videos
        self.world, self.takes_all = world, shares_network(config, world)
        self.saved_step = self._written_step = 0
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        if self.takes_all:
            from tgmae.training.checkpoints.sharded import ShardedWriting

            self._sharded = ShardedWriting(folder, config.log.keep_checkpoints)

    def resume_from(self, step: int) -> None:
        """Take note of the checkpoint that the run starts from."""
        self.saved_step = self._written_step = step

    def save(self, step: int) -> None:
        """Begin to write the checkpoint of `step`, unless it is there, once the one before is written.

        Every process must call it where `takes_all`. Raises OSError where the one before could not be written.
        """
        self.wait()
        if step <= self.saved_step:
            return
        self.saved_step = step
        if self.takes_all:
            header = describe_run(step, self.model, self.optimizer, self.config, self.videos)
            self._writing = self._sharded.begin(header, self.model, self.optimizer)
        elif self.world.is_main:
            state = make_state(step, self.model, self.optimizer, self.config, self.videos)
            self._writing = self._thread.submit(self._write, step, _copy_to_host(state))

    def wait(self) -> None:
        """Wait until what `save` has begun is on disk. Raises OSError where it is not, as `save_checkpoint` does."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except BaseException:
            self.saved_step = self._written_step
            raise
        self._written_step = self.saved_step

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        _write_file(self.folder / f"step_{step:08d}.pt", state)
        prune_checkpoints(self.folder, self.config.log.keep_checkpoints)


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, videos: str
) -> Path:
    """Write folder/step_<step>.pt: a temporary file, synced to disk, then renamed.

    step     optimiser steps done            videos   fingerprint of the manifest, checked when resuming

    Raises OSError, naming the newest whole checkpoint, where the file cannot be written. Older checkpoints are not
    touched.
    """
    return _write_file(folder / f"step_{step:08d}.pt", make_state(step, model, optimizer, config, videos))


def make_state(
    step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, videos: str
) -> dict[str, Any]:
    """Return what a checkpoint holds. Its tensors are those of network and optimiser, not copies."""
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return describe_run(step, model, optimizer, config, videos) | tensors


def describe_run(
    step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, videos: str
) -> dict[str, Any]:
    """Return what a checkpoint holds besides tensors."""
    return {
        "format": FORMAT,
        "step": step,
        "videos": videos,
        "config": to_dict(config),
        "scorer": digest_scorer(config),
        "parameters": name_parameters(model, optimizer),
    }


def _copy_to_host(state: Any) -> Any:
    """Return a copy of nested dictionaries whose tensors are copies in host memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    return {name: _copy_to_host(part) for name, part in state.items()} if isinstance(state, dict) else state


def _write_file(path: Path, state: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs(path.parent)
    try:
        with replacing(path, sync=True) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch turns some failed writes into RuntimeError
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        raise OSError(describe_failure(path, getattr(reason, "strerror", None) or error)) from error
    return path
