"""Frames for score maps: whole pictures, so resized that a patch covers a cell of the map; decoded by worker processes.

Workers import this module: it does without CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dali_pipelines.decode import DecodeError, decode_pictures
from tgmae.manifest import Manifest
from tgmae.types import Video
from tgmae.workers import end_with_parent


def grid_of(video: Video, cells: int) -> tuple[int, int]:
    """Rows and columns of a video's maps: `cells` along the short side, as square as whole numbers allow."""
    cell = min(video.width, video.height) / cells
    return max(cells, round(video.height / cell)), max(cells, round(video.width / cell))


class _Pictures(Dataset[NDArray[np.uint8] | str]):
    """Every `every`-th frame of each of `rows`: uint8 [F, Y·patch, X·patch, 3], or the reason there is none."""

    def __init__(self, manifest: Manifest, rows: list[int], cells: int, patch_size: int, every: int) -> None:
        self.manifest, self.rows, self.cells, self.patch_size, self.every = manifest, rows, cells, patch_size, every

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> NDArray[np.uint8] | str:
        row = self.rows[place]
        video = self.manifest[row]
        height, width = (count * self.patch_size for count in grid_of(video, self.cells))
        frames = range(0, video.num_frames, self.every)
        pictures: list[NDArray[np.uint8]] = []
        try:
            pictures.extend(decode_pictures(self.manifest.file(row), video, frames, height, width))
        except DecodeError as error:
            # What lies before a break is worth having: clips from there can be trained on.
            if not pictures:
                return str(error)
        # Turned pictures are transposed views, and so would their stack be; the patch kernel takes whole rows.
        return np.ascontiguousarray(np.stack(pictures))


def decode_in_workers(
    manifest: Manifest, rows: list[int], cells: int, patch_size: int, every: int, num_workers: int
) -> Iterator[NDArray[np.uint8] | str]:
    """The pictures of each of `rows` in turn, decoded ahead."""
    num_workers = min(num_workers, len(rows))  # a finished folder starts none
    return iter(
        DataLoader(
            _Pictures(manifest, rows, cells, patch_size, every), batch_size=None, num_workers=num_workers,
            collate_fn=_unchanged, multiprocessing_context="spawn" if num_workers else None,
            worker_init_fn=_start_worker,
        )
    )  # fmt: skip


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    end_with_parent()
