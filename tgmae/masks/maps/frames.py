"""Frames for score maps: whole frames, resized so that a patch covers a cell of the map, decoded by worker processes.

Workers import this module, so it does without CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.types import Video
from dali_pipelines.video.decode import DecodeError, decode_whole_frames
from dali_pipelines.workers.pool import Death, map_in_workers
from tgmae.data.manifest import Manifest


def grid_of(video: Video, cells: int) -> tuple[int, int]:
    """Return rows and columns of a video's maps: `cells` along the short side, and cells as square as possible."""
    return _grid(video.width, video.height, cells)


def shapes_of(manifest: Manifest, cells: int, every: int) -> list[tuple[int, ...]]:
    """Return the shape of every row's score maps, frames, captions, rows and columns, from the manifest's columns."""
    names = ("start_frame", "end_frame", "captions", "width", "height")
    rows = zip(*(manifest.table.column(name).to_pylist() for name in names), strict=True)
    return [
        (len(range(start, end, every)), len(captions), *_grid(width, height, cells))
        for start, end, captions, width, height in rows
    ]


def _grid(width: int, height: int, cells: int) -> tuple[int, int]:
    cell = min(width, height) / cells
    return max(cells, round(height / cell)), max(cells, round(width / cell))


def decode_in_workers(
    manifest: Manifest, rows: list[int], cells: int, patch_size: int, every: int, num_workers: int
) -> Iterator[tuple[NDArray[np.uint8] | None, str]]:
    """Yield every `every`-th frame of each of `rows`, in order, decoded ahead.

    Each item is uint8 [F, Y·patch, X·patch, 3], or None where the video could not be read, and why there are no more
    frames ("" where there are no more in the video).
    """
    work = partial(_decode, manifest, cells, patch_size, every)
    for _, result in map_in_workers(work, rows, num_workers, lambda row: manifest[row].name):
        yield (None, str(result)) if isinstance(result, Death) else result


def _decode(
    manifest: Manifest, cells: int, patch_size: int, every: int, row: int
) -> tuple[NDArray[np.uint8] | None, str]:
    video = manifest[row]
    height, width = (count * patch_size for count in grid_of(video, cells))
    frames = range(video.start, video.end, every)
    decoded: list[NDArray[np.uint8]] = []
    reason = ""
    try:
        decoded.extend(decode_whole_frames(manifest.file(row), video, frames, height, width))
    except DecodeError as error:
        # The frames before a break are worth having: clips from there can be trained on.
        reason = str(error)
    if len(decoded) < len(frames):
        reason = reason or f"only {len(decoded)} of {len(frames)} frames could be decoded"
    if not decoded:
        return None, reason
    # Frames that were turned upright are transposed views, and so would their stack be. The patch kernel needs whole
    # rows.
    return np.ascontiguousarray(np.stack(decoded)), reason
