"""Fixtures of the tests of benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench.gpu_report.summary
import bench.harness.report


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for reports, instead of bench/results."""
    folder = tmp_path / "results"
    monkeypatch.setattr(bench.harness.report, "RESULTS", folder)
    monkeypatch.setattr(bench.gpu_report.summary, "RESULTS", folder)
    return folder
