"""The types that travel from a video file to a batch of clips: `Video` → `ClipRequest` → `ClipBatch`.

Shapes and dtypes are checked when an object is made. Values are never read, so a check costs no GPU synchronisation.
Dimensions: B clips, T frames, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

# Decode workers import this module and hold no tensors: without torch each saves 1.5 s and 300 MB.
if TYPE_CHECKING:
    import torch


class CodedFormat(NamedTuple):
    """The coded format. Width and height are before rotation; codec and pixel format are FFmpeg's names."""

    codec: str
    pixel_format: str
    width: int
    height: int


class Caption(NamedTuple):
    """A text that describes a video."""

    text: str
    source: str  # where it comes from: "csv", "label", "shapes", the name of a captioning model; "" where unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One row of the manifest: a video file, or a segment of one.

    `width` and `height` are after `rotation` is applied. Frame numbers always count from the start of the file.
    """

    path: str  # relative to the manifest's root, with forward slashes
    num_frames: int  # of the whole file
    fps: float
    width: int
    height: int
    codec: str  # FFmpeg's name: h264, vp9, mjpeg, mpeg4, hevc, av1, ...
    pixel_format: str  # FFmpeg's name: yuv420p is 8 bits per sample, chroma at half the width and height
    rotation: int  # clockwise degrees that turn a coded frame upright: 0, 90, 180 or 270
    num_bytes: int
    mtime_ns: int
    keyframes: tuple[int, ...]  # frame numbers at which decoding can start, ascending, in display order; first is 0
    keyframe_pts: tuple[int, ...]  # their presentation time stamps in the stream's time base
    label: str
    captions: tuple[Caption, ...]
    split: str
    stream: int = 0  # number of the stream among the video streams of the file
    mirrored: bool = False  # whether the frame, once turned upright, must also be flipped left to right
    segment: tuple[int, int] | None = None  # first frame, and the frame after the last; None for the whole file
    digest: str = ""  # of the file's content (`video.opening.digest_file`); "" where it is not known
    data_set: int = 0  # number of its data set, in a run that has several

    def __post_init__(self) -> None:
        """Check the segment, and store None where it is the whole file: equal rows have equal names."""
        if self.segment is None:
            return
        if not 0 <= self.start < self.end <= self.num_frames:
            raise ValueError(
                f"expected a segment within the {self.num_frames} frames of {self.path}, got frames {self.start} to "
                f"{self.end}, the last one excluded"
            )
        if self.segment == (0, self.num_frames):
            object.__setattr__(self, "segment", None)

    @property
    def start(self) -> int:
        """The first frame that clips may show."""
        return self.segment[0] if self.segment else 0

    @property
    def end(self) -> int:
        """The frame after the last one that clips may show."""
        return self.segment[1] if self.segment else self.num_frames

    @property
    def length(self) -> int:
        """Number of frames that clips may show."""
        return self.end - self.start

    @property
    def texts(self) -> tuple[str, ...]:
        """The captions without their sources."""
        return tuple(caption.text for caption in self.captions)

    @property
    def name(self) -> str:
        """The row's name, unique within a data set: its path, and for a segment its frames."""
        return self.path if self.segment is None else f"{self.path}#{self.start}-{self.end}"

    @property
    def coded(self) -> CodedFormat:
        """The format that a decoder is told."""
        width, height = (self.height, self.width) if self.rotation % 180 else (self.width, self.height)
        return CodedFormat(self.codec, self.pixel_format, width, height)

    def is_file(self, file: str | Path) -> bool:
        """Return whether `file` exists with the size and modification time that were indexed."""
        try:
            stat = os.stat(file)
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.num_bytes, self.mtime_ns)


