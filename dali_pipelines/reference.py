"""The readable pipeline: PyAV decodes from frame 0, torch crops, resizes and flips. `clips.py` is compared with it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from dali_pipelines.decode import DecodeError, decode_frames
from dali_pipelines.geometry import coded_crop, orientation
from tgmae.types import BatchPlan, ClipBatch, ClipRequest, SkippedVideo, Video, VideoTable, describe_skipped


class ReferencePipeline:
    """A `ClipPipeline` in one process, without DALI; frames come out on the CPU.

    videos       the manifest        plan   the requests of batch 0, 1, …
    size         height and width of the clips, pixels
    first_batch  where to start, for resuming
    """

    def __init__(self, videos: VideoTable, plan: BatchPlan, size: int, first_batch: int = 0) -> None:
        self.videos, self.plan, self.size = videos, plan, size
        self.batch = first_batch

    def next_batch(self) -> ClipBatch:
        """Decode the next batch. Raises ValueError where not one of its videos can be read."""
        requests = self.plan(self.batch)
        self.batch += 1
        clips: list[torch.Tensor | None] = []
        skipped: dict[int, SkippedVideo] = {}
        for request in requests:
            video = self.videos[request.row]
            try:
                clips.append(read_clip(self.videos.file(request.row), video, request, self.size))
            except DecodeError as error:
                skipped[request.row] = SkippedVideo(row=request.row, path=video.path, reason=str(error))
                clips.append(None)
        return replace_skipped(clips, requests, tuple(skipped.values()))

    def close(self) -> None:
        """Nothing is held open."""


def read_clip(file: str, video: Video, request: ClipRequest, size: int) -> torch.Tensor:
    """One clip, uint8 [T, size, size, 3]: crop, antialiased bilinear resize, turn upright, flip. Raises DecodeError."""
    crop, turn = coded_crop(video, request.crop), orientation(video, request.flip)
    resized = {}
    for number, frame in decode_frames(file, video, request.frames, seek=False):
        picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
        picture = picture[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width].permute(2, 0, 1)
        small = F.interpolate(picture[None].float(), (size, size), mode="bilinear", antialias=True)
        resized[number] = small[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    clip = torch.stack([resized[number] for number in request.frames])
    if turn.transpose:
        clip = clip.transpose(1, 2)
    flipped = [dim for dim, flip in ((1, turn.flip_vertical), (2, turn.flip_horizontal)) if flip]
    return clip.flip(flipped).contiguous()


def replace_skipped(
    clips: list[torch.Tensor | None], requests: tuple[ClipRequest, ...], skipped: tuple[SkippedVideo, ...]
) -> ClipBatch:
    """A batch in which every missing clip is a copy of the next one that could be read, under a mask of its own.

    So the batch size never changes. Raises ValueError where nothing could be read.
    """
    good = [place for place, clip in enumerate(clips) if clip is not None]
    if not good:
        raise ValueError(f"not one video of this batch could be read:\n{describe_skipped(skipped)}")
    places = [min(good, key=lambda other: (other - place) % len(clips)) for place in range(len(clips))]
    frames = torch.stack([clips[place] for place in places])  # type: ignore[misc]
    copied = tuple(
        replace(requests[place], mask_seed=request.mask_seed) for place, request in zip(places, requests, strict=True)
    )
    return ClipBatch(frames=frames, requests=copied, skipped=skipped)
