"""Pictures of a machine's benchmarks, one a topic: bars of medians, and ratios around a line at 1, with their spread.

A report is what bench/harness/report.py writes: NAME.DEVICE.json with "tables". Other files in the folder are ignored,
and so are reports that were counted, not measured (bench/roofline.py draws its own). A topic is what a NAME begins
with, up to a dot: loader.shapes and loader.fight_surv are drawn together.

All lengths are in inches. Every axis is linear and shows 0, so that lengths can be compared; small values are read off
the numbers beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from bench.harness.tables import format_number
from tgmae.pictures.figures import Page, fit, text_width, wrap

_COLUMNS, _COLUMN, _GAP, _MARGIN = 2, 7.5, 0.5, 0.25
_WIDTH = _COLUMNS * _COLUMN + (_COLUMNS - 1) * _GAP + 2 * _MARGIN
_ACROSS = _WIDTH - 2 * _MARGIN
_ROW, _LINE = 0.19, 0.15  # heights of a bar and of a line of text
_NAMES, _RATIOS = 2.4, 1.3  # widths: of names at most, and of the axis of ratios
_SMALL, _TEXT, _TITLE, _NAME = 7, 8, 9, 12  # points
_BAR, _BASE, _LIMIT, _GRID = "#7fa8d1", "#33608c", "#b03030", "#dddddd"


@dataclass(frozen=True)
class Report:
    """One benchmark on one device."""

    name: str
    device: str
    content: dict[str, Any]


def read_reports(folder: Path, device: str | None = None) -> list[Report]:
    """Return one device's reports with tables, by name; by default of the device whose report was written last.

    Raises ValueError if there are none.
    """
    reports: list[Report] = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        name, _, of = path.stem.rpartition(".")
        content = json.loads(path.read_text())
        if name and isinstance(content, dict) and content.get("tables") and not content.get("counted"):
            reports.append(Report(name, of, content))
    if not reports:
        raise ValueError(f"no benchmark reports in {folder}; create them with: make bench")
    chosen = device or reports[-1].device
    found = sorted((report for report in reports if report.device == chosen), key=lambda report: report.name)
    if not found:
        there = ", ".join(sorted({report.device for report in reports}))
        raise ValueError(f"no reports of {chosen} in {folder}, which has {there}; create them with: make bench")
    return found


def topics(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Return the reports that are drawn together, by topic."""
    names = dict.fromkeys(report.name.partition(".")[0] for report in reports)
    return {name: [report for report in reports if report.name.partition(".")[0] == name] for name in names}


def draw_reports(reports: Sequence[Report], path: Path) -> None:
    """Write a PNG of the reports' headlines and tables."""
    sections = [_Section(report) for report in reports]
    page = Page(_WIDTH, sum(section.height for section in sections) + 2 * _MARGIN)
    top = _MARGIN
    for section in sections:
        section.draw(page, top)
        top += section.height
    page.save(path)


