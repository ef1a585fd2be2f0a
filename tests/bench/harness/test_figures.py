"""Figures are found in reports by the names of tables and rows."""

from __future__ import annotations

from pathlib import Path

from bench.harness.figures import best, find_rows, load_reports, values
from bench.harness.tables import Row, Table
from tests.support.reports import write_tables


def test_missing_figures_are_none(tmp_path: Path) -> None:
    write_tables(tmp_path, "x.h200-nvl", Table("T", "ms", [Row("r", [1.0], {"text": "yes"})]))
    reports = load_reports(tmp_path, "h200-nvl")
    assert load_reports(tmp_path, "h200") == {}
    assert values(find_rows(reports, "x", "T", "r"), "text") == []
    assert best(find_rows(reports, "x", "T", "nothing")) is None
    assert best(find_rows({"y": {"headline": {}}}, "y", "", "")) is None
