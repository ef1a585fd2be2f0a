"""From requests to what the training step takes: clips and masks, one batch ahead of it.

The next batch is fetched and masked by a thread (on its own CUDA stream where there is a GPU) while the step runs.
Decoding itself happens in the pipeline's worker processes and DALI's threads, so the thread mostly waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from tgmae.config import TrainConfig
from tgmae.manifest import Manifest
from tgmae.masking import plan_masks
from tgmae.sampling import ClipSampler
from tgmae.types import ClipBatch, ClipPipeline, MaskPlan, SkippedVideo, VideoTable


@dataclass(frozen=True)
class TrainingBatch:
    """Clips and their masks, on the training device; `ready` fires once a CUDA stream has filled them."""

    clips: ClipBatch
    plan: MaskPlan
    ready: torch.cuda.Event | None


class Loader:
    """Iterate over training batches; `waited_s` adds up the time `next_batch` kept its caller waiting.

    Videos that could not be read are named once and kept in `skipped`, by row. Raises ValueError once they are more
    than the share `max_skipped` of all.
    """

    def __init__(
        self,
        pipeline: ClipPipeline,
        make_masks: Callable[[ClipBatch], MaskPlan],
        device: torch.device,
        num_videos: int,
        max_skipped: float,
    ) -> None:
        self.pipeline, self.make_masks, self.device = pipeline, make_masks, device
        self.num_videos, self.max_skipped = num_videos, max_skipped
        self.waited_s = 0.0
        self.skipped: dict[int, SkippedVideo] = {}
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: Future[TrainingBatch] = self._thread.submit(self._make_batch)

    def next_batch(self) -> TrainingBatch:
        """The next batch; the one after it is begun at once."""
        started = time.perf_counter()
        batch = self._next.result()
        self._next = self._thread.submit(self._make_batch)
        self._hand_over(batch)
        self.waited_s += time.perf_counter() - started
        self._count_skipped(batch.clips)
        return batch

    def close(self) -> None:
        """Stop the thread and the pipeline's processes."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.pipeline.close()

    def _make_batch(self) -> TrainingBatch:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            clips = self.pipeline.next_batch()
            clips = replace(clips, frames=clips.frames.to(self.device, non_blocking=True))
            plan = self.make_masks(clips)
            return TrainingBatch(clips, plan, self._stream.record_event() if self._stream else None)

    def _hand_over(self, batch: TrainingBatch) -> None:
        """Order the training stream after the loader's, and keep the memory until the former is done with it."""
        if batch.ready is None:
            return
        training_stream = torch.cuda.current_stream(self.device)
        training_stream.wait_event(batch.ready)
        for tensor in (batch.clips.frames, batch.plan.visible, batch.plan.masked):
            tensor.record_stream(training_stream)

    def _count_skipped(self, clips: ClipBatch) -> None:
        for video in clips.skipped:
            if video.row not in self.skipped:
                tqdm.write(f"skipped {video.path}: {video.reason}")  # above the progress bar, where there is one
                self.skipped[video.row] = video
        share = len(self.skipped) / self.num_videos
        if share > self.max_skipped:
            raise ValueError(
                f"{len(self.skipped)} of {self.num_videos} videos could not be read ({share:.1%}, more than "
                f"--data.max-skipped {self.max_skipped:.1%}); index the folder anew. The first:\n"
                + "\n".join(f"  {video.path}: {video.reason}" for video in list(self.skipped.values())[:5])
            )


def make_pipeline(
    config: TrainConfig, videos: VideoTable, plan: ClipSampler, first_batch: int, device: torch.device
) -> ClipPipeline:
    """The pipeline the configuration names. Raises ValueError where it cannot run here."""
    size = config.model.image_size
    if config.pipeline == "pyav":
        from dali_pipelines.reference import ReferencePipeline

        return ReferencePipeline(videos, plan, size, first_batch)
    if config.data.decode == "gpu" and device.type != "cuda":
        raise ValueError("--data.decode gpu needs a CUDA device; choose auto or cpu")
    try:
        from dali_pipelines.clips import DaliPipeline
    except ImportError as error:
        raise ValueError(
            f"--pipeline dali cannot run: {error}. Install it with pip install nvidia-dali-cuda130, "
            "or choose --pipeline pyav"
        ) from error
    return DaliPipeline(videos, plan, config.data, size, first_batch, device.index if device.type == "cuda" else None)


def make_loader(
    config: TrainConfig, manifest: Manifest, first_batch: int, device: torch.device, rank: int, world_size: int
) -> Loader:
    """The loader of one process, from its batch `first_batch` on."""
    plan = ClipSampler(
        manifest=manifest, data=config.data, num_frames=config.model.num_frames,
        batch_size=config.device_batch_size, seed=config.seed, rank=rank, world_size=world_size,
    )  # fmt: skip
    pipeline = make_pipeline(config, manifest, plan, first_batch, device)

    def make_masks(clips: ClipBatch) -> MaskPlan:
        return plan_masks(config.mask, config.model, clips.requests, device)

    return Loader(pipeline, make_masks, device, len(manifest), config.data.max_skipped)
