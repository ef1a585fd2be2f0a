"""A contact sheet of a data set."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from dali_pipelines.types import SkippedVideo
from dali_pipelines.video.decode import DecodeError, decode_frames, to_rgb
from dali_pipelines.video.geometry import turn_upright
from tgmae.data.manifest import Manifest
from tgmae.pictures.figures import save_figure, shorten

_MISSING = np.zeros((9, 16, 3), np.uint8)  # a black frame, shown for a video that cannot be decoded


def draw_contact_sheet(manifest: Manifest, path: Path, count: int, seed: int) -> list[SkippedVideo]:
    """Write a PNG with the middle frames of up to `count` videos, chosen at random.

    Returns the videos that cannot be decoded: they are black and titled with the reason. Raises ValueError if `count`
    is below 1.
    """
    if count < 1:
        raise ValueError(f"expected at least one video on the sheet, got {count}")
    rows = sorted(np.random.default_rng(seed).permutation(len(manifest))[:count].tolist())
    skipped: list[SkippedVideo] = []
    tiles = [_read_tile(manifest, row, skipped) for row in rows]
    columns = min(6, len(tiles))
    lines = -(-len(tiles) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 2.4 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (frame, title) in zip(axes.flat, tiles, strict=False):
        axis.imshow(frame)
        axis.set_title(title, fontsize=7, parse_math=False)
    save_figure(figure, path, dpi=90)
    return skipped


def _read_tile(manifest: Manifest, row: int, skipped: list[SkippedVideo]) -> tuple[NDArray[np.uint8], str]:
    """Read the middle frame of a video, upright, uint8 [H, W, 3], and its title; or note that it cannot be read."""
    video = manifest[row]
    try:
        [(_, frame)] = decode_frames(manifest.file(row), video, [video.start + video.length // 2], seek=True)
        upright = turn_upright(to_rgb(frame), video)
    except DecodeError as error:
        skipped.append(SkippedVideo(row=row, path=video.name, reason=str(error)))
        return _MISSING, f"{shorten(video.name)}\n{shorten(str(error))}"
    name = f"{video.label}: {Path(video.name).name}" if video.label else video.name
    caption = shorten(video.captions[0].text if video.captions else name)
    return upright, f"{caption}\n{video.width}×{video.height} {video.codec}, {video.length} frames"
