"""Find single figures in the reports of bench/results by the names of tables and rows.

A missing figure is None: a part may have failed, been left out, or never run on that GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

Reports = Mapping[str, Mapping[str, Any]]  # content by name, without the device


def load_reports(folder: Path, chip: str, since: float = 0.0) -> dict[str, dict[str, Any]]:
    """Read the reports of a chip, given by its `short_name`: step.h200.json for h200, but not step.h200-nvl.json.

    since   seconds since 1970; older reports are left out
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        name, _, device = path.stem.rpartition(".")
        if device == chip and path.stat().st_mtime >= since:
            try:
                content = json.loads(path.read_text())
            except ValueError:  # a benchmark was stopped while it wrote
                continue
            if isinstance(content, dict):
                found[name] = content
    return found


def find_rows(reports: Reports, report: str, table: str, row: str) -> list[Mapping[str, Any]]:
    """Return rows of the reports whose name matches the glob `report`.

    `table` and `row` are regular expressions that are searched for in titles and row names.
    """
    return [
        found
        for name, content in reports.items()
        if fnmatch(name, report)
        for one in content.get("tables", [])
        if re.search(table, str(one.get("title", "")))
        for found in one.get("rows", [])
        if re.search(row, str(found.get("name", "")))
    ]


def values(rows: Sequence[Mapping[str, Any]], key: str = "median") -> list[float]:
    """Return the numbers of a column, without missing values and text."""
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]


def best(rows: Sequence[Mapping[str, Any]], key: str = "median") -> float | None:
    """Return the largest number of a column; None if there is none."""
    return max(values(rows, key), default=None)
