"""The picture of benchmarks has the right reports, bars as long as their medians, and no overlapping text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from bench.harness.tables import Row, Table
from bench.pictures.__main__ import Options, run
from bench.pictures.reports import Report, draw_reports, read_reports


def table(rows: int, limit: float | None = None, title: str = "a table", name: str = "row", spread: float = 5) -> Table:
    names = [f"{name} {number}" for number in range(rows)]
    values = [[spread**number * share for share in (1.1, 1.0, 0.8)] for number in range(rows)]
    filled = [Row(name, of) for name, of in zip(names, values, strict=True)]
    return Table(title, "clips/s", filled, names[0], limit, note="what was left out, and why; " * rows)


def write(
    folder: Path, name: str, tables: Sequence[Table], written: int, headline: dict[str, Any] | None = None
) -> None:
    """A report as bench/harness/report.py writes it; `written` orders the files in time."""
    folder.mkdir(exist_ok=True)
    content = {
        "command": "python -m bench.x", "commit": "abc", "date": "2026-11-21", "cpu": "2 × CPU", "gpu": [],
        "headline": headline or {}, "tables": [one.to_dict() for one in tables],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content))
    os.utime(folder / f"{name}.json", (written, written))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved, kept open for inspection."""
    figures: list[Figure] = []
    monkeypatch.setattr("bench.pictures.reports.plt.close", figures.append)
    return figures


def as_report(tables: Sequence[Table], headline: dict[str, Any] | None = None) -> Report:
    return Report("step", "cpu", {"headline": headline or {}, "tables": [one.to_dict() for one in tables]})


def test_reports_of_one_device_are_read(tmp_path: Path) -> None:
    write(tmp_path, "loader.shapes.h200", [table(2)], 1)
    write(tmp_path, "step.h200", [table(2)], 2)
    write(tmp_path, "step.cpu", [table(2)], 3)
    write(tmp_path, "old.cpu", [], 4)
    (tmp_path / "demo.cpu.json").write_text("[]")
    write(tmp_path, "roofline.h100", [table(2)], 5)
    counted = json.loads((tmp_path / "roofline.h100.json").read_text()) | {"counted": True}
    (tmp_path / "roofline.h100.json").write_text(json.dumps(counted))
    assert [report.name for report in read_reports(tmp_path, "h200")] == ["loader.shapes", "step"]
    assert [report.device for report in read_reports(tmp_path)] == ["cpu"]  # written last
    with pytest.raises(ValueError, match=r"no reports of l40s in .*, which has cpu, h200; .*make bench"):
        read_reports(tmp_path, "l40s")


def test_a_folder_without_tables_is_an_error_that_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make bench"):
        read_reports(tmp_path / "missing")
    write(tmp_path, "old.cpu", [], 1)
    with pytest.raises(ValueError, match="make bench"):
        run(Options(tmp_path))


def test_the_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "step.cpu", [table(3), table(2)], 1, {"ratio": 1.25})
    write(tmp_path, "loader.shapes.cpu", [table(4)], 2)
    run(Options(tmp_path))
    assert "3 tables of 2 reports" in capsys.readouterr().out
    picture = Image.open(tmp_path / "bench.cpu.png")
    assert picture.width > picture.height / 3
    run(Options(tmp_path, device="cpu", out=tmp_path / "new" / "other.png"))
    assert (tmp_path / "new" / "other.png").exists()


@pytest.mark.parametrize(("spread", "scale"), [(1.2, "linear"), (5, "log")])
def test_bars_whiskers_and_limit_show_the_numbers(
    tmp_path: Path, drawn: list[Figure], spread: float, scale: str
) -> None:
    one = table(5, limit=700.0, spread=spread)
    if scale == "linear":
        one = Table(one.title, one.unit, one.rows, one.relative_to, limit=3.0)
    draw_reports([as_report([one])], tmp_path / "x.png")
    axis: Any = drawn[0].axes[0]
    assert axis.get_xscale() == scale
    assert [bar.get_width() for bar in axis.patches] == [sorted(row.values)[1] for row in one.rows]
    assert [label.get_text() for label in axis.get_yticklabels()] == [row.name for row in one.rows]
    whiskers = np.array([segment[:, 0] for segment in axis.collections[0].get_segments()])
    assert np.allclose(whiskers, [[min(row.values), max(row.values)] for row in one.rows])
    assert any(list(line.get_xdata()) == [one.limit] * 2 and line.get_linestyle() == "--" for line in axis.lines)
    low, high = axis.get_xlim()
    assert low <= whiskers.min() < max(whiskers.max(), one.limit or 0) < high


def test_negative_and_empty_bars_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    """Differences, such as what a whole takes beyond its stages, may be negative."""
    rows = [Row("below", [-2.0, -1.0]), Row("nothing", [0.0, 0.0]), Row("above", [1.0, 3.0])]
    draw_reports([as_report([Table("rest", "ms", rows), Table("zeros", "ms", rows[1:2])])], tmp_path / "x.png")
    assert drawn[0].axes[0].get_xlim()[0] < -2


@pytest.mark.slow
def test_nothing_overlaps_on_a_full_page(tmp_path: Path, drawn: list[Figure]) -> None:
    long = "a title that is so long that it has to go on in a second line, as it names network, clip size and batch"
    name = "γ 0.75, $xformers$ & more, batch of clips"
    tables = [
        table(1 + number % 12, 50.0 if number % 2 else None, long if number % 3 else "short", name, 1 + number / 4)
        for number in range(15)
    ]
    headline = {f"network {number}": "1,234 clips/s; " * (2 + 5 * number) for number in range(8)}
    reports = [as_report(tables[:9], headline), as_report(tables[9:])]
    draw_reports(reports, tmp_path / "x.png")
    figure = drawn[0]
    canvas: Any = figure.canvas
    canvas.draw()  # at the figure's own resolution
    renderer = canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    texts = [text for text in texts if not is_hidden_tick(text)]
    boxes = np.array([text.get_window_extent(renderer).extents for text in texts])
    assert len(boxes) > 15 * 10
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [figure.bbox.width, figure.bbox.height]).all()
    left, bottom, right, top = boxes.T
    across = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    down = np.minimum(top[:, None], top) - np.maximum(bottom[:, None], bottom)
    # Line boxes are a little taller than their text.
    clash = (across > 0.5) & (down > 0.25 * np.minimum(top - bottom, (top - bottom)[:, None]))
    np.fill_diagonal(clash, False)
    assert [(texts[one].get_text(), texts[other].get_text()) for one, other in np.argwhere(clash)] == []


def is_hidden_tick(text: Text) -> bool:
    """Tell whether a tick label lies beyond its axis's limits, where it exists but is not drawn."""
    axis = text.axes
    if axis is None or text not in axis.get_xticklabels():
        return False
    low, high = axis.get_xlim()
    return not low <= text.get_position()[0] <= high
