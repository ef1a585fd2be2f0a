"""The readable pipeline: PyAV decodes from frame 0, torch crops, resizes and flips. `clips.py` is compared with it."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from dali_pipelines.types import BatchSampler, ClipBatch, ClipRequest, SkippedVideo, Video, VideoTable
from dali_pipelines.video.decode import DecodeError, decode_frames
from dali_pipelines.video.geometry import coded_crop, orientation
from tgmae.telemetry.nvtx_ranges import named_range


class PyavPipeline:
    """A `ClipPipeline` in one process, without DALI; frames come out on the CPU.

    videos       the manifest        sampler   the requests of batch 0, 1, …
    size         height and width of the clips, pixels
    first_batch  where to start, for resuming
    """

    def __init__(self, videos: VideoTable, sampler: BatchSampler, size: int, first_batch: int = 0) -> None:
        self.videos, self.sampler, self.size = videos, sampler, size
        self.batch = first_batch

    def next_batch(self) -> ClipBatch:
        """Decode the next batch. Raises ValueError where not one of its videos can be read."""
        requests = self.sampler(self.batch)
        clips: list[torch.Tensor | None] = []
        skipped: dict[int, SkippedVideo] = {}
        for request in requests:
            video = self.videos[request.row]
            try:
                clips.append(read_clip(self.videos.file(request.row), video, request, self.size))
            except DecodeError as error:
                skipped[request.row] = SkippedVideo(row=request.row, path=video.path, reason=str(error))
                clips.append(None)
        self.batch += 1
        stand_in = partial(find_stand_in, self.videos, self.sampler, self.batch, self.size)
        return replace_skipped(clips, requests, tuple(skipped.values()), stand_in)

    def close(self) -> None:
        """Nothing is held open."""


@named_range("decode")
def read_clip(file: str, video: Video, request: ClipRequest, size: int) -> torch.Tensor:
    """One clip, uint8 [T, size, size, 3]: crop, antialiased bilinear resize, turn upright, flip. Raises DecodeError."""
    crop, turn = coded_crop(video, request.crop), orientation(video, request.flip)
    resized = {}
    for number, frame in decode_frames(file, video, request.frames, seek=False):
        with named_range("augment"):
            # One thread: the conversion's own are slower than the work they share as soon as cores are busy.
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1))
            picture = picture[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width].permute(2, 0, 1)
            small = F.interpolate(picture[None].float(), (size, size), mode="bilinear", antialias=True)
            resized[number] = small[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    clip = torch.stack([resized[number] for number in request.frames])
    if turn.transpose:
        clip = clip.transpose(1, 2)
    flipped = [dim for dim, flip in ((1, turn.flip_vertical), (2, turn.flip_horizontal)) if flip]
    return clip.flip(flipped).contiguous()


def replace_skipped(
    clips: list[torch.Tensor | None],
    requests: tuple[ClipRequest, ...],
    skipped: tuple[SkippedVideo, ...],
    find_stand_in: Callable[[], tuple[torch.Tensor, ClipRequest]],
) -> ClipBatch:
    """A batch in which every missing clip is a copy of the next one that could be read, under a mask of its own.

    So the batch size never changes. Where nothing could be read, `find_stand_in` gives the clip.
    """
    good = [place for place, clip in enumerate(clips) if clip is not None]
    readable = [(clip, request) for clip, request in zip(clips, requests, strict=True) if clip is not None]
    pool = readable or [find_stand_in()]
    chosen = [pool[bisect_left(good, place) % len(pool)] for place in range(len(clips))]
    frames = torch.stack([clip for clip, _ in chosen])
    copied = tuple(
        replace(copy, mask_seed=request.mask_seed) for (_, copy), request in zip(chosen, requests, strict=True)
    )
    return ClipBatch(frames=frames, requests=copied, skipped=skipped)


def find_stand_in(
    videos: VideoTable, sampler: BatchSampler, next_batch: int, size: int
) -> tuple[torch.Tensor, ClipRequest]:
    """The first clip of the next batches that can be read: a function of the sampler, so that resuming changes nothing.

    Raises ValueError where there is none.
    """
    reasons = []
    for request in itertools.chain.from_iterable(map(sampler, range(next_batch, next_batch + 16))):
        video = videos[request.row]
        try:
            return read_clip(videos.file(request.row), video, request, size), request
        except DecodeError as error:
            reasons.append(f"  {video.path}: {error}")
    raise ValueError("not one video of 16 batches could be read; the first:\n" + "\n".join(reasons[:5]))
