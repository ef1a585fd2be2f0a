"""A killed process ends the job, or restarts it; a job that lost a machine ends like one that did not.

Single processes: test_killed_runs.py. Processes that stall: tests/tgmae/telemetry/test_watch.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.faults.two_machines import Options, make_run, rehearse, two_machines
from tests.support.runs import REPOSITORY, losses, state, wait_for_group_to_end, wait_for_step
from tgmae.telemetry.metrics import read_metrics

pytestmark = pytest.mark.slow
# Half a minute each. Two processes of which one is killed are in tests/tgmae/test_sharded_runs.py, always.
on_request = pytest.mark.skipif(os.environ.get("TGMAE_FAULTS") != "all", reason="runs with TGMAE_FAULTS=all")


def launch(options: Options, name: str, *flags: str) -> subprocess.Popen[str]:
    """Start the run `name` as two processes of torchrun."""
    assert options.manifest is not None
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]
    return subprocess.Popen(
        [*launcher, *make_run(options, options.manifest, options.folder / name)], cwd=REPOSITORY, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def find_ranks(torchrun: subprocess.Popen[str]) -> dict[int, int]:
    """Return the process of each rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    return found


def assert_same_end(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def options(shapes: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Options:
    """Twenty steps with both losses. In the folder, `alone` is such a run by two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("ranks")
    options = Options(folder, shapes, flags=("--loss.contrastive", "1", "--clip.cache-dir", str(cache_dir)))
    process = launch(options, "alone")
    assert process.wait(timeout=120) == 0, process.communicate()[0]
    return options


@on_request
def test_a_killed_rank_restarts_the_job_or_ends_it(options: Options) -> None:
    """Killed once, all restart. Again, the job ends with the reason last. Resumed, it ends as if never killed."""
    run_dir = options.folder / "killed"
    process = launch(options, "killed", "--max-restarts", "1")
    wait_for_step(run_dir, 3, process)
    before = find_ranks(process)
    os.kill(before[1], signal.SIGKILL)
    step = read_metrics(run_dir)[-1]["step"]
    wait_for_step(run_dir, step + 4, process)
    after = find_ranks(process)
    assert not set(before.values()) & set(after.values())
    os.kill(after[0], signal.SIGKILL)
    killed_s = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - killed_s < 60
    assert process.returncode == 1
    wait_for_group_to_end(process.pid)
    *_, rank, _, _, reason, border = output.splitlines()
    assert set(border) == {"="}
    assert reason == f"  traceback : Signal 9 (SIGKILL) received by PID {after[0]}"
    assert rank == "  rank      : 0 (local_rank: 0)"
    assert output.count("resuming from") == output.count("Root Cause") == 1
    assert "another one has ended" not in output  # what the other process would say
    assert read_metrics(run_dir)[-1]["step"] < options.steps

    process = launch(options, "killed")
    assert process.wait(timeout=120) == 0, process.communicate()[0]
    assert_same_end(run_dir, options.folder / "alone")


def test_what_all_ranks_meet_is_said_once(tmp_path: Path) -> None:
    """At the end of the log, and the processes that had nothing to add are not on torchrun's page."""
    process = launch(Options(tmp_path, tmp_path / "gone.parquet"), "run")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    reason = f"tgmae-train: no manifest at {tmp_path}/gone.parquet"
    assert output.splitlines()[-2].startswith(f"  traceback : {reason}")
    assert output.count(reason) == 1
    assert "<NO_OTHER_FAILURES>" in output


@on_request
def test_training_survives_the_loss_of_a_machine(options: Options) -> None:
    """Two network namespaces, everything in one of them killed half way; the end is that of two processes on one."""
    try:
        with two_machines():
            pass
    except OSError as error:
        pytest.skip(f"no two machines here: {error}")
    rehearse(options)
    assert b"resuming from" in (options.folder / "node-a.log").read_bytes()
    assert_same_end(options.folder / "run", options.folder / "alone")