def video_from_json(values: dict[str, Any]) -> Video:
    """Rebuild a `Video` from the JSON of `dataclasses.asdict`. Raises TypeError or KeyError for other objects.

    Captions written before they had a source, as plain strings, get the source "".
    """
    lists = {name: tuple(values[name]) for name in ("keyframes", "keyframe_pts")}
    captions = [Caption(found, "") if isinstance(found, str) else Caption(*found) for found in values["captions"]]
    segment = values.get("segment")
    return Video(
        **{
            **values, **lists, "captions": tuple(captions), "segment": None if segment is None else tuple(segment),
        }
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class CropBox:
    """A rectangle in pixels of the upright frame."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """Everything random about one clip. A pure function of (seed, epoch, position); see `tgmae.data.sampling`."""

    row: int  # of the manifest
    epoch: int
    position: int  # within the epoch
    frames: tuple[int, ...]  # T frame numbers, ascending; the last one repeats where the video is too short
    crop: CropBox
    flip: bool
    caption: int  # number of the caption among the video's own; 0 where it has none
    mask_seed: int
    augment_seed: int = 0  # for augmentations that finetuning applies to the decoded clip
    view: int = 0  # number of the view where a video is tested in several

    def __str__(self) -> str:
        return f"epoch {self.epoch} position {self.position} row {self.row}"


class BatchSampler(Protocol):
    """Gives the requests of a batch by its number. Requests that share a decode stand next to each other."""

    def __call__(self, batch: int, /) -> tuple[ClipRequest, ...]: ...


@runtime_checkable
class UnitSampler(BatchSampler, Protocol):
    """A `BatchSampler` that can also give a single decode of a batch, for workers that need no more of it."""

    def unit(self, batch: int, unit: int, /) -> tuple[ClipRequest, ...]:
        """Return the requests that share decode number `unit` of the batch."""
        ...


class VideoTable(Protocol):
    """The part of a manifest that a pipeline needs."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Video: ...
    def file(self, row: int) -> str: ...
    def coded(self) -> Iterator[CodedFormat]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedVideo:
    """A video that could not be decoded when its turn came."""

    row: int
    path: str  # `Video.name`
    reason: str


@dataclass(frozen=True, kw_only=True, repr=False)
class ClipBatch:
    """Decoded and augmented clips.

    frames    uint8 [B, T, H, W, 3], RGB, on the pipeline's device
    requests  B requests, in the order of `frames`
    videos    B rows of the manifest, in the order of `frames`
    skipped   videos of this batch that could not be read; copies of readable clips stand in their places
    """

    frames: torch.Tensor
    requests: tuple[ClipRequest, ...]
    videos: tuple[Video, ...]
    skipped: tuple[SkippedVideo, ...] = ()

    def __post_init__(self) -> None:
        import torch

        if self.frames.dtype != torch.uint8 or self.frames.dim() != 5 or self.frames.shape[-1] != 3:
            raise ValueError(
                f"expected uint8 frames [B, T, H, W, 3], got {self.frames.dtype} {list(self.frames.shape)}"
            )
        for name, items in (("requests", self.requests), ("videos", self.videos)):
            if len(items) != self.frames.shape[0]:
                raise ValueError(f"expected {self.frames.shape[0]} {name}, one per clip, got {len(items)}")

    def __repr__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"ClipBatch(frames {describe_tensor(self.frames)}{skipped})"

    def captions(self) -> list[str]:
        """Return the caption that each request drew; "" for a video that has none."""
        pairs = zip(self.videos, self.requests, strict=True)
        return [video.texts[request.caption] if video.captions else "" for video, request in pairs]


def describe_tensor(tensor: torch.Tensor) -> str:
    """Return dtype, shape and device, such as "uint8 [8, 16, 224, 224, 3] on cuda:0"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


class ClipPipeline(Protocol):
    """Turns the batches of a `BatchSampler` into `ClipBatch`es, in order. Two exist: DALI and the PyAV reference."""

    def next_batch(self) -> ClipBatch: ...

    def describe(self) -> str:
        """Say where videos are decoded, in one line for a run's first lines."""
        ...

    def interrupt(self) -> None:
        """Have a `next_batch` that waits in another thread fail (ValueError). Only `close` may follow."""
        ...

    def close(self) -> None: ...
