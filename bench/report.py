"""What every benchmark prints and writes: medians with their spread, and a JSON that says where they come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "nvidia-dali-cuda130", "av", "numpy", "xformers", "triton")


def format_rates(rates: dict[str, list[float]], unit: str, relative_to: str) -> str:
    """One line a stage: median (lowest to highest), and the median of its ratios to one stage, round by round."""
    lines = []
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[relative_to], strict=True))
        spread = f"{min(values):.1f} to {max(values):.1f}"
        lines.append(f"{name:12} {statistics.median(values):8.1f} {unit} ({spread})   {ratio:5.2f} × {relative_to}")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Commit, date, machine and versions."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
        return done.stdout.strip()

    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *map(_shorten, sys.argv[1:])]),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "date": datetime.date.today().isoformat(),
        "cpu": f"{len(os.sched_getaffinity(0))} × {cpus[0] if cpus else platform.machine()}",
        "gpu": gpus,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _shorten(argument: str) -> str:
    """Without the folders of the machine it ran on."""
    return "/".join(Path(argument).parts[-2:]) if Path(argument).is_absolute() else argument


def write_report(name: str, results: dict[str, Any]) -> Path:
    """Write bench/results/<name>.json; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**environment(), "results": results}, indent=2, ensure_ascii=False) + "\n")
    return path
