"""A contact sheet of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.types import SkippedVideo
from dali_pipelines.video.decode import DecodeError, decode_frames, to_rgb
from dali_pipelines.video.geometry import turn_upright
from tgmae.data.manifest import Manifest, count_videos
from tgmae.pictures.figures import Page, fit, text_width, wrap

_WIDTH, _HEIGHT, _GAP, _MARGIN = 2.4, 1.35, 0.15, 0.2  # inches: what a frame must fit into, between them, around them
_TEXT = 0.55  # inches below a frame
_COLUMNS = 6


@dataclass(frozen=True)
class _Tile:
    frame: NDArray[np.uint8] | None  # the middle frame, upright, [H, W, 3]; None for a video that cannot be decoded
    words: str
    name: str
    about: str  # size, codec and length, to follow the name


def draw_contact_sheet(manifest: Manifest, path: Path, count: int, seed: int) -> list[SkippedVideo]:
    """Write a PNG with the middle frames of up to `count` videos, chosen at random.

    Returns the videos that cannot be decoded: grey stands in their places, with the reason. Raises ValueError if
    `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"expected at least one video on the sheet, got {count}")
    rows = sorted(np.random.default_rng(seed).permutation(len(manifest))[:count].tolist())
    skipped: list[SkippedVideo] = []
    tiles = [_read_tile(manifest, row, skipped) for row in rows]
    columns = min(_COLUMNS, len(tiles))
    lines = -(-len(tiles) // columns)
    first, across, down = _MARGIN + 0.35, _WIDTH + _GAP, _HEIGHT + _TEXT + _GAP
    page = Page(max(2 * _MARGIN + columns * across - _GAP, 4.5), first + lines * down)
    chosen = f", chosen at random (seed {seed})" * (len(rows) < len(manifest))
    shown = f"{len(rows):,} of {count_videos(len(manifest))}" if chosen else count_videos(len(manifest))
    page.write(_MARGIN, _MARGIN, fit(f"{shown}{chosen}: the middle frame of each", page.width - 2 * _MARGIN, 10), 10)
    for number, tile in enumerate(tiles):
        left, top = _MARGIN + number % columns * across, first + number // columns * down
        high, wide = (9, 16) if tile.frame is None else tile.frame.shape[:2]
        scale = min(_WIDTH / wide, _HEIGHT / high)
        if tile.frame is None:
            page.show_hidden(left, top, wide * scale, high * scale)
        else:
            page.show(left, top, wide * scale, high * scale, tile.frame)
        words = wrap(tile.words, _WIDTH, 8, lines=2)
        page.write(left, top + _HEIGHT + 0.05, "\n".join(words), 8)
        name = fit(tile.name, _WIDTH - text_width(tile.about, 7), 7)
        page.write(left, top + _HEIGHT + 0.08 + 0.15 * len(words), name + tile.about, 7, faint=True)
    page.save(path)
    return skipped


def _read_tile(manifest: Manifest, row: int, skipped: list[SkippedVideo]) -> _Tile:
    """Read the middle frame of a video, or note that it cannot be read."""
    video = manifest[row]
    try:
        [(_, frame)] = decode_frames(manifest.file(row), video, [video.start + video.length // 2], seek=True)
        upright = turn_upright(to_rgb(frame), video)
    except DecodeError as error:
        skipped.append(SkippedVideo(row=row, path=video.name, reason=str(error)))
        return _Tile(None, str(error), video.name, "")
    caption = f"“{video.captions[0].text}”" if video.captions else video.label
    name, about = Path(video.name).name, f", {video.width}×{video.height} {video.codec}, {video.length} frames"
    return _Tile(upright, caption or Path(video.name).stem, name, about)
