"""The types that travel from video file to gradient: `Video` → `ClipRequest` → `ClipBatch` → `TokenMasks`.

Shapes and dtypes are checked when an object is made; values are never read, so a check costs no GPU synchronisation.
Dimensions: B clips, T frames, H W pixels, S slots, N patches a slot, V visible tokens, M masked tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

# Decode workers import this module and hold no tensor: they do without torch (1.5 s and 300 MB each).
if TYPE_CHECKING:
    import torch


class CodedFormat(NamedTuple):
    """How a video's pictures are coded; they may lie on their side. Codec and pixel format are FFmpeg's names."""

    codec: str
    pixel_format: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One row of the manifest. `width` and `height` are of the upright picture, after `rotation` is applied."""

    path: str  # relative to the manifest's root, with forward slashes
    num_frames: int
    fps: float
    width: int
    height: int
    codec: str  # FFmpeg's name: h264, vp9, mjpeg, mpeg4, hevc, av1, ...
    pixel_format: str  # FFmpeg's name: yuv420p is 8 bits a sample, chroma at half the width and height
    rotation: int  # degrees clockwise that turn the coded picture upright: 0, 90, 180 or 270
    num_bytes: int
    mtime_ns: int
    keyframes: tuple[int, ...]  # frame numbers at which decoding can start, ascending, in display order; first is 0
    keyframe_pts: tuple[int, ...]  # their presentation time stamps in the stream's time base
    label: str
    captions: tuple[str, ...]
    split: str

    @property
    def coded(self) -> CodedFormat:
        """What a decoder is told."""
        width, height = (self.height, self.width) if self.rotation % 180 else (self.width, self.height)
        return CodedFormat(self.codec, self.pixel_format, width, height)

    def is_file(self, file: str | Path) -> bool:
        """Whether `file` exists with the size and time of change that were indexed."""
        try:
            stat = os.stat(file)
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.num_bytes, self.mtime_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class CropBox:
    """A rectangle in pixels of the upright picture."""

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

    def __str__(self) -> str:
        return f"epoch {self.epoch} position {self.position} row {self.row}"


class BatchSampler(Protocol):
    """The requests of one batch, by batch number. Requests that share a decode stand next to each other."""

    def __call__(self, batch: int, /) -> tuple[ClipRequest, ...]: ...


@runtime_checkable
class UnitSampler(BatchSampler, Protocol):
    """A `BatchSampler` that also plans a single decode of a batch, for workers that need no more of it."""

    def unit(self, batch: int, unit: int, /) -> tuple[ClipRequest, ...]:
        """The requests that share decode number `unit` of the batch."""
        ...


class VideoTable(Protocol):
    """What a pipeline needs of a manifest."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Video: ...
    def file(self, row: int) -> str: ...
    def coded(self) -> Iterator[CodedFormat]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedVideo:
    """A video that could not be decoded when its turn came."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Decoded and augmented clips.

    frames    uint8 [B, T, H, W, 3], RGB, on the pipeline's device
    requests  B requests, in the order of `frames`
    skipped   videos of this batch that could not be read; their places hold copies of clips that could
    """

    frames: torch.Tensor
    requests: tuple[ClipRequest, ...]
    skipped: tuple[SkippedVideo, ...] = ()

    def __post_init__(self) -> None:
        import torch

        if self.frames.dtype != torch.uint8 or self.frames.dim() != 5 or self.frames.shape[-1] != 3:
            raise ValueError(
                f"expected uint8 frames [B, T, H, W, 3], got {self.frames.dtype} {list(self.frames.shape)}"
            )
        if len(self.requests) != self.frames.shape[0]:
            raise ValueError(f"expected {self.frames.shape[0]} requests, one a clip, got {len(self.requests)}")


class ClipPipeline(Protocol):
    """Turns the batches of a `BatchSampler` into `ClipBatch`es, in order. Two exist: DALI and the PyAV reference."""

    def next_batch(self) -> ClipBatch: ...
    def close(self) -> None: ...
