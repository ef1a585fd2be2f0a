"""Matplotlib without a display, titles that fit, and PNG files."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engines.files import replacing


def shorten(text: str) -> str:
    """Cut the middle out of a title that is wider than its picture."""
    return text if len(text) <= 42 else f"{text[:20]} … {text[-19:]}"


def hide_ticks(axis: Axes) -> None:
    """Leave the frame and the labels of an image, without ticks."""
    axis.set_xticks([])
    axis.set_yticks([])


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG, making its folder, and free the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary, warnings.catch_warnings():
            # A caption may be in letters that the font does not have; boxes take their places.
            warnings.filterwarnings("ignore", r"Glyph .* missing from font")
            figure.savefig(temporary, dpi=dpi, format="png")
    finally:
        plt.close(figure)
