"""What the worker processes of the DALI pipeline do: read a file, and decode it where DALI cannot.

Workers import this module: it does without torch (1.5 s and 300 MB each).

Dimensions: R clips from a decode (data.repeat), T frames, S height and width.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import types

from dali_pipelines.decode import DecodeError, decode_clips
from dali_pipelines.geometry import coded_crop, orientation
from tgmae.types import BatchPlan, ClipRequest, UnitPlan, Video, VideoTable
from tgmae.workers import end_with_parent

# What fn.decoders.video of DALI 2.4 decodes; the GPU list is from its documentation and has not been run here.
NATIVE_CODECS = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "gpu": frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"}),
}
_NO_PICTURE: NDArray[np.uint8] = np.zeros((1, 1, 1, 3), np.uint8)
_NO_BYTES: NDArray[np.uint8] = np.zeros(1, np.uint8)


@dataclass
class ClipSource:
    """Callback of the parallel external source: one call is one decode, in a worker process."""

    videos: VideoTable
    plan: BatchPlan
    size: int
    repeat: int
    first_batch: int
    decode: Literal["cpu", "gpu"]
    distrusted: frozenset[int]  # rows that DALI must not decode

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrival in a worker process: Ctrl-C and SIGTERM leave it alone, so that the step can finish; it ends with its
        parent.
        """
        self.__dict__.update(state)
        end_with_parent()
        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def __call__(self, sample: types.SampleInfo) -> tuple[NDArray[Any], ...]:
        """One decode for `_graph`.

        Returns
          encoded  uint8: the file's bytes, for DALI to decode, or nothing (one byte)
          frames   int32 [T]: their numbers
          native   int32 [2]: 1 where DALI decodes; 1 where it must then swap rows and columns
          crops    float32 [R, 4]: top, left, bottom, right in the coded picture, for DALI
          flips    int32 [R, 2]: top to bottom, left to right
          error    uint8: why the video could not be read, in UTF-8, or a zero
          decoded  R times uint8 [T, S, S, 3]: clips that want no more than their flips, or nothing (one pixel)
        """
        requests = self._requests(self.first_batch + sample.iteration, sample.idx_in_batch)
        row = requests[0].row
        video, file = self.videos[row], self.videos.file(row)

        encoded, decoded, error = _NO_BYTES, [_NO_PICTURE] * self.repeat, ""
        native = (
            video.codec in NATIVE_CODECS[self.decode] and row not in self.distrusted and _has_indexed_size(file, video)
        )
        turns = [orientation(video, request.flip) for request in requests]
        transpose = turns[0].transpose  # the video's, whatever the flips
        try:
            if native:
                encoded = np.fromfile(file, np.uint8)
            else:
                clips = decode_clips(file, video, requests, self.size)
                decoded = [clip.swapaxes(1, 2) if transpose else clip for clip in clips]
        except (DecodeError, OSError) as problem:
            native, error = False, str(problem)
            decoded = [np.zeros((len(requests[0].frames), self.size, self.size, 3), np.uint8)] * self.repeat

        crops = [coded_crop(video, request.crop) for request in requests]
        return (
            encoded,
            np.array(requests[0].frames, np.int32),
            np.array([native, transpose], np.int32),
            np.array([[crop.y, crop.x, crop.y + crop.height, crop.x + crop.width] for crop in crops], np.float32),
            np.array([[turn.flip_vertical, turn.flip_horizontal] for turn in turns], np.int32),
            np.frombuffer(error.encode() or b"\0", np.uint8),
            *decoded,
        )

    def _requests(self, batch: int, unit: int) -> tuple[ClipRequest, ...]:
        """The requests of one decode."""
        if isinstance(self.plan, UnitPlan):
            return self.plan.unit(batch, unit)
        return self.plan(batch)[unit * self.repeat : (unit + 1) * self.repeat]


def _has_indexed_size(file: str, video: Video) -> bool:
    """Size but not date: a copy of a data set has new dates."""
    try:
        return os.stat(file).st_size == video.num_bytes
    except OSError:
        return False
