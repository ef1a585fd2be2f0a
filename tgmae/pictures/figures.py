"""What every picture needs: matplotlib without a display, titles that fit, PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def shorten(text: str) -> str:
    """A title that stays within its picture."""
    return text if len(text) <= 42 else f"{text[:20]} … {text[-19:]}"


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
