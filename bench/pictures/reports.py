"""One picture of a machine's benchmarks: a panel for each table, bars of medians with whiskers from lowest to highest.

A report is what bench/harness/report.py writes: NAME.DEVICE.json with "tables". Other files in the folder are ignored,
and so are reports that were counted, not measured (bench/roofline.py draws its own).

All lengths are in inches. Panels are laid out in columns below their report's name, each in the shortest column so far.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from bench.harness.tables import format_number
from tgmae.pictures.figures import shorten

_COLUMNS, _COLUMN, _GAP, _MARGIN = 3, 5.2, 0.35, 0.3
_WIDTH = _COLUMNS * _COLUMN + (_COLUMNS - 1) * _GAP + 2 * _MARGIN
_ROW, _LINE, _NUMBERS = 0.2, 0.145, 1.05  # height of a bar, of a line of text; width of the numbers beside the bars
_SMALL, _TEXT, _TITLE, _NAME = 7, 8, 9, 13  # points
_LOG_FROM = 50  # above this ratio of largest to smallest bar, a linear axis would hide the small ones
_BAR, _BASE, _LIMIT = "#7fa8d1", "#33608c", "#b03030"


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


def draw_reports(reports: Sequence[Report], path: Path) -> None:
    """Write a PNG of the reports' headlines and tables."""
    sections = [_Section(report) for report in reports]
    height = sum(section.height for section in sections) + 2 * _MARGIN
    figure = plt.figure(figsize=(_WIDTH, height))
    top = _MARGIN
    for section in sections:
        section.draw(figure, top)
        top += section.height
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


class _Section:
    """A report's name, headline and panels, and the height they need."""

    def __init__(self, report: Report) -> None:
        self.report, content = report, report.content
        lines = [f"{name}: {_plain(value)}" for name, value in content.get("headline", {}).items()]
        across = _WIDTH - 2 * _MARGIN
        self.headline = [
            part for line in lines for part in textwrap.wrap(line, _fit(across, _TEXT), subsequent_indent="    ")
        ]
        panels = [_Panel(table) for table in content["tables"]]
        self.panels_top = 0.5 + _LINE * len(self.headline) + 0.15
        ends = [0.0] * _COLUMNS
        self.places: list[tuple[_Panel, int, float]] = []
        for panel in panels:
            column = ends.index(min(ends))
            self.places.append((panel, column, self.panels_top + ends[column]))
            ends[column] += panel.height
        self.height = self.panels_top + max(ends) + 0.2

    def draw(self, figure: Figure, top: float) -> None:
        content = self.report.content
        _write(figure, _MARGIN, top, f"{self.report.name}, {self.report.device}", size=_NAME, weight="bold")
        machine = ", ".join([*map(str, content.get("gpu", [])), str(content.get("cpu", ""))])
        source = "   ".join(filter(None, [str(content.get(key, "")) for key in ("command", "commit", "date")]))
        about = f"{machine}   {source}"
        room = _fit(_WIDTH - 2 * _MARGIN, _SMALL)
        _write(figure, _MARGIN, top + 0.27, about[:room], size=_SMALL, color="grey")
        for number, line in enumerate(self.headline):
            _write(figure, _MARGIN, top + 0.5 + number * _LINE, line, size=_TEXT)
        for panel, column, place in self.places:
            panel.draw(figure, _MARGIN + column * (_COLUMN + _GAP), top + place)


