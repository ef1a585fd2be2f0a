"""The roofline's labels overlap neither each other nor the picture's edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from bench.pictures.roofline import Point, draw_roofline


def test_labels_keep_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("bench.pictures.roofline.plt.close", figures.append)
    crowd = [Point(f"a stage called {number}", 2 + number / 10, 9 + number / 2, number or None) for number in range(8)]
    top = [Point(f"at the top {number}", 10.0 ** (3 + number), 900) for number in range(3)]
    draw_roofline([*crowd, *top], 4.8, {"tensor cores": 989, "float32": 67}, tmp_path / "x.png", "title")
    (axis,) = figures[0].axes
    canvas: Any = figures[0].canvas
    canvas.draw()
    texts = [text for text in axis.texts if isinstance(text, Annotation)]
    # The extent of the letters alone; an annotation's own extent includes its line.
    boxes = [super(Annotation, text).get_window_extent(canvas.get_renderer()) for text in texts]
    assert len(boxes) == 11
    for number, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figures[0].bbox.width
        assert 0 <= box.y0 < box.y1 <= figures[0].bbox.height
        for other in boxes[:number]:
            across, down = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 0.5 or down <= 0.25 * (box.y1 - box.y0)