class _Section:
    """A report's name, headline and panels, and the height they need. Panels go into the shorter column."""

    def __init__(self, report: Report) -> None:
        self.report, content = report, report.content
        lines = [f"{name}: {_plain(value)}" for name, value in content.get("headline", {}).items()]
        self.headline = [part for line in lines for part in wrap(line, _COLUMN, _TEXT)]
        self.half = -(-len(self.headline) // _COLUMNS)  # lines in a column
        ends = [0.48 + _LINE * self.half + 0.12] * _COLUMNS
        self.places: list[tuple[_Panel, int, float]] = []
        for panel in map(_Panel, content["tables"]):
            column = ends.index(min(ends))
            self.places.append((panel, column, ends[column]))
            ends[column] += panel.height
        self.height = max(ends)

    def draw(self, page: Page, top: float) -> None:
        content = self.report.content
        page.write(_MARGIN, top, f"{self.report.name}, {self.report.device}", _NAME, weight="bold")
        machine = ", ".join([*map(str, content.get("gpu", [])), str(content.get("cpu", ""))])
        about = [machine, *(str(content.get(key, "")) for key in ("command", "commit", "date"))]
        page.write(_MARGIN, top + 0.25, fit("   ".join(filter(None, about)), _ACROSS, _SMALL), _SMALL, faint=True)
        for number, line in enumerate(self.headline):
            side, below = divmod(number, self.half)
            page.write(_MARGIN + side * (_COLUMN + _GAP), top + 0.48 + below * _LINE, line, _TEXT)
        for panel, column, place in self.places:
            panel.draw(page, _MARGIN + column * (_COLUMN + _GAP), top + place)


class _Panel:
    """A table: its title, bars, ratios and notes."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.rows, self.limit, self.unit = table["rows"], table.get("limit"), table["unit"]
        self.base = next((row["ratio"]["to"] for row in self.rows if "ratio" in row), None)
        self.title = wrap(table["title"], _COLUMN, _TITLE)
        notes = [part for line in table.get("note", "").splitlines() for part in wrap(line, _COLUMN, _SMALL)]
        self.notes = notes if len(notes) <= 4 else [*notes[:3], f"{notes[3][:-2]} …"]
        self.names = [fit(row["name"], _NAMES, _TEXT) for row in self.rows]
        self.head = 0.17 * len(self.title) + 0.22
        self.bars = _ROW * len(self.rows)
        self.height = self.head + self.bars + 0.25 + 0.13 * len(self.notes) + 0.15

    def draw(self, page: Page, left: float, top: float) -> None:
        page.write(left, top, "\n".join(self.title), _TITLE, weight="bold")
        y = top + self.head
        for number, name in enumerate(self.names):
            page.write(left, y + number * _ROW + 0.02, name, _TEXT)
        values = [_spread(row) for row in self.rows]
        begin = left + max((text_width(name, _TEXT) for name in self.names), default=0) + 0.12
        end = left + _COLUMN - max((text_width(value, _TEXT) for value in values), default=0)
        if self.base is not None:
            ratios = [_spread(row["ratio"]) if row["name"] != self.base else "1" for row in self.rows]
            after = left + _COLUMN - max(text_width(ratio, _TEXT) for ratio in ratios)
            self._draw_ratios(page, after - 0.08 - _RATIOS, left + _COLUMN, y, ratios)
            end -= left + _COLUMN - after + 0.08 + _RATIOS + 0.2
        self._draw_bars(page, begin, end - 0.08, y, values)
        page.write(left, y + self.bars + 0.25, "\n".join(self.notes), _SMALL, faint=True)

    def _draw_bars(self, page: Page, left: float, right: float, top: float, values: Sequence[str]) -> None:
        lows, highs = [row["low"] for row in self.rows], [row["high"] for row in self.rows]
        axis = _Axis(page, left, right, top, self.bars, min([0, *lows]), max([*highs, self.limit or 0]))
        unit = self.unit
        if self.limit is not None:
            axis.line(self.limit, _LIMIT)
            unit += f" (dashed: limit {format_number(self.limit)})"
        page.write(left, top - 0.19, unit, _SMALL, faint=True)
        for number, (row, value) in enumerate(zip(self.rows, values, strict=True)):
            axis.bar(number, row["median"], _BASE if row["name"] == self.base else _BAR)
            axis.whisker(number, row["low"], row["high"])
            page.write(right + 0.08, top + number * _ROW + 0.02, value, _TEXT)

    def _draw_ratios(self, page: Page, left: float, right: float, top: float, ratios: Sequence[str]) -> None:
        axis = _Axis(page, left, left + _RATIOS, top, self.bars, 0, max(row["ratio"]["high"] for row in self.rows))
        axis.line(1, _BASE)
        page.write(left, top - 0.19, fit(f"relative to {self.base}", right - left, _SMALL), _SMALL, faint=True)
        for number, (row, ratio) in enumerate(zip(self.rows, ratios, strict=True)):
            axis.whisker(number, row["ratio"]["low"], row["ratio"]["high"])
            axis.dot(number, row["ratio"]["median"], _BASE)
            page.write(left + _RATIOS + 0.08, top + number * _ROW + 0.02, ratio, _TEXT)


class _Axis:
    """A linear axis with its ticks below, and what stands on it: a row of a table every `_ROW` inches."""

    def __init__(
        self, page: Page, left: float, right: float, top: float, height: float, low: float, high: float
    ) -> None:
        self.page, self.top, self.bottom = page, top, top + height
        high = high if high > low else low + 1
        self.left, self.low, self.scale = left, low, (right - left) / (high - low)
        for tick in MaxNLocator(min(4, int(2.4 * (right - left))), steps=[1, 2, 5, 10]).tick_values(low, high):
            if low <= tick <= high:
                page.axes.plot([self.x(tick)] * 2, [top, self.bottom], color=_GRID, linewidth=0.8, zorder=0)
                label = f"{tick:g}" if abs(tick) < 10_000 else f"{tick / 1000:,g}k"
                page.write(self.x(tick), self.bottom + 0.02, label, _SMALL, faint=True, ha="center")

    def x(self, value: float) -> float:
        return self.left + (value - self.low) * self.scale

    def _middle(self, number: int) -> float:
        return self.top + (number + 0.5) * _ROW

    def line(self, value: float, colour: str) -> None:
        self.page.axes.plot([self.x(value)] * 2, [self.top, self.bottom], color=colour, linewidth=1, linestyle="--")

    def bar(self, number: int, value: float, colour: str) -> None:
        width = value * self.scale
        self.page.axes.barh(self._middle(number), width, height=0.7 * _ROW, left=self.x(0), color=colour)

    def dot(self, number: int, value: float, colour: str) -> None:
        self.page.axes.plot(self.x(value), self._middle(number), "o", color=colour, markersize=3.5)

    def whisker(self, number: int, low: float, high: float) -> None:
        if low == high:
            return
        ends, y = [self.x(low), self.x(high)], self._middle(number)
        self.page.axes.plot(ends, [y, y], color="black", linewidth=0.8, marker="|", markersize=4)


def _spread(figures: dict[str, Any]) -> str:
    """Format a median with the lowest and highest, where there are several."""
    median, low, high = (_short(figures[key]) for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low} to {high})"


def _short(value: float) -> str:
    return format_number(value).replace("-", "−")


def _plain(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else str(value)
