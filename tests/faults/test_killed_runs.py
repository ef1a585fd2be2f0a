"""A run that is killed again and again, at random moments, ends with the weights of one that was not.

TGMAE_FAULTS=all .venv/bin/python -m pytest tests/faults/test_killed_runs.py    # 50 kills
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.processes import forking_context
from tests.support.runs import state, tiny
from tgmae.config.run import TrainConfig
from tgmae.telemetry.metrics import read_metrics
from tgmae.train import train

STEPS = 60


@pytest.mark.slow
def test_killed_runs_resume_bit_identically(
    shapes: Path, tmp_path: Path, repetitions: Callable[[int, int], int], record_counts: Callable[..., None]
) -> None:
    kills, choose = repetitions(2, 50), random.Random(0)
    config = tiny(shapes, tmp_path / "whole", epochs=1000, max_steps=STEPS)
    config = replace(config, log=replace(config.log, checkpoint_every=5, picture_every=10**6))
    context = forking_context()
    started = time.monotonic()
    whole = context.Process(target=_train, args=(config,))
    whole.start()
    whole.join()
    longest_s = 1.2 * (time.monotonic() - started)
    expected = state(config.run_dir)
    killed, runs, where = 0, 0, Counter[str]()
    while killed < kills:
        run = replace(config, run_dir=tmp_path / f"killed_{runs}")
        runs += 1
        for _ in range(200):
            process = context.Process(target=_train, args=(run,))
            process.start()
            # From before the run's first file to after its last.
            process.join(choose.uniform(0, longest_s) if killed < kills else None)
            if process.exitcode is None:
                time.sleep(choose.uniform(0, 0.01))
                process.kill()
                process.join()
                killed += 1
                lines = read_metrics(run.run_dir)
                last = lines[-1]["step"] if lines else 0
                where["before the first step" if not last else "after the last" if last == STEPS else "between"] += 1
            elif process.exitcode == 0:
                break
        found = state(run.run_dir)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert [line["step"] for line in read_metrics(run.run_dir)] == list(range(1, STEPS + 1))
        assert (run.run_dir / "hf" / "model.safetensors").exists()
        assert (run.run_dir / "loss.png").exists()
    record_counts(
        "kills −9 of the run",
        tried=killed,
        kills=dict(where),
        runs=runs,
        steps_of_a_run=STEPS,
        runs_with_other_results=0,
    )


def _train(config: TrainConfig) -> None:
    torch.set_num_threads(1)
    train(config)
