"""Pages on which images and text are laid out in inches, and how hidden patches are drawn in every picture."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from numpy.typing import NDArray

from dali_pipelines.types import Video
from engines.files import replacing

HIDDEN = "#808080"  # hidden patches: a grey that is seen in dark and in bright videos
_HATCH = "#a6a6a6"  # the thin lines across it, which are seen in grey videos, too
_HATCH_WIDTH = 0.6  # points
_OUTLINE = "#404040"  # around images, and between hidden and visible patches
_TEXT, _FAINT = "black", "#666666"
_RULE = "#cccccc"
_DPI = 100
_RENDERER = RendererAgg(1, 1, _DPI)  # type: ignore[no-untyped-call] # measures text before there is a figure


class Page:
    """A figure whose positions and sizes are in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = plt.figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.axes.autoscale(False)

    def write(self, left: float, top: float, text: str, size: float = 8, faint: bool = False, **style: Any) -> None:
        """Write lines of text, `size` points high, from a top left corner on."""
        style = {"color": _FAINT if faint else _TEXT, **style}
        for number, line in enumerate(text.split("\n")):
            y = top + (0.95 + 1.35 * number) * size / 72
            self.axes.text(left, y, line, fontsize=size, parse_math=False, **style)

    def show(
        self, left: float, top: float, width: float, height: float, image: NDArray[Any],
        hidden: NDArray[np.bool_] | None = None, **scale: Any,
    ) -> None:  # fmt: skip
        """Show an image, with the patches that `hidden` (bool, rows and columns of patches) marks in hatched grey."""
        extent = (left, left + width, top + height, top)
        self.axes.imshow(image, extent=extent, aspect="auto", **scale)
        if hidden is not None:
            self._hide(left, top, width / hidden.shape[1], height / hidden.shape[0], hidden)
        self.axes.add_artist(Rectangle((left, top), width, height, fill=False, edgecolor=_OUTLINE, linewidth=0.6))

    def _hide(self, left: float, top: float, across: float, down: float, hidden: NDArray[np.bool_]) -> None:
        """Cover patches, `across` by `down` inches, as one area: its hatching goes on from patch to patch."""
        corner = np.array([left, top])
        size = np.array([across, down])
        square = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])  # x and y
        squares = [Outline(corner + (place[::-1] + square) * size, closed=True) for place in np.argwhere(hidden)]
        area = Outline.make_compound_path(*squares)
        self.axes.add_artist(
            PathPatch(
                area, facecolor=HIDDEN, edgecolor=_HATCH, linewidth=0, hatch="/////", hatch_linewidth=_HATCH_WIDTH,
                antialiased=False, zorder=1.5,
            )
        )  # fmt: skip
        # The edges between hidden and visible patches: wherever a patch differs from the one below it, or beside it.
        level = np.argwhere(hidden[1:] != hidden[:-1])[:, None, ::-1] + np.array([(0, 1), (1, 1)])
        upright = np.argwhere(hidden[:, 1:] != hidden[:, :-1])[:, None, ::-1] + np.array([(1, 0), (1, 1)])
        edges = corner + np.concatenate([level, upright]) * size
        self.axes.add_artist(LineCollection(edges, colors=_OUTLINE, linewidths=0.6, zorder=1.6))

    def show_hidden(self, left: float, top: float, width: float, height: float) -> None:
        """Show the grey of hidden patches alone: in a legend, or in place of an image that is missing."""
        self.show(left, top, width, height, np.zeros((1, 1, 3)), np.ones((1, 1), bool))

    def rule(self, left: float, top: float, width: float) -> None:
        """Draw a thin level line."""
        self.axes.plot([left, left + width], [top, top], color=_RULE, linewidth=0.6)

    def show_scale(self, left: float, top: float, low: float, high: float, colours: str, text: str) -> None:
        """Show a colour bar between its two ends, and what it measures."""
        ends = [f"{value:.2f}".replace("-", "−") for value in (low, high)]
        self.write(left + 0.4, top, ends[0], ha="right")
        self.show(left + 0.46, top, 1.2, 0.16, np.linspace(0, 1, 128)[None], cmap=colours)
        self.write(left + 1.72, top, f"{ends[1]}  {text}")

    def save(self, path: Path) -> None:
        save_figure(self.figure, path, _DPI)


def text_width(text: str, size: float) -> float:
    """Return the width of a line in inches."""
    with _without_glyph_warnings():
        measured = _RENDERER.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)  # type: ignore[no-untyped-call]
    return float(measured[0] / _DPI)


def fit(text: str, width: float, size: float) -> str:
    """Cut the middle out of a line that is wider than `width` inches. A line break in it becomes a space."""
    shown = text = _join_lines(text)
    keep = len(text)
    while keep > 2 and (across := text_width(shown, size)) > width:
        keep = min(keep - 1, int(keep * width / across))
        shown = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    return shown


def wrap(text: str, width: float, size: float, lines: int | None = None) -> list[str]:
    """Break a text into lines of at most `width` inches; what does not fit into `lines` is left out, with a mark."""
    text = _join_lines(text)
    across = text_width(text, size)
    if across <= width:
        return [text]
    broken = textwrap.wrap(text, max(8, int(0.93 * len(text) * width / across)))
    if lines is not None and len(broken) > lines:
        broken[lines - 1 :] = [f"{broken[lines - 1][:-2].rstrip()} …"]
    return [fit(line, width, size) for line in broken]


def _join_lines(text: str) -> str:
    return " ".join(text.splitlines())


def name_clip(video: Video, caption: str, width: float, size: float = 9) -> tuple[list[str], str]:
    """Return a clip's caption (or label) in up to two lines, and the name of its video, to stand above it."""
    words = f"“{caption}”" if caption else video.label
    return wrap(words, width, size, lines=2) if words else [], fit(video.name, width, size - 1)


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG, making its folder, and free the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary, _without_glyph_warnings():
            figure.savefig(temporary, dpi=dpi, format="png")
    finally:
        plt.close(figure)


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Say nothing of a caption in letters that the font does not have; boxes take their places."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        yield
