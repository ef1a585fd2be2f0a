"""The DALI graphs: compressed video to uint8 clips, and one video alone, to find out whether DALI survives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from dali_pipelines.placement import Placement
from dali_pipelines.types import ClipRequest, Video
from dali_pipelines.video.excerpt import cut_excerpt
from dali_pipelines.worker import ClipWorker


def read_samples(worker: ClipWorker, prefetch: int) -> Sequence[Any]:
    """Add to a graph the outputs that workers return for each sample (`ClipWorker.__call__`)."""
    outputs: Sequence[Any] = fn.external_source(
        source=worker, num_outputs=8 + worker.repeat, batch=False, parallel=True, prefetch_queue_depth=prefetch,
        dtype=[types.UINT8, *[types.INT32] * 3, types.FLOAT, types.FLOAT, types.INT32, types.UINT8]
        + [types.UINT8] * worker.repeat,
        ndim=[1, 1, 1, 1, 2, 2, 2, 1] + [4] * worker.repeat, layout=[""] * 8 + ["FHWC"] * worker.repeat,
    )  # fmt: skip
    return outputs


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # DALI is not typed
def _clips(worker: ClipWorker, prefetch: int, use_nvdec: bool, to_gpu: bool) -> tuple[Any, ...]:
    """Build the graph; it returns R times clips uint8 [U, T, S, S, 3], then the error texts on the CPU.

    `if` is a conditional of the graph: each sample takes one of the two branches, and a batch may mix them.
    """
    encoded, frames, order, native, cuts, colours, flips, error, *decoded = read_samples(worker, prefetch)
    if native[0] == 1:
        # DALI decodes the distinct frames of the excerpt. A GPU that does not decode still crops and resizes.
        video = fn.decoders.video(encoded, frames=frames, device="mixed" if use_nvdec else "cpu")
        if to_gpu and not use_nvdec:
            video = video.gpu()
        # Crop, resize and flip are one operator: a negative extent flips.
        clips = [
            fn.resize(
                video, roi_start=cuts[repeat, :2], roi_end=cuts[repeat, 2:4], size=cuts[repeat, 4:],
                interp_type=types.INTERP_LINEAR, antialias=True,
            )
            for repeat in range(worker.repeat)
        ]  # fmt: skip
        # Frames that occur more than once are repeated now, when they are small.
        clips = [fn.sequence_rearrange(clip, new_order=order) for clip in clips]
        # DALI takes all YUV for BT.601: tagged videos get their colours corrected.
        if native[2] == 1:
            clips = [fn.coord_transform(clip, M=colours, dtype=types.UINT8) for clip in clips]
        # Videos that were recorded sideways are turned upright.
        if native[1] == 1:
            clips = [fn.transpose(clip, perm=[0, 2, 1, 3], transpose_layout=False) for clip in clips]
    else:
        # The worker has decoded. Outputs of a parallel source must pass an operator before they leave the graph
        # (DALI 2.1.1, known issues): the flip is that operator, even where nothing is flipped.
        clips = [
            fn.flip(clip.gpu() if to_gpu else clip, vertical=flips[repeat, 0], horizontal=flips[repeat, 1])
            for repeat, clip in enumerate(decoded)
        ]
    return (*clips, fn.copy(error))


def build_clips(worker: ClipWorker, placement: Placement, batch_size: int) -> Any:
    """Build a pipeline that runs the graph. Its worker processes are starting when this returns."""
    pipeline = _clips(
        worker, placement.prefetch, placement.limits is not None, placement.device_id is not None,
        batch_size=batch_size, num_threads=placement.threads, device_id=placement.device_id,
        py_num_workers=placement.workers, py_start_method="spawn",
    )  # fmt: skip
    pipeline.build()
    return pipeline


def decode_alone(file: str, video: Video, request: ClipRequest, placement: Placement) -> str | None:
    """Return why DALI's decoder fails on a clip of a file, or None where it does not.

    Raises NoExcerpt or DecodeError where DALI would never get the file.
    """
    distinct = sorted(set(request.frames))
    excerpt = cut_excerpt(file, video, distinct)
    sample = [excerpt.encoded], [np.array(distinct, np.int32) - excerpt.first]

    @pipeline_def(batch_size=1, num_threads=1, device_id=placement.device_id)  # type: ignore[untyped-decorator]
    def alone() -> Any:
        encoded, frames = fn.external_source(lambda: sample, num_outputs=2, dtype=[types.UINT8, types.INT32])
        return fn.decoders.video(encoded, frames=frames, device="cpu" if placement.limits is None else "mixed")

    try:
        alone().run()
    except RuntimeError as error:
        return short_reason(error)
    return None


def short_reason(error: RuntimeError) -> str:
    """Return DALI's own words, without the pipeline's definition before them and the C++ stack behind them."""
    lines = str(error).split("encountered:")[-1].strip().splitlines()
    return lines[0] if lines else type(error).__name__
