"""Clocks, and the loop that measures several things in turn, round after round."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from engines.progress import progress_bar

Case = TypeVar("Case")


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has finished all work it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cpu_seconds() -> float:
    """Return the CPU time of this process and its living children so far."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(
    work: Mapping[str, Callable[[], float]],
    rounds: int,
    description: str = "measuring",
    after_round: Callable[[dict[str, list[float]]], object] = lambda found: None,
) -> dict[str, list[float]]:
    """Call each of `work` once a round and return what each returned: `rounds` values by name.

    Taking turns lets a machine that drifts affect all alike.
    after_round  is called after every round with the values so far, to save them
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    with progress_bar(total=rounds * len(work), desc=description, unit="run") as bar:
        for _ in range(rounds):
            for name, run in work.items():
                bar.set_postfix_str(name)
                found[name].append(run())
                bar.update()
            after_round(found)
    return found


def prepare_each(cases: Mapping[str, Case], description: str) -> Iterator[tuple[str, Case]]:
    """Yield each case with its name, under a progress bar that shows the current one."""
    with progress_bar(cases.items(), desc=description, leave=False) as bar:
        for name, case in bar:
            bar.set_postfix_str(name)
            yield name, case
