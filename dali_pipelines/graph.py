"""The DALI graphs: compressed video to uint8 clips, and one video alone, to find out whether DALI survives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from dali_pipelines.placement import Placement
from dali_pipelines.types import ClipRequest, Video
from dali_pipelines.video.excerpt import cut_excerpt

Source = Callable[[], tuple[list[NDArray[Any]], ...]]  # `ClipFeed.inputs` of one batch after the other


def read_samples(source: Source, repeat: int) -> Sequence[Any]:
    """Add the inputs to a graph. DALI reads them where they lie, so they must stay until the graph is done."""
    outputs: Sequence[Any] = fn.external_source(
        source=source, num_outputs=7 + repeat, batch=True, no_copy=True,
        dtype=[types.UINT8, *[types.INT32] * 3, types.FLOAT, types.FLOAT, types.INT32] + [types.UINT8] * repeat,
        ndim=[1, 1, 1, 1, 2, 2, 2] + [4] * repeat, layout=[""] * 7 + ["FHWC"] * repeat,
    )  # fmt: skip
    return outputs


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # DALI is not typed
def _clips(source: Source, repeat: int, use_nvdec: bool, to_gpu: bool) -> tuple[Any, ...]:
    """Build the graph; it returns R times clips uint8 [U, T, S, S, 3].

    `if` is a conditional of the graph: each sample takes one of the two branches, and a batch may mix them.
    """
    encoded, frames, order, switches, cuts, colours, flips, *decoded = read_samples(source, repeat)
    if switches[0] == 1:
        # DALI decodes the distinct frames of the excerpt. A GPU that does not decode still crops and resizes.
        video = fn.decoders.video(encoded, frames=frames, device="mixed" if use_nvdec else "cpu")
        if to_gpu and not use_nvdec:
            video = video.gpu()
        # Crop, resize and flip are one operator: a negative extent flips.
        clips = [
            fn.resize(
                video, roi_start=cuts[place, :2], roi_end=cuts[place, 2:4], size=cuts[place, 4:],
                interp_type=types.INTERP_LINEAR, antialias=True,
            )
            for place in range(repeat)
        ]  # fmt: skip
        # Frames that occur more than once are repeated now, when they are small.
        clips = [fn.sequence_rearrange(clip, new_order=order) for clip in clips]
        # DALI takes all YUV for BT.601: tagged videos get their colours corrected.
        if switches[2] == 1:
            clips = [fn.coord_transform(clip, M=colours, dtype=types.UINT8) for clip in clips]
        # Videos that were recorded sideways are turned upright.
        if switches[1] == 1:
            clips = [fn.transpose(clip, perm=[0, 2, 1, 3], transpose_layout=False) for clip in clips]
    else:
        # The worker has decoded. The flip, even where nothing is flipped, copies the clip out of the workers' memory.
        clips = [
            fn.flip(clip.gpu() if to_gpu else clip, vertical=flips[place, 0], horizontal=flips[place, 1])
            for place, clip in enumerate(decoded)
        ]
    return tuple(clips)


def build_clips(source: Source, repeat: int, placement: Placement, batch_size: int, queue: int) -> Any:
    """Build a pipeline that runs the graph, and `queue` batches at once."""
    pipeline = _clips(
        source, repeat, placement.limits is not None, placement.device_id is not None,
        batch_size=batch_size, num_threads=placement.threads, device_id=placement.device_id,
        prefetch_queue_depth=queue,
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
