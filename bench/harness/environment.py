"""Where a measurement comes from: command, commit, date, machine and versions."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.harness.chips import short_name
from bench.harness.command_line import command_name

BENCH = Path(__file__).resolve().parents[1]  # this package's folder, in the repository
PACKAGES = ("torch", "nvidia-dali-cuda130", "av", "numpy", "xformers", "triton", "tensorrt", "onnxruntime", "decord")


def environment() -> dict[str, Any]:
    """Return command, commit, date, machine and package versions, as JSON types."""
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["python", "-m", command_name(), *map(_shorten, sys.argv[1:])]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "cpu": f"{len(os.sched_getaffinity(0))} × {cpus[0] if cpus else platform.machine()}",
        "gpu": gpus,
        "driver": _driver() if gpus else "",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def device_name(device: torch.device | None) -> str:
    """Return "cpu", or a GPU's name as part of a file name: h200."""
    return "cpu" if device is None or device.type == "cpu" else short_name(torch.cuda.get_device_name(device))


def _commit() -> str:
    """Return the short hash, with "+changes" if tracked files other than results differ.

    Without git or a repository it is "not known".
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=BENCH, check=True)
        return done.stdout.strip()

    try:
        changes = "+changes" * bool(git("status", "--porcelain", "-uno", "--", ":!results"))
        return git("rev-parse", "--short", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "not known"


def _driver() -> str:
    """Return the driver's version, such as 580.95.05, or "" without nvidia-smi: torch knows only the runtime's."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(dict.fromkeys(done.stdout.split()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _shorten(argument: str) -> str:
    """Drop the folders of the machine from an absolute path."""
    return Path(argument).name if Path(argument).is_absolute() else argument
