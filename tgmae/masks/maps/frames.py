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
    cell = min(video.width, video.height) / cells
    return max(cells, round(video.height / cell)), max(cells, round(video.width / cell))


def decode_in_workers(
    manifest: Manifest, rows: list[int], cells: int, patch_size: int, every: int, num_workers: int
) -> Iterator[NDArray[np.uint8] | str]:
    """Yield every `every`-th frame of each of `rows`, in order, decoded ahead.

    Each item is uint8 [F, Y·patch, X·patch, 3], or the reason why the video could not be read.
    """
    work = partial(_decode, manifest, cells, patch_size, every)
    for _, frames in map_in_workers(work, rows, num_workers, lambda row: manifest[row].name):
        yield str(frames) if isinstance(frames, Death) else frames


def _decode(manifest: Manifest, cells: int, patch_size: int, every: int, row: int) -> NDArray[np.uint8] | str:
    video = manifest[row]
    height, width = (count * patch_size for count in grid_of(video, cells))
    frames = range(video.start, video.end, every)
    decoded: list[NDArray[np.uint8]] = []
    try:
        decoded.extend(decode_whole_frames(manifest.file(row), video, frames, height, width))
    except DecodeError as error:
        # The frames before a break are worth having: clips from there can be trained on.
        if not decoded:
            return str(error)
    # Frames that were turned upright are transposed views, and so would their stack be. The patch kernel needs whole
    # rows.
    return np.ascontiguousarray(np.stack(decoded))
