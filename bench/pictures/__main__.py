"""Draw the reports that `make bench` wrote on one device: a panel for each of their tables.

    python -m bench.pictures
    python -m bench.pictures bench/results --device h200 --out h200.png

Reports that were counted, not measured, are left out; bench.roofline draws its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench.harness.command_line import run_from_shell
from bench.pictures.reports import draw_reports, read_reports


@dataclass(frozen=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional] = Path("bench/results")  # folder of the reports
    device: str | None = None  # cpu, h200, …, as in the reports' names; by default the one that was written last
    out: Path | None = None  # PNG to write; by default bench.DEVICE.png in the folder


def run(options: Options) -> None:
    reports = read_reports(options.folder, options.device)
    out = options.out or options.folder / f"bench.{reports[0].device}.png"
    draw_reports(reports, out)
    tables = sum(len(report.content["tables"]) for report in reports)
    print(f"{tables} tables of {len(reports)} reports: {out}")


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
