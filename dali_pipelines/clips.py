"""The DALI pipeline: compressed video to uint8 clips, on the CPU or the GPU.

    worker processes (parallel external source)            DALI graph
    read bytes ─── codec DALI decodes on this device ───►  decode → crop + resize ─┐
    └─ other codecs: PyAV decodes, crops and resizes ──────────────────────────────┴─► turn, flip → [B, T, H, W, 3]

`fn.decoders.video` is DALI's only operator that decodes the samples of a batch in parallel. On a CPU it knows VP8, VP9
and MJPEG. It does not survive a broken file, so a worker passes on only what still has the size of its index entry,
and if the pipeline dies all the same it is rebuilt with the culprits left to PyAV.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch.utils.dlpack import from_dlpack

from dali_pipelines.decode import DecodeError, decode_clips
from dali_pipelines.geometry import coded_crop, orientation
from dali_pipelines.reference import find_stand_in, replace_skipped
from tgmae.config import DataConfig
from tgmae.types import BatchPlan, ClipBatch, ClipRequest, SkippedVideo, Video, VideoTable
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
    _planned: tuple[int, tuple[ClipRequest, ...]] = field(default=(-1, ()), repr=False)

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
        """Returns (encoded, frames, native, decoded, crops, turns, error); see `_graph`."""
        batch = self.first_batch + sample.iteration
        if self._planned[0] != batch:
            self._planned = (batch, self.plan(batch))
        start = sample.idx_in_batch * self.repeat
        requests = self._planned[1][start : start + self.repeat]
        row = requests[0].row
        video, file = self.videos[row], self.videos.file(row)

        encoded, decoded, error = _NO_BYTES, _NO_PICTURE, ""
        native = (
            video.codec in NATIVE_CODECS[self.decode] and row not in self.distrusted and _has_indexed_size(file, video)
        )
        try:
            if native:
                encoded = np.fromfile(file, np.uint8)
            else:
                decoded = decode_clips(file, video, requests, self.size).reshape(-1, self.size, self.size, 3)
        except (DecodeError, OSError) as problem:
            native, error = False, str(problem)
            decoded = np.zeros((self.repeat * len(requests[0].frames), self.size, self.size, 3), np.uint8)

        crops, turns = [], []
        for request in requests:
            crop, turn = coded_crop(video, request.crop), orientation(video, request.flip)
            crops.append([crop.y, crop.x, crop.y + crop.height, crop.x + crop.width])
            turns.append([turn.transpose, turn.flip_vertical, turn.flip_horizontal])
        return (
            encoded,
            np.array(requests[0].frames, np.int32),
            np.array([native], np.int32),
            decoded,
            np.array(crops, np.float32),
            np.array(turns, np.int32),
            np.frombuffer(error.encode() or b"\0", np.uint8),
        )


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # DALI is not typed
def _graph(source: ClipSource, num_frames: int, decode: str, prefetch: int) -> tuple[Any, ...]:
    """R = source.repeat outputs of [U, T, size, size, 3], U decodes a batch, then the error texts."""
    encoded, frames, native, decoded, crops, turns, error = fn.external_source(
        source=source, num_outputs=7, batch=False, parallel=True, prefetch_queue_depth=prefetch,
        dtype=[types.UINT8, types.INT32, types.INT32, types.UINT8, types.FLOAT, types.INT32, types.UINT8],
        ndim=[1, 1, 1, 4, 2, 2, 1], layout=["", "", "", "FHWC", "", "", ""],
    )  # fmt: skip
    on_gpu = decode == "gpu"
    clips = []
    if native[0] == 1:
        video = fn.decoders.video(encoded, frames=frames, device="mixed" if on_gpu else "cpu")
        resized = [
            fn.resize(
                video, size=[source.size, source.size], roi_start=crops[repeat, :2], roi_end=crops[repeat, 2:],
                interp_type=types.INTERP_LINEAR, antialias=True,
            )
            for repeat in range(source.repeat)
        ]  # fmt: skip
    else:
        pictures = decoded.gpu() if on_gpu else decoded
        resized = [pictures[repeat * num_frames : (repeat + 1) * num_frames] for repeat in range(source.repeat)]
    for repeat in range(source.repeat):
        clip = resized[repeat]
        if turns[repeat, 0] == 1:
            clip = fn.transpose(clip, perm=[0, 2, 1, 3], transpose_layout=False)
        clips.append(fn.flip(clip, vertical=turns[repeat, 1], horizontal=turns[repeat, 2]))
    # Outputs of a parallel source must pass an operator before they leave the graph (DALI 2.1.1, known issues).
    return (*clips, fn.copy(error))


class DaliPipeline:
    """A `ClipPipeline` on DALI.

    videos       the manifest        plan   the requests of batch 0, 1, …
    size         height and width of the clips, pixels
    first_batch  where to start, for resuming
    device_id    GPU on which frames are decoded and come out; None, or data.decode "cpu", keeps all on the CPU
    """

    def __init__(
        self, videos: VideoTable, plan: BatchPlan, data: DataConfig, size: int, first_batch: int = 0,
        device_id: int | None = None,
    ) -> None:  # fmt: skip
        self.videos, self.plan, self.data, self.size = videos, plan, data, size
        self.device_id = device_id if data.decode != "cpu" else None
        self.batch = first_batch
        self.distrusted: frozenset[int] = frozenset()
        self.failures = 0  # in a row
        self._build()

    def _build(self) -> None:
        decode: Literal["cpu", "gpu"] = "cpu" if self.device_id is None else "gpu"
        requests = self.plan(self.batch)
        source = ClipSource(
            videos=self.videos, plan=self.plan, size=self.size, repeat=self.data.repeat, first_batch=self.batch,
            decode=decode, distrusted=self.distrusted,
        )  # fmt: skip
        self.pipe = _graph(
            source, len(requests[0].frames), decode, self.data.prefetch,
            batch_size=len(requests) // self.data.repeat, num_threads=self.data.num_workers,
            device_id=self.device_id,
            py_num_workers=self.data.num_workers, py_start_method="spawn",
        )  # fmt: skip
        self.pipe.build()

    def next_batch(self) -> ClipBatch:
        """Run one batch: uint8 frames on the device. Raises ValueError where it cannot be decoded, by PyAV either."""
        stream = torch.cuda.current_stream(self.device_id) if self.device_id is not None else None
        try:
            *outputs, errors = self.pipe.run(stream)
            self.failures = 0
        except RuntimeError as error:
            self._recover(error)
            *outputs, errors = self.pipe.run(stream)
        requests = self.plan(self.batch)
        self.batch += 1
        # DALI reuses its buffers in the next run while the loader still holds this batch: hence the copy.
        clips = torch.stack([from_dlpack(output.as_tensor()) for output in outputs], dim=1).flatten(0, 1)
        skipped = []
        for unit in range(len(errors)):
            if text := errors.at(unit).tobytes().strip(b"\0").decode():
                row = requests[unit * self.data.repeat].row
                skipped.append(SkippedVideo(row=row, path=self.videos[row].path, reason=text))
        if not skipped:
            return ClipBatch(frames=clips, requests=requests)
        rows = {video.row for video in skipped}
        readable = [None if request.row in rows else clip for clip, request in zip(clips, requests, strict=True)]

        def stand_in() -> tuple[torch.Tensor, ClipRequest]:
            clip, request = find_stand_in(self.videos, self.plan, self.batch, self.size)
            return clip.to(clips.device), request

        return replace_skipped(readable, requests, tuple(skipped), stand_in)

    def _recover(self, error: RuntimeError) -> None:
        """Rebuild after a file broke DALI's decoder. What PyAV cannot decode either is left to PyAV, which says why.

        Where PyAV decodes the whole batch, that batch is left to it, with a warning. The third failure in a row is an
        error (ValueError), for then it is not about single files.
        """
        self.close()
        rows = {request.row: request for request in self.plan(self.batch)}
        broken = {row for row, request in rows.items() if not _decodes(self.videos, request, self.size)}
        culprits = broken - self.distrusted
        if not culprits:
            self.failures += 1
            if self.failures > 2:
                raise ValueError(
                    f"DALI fails batch after batch where PyAV does not: {error}. "
                    "Choose --data.decode cpu or --pipeline pyav; tgmae-info says what this machine has"
                ) from error
            paths = ", ".join(self.videos[row].path for row in rows)
            warnings.warn(f"DALI failed where PyAV does not: {error}; from now on PyAV decodes {paths}", stacklevel=2)
        self.distrusted |= culprits or rows.keys()
        self._build()

    def close(self) -> None:
        """Stop the worker processes; DALI does so when the pipeline is collected."""
        self.pipe = None


def _has_indexed_size(file: str, video: Video) -> bool:
    """Size but not date: a copy of a data set has new dates."""
    try:
        return os.stat(file).st_size == video.num_bytes
    except OSError:
        return False


def _decodes(videos: VideoTable, request: ClipRequest, size: int) -> bool:
    try:
        decode_clips(videos.file(request.row), videos[request.row], [request], size)
    except DecodeError:
        return False
    return True
