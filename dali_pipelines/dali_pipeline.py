"""The DALI pipeline: compressed video to uint8 clips, on the CPU or the GPU.

    worker processes (parallel external source)          DALI graph
    cut packets ── what DALI decodes on this device ───► decode → crop, resize, flip → turn ─┐
    └─ the rest: PyAV decodes; crop, resize, turn ─────► flip ───────────────────────────────┴─► [B, T, H, W, 3]

`fn.decoders.video` is DALI's only operator that decodes the samples of a batch in parallel. On a CPU it is given
VP8 and VP9, on a GPU what NVDEC takes. It does not survive a broken file, so a worker passes on only what still has the
size of its index entry, and if the pipeline dies all the same it is rebuilt with the culprits left to PyAV (lane.py).

Its threads wait for each other on the pipeline's one CUDA stream, so several pipelines take turns with the batches.

Dimensions: U decodes a batch, R clips from each decode (data.repeat), B = U · R, T frames, S height and width.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from dali_pipelines.placement import Placement, choose_placement, find_clashes
from dali_pipelines.pyav_pipeline import find_stand_in, replace_skipped
from dali_pipelines.resilient import Job, ResilientPipeline
from dali_pipelines.types import BatchSampler, ClipBatch, ClipRequest, CodedFormat, SkippedVideo, VideoTable
from tgmae.data.config import DataConfig

_CPU = torch.device("cpu")
_SHARED_MEMORY = "/dev/shm"
_UNDER_WAY = 2  # batches of a pipeline besides those that its workers run ahead


class DaliPipeline:
    """A `ClipPipeline` on DALI.

    videos       the manifest        sampler   the requests of batch 0, 1, …
    size         height and width of the clips, pixels
    first_batch  where to start, for resuming
    device       where clips come out; the `decoding` that is chosen for it says where videos are decoded

    On CUDA a batch may be DALI's own memory, of which torch's allocator knows nothing: keep it until the work on it is
    done, not merely queued.

    Raises ValueError where --data.decode asks for what is not there.
    """

    def __init__(
        self, videos: VideoTable, sampler: BatchSampler, data: DataConfig, size: int, first_batch: int = 0,
        device: torch.device = _CPU,
    ) -> None:  # fmt: skip
        self.placement = choose_placement(data, device)
        limits = self.placement.limits
        clashing = set[CodedFormat]() if limits is None else find_clashes(videos.coded(), limits)
        distrusted = {row for row, coded in enumerate(videos.coded()) if coded in clashing} if clashing else set[int]()
        self.job = Job(
            videos=videos,
            sampler=sampler,
            size=size,
            repeat=data.repeat,
            placement=self.placement,
            distrusted=distrusted,
        )
        requests = sampler(first_batch)
        _check_shared_memory(len(requests) * len(requests[0].frames) * 3 * size**2, self.placement)
        self.batch = first_batch
        step = self.placement.pipelines
        self.lanes = [
            ResilientPipeline(self.job, first_batch + place, step) for place in range(step)
        ]  # next batch first
        self.is_started = False
        self._copied: tuple[torch.cuda.Event, list[torch.Tensor]] | None = None

    def next_batch(self) -> ClipBatch:
        """One batch on the device, in the order of the current stream.

        Raises ValueError where it cannot be decoded, by PyAV either.
        """
        self._let_go()
        if not self.is_started:
            for lane in self.lanes:
                lane.start()
            self.is_started = True
        device_id = self.placement.device_id
        stream = None if device_id is None else torch.cuda.current_stream(device_id)
        *outputs, errors = self.lanes[0].take(stream)
        self.lanes.append(self.lanes.pop(0))
        requests = self.job.sampler(self.batch)
        self.batch += 1
        clips = [from_dlpack(output.as_tensor()) for output in outputs]
        skipped = self._read_errors(errors, requests)
        if len(clips) == 1 and not skipped:
            # DALI's executor gives every run new buffers and frees those that nobody holds.
            return ClipBatch(frames=clips[0], requests=requests)
        batch = self._copy(clips, requests, skipped)
        if stream is not None:
            self._copied = torch.cuda.Event(), clips  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._copied[0].record(stream)
        return batch

    def _copy(
        self, clips: list[torch.Tensor], requests: tuple[ClipRequest, ...], skipped: tuple[SkippedVideo, ...]
    ) -> ClipBatch:
        """R tensors [U, T, S, S, 3] as one batch [U·R, T, S, S, 3], with stand-ins for the clips of skipped videos."""
        if not skipped:
            return ClipBatch(frames=torch.stack(clips, dim=1).flatten(0, 1), requests=requests)
        rows = {video.row for video in skipped}
        in_turn = [clip[unit] for unit in range(len(clips[0])) for clip in clips]
        readable = [None if request.row in rows else clip for clip, request in zip(in_turn, requests, strict=True)]

        def stand_in() -> tuple[torch.Tensor, ClipRequest]:
            clip, request = find_stand_in(self.job.videos, self.job.sampler, self.batch, self.job.size)
            return clip.to(clips[0].device), request

        return replace_skipped(readable, requests, skipped, stand_in)

    def _read_errors(self, errors: Any, requests: tuple[ClipRequest, ...]) -> tuple[SkippedVideo, ...]:
        skipped = []
        for unit in range(len(errors)):
            if text := errors.at(unit).tobytes().strip(b"\0").decode():
                row = requests[unit * self.job.repeat].row
                skipped.append(SkippedVideo(row=row, path=self.job.videos[row].path, reason=text))
        return tuple(skipped)

    def _let_go(self) -> None:
        """Free what the last batch was copied from, when the GPU has copied it: DALI would use the memory again."""
        if self._copied is not None:
            self._copied[0].synchronize()
            self._copied = None

    def close(self) -> None:
        """Stop all worker processes."""
        self._let_go()
        for lane in self.lanes:
            lane.close()


def _check_shared_memory(batch_bytes: int, placement: Placement) -> None:
    """Warn where the workers may not have room for the clips that they decode: they would die of it without a word."""
    room = os.statvfs(_SHARED_MEMORY)
    batches = placement.pipelines * (placement.prefetch + _UNDER_WAY) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free, needed = room.f_bavail * room.f_frsize, batches * batch_bytes
    if free < needed:
        warnings.warn(
            f"{_SHARED_MEMORY} has {free >> 20:,} MiB free, and through it DALI's workers hand over what they decode, "
            f"up to {needed >> 20:,} MiB. Give a container more (docker run --shm-size={-(-needed >> 30)}g), or take "
            "--pipeline pyav",
            stacklevel=3,
        )
