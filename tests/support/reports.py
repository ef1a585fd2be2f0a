"""Reports of benchmarks: read what a benchmark wrote, write what a test needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.harness.tables import Table


def read_report(results: Path, name: str) -> dict[str, Any]:
    """Read the report NAME.DEVICE.json, whatever the device."""
    (path,) = results.glob(f"{name}.*.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def rows_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a report's rows by name."""
    return {row["name"]: row for row in table["rows"]}


def write_tables(folder: Path, name: str, *tables: Table) -> None:
    """Write a report with tables and nothing else."""
    (folder / f"{name}.json").write_text(json.dumps({"headline": {}, "tables": [one.to_dict() for one in tables]}))
