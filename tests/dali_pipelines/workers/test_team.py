"""What the environment says of the processes that share a job. Real ones: tests/tgmae/cli/test_shared_commands.py."""

from __future__ import annotations

import pytest

from dali_pipelines.workers.team import Team, find_meeting_point, read_place

BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}  # before it calls srun
STEP = {**BATCH_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_PROCID": "5"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [({}, (0, 1)), (TORCHRUN, (1, 2)), (BATCH_SCRIPT, (0, 1)), (STEP, (5, 8)), ({**STEP, **TORCHRUN}, (1, 2))],
    ids=["alone", "torchrun", "batch script", "srun", "srun torchrun"],
)
def test_place(environment: dict[str, str], place: tuple[int, int]) -> None:
    assert read_place(environment) == place


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("n7", "n7"), ("n7,n9", "n7"), ("gpu-[007-010,12]", "gpu-007"), ("a[3,5],b[1-2]", "a3"), ("10.0.0.2", "10.0.0.2")],
)
def test_first_host_of_a_step(hosts: str, first: str) -> None:
    """Every process finds the same port, and that of the next step is another one."""
    host, port = find_meeting_point({**STEP, "SLURM_STEP_NODELIST": hosts})
    assert host == first
    assert 20_000 <= port < 30_000
    assert find_meeting_point({**STEP, "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": hosts}) != (host, port)


def test_no_host() -> None:
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST is '', expected hosts; set MASTER_ADDR and MASTER_PORT"):
        find_meeting_point(STEP)


def test_shares_are_disjoint_and_complete() -> None:
    shares = [Team(rank, 3).divide(range(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
