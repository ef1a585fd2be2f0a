"""The DALI pipeline: compressed video to uint8 clips, on the CPU or the GPU.

    worker processes (parallel external source)            DALI graph
    read bytes ─── codec DALI decodes on this device ───►  decode → crop + resize → turn ─┐
    └─ other codecs: PyAV decodes; crop, resize, turn ────────────────────────────────────┴─► flip → [B, T, H, W, 3]

`fn.decoders.video` is DALI's only operator that decodes the samples of a batch in parallel. On a CPU it knows VP8, VP9
and MJPEG. It does not survive a broken file, so a worker passes on only what still has the size of its index entry,
and if the pipeline dies all the same it is rebuilt with the culprits left to PyAV.

Dimensions: U decodes a batch, R clips from each decode (data.repeat), B = U · R, T frames, S height and width.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.dlpack import from_dlpack

from dali_pipelines.decode import DecodeError, decode_clips
from dali_pipelines.reference import find_stand_in, replace_skipped
from dali_pipelines.source import ClipSource
from tgmae.config import DataConfig
from tgmae.types import BatchPlan, ClipBatch, ClipRequest, SkippedVideo, VideoTable


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # DALI is not typed
def _graph(source: ClipSource, decode: str, prefetch: int) -> tuple[Any, ...]:
    """R times clips uint8 [U, T, S, S, 3], then the error texts."""
    encoded, frames, native, crops, flips, error, *decoded = fn.external_source(
        source=source, num_outputs=6 + source.repeat, batch=False, parallel=True, prefetch_queue_depth=prefetch,
        dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.UINT8]
        + [types.UINT8] * source.repeat,
        ndim=[1, 1, 1, 2, 2, 1] + [4] * source.repeat, layout=[""] * 6 + ["FHWC"] * source.repeat,
    )  # fmt: skip
    on_gpu = decode == "gpu"
    if native[0] == 1:
        video = fn.decoders.video(encoded, frames=frames, device="mixed" if on_gpu else "cpu")
        clips = [
            fn.resize(
                video, size=[source.size, source.size], roi_start=crops[repeat, :2], roi_end=crops[repeat, 2:],
                interp_type=types.INTERP_LINEAR, antialias=True,
            )
            for repeat in range(source.repeat)
        ]  # fmt: skip
        if native[1] == 1:
            clips = [fn.transpose(clip, perm=[0, 2, 1, 3], transpose_layout=False) for clip in clips]
    else:
        clips = [clip.gpu() if on_gpu else clip for clip in decoded]
    # Outputs of a parallel source must pass an operator before they leave the graph (DALI 2.1.1, known issues). For
    # clips the flip is that operator, also where nothing is flipped.
    flipped = [
        fn.flip(clip, vertical=flips[repeat, 0], horizontal=flips[repeat, 1]) for repeat, clip in enumerate(clips)
    ]
    return (*flipped, fn.copy(error))


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
            source, decode, self.data.prefetch,
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
        clips = _as_batch(outputs, copy=self.device_id is not None)
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


def _as_batch(outputs: list[Any], copy: bool) -> torch.Tensor:
    """R outputs of DALI, each [U, T, S, S, 3] → [U·R, T, S, S, 3].

    copy   where a CUDA stream that DALI knows nothing of may still read the memory when Python lets go of it
           (Tensor.record_stream holds back torch's own memory only)
    """
    clips = [from_dlpack(output.as_tensor()) for output in outputs]
    if len(clips) == 1 and not copy:
        return clips[0]  # DALI's executor gives every run new buffers and frees those that nobody holds
    return torch.stack(clips, dim=1).flatten(0, 1)


def _decodes(videos: VideoTable, request: ClipRequest, size: int) -> bool:
    try:
        decode_clips(videos.file(request.row), videos[request.row], [request], size)
    except DecodeError:
        return False
    return True
