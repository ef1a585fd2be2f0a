"""Decode workers killed at random moments cost a run nothing: every step is done, and the weights are the same.

TGMAE_FAULTS=all .venv/bin/python -m pytest tests/faults/test_killed_workers.py    # 50 kills in 2,000 steps
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.runs import REPOSITORY, command, state, tiny, wait_for_step
from tgmae.telemetry.metrics import read_metrics
from tgmae.train import train


def kill_workers(count: int, run_dir: Path, has_ended: threading.Event, killed: list[int]) -> None:
    """Kill a random worker `count` times: while it starts, waits or decodes.

    At most three kills come between one report of the run and the next: workers that never get to finish anything are
    an error, and rightly so.
    """
    choose = random.Random(0)
    since, seen = 0, 0
    while len(killed) < count and not has_ended.wait(choose.uniform(0.05, 1.5)):
        written = sum(path.stat().st_size for path in run_dir.glob("metrics.jsonl"))
        since = since if written == seen else 0
        seen = written
        workers = [process.pid for process in multiprocessing.active_children() if process.pid not in killed]
        if workers and since < 3 and (pid := choose.choice(workers)) is not None:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            since += 1


@pytest.mark.slow
def test_killed_workers_change_nothing(
    shapes: Path, tmp_path: Path, repetitions: Callable[[int, int], int], record_counts: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kills, steps = repetitions(2, 50), repetitions(80, 2000)
    config = tiny(shapes, tmp_path / "undisturbed", pipeline="dali", epochs=2000, max_steps=steps)
    config = replace(
        config,
        data=replace(config.data, num_workers=2),
        log=replace(config.log, checkpoint_every=10**6, picture_every=10**6),
    )
    train(config)
    has_ended, killed = threading.Event(), list[int]()
    killer = threading.Thread(target=kill_workers, args=(kills, tmp_path / "disturbed", has_ended, killed))
    killer.start()
    try:
        while len(killed) < kills:  # a fast machine repeats the run until all kills have happened
            result = train(replace(config, run_dir=tmp_path / "disturbed", resume="never"))
            assert result.step == steps
    finally:
        has_ended.set()
        killer.join()
    expected, found = state(tmp_path / "undisturbed"), state(tmp_path / "disturbed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in read_metrics(tmp_path / "disturbed")] == list(range(1, steps + 1))
    assert all(line["skipped_videos"] == 0 for line in read_metrics(tmp_path / "disturbed"))
    assert capfd.readouterr().err.count("was killed by SIGKILL while it had") >= kills / 2
    record_counts("kills of workers", tried=kills, steps=steps, steps_done=steps, clips_skipped=0, tensors_changed=0)


@pytest.mark.slow
def test_a_run_whose_workers_are_stopped_can_be_stopped(shapes: Path, tmp_path: Path) -> None:
    """As where a network file never comes: SIGTERM saves what there is, though no batch comes any more."""
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(shapes, run_dir, "--max-steps", "100000", "--epochs", "100000", "--log.no-progress"),
        cwd=REPOSITORY, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for_step(run_dir, 3, process)
        workers = find_workers(process.pid)
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        time.sleep(2)  # the batches that are there are used up
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert time.monotonic() - started < 60
    assert "stopped by SIGTERM after step" in said
    assert "as no input came; the same command resumes from there" in said
    assert int(state(run_dir)["step"]) >= 3


def find_workers(pid: int) -> list[int]:
    """Return the decode workers that any thread of a process has started."""
    lists = [thread / "children" for thread in Path(f"/proc/{pid}/task").iterdir()]
    children = [int(child) for children in lists for child in children.read_text().split()]
    return [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
