"""From requests to what the training step takes: clips and masks, one batch ahead of it.

The next batch is fetched and masked by a thread (on its own CUDA stream where there is a GPU) while the step runs.
Placement itself happens in the pipeline's worker processes and DALI's threads, so the thread mostly waits.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tqdm import tqdm

from dali_pipelines.types import ClipBatch, ClipPipeline, SkippedVideo, VideoTable
from tgmae.config import InputConfig, TrainConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.config import MaskConfig
from tgmae.masks.scorer import Scorer
from tgmae.masks.select import select_masks
from tgmae.model.config import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.telemetry.stage_clock import StageClock
from tgmae.training.batch_lifetime import BatchLifetime


@dataclass(frozen=True)
class TrainingBatch:
    """Clips and their masks, on the training device."""

    clips: ClipBatch
    masks: TokenMasks


class Loader:
    """Iterate over training batches; `waited_s` adds up the time `next_batch` kept its caller waiting.

    On CUDA a batch's memory is safe for work that is queued on the caller's stream before it asks for the next batch.
    Videos that could not be read are named once and kept in `skipped`, by row. `clock` times the stages load (waiting
    for decoded clips), score and mask.
    """

    def __init__(
        self, pipeline: ClipPipeline, scorer: Scorer, mask: MaskConfig, model: ModelConfig, device: torch.device
    ) -> None:
        self.pipeline, self.scorer, self.mask, self.model, self.device = pipeline, scorer, mask, model, device
        self.clock = StageClock(device)
        self.waited_s = 0.0
        self.skipped: dict[int, SkippedVideo] = {}
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            # What the scorer holds was put on the device by this thread's stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._handover = BatchLifetime(self._record_event)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: Future[TrainingBatch] = self._thread.submit(self._make_batch)

    def next_batch(self) -> TrainingBatch:
        """The next batch; the one after it is begun at once."""
        started = time.perf_counter()
        batch = self._next.result()
        self._next = self._thread.submit(self._make_batch)
        self.waited_s += time.perf_counter() - started
        if self._stream is not None:
            self._handover.hand_out(batch)
        for video in batch.clips.skipped:
            if video.row not in self.skipped:
                tqdm.write(f"skipped {video.path}: {video.reason}")  # above the progress bar, where there is one
                self.skipped[video.row] = video
        return batch

    def close(self) -> None:
        """Stop the thread and the pipeline's processes."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._handover.close()
        self.pipeline.close()

    def _record_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _make_batch(self) -> TrainingBatch:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            with self.clock("load", host=True):
                clips = self.pipeline.next_batch()
                clips = replace(clips, frames=clips.frames.to(self.device, non_blocking=True))
            with self.clock("score"):
                scores = self.scorer(clips)
            with self.clock("mask"):
                batch = TrainingBatch(clips, select_masks(self.mask, self.model, scores))
        if self._stream is not None:
            # Done means done on the GPU too: or the wait would hide in the training step, outside `waited_s`. Blocking:
            # the thread sleeps, instead of spinning on a core that the decoders need.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            done.record(self._stream)
            done.synchronize()
        return batch


def make_pipeline(
    config: InputConfig,
    kind: Literal["dali", "pyav"],
    videos: VideoTable,
    sampler: ClipSampler,
    first_batch: int,
    device: torch.device,
) -> ClipPipeline:
    """The pipeline of a kind. Raises ValueError where it cannot run here."""
    size = config.model.image_size
    if kind == "pyav":
        if config.data.decode == "gpu":
            raise ValueError("--pipeline pyav decodes on the CPU: take --pipeline dali, or leave out --data.decode gpu")
        from dali_pipelines.pyav_pipeline import PyavPipeline

        return PyavPipeline(videos, sampler, size, first_batch)
    try:
        from dali_pipelines.dali_pipeline import DaliPipeline
    except ImportError as error:
        raise ValueError(
            f"--pipeline dali cannot run: {error}. Install it with pip install nvidia-dali-cuda130, "
            "or choose --pipeline pyav"
        ) from error
    return DaliPipeline(videos, sampler, config.data, size, first_batch, device)


def make_loader(
    config: TrainConfig,
    manifest: Manifest,
    scorer: Scorer,
    first_batch: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """The loader of one process, from its batch `first_batch` on."""
    sampler = ClipSampler(
        manifest=manifest, data=config.data, num_frames=config.model.num_frames,
        batch_size=config.device_batch_size, seed=config.seed, rank=rank, world_size=world_size,
    )  # fmt: skip
    pipeline = make_pipeline(config, config.pipeline, manifest, sampler, first_batch, device)
    return Loader(pipeline, scorer, config.mask, config.model, device)
