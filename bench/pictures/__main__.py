"""Draw the reports that `make bench` wrote on one device: a picture for each topic, a panel for each table.

    python -m bench.pictures
    python -m bench.pictures bench/results --device h200 --out pictures

Reports that were counted, not measured, are left out; bench.roofline draws its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench.harness.command_line import run_from_shell
from bench.pictures.reports import draw_reports, read_reports, topics


@dataclass(frozen=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional] = Path("bench/results")  # folder of the reports
    device: str | None = None  # cpu, h200, …, as in the reports' names; by default the one that was written last
    out: Path | None = None  # folder for the pictures, TOPIC.DEVICE.png; by default that of the reports


def run(options: Options) -> None:
    reports = read_reports(options.folder, options.device)
    for topic, chosen in topics(reports).items():
        out = (options.out or options.folder) / f"{topic}.{chosen[0].device}.png"
        draw_reports(chosen, out)
        tables = sum(len(report.content["tables"]) for report in chosen)
        print(f"{out}: {tables} tables of {len(chosen)} reports")


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