class _Panel:
    """A table: its title, bars and notes."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.table, self.rows, self.limit = table, table["rows"], table.get("limit")
        self.title = textwrap.wrap(table["title"], _fit(_COLUMN, _TITLE))
        notes = [part for line in table.get("note", "").splitlines() for part in _wrap_note(line)]
        self.notes = notes if len(notes) <= 4 else [*notes[:3], f"{notes[3][:-2]} …"]
        self.names = [shorten(row["name"]) for row in self.rows]
        self.head = 0.2 * len(self.title) + (0.16 if self.limit is not None else 0.04)
        self.bars = _ROW * len(self.rows) + 0.08
        self.height = self.head + self.bars + 0.45 + 0.12 * len(self.notes) + 0.15

    def draw(self, figure: Figure, left: float, top: float) -> None:
        for number, line in enumerate(self.title):
            _write(figure, left, top + 0.2 * number, line, size=_TITLE, weight="bold")
        labels = max(len(name) for name in self.names) * _TEXT * 0.56 / 72 + 0.2
        axis = _add_axes(figure, left + labels, top + self.head, _COLUMN - labels - _NUMBERS, self.bars)
        self._draw_bars(axis)
        below = top + self.head + self.bars + 0.45
        for number, line in enumerate(self.notes):
            _write(figure, left, below + 0.12 * number, line, size=_SMALL, color="grey")

    def _draw_bars(self, axis: Axes) -> None:
        lows, medians, highs = ([row[key] for row in self.rows] for key in ("low", "median", "high"))
        base = next((row["ratio"]["to"] for row in self.rows if "ratio" in row), None)
        places = list(range(len(self.rows)))
        colours = [_BASE if row["name"] == base else _BAR for row in self.rows]
        axis.barh(places, medians, height=0.7, color=colours)
        whiskers = [[m - low for m, low in zip(medians, lows, strict=True)],
                    [high - m for m, high in zip(medians, highs, strict=True)]]  # fmt: skip
        axis.errorbar(medians, places, xerr=whiskers, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        everything = [*lows, *highs, *([] if self.limit is None else [self.limit])]
        is_log = min(everything) > 0 and max(everything) > _LOG_FROM * min(everything)
        if is_log:
            axis.set_xscale("log")
            axis.set_xlim(min(everything) / 2, max(everything) * 1.5)
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(min(0, 1.05 * min(everything)), 1.05 * max(*everything, 1e-12))
            axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_ylim(len(self.rows) - 0.4, -0.6)
        axis.set_yticks(places, self.names, fontsize=_TEXT, parse_math=False)
        axis.tick_params(axis="x", labelsize=_SMALL)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(self.table["unit"] + ", log scale" * is_log, fontsize=_TEXT, labelpad=1, parse_math=False)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for place, row in enumerate(self.rows):
            _beside(axis, 0.5, place, format_number(row["median"]), "black")
            if "ratio" in row and row["name"] != base:
                _beside(axis, _NUMBERS, place, _ratio(row["ratio"]["median"]), "grey")
        if base is not None:
            x = 1 + _NUMBERS / _inches(axis)
            axis.text(x, 1, "× dark bar", size=_SMALL, color="grey", transform=axis.transAxes, ha="right", va="bottom")
        if self.limit is not None:
            axis.axvline(self.limit, color=_LIMIT, linestyle="--", linewidth=1)
            axis.text(
                0, 1.0, f"limit {format_number(self.limit)} (dashed)", size=_SMALL, color=_LIMIT,
                transform=axis.transAxes, va="bottom",
            )  # fmt: skip


def _beside(axis: Axes, right: float, place: int, text: str, colour: str) -> None:
    """Write text in the row of a bar, ending `right` inches beyond the axes."""
    x = 1 + right / _inches(axis)
    axis.text(x, place, text, size=_TEXT, color=colour, ha="right", va="center", transform=axis.get_yaxis_transform())


def _inches(axis: Axes) -> float:
    """Return the width of the axes."""
    return float(axis.get_position().width) * _WIDTH


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    total = figure.get_figheight()
    return figure.add_axes((left / _WIDTH, 1 - (top + height) / total, width / _WIDTH, height / total))


def _write(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    total = figure.get_figheight()
    figure.text(left / _WIDTH, 1 - top / total, text, va="top", parse_math=False, **style)


def _wrap_note(line: str) -> list[str]:
    return textwrap.wrap(line, _fit(_COLUMN, _SMALL))


def _fit(width: float, points: float) -> int:
    """Return how many characters fit; one is about .56 of its font size wide."""
    return int(width * 72 / (0.56 * points))


def _ratio(value: float) -> str:
    """Format a ratio as precisely as there is room for."""
    if not 0.1 <= value < 10_000:
        return f"×{value:.1g}"
    return f"×{value:.2f}" if value < 10 else f"×{format_number(value)}"


def _plain(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else str(value)
