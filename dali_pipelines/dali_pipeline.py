"""The DALI pipeline: compressed video to uint8 clips, on the CPU or the GPU.

    worker processes                                    DALI graph
    cut packets, where DALI decodes on this device ───► decode → crop, resize, flip → transpose ─┐
    decode with PyAV elsewhere, crop, resize ─────────► flip ────────────────────────────────────┴─► [B, T, H, W, 3]

`fn.decoders.video` is the only DALI operator that decodes the samples of a batch in parallel. On a CPU it gets VP8 and
VP9; on a GPU, what NVDEC supports. It does not survive a corrupt file. Workers therefore pass on only files that
have not changed since they were indexed, and a pipeline that dies all the same is rebuilt, with the culprits left to
PyAV (resilient.py).

The threads of one DALI pipeline wait for each other on its single CUDA stream, so several pipelines serve the batches
round-robin.

Dimensions: U decodes per batch, R clips per decode (data.repeat), B = U · R, T frames, S height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from dali_pipelines.config import DecodeConfig
from dali_pipelines.placement import Placement, choose_placement, find_clashes
from dali_pipelines.pyav_pipeline import find_stand_in, replace_skipped
from dali_pipelines.resilient import PipelineSpec, ResilientPipeline
from dali_pipelines.types import BatchSampler, ClipBatch, ClipRequest, CodedFormat, SkippedVideo, VideoTable
from dali_pipelines.video.excerpt import why_no_excerpt
from dali_pipelines.workers.clip_worker import dali_decodes
from dali_pipelines.workers.feed import ClipFeed

_CPU = torch.device("cpu")
_EXCERPTS_TRIED = 16  # videos whose packets are looked at before a run starts


class DaliPipeline:
    """A `ClipPipeline` on DALI.

    videos       the manifest        sampler   gives the requests of batch 0, 1, …
    size         height and width of the clips, in pixels
    first_batch  batch to start from, for resuming
    device       device on which clips come out; `placement` says where videos are decoded for it

    On CUDA a batch may be DALI's own memory, which torch's allocator does not know. Keep it until the work on it is
    done, not merely queued. Raises ValueError where --data.decode asks for what is not there.
    """

    def __init__(
        self, videos: VideoTable, sampler: BatchSampler, config: DecodeConfig, size: int, first_batch: int = 0,
        device: torch.device = _CPU,
    ) -> None:  # fmt: skip
        self.placement = choose_placement(config, device)
        limits = self.placement.limits
        kinds = set(videos.coded())
        clashing = set[CodedFormat]() if limits is None else find_clashes(kinds, limits)
        distrusted = {row for row, coded in enumerate(videos.coded()) if coded in clashing} if clashing else set[int]()
        requests = sampler(first_batch)
        self.span = max(request.frames[-1] - request.frames[0] + 1 for request in requests)
        self.batch = first_batch
        step = self.placement.pipelines
        # A graph that decodes works on two batches at once. One that only flips has nothing to gain from that.
        queue = 2 if any(dali_decodes(coded, limits) for coded in kinds) else 1
        # Each pipeline may be reading what it works on and what it has given out last.
        depth = step * (queue + 1 + self.placement.prefetch)
        self.feed = ClipFeed(
            videos, sampler, size=size, repeat=config.repeat, limits=limits, first_batch=first_batch,
            num_workers=step * self.placement.workers, depth=depth, distrusted=distrusted,
        )  # fmt: skip
        self.spec = PipelineSpec(
            videos=videos, sampler=sampler, size=size, placement=self.placement, queue=queue, feed=self.feed
        )
        self.turns = [
            ResilientPipeline(self.spec, first_batch + place, step) for place in range(step)
        ]  # next one first
        self.is_started = False
        self._copied: tuple[torch.cuda.Event, list[torch.Tensor]] | None = None

    def next_batch(self) -> ClipBatch:
        """Return one batch on the device, in the order of the current stream.

        Raises ValueError where not even PyAV can decode it.
        """
        self._release_copied()
        if not self.is_started:
            for pipeline in self.turns:
                pipeline.start()
            self.is_started = True
        device_id = self.placement.device_id
        stream = None if device_id is None else torch.cuda.current_stream(device_id)
        outputs, prepared = self.turns[0].take(stream)
        self.turns.append(self.turns.pop(0))
        requests = prepared.requests
        self.batch += 1
        clips = [from_dlpack(output.as_tensor()) for output in outputs]
        skipped = tuple(
            SkippedVideo(row=row, path=self.spec.videos[row].name, reason=error)
            for row, error in prepared.errors().items()
        )
        if len(clips) == 1 and not skipped:
            # DALI's executor gives every run new buffers and frees those that nobody holds.
            return ClipBatch(frames=clips[0], requests=requests, videos=self._videos(requests))
        batch = self._copy(clips, requests, skipped)
        if stream is not None:
            self._copied = torch.cuda.Event(), clips  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._copied[0].record(stream)
        return batch

    def _videos(self, requests: tuple[ClipRequest, ...]) -> tuple[Any, ...]:
        return tuple(self.spec.videos[request.row] for request in requests)

    def _copy(
        self, clips: list[torch.Tensor], requests: tuple[ClipRequest, ...], skipped: tuple[SkippedVideo, ...]
    ) -> ClipBatch:
        """R tensors [U, T, S, S, 3] → one batch [U·R, T, S, S, 3], with stand-ins for the clips of skipped videos."""
        if not skipped:
            frames = torch.stack(clips, dim=1).flatten(0, 1)
            return ClipBatch(frames=frames, requests=requests, videos=self._videos(requests))
        rows = {video.row for video in skipped}
        in_turn = [clip[unit] for unit in range(len(clips[0])) for clip in clips]
        readable = [None if request.row in rows else clip for clip, request in zip(in_turn, requests, strict=True)]

        def stand_in() -> tuple[torch.Tensor, ClipRequest]:
            clip, request = find_stand_in(self.spec.videos, self.spec.sampler, self.batch, self.spec.size)
            return clip.to(clips[0].device), request

        return replace_skipped(readable, requests, self.spec.videos, skipped, stand_in)

    def _release_copied(self) -> None:
        """Free what the last batch was copied from once the GPU has copied it: DALI would reuse the memory."""
        if self._copied is not None:
            self._copied[0].synchronize()
            self._copied = None

    def describe(self) -> str:
        """Say where videos are decoded, and why not all of them go to NVDEC."""
        return f"dali, {describe_decoding(self.placement, self.spec.videos, self.span)}"

    def interrupt(self) -> None:
        """End all worker processes, for which a `next_batch` may be waiting."""
        self.feed.close()

    def close(self) -> None:
        """End all worker processes, and free the graphs."""
        self.feed.close()
        self._release_copied()
        for pipeline in self.turns:
            pipeline.pipe = None


def describe_decoding(placement: Placement, videos: VideoTable, span: int) -> str:
    """Say where the videos of a data set are decoded, and why not all of them go to NVDEC.

    span   frames from the first to the last of a clip
    """
    said = placement.describe(videos.coded())
    kinds = placement.native(videos.coded())
    native = [row for row, kind in enumerate(videos.coded()) if kind in kinds] if kinds else []
    # Only the file shows packets that NVDEC must not get, so a few files are tried.
    tried = native[:: max(1, -(-len(native) // _EXCERPTS_TRIED))]
    reasons = [reason for row in tried if (reason := why_no_excerpt(videos.file(row), videos[row], span))]
    if not reasons:
        return said
    listed = ", ".join(sorted(set(reasons)))
    return (
        f"{said}; but {len(reasons)} of {len(tried)} videos tried go to PyAV too ({listed}): "
        "tgmae-data compact fixes that"
    )
