"""Tables of measurements: medians with their spread, for the terminal, for Markdown and for JSON."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One thing that was measured: a value for each round, in the table's unit, and further columns."""

    name: str
    values: Sequence[float]
    facts: Mapping[str, float | str] = field(default_factory=dict)  # further columns


@dataclass(frozen=True)
class Table:
    """Rows that were measured in turn in the same rounds.

    unit         unit of the rows' values, such as clips/s or ms
    relative_to  row that all others are compared with, as ratios within a round
    limit        in `unit`: what the machine, or the step alone, could reach; drawn as a line
    """

    title: str
    unit: str
    rows: Sequence[Row]
    relative_to: str | None = None
    limit: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: medians, spreads and ratios beside the values they come from."""
        base = next((row.values for row in self.rows if row.name == self.relative_to), None)
        rows = []
        for row in self.rows:
            plain: dict[str, Any] = {"name": row.name, **spread_of(row.values), **row.facts, "values": list(row.values)}
            if base is not None:
                ratios = [a / b for a, b in zip(row.values, base, strict=True)]
                plain["ratio"] = {"to": self.relative_to, **spread_of(ratios)}
            rows.append(plain)
        return {"title": self.title, "unit": self.unit, "limit": self.limit, "note": self.note, "rows": rows}


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def format_number(value: float) -> str:
    """Format with three significant figures, and with a comma between thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def print_table(table: Table) -> None:
    """Print the median, the lowest and highest value, the median ratio, and the facts of every row."""
    plain = table.to_dict()
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:  # a borrowed interpreter may lack it
        print(markdown(plain))
        return
    facts = list(dict.fromkeys(name for row in table.rows for name in row.facts))
    shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
    shown.add_column("")
    spread, base = ["lowest to highest"] * _has_spread(plain["rows"]), [f"× {table.relative_to}"]
    for heading in (table.unit, *spread, *(base * bool(table.relative_to)), *facts):
        shown.add_column(heading, justify="right")
    for row, values in zip(table.rows, plain["rows"], strict=True):
        cells = [row.name, format_number(values["median"])]
        if spread:
            cells.append(f"{format_number(values['low'])} to {format_number(values['high'])}")
        if table.relative_to:
            cells.append(f"{values['ratio']['median']:.2f}")
        for name in facts:
            fact = row.facts.get(name, "")
            cells.append(fact if isinstance(fact, str) else format_number(fact))
        shown.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def markdown(table: Mapping[str, Any]) -> str:
    """Format a report's table (`Table.to_dict`) as Markdown."""
    rows, known = table["rows"], {"name", "median", "low", "high", "values", "ratio"}
    facts = list(dict.fromkeys(name for row in rows for name in row if name not in known))
    base = next((f"× {row['ratio']['to']}" for row in rows if "ratio" in row), None)
    spread = _has_spread(rows)
    headings = ["", table["unit"] + " (lowest to highest)" * spread, *([base] if base else []), *facts]
    lines = [f"**{table['title']}**", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = [row["name"], format_number(row["median"])]
        if spread:
            cells[1] += f" ({format_number(row['low'])} to {format_number(row['high'])})"
        if base:
            cells.append(f"{row['ratio']['median']:.2f}")
        cells += [fact if isinstance(fact := row.get(name, ""), str) else format_number(fact) for name in facts]
        lines.append(f"| {' | '.join(cells)} |")
    if table["limit"] is not None:
        lines += ["", f"Limit: {format_number(table['limit'])} {table['unit']}."]
    return "\n".join([*lines, *(["", table["note"]] if table["note"] else []), ""])


def _has_spread(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether anything was measured more than once."""
    return any(len(row["values"]) > 1 for row in rows)
