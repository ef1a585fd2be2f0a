"""Keyframes of some videos with all their captions, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dali_pipelines.types import SkippedVideo, Video
from tgmae.captions.generate.frames import Frames, read_frames
from tgmae.data.manifest import Manifest, count_videos
from tgmae.pictures.figures import Page, fit, text_width, wrap

_FRAMES = 3  # keyframes of a video
_WIDTH, _HEIGHT, _GAP, _MARGIN = 1.75, 1.2, 0.06, 0.25  # inches: what a frame must fit into, between them, the border
_TEXT, _SIZE, _LINE = 5.6, 8.5, 0.17  # inches beside the frames; points; inches from a line to the next
_NAME, _BETWEEN = 0.24, 0.3  # inches below the frames for the video's name; between two videos
_APART = 0.06  # inches between the captions of two sources
_MOST = 14  # lines of captions beside a video
_COLOURS = ("#1f5fa8", "#b3541e", "#2e7d4f", "#8e3b7f", "#7a6a1f", "#3d6f7a")  # of sources


@dataclass(frozen=True)
class _Line:
    """One line of text beside the frames; `source` stands in front of the first line of each source."""

    text: str
    source: str
    is_first: bool


def draw_captions(manifest: Manifest, path: Path, count: int, seed: int) -> list[SkippedVideo]:
    """Write a PNG with three keyframes and the captions of up to `count` videos, chosen at random.

    Returns the videos that cannot be decoded, wholly or in part. Raises ValueError if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    rows = sorted(np.random.default_rng(seed).permutation(len(manifest))[:count].tolist())
    videos = [manifest[row] for row in rows]
    sources = sorted({caption.source for video in videos for caption in video.captions})
    colours = {source: _COLOURS[number % len(_COLOURS)] for number, source in enumerate(sources)}
    tags = max([0.0, *(1.12 * text_width(source or "–", _SIZE) for source in sources)]) + 0.15
    tags = min(tags, _TEXT / 3)

    listed = [_list_lines(video, tags) for video in videos]
    heights = [max(_HEIGHT + _NAME, _measure(lines)) + _BETWEEN for lines in listed]
    beside = _MARGIN + _FRAMES * (_WIDTH + _GAP) + 0.15
    page = Page(beside + _TEXT + _MARGIN, _MARGIN + 0.4 + sum(heights))
    chosen = f"{len(rows):,} of {count_videos(len(manifest))}, chosen at random (seed {seed})"
    shown = chosen if len(rows) < len(manifest) else count_videos(len(manifest))
    page.write(_MARGIN, _MARGIN, f"{shown}: keyframes, and the captions of each source", 10)

    skipped: list[SkippedVideo] = []
    decoded = {row: (frames, why) for row, frames, why in read_frames(manifest, rows, _FRAMES, 400, num_workers=0)}
    top = _MARGIN + 0.4
    for row, video, lines, height in zip(rows, videos, listed, heights, strict=True):
        frames, reason = decoded[row]
        if reason:
            skipped.append(SkippedVideo(row=row, path=video.name, reason=reason))
        bottom = _show_frames(page, top, frames)
        about = f", {video.label}" * bool(video.label) + f", {video.length} frames"
        name = fit(video.name, _FRAMES * _WIDTH - text_width(about, 7), 7) + about
        page.write(_MARGIN, bottom + 0.06, fit(reason, _FRAMES * _WIDTH, 7) if not frames else name, 7, faint=True)
        y = top - _APART
        for line in lines:
            if line.is_first:
                y += _APART
                tag = fit(line.source or "–", tags - 0.1, _SIZE)
                page.write(beside, y, tag, _SIZE, color=colours[line.source], weight="bold")
            page.write(beside + tags, y, line.text, _SIZE)
            y += _LINE
        if not lines:
            page.write(beside, top, "no caption", _SIZE, faint=True)
        top += height
        if row != rows[-1]:
            page.rule(_MARGIN, top - 0.6 * _BETWEEN, page.width - 2 * _MARGIN)
    page.save(path)
    return skipped


def _show_frames(page: Page, top: float, frames: Frames) -> float:
    """Show the frames side by side in one height, and return where they end; grey stands where there are none."""
    left, bottom = _MARGIN, top
    if not frames:
        page.show_hidden(left, top, _WIDTH, _HEIGHT)
        return top + _HEIGHT
    for frame in frames:
        high, wide = frame.shape[:2]
        scale = min(_WIDTH / wide, _HEIGHT / high)
        page.show(left, top, wide * scale, high * scale, frame)
        left, bottom = left + wide * scale + _GAP, top + high * scale
    return bottom


def _measure(lines: Sequence[_Line]) -> float:
    """Return the inches that lines take."""
    return len(lines) * _LINE + sum(line.is_first for line in lines[1:]) * _APART


def _list_lines(video: Video, tags: float) -> list[_Line]:
    """Return the captions of a video in lines, those of a source together; the last line says what is left out."""
    by_source: dict[str, list[str]] = {}
    for caption in video.captions:
        by_source.setdefault(caption.source, []).append(caption.text)
    lines = [line for source, texts in by_source.items() for line in _lines_of(source, texts, _TEXT - tags)]
    if len(lines) <= _MOST:
        return lines
    return [*lines[: _MOST - 1], _Line(f"… and {len(lines) - _MOST + 1} more lines", lines[_MOST - 1].source, False)]


def _lines_of(source: str, texts: Sequence[str], width: float) -> Iterator[_Line]:
    is_first = True
    for text, count in Counter(texts).items():
        text += f"  ×{count}" * (count > 1)
        for number, part in enumerate(wrap(text, width - 0.12, _SIZE, lines=3)):
            yield _Line(f"{'   ' * (number > 0)}{part}", source, is_first)
            is_first = False
