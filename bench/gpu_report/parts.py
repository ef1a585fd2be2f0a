"""The parts of the GPU report: commands that run one after the other, each within its share of the time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_report.watch import GpuWatch

GRACE_S = 5.0  # for a part that is told to stop
LEAST_S = 10.0  # a part gets, however late it is


@dataclass(frozen=True)
class Part:
    """A command, the question it answers, and the time it needs."""

    name: str
    question: str
    command: tuple[str, ...]
    minutes: float  # that it needs; where there is more time or less, it gets the same share of it
    reports: str = ""  # glob of the reports it writes to bench/results, without the device
    third: int = 1  # of the whole report


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: Part
    status: str  # ok, or what went wrong
    seconds: float
    tail: str  # of its output
    utilisation: dict[str, float]  # mean and maximum of what nvidia-smi saw meanwhile


def allot(parts: Sequence[Part], left_s: float) -> float:
    """Return seconds for the first of `parts`: its share of the time left for all of them, less the time to stop it."""
    return max(left_s * parts[0].minutes / sum(part.minutes for part in parts) - GRACE_S, LEAST_S)


def run_part(part: Part, folder: Path, limit_s: float, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run a part in its own process group, with `environment` beside this process's, and stop it after `limit_s`."""
    log, started = folder / f"{part.name}.log", time.perf_counter()
    print(f"{part.name}: {' '.join(part.command[1:])} (at most {limit_s:.0f} s)", flush=True)
    with GpuWatch(folder / f"{part.name}.csv") as watched, log.open("w") as output:
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"not done after {limit_s:.0f} s"
        finally:  # also if this process is told to stop
            if process.poll() is None:
                stop(process)
    seconds = time.perf_counter() - started
    tail = log.read_text(errors="replace")[-3000:]
    print(f"{tail if status != 'ok' else ''}{part.name}: {status}, {seconds:.0f} s", flush=True)
    return Outcome(part, status, seconds, tail, watched.read())


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a part as Ctrl-C does, so that pytest reports its failures so far; then kill its group."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):  # includes processes that the part started and left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
