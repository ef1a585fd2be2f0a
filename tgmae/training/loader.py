"""From requests to what a training step needs: clips, masks and text, one batch ahead of the step.

A thread fetches and masks the next batch while the step runs, on its own CUDA stream where there is a GPU. Decoding
happens in the pipeline's worker processes and in DALI's threads, so the thread mostly waits.

Dimensions: B clips, E text embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dali_pipelines.open import open_pipeline
from dali_pipelines.types import ClipBatch, ClipPipeline, SkippedVideo, describe_tensor
from dali_pipelines.workers.serving import holding_signals
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import TrainConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.scorer import BoundScorer
from tgmae.masks.select import select_masks
from tgmae.model.pretraining import Inputs
from tgmae.model.token_masks import TokenMasks
from tgmae.telemetry.stage_clock import StageClock
from tgmae.training.batch_lifetime import BatchLifetime

T = TypeVar("T")
_STOPPING_S = 10  # seconds that a run which was asked to stop waits for a batch


class InputError(ValueError):
    """The next batch cannot be made. The message says why and what to do about it."""


class InputStalled(InputError):
    """The next batch does not come, and the run was asked to stop."""


@dataclass(frozen=True, repr=False)
class TrainingBatch:
    """Clips, their masks and their text, on the training device.

    text      float32 [B, E], L2-normalised: the embedding of the caption that each request drew; None where nothing
              needs it
    captions  int64 [B], equal where the captions are equal; None where `text` is
    """

    clips: ClipBatch
    masks: TokenMasks
    text: Tensor | None
    captions: Tensor | None = None

    @property
    def inputs(self) -> Inputs:
        """What the networks read."""
        return Inputs(self.clips.frames, self.masks, self.text, self.captions)

    def __repr__(self) -> str:
        text = "None" if self.text is None else describe_tensor(self.text)
        return f"TrainingBatch(clips {self.clips!r}, masks {self.masks!r}, text {text})"


def start_input_thread(device: torch.device) -> ThreadPoolExecutor:
    """Start the thread that waits for batches, with `device` as its own.

    A new thread's device is GPU 0. `torch.cuda.stream` restores it at its end, which would open a context there, of
    about 500 MiB, in every process.
    """

    def choose_device() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    return ThreadPoolExecutor(1, "loader", initializer=choose_device)


def wait_for_batch(batch: Future[T], is_stopping: Callable[[], bool]) -> None:
    """Wait until another thread has made a batch.

    Raises InputStalled where it does not come although `is_stopping` has been true for ten seconds.
    """
    patience = _STOPPING_S
    while not wait([batch], timeout=1).done:
        patience -= is_stopping()
        if patience <= 0:
            raise InputStalled("the next batch does not come")


def take_batch(batch: Future[T], is_stopping: Callable[[], bool]) -> T:
    """Return a batch that another thread makes. Raises InputStalled, and InputError where it cannot be made."""
    wait_for_batch(batch, is_stopping)
    try:
        return batch.result()
    except ValueError as error:
        raise InputError(str(error)) from error


class Loader(Iterator[TrainingBatch]):
    """An endless iterator over training batches: `for batch in loader`.

    skipped   videos that could not be read, by row of the manifest; each is named once on the terminal
    clock     times the stages load (waiting for decoded clips), score and mask

    On CUDA the memory of a batch stays valid for all work that is queued on the caller's stream before it asks for the
    next batch.
    """

    def __init__(
        self,
        pipeline: ClipPipeline,
        scorer: BoundScorer,
        mask: MaskConfig,
        model: ModelConfig,
        device: torch.device,
    ) -> None:
        self.pipeline, self.scorer, self.mask, self.model, self.device = pipeline, scorer, mask, model, device
        self.clock = StageClock(device)
        self.skipped: dict[int, SkippedVideo] = {}
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            # The scorer's tensors were put on the device by this thread's stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._lifetime = BatchLifetime(device)
        with holding_signals():  # one that ends a run while the thread starts would leave a thread that nobody ends
            self._thread = start_input_thread(device)
            self._next: Future[TrainingBatch] = self._thread.submit(self._make_batch)

    @property
    def waited_s(self) -> float:
        """Seconds that training has waited for input, in all: a CPU's host, or an idle GPU (`BatchLifetime`)."""
        return self._lifetime.waited_s

    def __next__(self) -> TrainingBatch:
        return self.next_batch()

    def next_batch(self, is_stopping: Callable[[], bool] = lambda: False) -> TrainingBatch:
        """Return the next batch, and start on the one after it. On CUDA the host waits while two passes are queued.

        Raises InputError and InputStalled as `take_batch` does.
        """
        batch = self._lifetime.hand_out(lambda: self._take(is_stopping))
        for video in batch.clips.skipped:
            if video.row not in self.skipped:
                tqdm.write(f"skipped {video.path}: {video.reason}")  # above the progress bar, where there is one
                self.skipped[video.row] = video
        return batch

    def _take(self, is_stopping: Callable[[], bool]) -> TrainingBatch:
        """Wait for the batch that the thread makes, and let it make another one."""
        batch = take_batch(self._next, is_stopping)
        self._next = self._thread.submit(self._make_batch)
        return batch

    def finish_batch(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Wait until the next batch is made. Nobody uses the scorer then. Raises InputStalled as `next_batch` does."""
        wait_for_batch(self._next, is_stopping)

    def close(self) -> None:
        """Stop the pipeline's processes and the thread, which may be waiting for them."""
        self.pipeline.interrupt()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._lifetime.close()
        self.pipeline.close()

    def _make_batch(self) -> TrainingBatch:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            with self.clock("load", host=True):
                clips = self.pipeline.next_batch()
                clips = replace(clips, frames=clips.frames.to(self.device, non_blocking=True))
            with self.clock("score"):
                text, captions = self.scorer.text(clips), self.scorer.caption_numbers(clips)
                scores = self.scorer.score(clips, text)
            with self.clock("mask"):
                batch = TrainingBatch(clips, select_masks(self.mask, self.model, scores), text, captions)
        if self._stream is not None:
            # A batch is done when the GPU is done with it; otherwise the wait would move into the training step,
            # outside `waited_s`. The event blocks, as in BatchLifetime.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            done.record(self._stream)
            done.synchronize()
        return batch


def make_loader(
    config: TrainConfig,
    manifest: Manifest,
    scorer: BoundScorer,
    first_batch: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Make the loader of one process, starting at its batch `first_batch`.

    scorer   scores the patches, and finds the text of the batches (`bind_scorer`)

    Raises ValueError where the pipeline cannot run here.
    """
    pipeline = open_clips(config, manifest, first_batch, device, rank, world_size)
    return Loader(pipeline, scorer, config.mask, config.model, device)


def open_clips(
    config: TrainConfig, manifest: Manifest, first_batch: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> ClipPipeline:
    """Open the pipeline of one process, starting at its batch `first_batch`. Raises ValueError where it cannot run."""
    sampler = ClipSampler(
        manifest=manifest, data=config.data, num_frames=config.model.num_frames,
        batch_size=config.device_batch_size, seed=config.seed, rank=rank, world_size=world_size,
        captions=config.captions,
    )  # fmt: skip
    return open_pipeline(config.pipeline, manifest, sampler, config.data, config.model.image_size, first_batch, device)
