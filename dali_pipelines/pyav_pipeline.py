"""The reference pipeline: PyAV decodes from frame 0, torch crops, resizes and flips.

It is written to be read. `dali_pipeline.py` is compared with it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import nvtx
import torch
import torch.nn.functional as F

from dali_pipelines.types import BatchSampler, ClipBatch, ClipRequest, SkippedVideo, Video, VideoTable
from dali_pipelines.video.decode import DecodeError, decode_frames, to_rgb
from dali_pipelines.video.geometry import coded_crop, orientation

_STAND_IN_BATCHES = 16  # searched for a readable clip where a whole batch cannot be read


class PyavPipeline:
    """A `ClipPipeline` in one process, without DALI. Frames come out on the CPU.

    videos       the manifest        sampler   gives the requests of batch 0, 1, …
    size         height and width of the clips, in pixels
    first_batch  batch to start from, for resuming
    """

    def __init__(self, videos: VideoTable, sampler: BatchSampler, size: int, first_batch: int = 0) -> None:
        self.videos, self.sampler, self.size = videos, sampler, size
        self.batch = first_batch

    def next_batch(self) -> ClipBatch:
        """Decode the next batch. Raises ValueError where none of its videos, and none of the next, can be read."""
        requests = self.sampler(self.batch)
        clips: list[torch.Tensor | None] = []
        skipped: dict[int, SkippedVideo] = {}
        for request in requests:
            video = self.videos[request.row]
            try:
                clips.append(read_clip(self.videos.file(request.row), video, request, self.size))
            except DecodeError as error:
                skipped[request.row] = SkippedVideo(row=request.row, path=video.name, reason=str(error))
                clips.append(None)
        self.batch += 1
        stand_in = partial(find_stand_in, self.videos, self.sampler, self.batch, self.size)
        return replace_skipped(clips, requests, self.videos, tuple(skipped.values()), stand_in)

    def describe(self) -> str:
        """Say where videos are decoded."""
        return "pyav, decoding on the CPU"

    def interrupt(self) -> None:
        """Do nothing: reading gives up by itself where nothing comes."""

    def close(self) -> None:
        """Do nothing: no file is kept open."""


def read_clip(file: str, video: Video, request: ClipRequest, size: int) -> torch.Tensor:
    """Decode one clip: crop, antialiased bilinear resize, turn upright, flip.

    Returns uint8 [T, size, size, 3]. Raises DecodeError.
    """
    crop, turn = coded_crop(video, request.crop), orientation(video, request.flip)
    resized = {}
    with _stage("decode"):
        for number, frame in decode_frames(file, video, request.frames, seek=False):
            with _stage("augment"):
                rgb = torch.from_numpy(to_rgb(frame))
                rgb = rgb[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width].permute(2, 0, 1)
                small = F.interpolate(rgb[None].float(), (size, size), mode="bilinear", antialias=True)
                resized[number] = small[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    clip = torch.stack([resized[number] for number in request.frames])
    if turn.transpose:
        clip = clip.transpose(1, 2)
    flipped = [dim for dim, flip in ((1, turn.flip_vertical), (2, turn.flip_horizontal)) if flip]
    return clip.flip(flipped).contiguous()


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Name a stage on the timelines of nsys and of torch's profiler."""
    with nvtx.annotate(name, domain="tgmae"), torch.profiler.record_function(name):
        yield


def replace_skipped(
    clips: list[torch.Tensor | None],
    requests: tuple[ClipRequest, ...],
    videos: VideoTable,
    skipped: tuple[SkippedVideo, ...],
    find_stand_in: Callable[[], tuple[torch.Tensor, ClipRequest]],
) -> ClipBatch:
    """Make a batch in which a copy of the next readable clip, with a mask of its own, replaces each missing clip.

    The batch size therefore never changes. Where no clip could be read, `find_stand_in` gives one.
    """
    good = [place for place, clip in enumerate(clips) if clip is not None]
    readable = [(clip, request) for clip, request in zip(clips, requests, strict=True) if clip is not None]
    pool = readable or [find_stand_in()]
    chosen = [pool[bisect_left(good, place) % len(pool)] for place in range(len(clips))]
    frames = torch.stack([clip for clip, _ in chosen])
    copied = tuple(
        replace(copy, mask_seed=request.mask_seed) for (_, copy), request in zip(chosen, requests, strict=True)
    )
    return ClipBatch(
        frames=frames, requests=copied, videos=tuple(videos[request.row] for request in copied), skipped=skipped
    )


def find_stand_in(
    videos: VideoTable, sampler: BatchSampler, next_batch: int, size: int
) -> tuple[torch.Tensor, ClipRequest]:
    """Return the first readable clip of the next batches.

    It depends on the sampler alone, so resuming changes nothing. Raises ValueError where there is none.
    """
    reasons = []
    batches = range(next_batch, next_batch + _STAND_IN_BATCHES)
    for request in itertools.chain.from_iterable(map(sampler, batches)):
        video = videos[request.row]
        try:
            return read_clip(videos.file(request.row), video, request, size), request
        except DecodeError as error:
            reasons.append(f"  {video.name}: {error}")
    raise ValueError(
        f"none of the videos of {_STAND_IN_BATCHES} batches could be read; the first:\n" + "\n".join(reasons[:5])
    )
