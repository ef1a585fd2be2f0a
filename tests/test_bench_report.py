"""What all benchmarks share: a report is written whatever the machine lacks, and mistakes end with one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import bench.report
from bench.report import Row, Table, environment, markdown, print_table


def test_a_table_is_printed_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("Speeds", "clips/s", [Row("a", [1.0, 2.0]), Row("b", [2.0, 4.0])], "a", note="noted")
    for module in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, module, None)
    print_table(table)
    assert capsys.readouterr().out == markdown(table.to_dict()) + "\n"


def test_a_commit_that_cannot_be_found_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.report, "RESULTS", tmp_path / "results")  # outside the repository
    assert environment()["commit"] == "not known"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert environment()["commit"] == "not known"
