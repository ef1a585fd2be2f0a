"""The work of a decode worker: read a file, and decode it where DALI cannot.

Workers import this module. It does without torch, which would cost each of them 1.5 s and 300 MB.

Dimensions: R clips per decode (data.repeat), T frames, D distinct frames, S height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.nvdec import CodecLimits
from dali_pipelines.types import BatchSampler, ClipRequest, CodedFormat, UnitSampler, VideoTable
from dali_pipelines.video.colours import colour_matrix
from dali_pipelines.video.decode import DecodeError, decode_clips
from dali_pipelines.video.excerpt import NoExcerpt, cut_excerpt
from dali_pipelines.video.geometry import Orientation, coded_crop, orientation

# The codecs that fn.decoders.video of DALI 2.4 decodes on a CPU, without MJPEG: a damaged one may crash the process.
CPU_CODECS = frozenset({"vp8", "vp9"})
NVDEC_FORMATS = frozenset({"yuv420p", "yuvj420p"})  # 8 bits, 4:2:0: the formats that `CodecLimits` describes
_NO_COLOURS = np.eye(3, dtype=np.float32)


def dali_decodes(coded: CodedFormat, limits: Mapping[str, CodecLimits] | None) -> bool:
    """Return whether videos of this format go to DALI's decoder rather than to PyAV.

    limits   what NVDEC can decode; None where DALI decodes on the CPU, which accepts frames of any size
    """
    if limits is None:
        return coded.codec in CPU_CODECS
    fits = coded.codec in limits and limits[coded.codec].fit(coded.width, coded.height)
    return fits and coded.pixel_format in NVDEC_FORMATS


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One decode, ready for the graph (`graph._clips`).

    num_bytes  size of an excerpt of the file for DALI to decode; 0 where the worker has decoded
    encoded    that excerpt, uint8; None where it lies in the decode's part of the ring
    frames     int32 [D]: numbers, in the excerpt, of the distinct frames; DALI would start over for a repeated one
    order      int32 [T]: which of these each frame of the clip is
    transpose  whether DALI, where it decodes, must then swap rows and columns
    cuts       float32 [R, 6], where DALI decodes: top, left, bottom, right in the coded frame; then the height and
               width that this becomes, negative where it is flipped
    colours    float32 [3, 3]: a matrix for red, green and blue (`colour_matrix`), where DALI decodes; None for none
    flips      int32 [R, 2], where the worker decodes: top to bottom, left to right
    error      why the video could not be read; "" where it could
    """

    num_bytes: int
    encoded: NDArray[np.uint8] | None
    frames: NDArray[np.int32]
    order: NDArray[np.int32]
    transpose: bool
    cuts: NDArray[np.float32]
    colours: NDArray[np.float32] | None
    flips: NDArray[np.int32]
    error: str

    @property
    def is_native(self) -> bool:
        """Whether DALI decodes."""
        return self.num_bytes > 0

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Return frames, order, switches, cuts, colours and flips as the graph takes them.

        switches   int32 [3]: 1 where DALI decodes; where it must then transpose; where it must then correct colours
        """
        switches = np.array([self.is_native, self.transpose, self.colours is not None], np.int32)
        colours = _NO_COLOURS if self.colours is None else self.colours
        return self.frames, self.order, switches, self.cuts, colours, self.flips


@dataclass(frozen=True, kw_only=True)
class ClipWorker:
    """The work of the pool: a task is one decode of one batch.

    limits   what NVDEC can decode; None where DALI decodes on the CPU
    shape    of the ring: slots, U, R, T, S, S, 3; batch b has slot b % slots
    """

    videos: VideoTable
    sampler: BatchSampler
    limits: Mapping[str, CodecLimits] | None
    shape: tuple[int, ...]

    def number(self, batch: int, unit: int, is_trusted: bool) -> int:
        """Return the task of a batch's decode; see `split`."""
        return (batch * self.shape[1] + unit) * 2 + is_trusted

    def split(self, task: int) -> tuple[int, int, bool]:
        """Return a task's batch and decode, and whether DALI may decode it."""
        place, is_trusted = divmod(task, 2)
        return *divmod(place, self.shape[1]), bool(is_trusted)

    def __call__(self, task: int, room: memoryview) -> Prepared:
        """Do one decode. Its pixels or, if they fit, the bytes of its excerpt go to its part of the ring."""
        batch, unit, is_trusted = self.split(task)
        ring: NDArray[np.uint8] = np.frombuffer(room, np.uint8).reshape(self.shape)
        into = ring[batch % self.shape[0], unit]
        prepared = self.prepare(self._requests(batch, unit), is_trusted, into)
        if prepared.encoded is not None and prepared.num_bytes <= into.size:
            into.reshape(-1)[: prepared.num_bytes] = prepared.encoded
            prepared = replace(prepared, encoded=None)
        return prepared

    def prepare(self, requests: tuple[ClipRequest, ...], is_trusted: bool, into: NDArray[np.uint8]) -> Prepared:
        """Cut an excerpt for DALI, or decode `requests`, which share their frames, into `into`, uint8 [R, T, S, S, 3].

        An error becomes a text, and the clips are black.
        """
        row, frames = requests[0].row, requests[0].frames
        video, file, distinct = self.videos[row], self.videos.file(row), sorted(set(frames))
        try:
            if is_trusted and self.is_native(row):
                try:
                    encoded, first, space = cut_excerpt(file, video, distinct)
                    return self._describe(requests, "", encoded, first, colour_matrix(space))
                except NoExcerpt:
                    pass
            clips = decode_clips(file, video, requests, into.shape[-2])
        except (DecodeError, OSError) as problem:
            return self.give_up(requests, str(problem), into)
        # Only the flip can differ in how the clips of a decode are turned upright.
        transpose = orientation(video, requests[0].flip).transpose
        into[:] = clips.swapaxes(2, 3) if transpose else clips
        return self._describe(requests)

    def give_up(self, requests: tuple[ClipRequest, ...], error: str, into: NDArray[np.uint8]) -> Prepared:
        """Return black clips with the reason."""
        into[:] = 0
        return self._describe(requests, error)

    def _describe(
        self, requests: tuple[ClipRequest, ...], error: str = "", encoded: NDArray[np.uint8] | None = None,
        first: int = 0, colours: NDArray[np.float32] | None = None,
    ) -> Prepared:  # fmt: skip
        video, frames, size = self.videos[requests[0].row], requests[0].frames, self.shape[-2]
        distinct = sorted(set(frames))
        turns = [orientation(video, request.flip) for request in requests]
        crops = [coded_crop(video, request.crop) for request in requests]
        cuts = [
            [crop.y, crop.x, crop.y + crop.height, crop.x + crop.width, *_extents(turn, size)]
            for crop, turn in zip(crops, turns, strict=True)
        ]
        return Prepared(
            num_bytes=0 if encoded is None else len(encoded),
            encoded=encoded,
            frames=np.array(distinct, np.int32) - first,
            order=np.searchsorted(distinct, frames).astype(np.int32),
            transpose=turns[0].transpose,
            cuts=np.array(cuts, np.float32),
            colours=colours,
            flips=np.array([[turn.flip_vertical, turn.flip_horizontal] for turn in turns], np.int32),
            error=error,
        )

    def is_native(self, row: int) -> bool:
        """Return whether DALI decodes a video, provided that an excerpt of it can be cut."""
        return dali_decodes(self.videos[row].coded, self.limits)

    def _requests(self, batch: int, unit: int) -> tuple[ClipRequest, ...]:
        """Return the requests of one decode."""
        if isinstance(self.sampler, UnitSampler):
            return self.sampler.unit(batch, unit)
        repeat = self.shape[2]
        return self.sampler(batch)[unit * repeat : (unit + 1) * repeat]


def _extents(turn: Orientation, size: int) -> tuple[int, int]:
    """Return height and width of a clip before it is transposed, negative where fn.resize must flip it.

    An `Orientation` flips what is already transposed.
    """
    vertical, horizontal = turn.flip_vertical, turn.flip_horizontal
    if turn.transpose:
        vertical, horizontal = horizontal, vertical
    return -size if vertical else size, -size if horizontal else size
