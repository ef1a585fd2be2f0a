"""Cores: a process's share of those that torchrun has."""

from __future__ import annotations

import os

import pytest

from dali_pipelines.workers.processes import count_cores


@pytest.mark.parametrize(
    ("own", "launcher", "processes", "share"),
    [
        (range(128), range(128), 8, 16),  # nobody is bound
        (range(16), range(128), 8, 16),  # torchrun --numa-binding exclusive
        (range(64), range(128), 8, 16),  # --numa-binding node, on two nodes
        (range(8), range(8), 4, 2),  # all in one container, or one job of Slurm
        (range(8), range(64, 128), 1, 8),  # srun binds each of its processes, which have no torchrun
        (range(8), None, 4, 2),  # torchrun is out of sight
        (range(2), range(2), 8, 1),
    ],
)
def test_a_process_has_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, own: range, launcher: range | None, processes: int, share: int
) -> None:
    def affinity(process: int) -> set[int]:
        if process == os.getppid() and launcher is None:
            raise ProcessLookupError
        return set(launcher or ()) if process == os.getppid() else set(own)

    monkeypatch.setattr(os, "sched_getaffinity", affinity)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert count_cores() == share
