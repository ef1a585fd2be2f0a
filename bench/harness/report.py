"""The report of a benchmark: tables, headline and origin, in bench/results/<name>.<cpu or GPU>.json.

`python -m bench.pictures` draws the reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.environment import BENCH, device_name, environment
from bench.harness.tables import Table, print_table

RESULTS = BENCH / "results"


def write_report(
    name: str,
    tables: Sequence[Table],
    headline: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    results: Any = None,
) -> Path:
    """Print the tables, write them to bench/results/<name>.<device>.json, and return its path.

    headline  the few figures that answer the benchmark's question        results  anything else worth keeping, as JSON
    """
    for table in tables:
        print_table(table)
    for key, value in (headline or {}).items():
        print(f"{key}: {value}")
    path = save_report(name, tables, headline, device, results)
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def save_report(
    name: str,
    tables: Sequence[Table],
    headline: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    results: Any = None,
) -> Path:
    """Do what `write_report` does without printing.

    Called after each table, it keeps the finished ones of a benchmark that runs out of time.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.{device_name(device)}.json"
    report = {**environment(), "headline": dict(headline or {}), "tables": [table.to_dict() for table in tables]}
    if results is not None:
        report["results"] = results
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return path


def source_name(manifest: Path) -> str:
    """Return the manifest's name for a report's, or its folder's name if the file is called manifest.parquet."""
    path = manifest.resolve()
    return path.parent.name if path.stem == "manifest" else path.stem
