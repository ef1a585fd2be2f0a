"""What do faults cost: killed workers and runs, damaged and replaced videos, flipped bits, full disks?

    python -m bench.faults
    python -m bench.faults --only "flipped bits" "full disks"    # the report keeps its other parts

Runs the tests that try each kind of fault, as often as docs/results.md says, and keeps what they counted. Takes about
half an hour on two cores. Writes bench/results/faults.cpu.json after every part, each with its own commit. A test that
fails is named there, and the exit status is then 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.command_line import run_from_shell
from bench.harness.environment import BENCH, environment
from bench.harness.report import RESULTS, save_report

# What pytest is given for each kind of fault.
PARTS = {
    "killed workers": ("tests/faults/test_killed_workers.py", "-k", "change_nothing"),
    "killed runs": ("tests/faults/test_killed_runs.py",),
    "damaged clips": ("tests/faults/test_damaged_clips.py",),
    "replaced videos": ("tests/faults/test_replaced_videos.py",),
    "flipped bits": ("tests/tgmae", "tests/engines", "-k", "flipped_bit or no_bit_of"),
    "full disks": ("tests", "-k", "full_disk or read_only or in_the_way or cannot_be_written"),
}


@dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = ()  # parts to run, of those in the report; by default all


def run_part(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Run tests and return how many passed, which did not, how long they took, and what they counted.

    Raises ValueError where there are no such tests.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *arguments,
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
        ]
        subprocess.run(
            command, cwd=BENCH.parent, env={**os.environ, "TGMAE_FAULTS": "all", "OMP_NUM_THREADS": "1"}, check=False
        )
        cases = list(ET.parse(report).getroot().iter("testcase")) if report.exists() else []
    if not cases:
        raise ValueError(f"pytest ran no test for: {' '.join(arguments)}")
    names = {id(case): f"{case.get('file')}::{case.get('name')}" for case in cases}
    ended = {
        kind: [names[id(case)] for case in cases if any(case.find(tag) is not None for tag in tags)]
        for kind, tags in {"failed": ("failure", "error"), "skipped": ("skipped",)}.items()
    }
    counts = [
        {"test": names[id(case)], "what": entry.get("name"), **json.loads(entry.get("value", ""))}
        for case in cases
        for entry in case.iter("property")
    ]
    passed = len(cases) - sum(map(len, ended.values()))
    return {"passed": passed, **ended, "seconds": round(time.perf_counter() - started), "counts": counts}


def run(options: Options) -> None:
    if unknown := set(options.only) - PARTS.keys():
        raise ValueError(f"there is no part {', '.join(map(repr, sorted(unknown)))}; the parts: {', '.join(PARTS)}")
    before = RESULTS / "faults.cpu.json"
    results: dict[str, Any] = json.loads(before.read_text())["results"] if options.only and before.exists() else {}
    for name in options.only or PARTS:
        print(f"{name}:", flush=True)
        origin = {key: value for key, value in environment().items() if key in ("commit", "date")}
        results[name] = {**origin, **run_part(PARTS[name])}
        path = save_report("faults", [], results=results)
    print(f"written to {path}")
    if failed := [test for part in results.values() for test in part["failed"]]:
        raise ValueError(f"{len(failed)} tests failed: {', '.join(failed)}")


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
