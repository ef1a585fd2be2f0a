"""The work of a DALI worker process: read a file, and decode it where DALI cannot.

Workers import this module. It does without torch, which would cost each of them 1.5 s and 300 MB.

Dimensions: R clips per decode (data.repeat), T frames, D distinct frames, S height and width.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.nvdec import CodecLimits
from dali_pipelines.processes import end_with_parent
from dali_pipelines.types import BatchSampler, ClipRequest, CodedFormat, UnitSampler, Video, VideoTable
from dali_pipelines.video.colours import colour_matrix
from dali_pipelines.video.decode import DecodeError, decode_clips
from dali_pipelines.video.excerpt import NoExcerpt, cut_excerpt
from dali_pipelines.video.geometry import Orientation, coded_crop, orientation

if TYPE_CHECKING:  # `dali_decodes` must also work where DALI is not installed
    from nvidia.dali import types

# The codecs that fn.decoders.video of DALI 2.4 decodes on a CPU, without MJPEG: a damaged one may crash the process.
CPU_CODECS = frozenset({"vp8", "vp9"})
NVDEC_FORMATS = frozenset({"yuv420p", "yuvj420p"})  # 8 bits, 4:2:0: the formats that `CodecLimits` describes
_NO_FRAME: NDArray[np.uint8] = np.zeros((1, 1, 1, 3), np.uint8)
_NO_BYTES: NDArray[np.uint8] = np.zeros(1, np.uint8)


def dali_decodes(coded: CodedFormat, limits: Mapping[str, CodecLimits] | None) -> bool:
    """Return whether videos of this format go to DALI's decoder rather than to PyAV.

    limits   what NVDEC can decode; None where DALI decodes on the CPU, which accepts frames of any size
    """
    if limits is None:
        return coded.codec in CPU_CODECS
    fits = coded.codec in limits and limits[coded.codec].fit(coded.width, coded.height)
    return fits and coded.pixel_format in NVDEC_FORMATS


@dataclass
class ClipWorker:
    """Callback of the parallel external source: one call is one decode, in a worker process.

    first_batch, step   the batches are first_batch, first_batch + step, first_batch + 2 · step, …
    """

    videos: VideoTable
    sampler: BatchSampler
    size: int
    repeat: int
    limits: Mapping[str, CodecLimits] | None  # what NVDEC can decode; None where DALI decodes on the CPU
    first_batch: int
    step: int
    distrusted: frozenset[int]  # rows that DALI must not decode

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in a worker process: ignore what asks to stop, so that a step can finish, and end with the parent."""
        self.__dict__.update(state)
        end_with_parent()
        if multiprocessing.parent_process() is not None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)

    def __call__(self, sample: types.SampleInfo) -> tuple[NDArray[Any], ...]:
        """Do one decode for the graph (`graph._clips`).

        Returns
          encoded  uint8: an excerpt of the file for DALI to decode, or nothing (one byte)
          frames   int32 [D]: numbers, in the excerpt, of the distinct frames; DALI would start over for a repeated one
          order    int32 [T]: which of these each frame of the clip is
          native   int32 [3]: 1 where DALI decodes; 1 where it must then swap rows and columns; 1 where it must then
                   apply `colours`
          cuts     float32 [R, 6], where DALI decodes: top, left, bottom, right in the coded frame; then the height and
                   width that this becomes, negative where it is flipped
          colours  float32 [3, 3]: a matrix for red, green and blue (`colour_matrix`)
          flips    int32 [R, 2], where the worker decodes: top to bottom, left to right
          error    uint8: why the video could not be read, in UTF-8, or a zero
          decoded  R times uint8 [T, S, S, 3]: clips that need no more than their flips, or nothing (one pixel)
        """
        requests = self._requests(self.first_batch + sample.iteration * self.step, sample.idx_in_batch)
        row = requests[0].row
        video, file = self.videos[row], self.videos.file(row)

        # All requests of a decode share their frames, and only the flip can differ in how clips are turned upright.
        encoded, decoded, error = _NO_BYTES, [_NO_FRAME] * self.repeat, ""
        native, frames = self.is_native(row), requests[0].frames
        distinct, first, colours = sorted(set(frames)), 0, None
        turns = [orientation(video, request.flip) for request in requests]
        transpose = turns[0].transpose

        # Either DALI gets an excerpt, or the clips are decoded here. An error becomes a text, and the clips are black.
        try:
            if native:
                try:
                    encoded, first, space = cut_excerpt(file, video, distinct)
                    colours = colour_matrix(space)
                except NoExcerpt:
                    native = False
            if not native:
                clips = decode_clips(file, video, requests, self.size)
                decoded = [clip.swapaxes(1, 2) if transpose else clip for clip in clips]
        except (DecodeError, OSError) as problem:
            native, error = False, str(problem)
            decoded = [np.zeros((len(frames), self.size, self.size, 3), np.uint8)] * self.repeat

        crops = [coded_crop(video, request.crop) for request in requests]
        cuts = [
            [crop.y, crop.x, crop.y + crop.height, crop.x + crop.width, *_extents(turn, self.size)]
            for crop, turn in zip(crops, turns, strict=True)
        ]
        return (
            encoded,
            np.array(distinct, np.int32) - first,
            np.searchsorted(distinct, frames).astype(np.int32),
            np.array([native, transpose, colours is not None], np.int32),
            np.array(cuts, np.float32),
            np.eye(3, dtype=np.float32) if colours is None else colours,
            np.array([[turn.flip_vertical, turn.flip_horizontal] for turn in turns], np.int32),
            np.frombuffer(error.encode() or b"\0", np.uint8),
            *decoded,
        )

    def is_native(self, row: int) -> bool:
        """Return whether DALI decodes a video, provided that its file is still the one that was indexed."""
        video = self.videos[row]
        return (
            row not in self.distrusted
            and dali_decodes(video.coded, self.limits)
            and _has_indexed_size(self.videos.file(row), video)
        )

    def _requests(self, batch: int, unit: int) -> tuple[ClipRequest, ...]:
        """Return the requests of one decode."""
        if isinstance(self.sampler, UnitSampler):
            return self.sampler.unit(batch, unit)
        return self.sampler(batch)[unit * self.repeat : (unit + 1) * self.repeat]


def _extents(turn: Orientation, size: int) -> tuple[int, int]:
    """Return height and width of a clip before it is transposed, negative where fn.resize must flip it.

    An `Orientation` flips what is already transposed.
    """
    vertical, horizontal = turn.flip_vertical, turn.flip_horizontal
    if turn.transpose:
        vertical, horizontal = horizontal, vertical
    return -size if vertical else size, -size if horizontal else size


def _has_indexed_size(file: str, video: Video) -> bool:
    """Compare the size but not the date: a copy of a data set has new dates."""
    try:
        return os.stat(file).st_size == video.num_bytes
    except OSError:
        return False
