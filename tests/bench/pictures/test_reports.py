"""The pictures of benchmarks have the right reports, bars as long as their medians, and no overlapping text."""

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

from bench.harness.tables import Row, Table
from bench.pictures.__main__ import Options, run
from bench.pictures.reports import Report, draw_reports, read_reports, topics
from tgmae.pictures.figures import Page


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
    monkeypatch.setattr("tgmae.pictures.figures.plt.close", figures.append)
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


def test_the_command_writes_a_picture_for_each_topic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "step.cpu", [table(3), table(2)], 1, {"ratio": 1.25})
    write(tmp_path, "loader.shapes.cpu", [table(4)], 2)
    write(tmp_path, "loader.mine.cpu", [table(4)], 3)
    run(Options(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/loader.cpu.png: 2 tables of 2 reports",
        f"{tmp_path}/step.cpu.png: 2 tables of 1 reports",
    ]
    run(Options(tmp_path, device="cpu", out=tmp_path / "new"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["loader.cpu.png", "step.cpu.png"]


@pytest.mark.slow
def test_committed_reports_fit_a_screen_and_take_no_negative_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Page] = []
    monkeypatch.setattr(Page, "save", lambda page, path: pages.append(page))
    monkeypatch.setattr(Page, "write", lambda *_, **__: None)
    reports = read_reports(Path("bench/results"), "cpu")
    measured = [one for report in reports for one in report.content["tables"] if one["unit"] != "points"]  # gains
    assert all(row["low"] >= 0 for one in measured for row in one["rows"])
    for topic, chosen in topics(reports).items():
        draw_reports(chosen, Path(topic))
    assert all(page.width <= 16 and page.height <= 24 for page in pages)


def segments(axis: Any, **style: Any) -> list[tuple[list[float], list[float]]]:
    """Return the places of lines that were drawn in a style, in inches."""
    lines = [line for line in axis.lines if all(getattr(line, f"get_{name}")() == of for name, of in style.items())]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


@pytest.mark.parametrize("limit", [None, 30.0])
def test_bars_ratios_whiskers_and_limit_show_the_numbers(
    tmp_path: Path, drawn: list[Figure], limit: float | None
) -> None:
    """On linear axes from 0, however far apart the numbers are."""
    rows = [
        Row("base", [2, 1, 4]),
        Row("half", [0.5, 1, 2]),
        Row("tiny", [0.01, 0.02, 0.01]),
        Row("large", [18, 20, 25]),
    ]
    draw_reports([as_report([Table("a table", "clips/s", rows, "base", limit)])], tmp_path / "x.png")
    axis: Any = drawn[0].axes[0]
    bars = [bar for bar in axis.patches if bar.get_width()]
    inch = bars[0].get_width() / 2  # of 1 clip/s
    zero = bars[0].get_x()
    assert [bar.get_width() / inch for bar in bars] == pytest.approx([2, 1, 0.01, 20])
    assert {bar.get_x() for bar in bars} == {zero}
    assert len({bar.get_facecolor() for bar in bars}) == 2  # the base is darker
    whiskers = segments(axis, marker="|")
    spans = [[(x - zero) / inch for x in ends] for ends, _ in whiskers[-4:]]
    np.testing.assert_allclose(spans, [[1, 4], [0.5, 2], [0.01, 0.02], [18, 25]], atol=1e-9)
    # Ratios within rounds, around a line at 1.
    dashed = segments(axis, linestyle="--")
    assert len(dashed) == (1 if limit is None else 2)
    one = dashed[0][0][0]
    dots = [x[0] for x, _ in segments(axis, marker="o")]
    assert dots[0] == one
    assert [(dot - dots[2]) / (one - dots[2]) for dot in dots] == pytest.approx([1, 0.498, 0, 9.04], abs=0.01)
    if limit is not None:
        assert dashed[1][0] == pytest.approx([zero + 30 * inch] * 2)
    words = [text.get_text() for text in axis.texts]
    assert {"20 (18 to 25)", "9 (6.25 to 20)", "relative to base", "1"} <= set(words)


def test_negative_and_empty_bars_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    """A difference may be negative: it is shown as what it is."""
    rows = [Row("below", [-2.0, -1.0]), Row("nothing", [0.0, 0.0]), Row("above", [1.0, 3.0])]
    draw_reports([as_report([Table("rest", "ms", rows), Table("zeros", "ms", rows[1:2])])], tmp_path / "x.png")
    axis: Any = drawn[0].axes[0]
    below, _, above, *_ = axis.patches
    assert below.get_width() < 0 < above.get_width()
    assert "−1.5 (−2 to −1)" in [text.get_text() for text in axis.texts]


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
