"""Where processes meet: what the environment says of them, and meetings that none of before disturbs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from dali_pipelines.workers.meeting import _agree_on_name, find_meeting_point, read_place

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


def test_a_restarted_job_meets_under_a_name_of_its_own() -> None:
    """In the store of those before, where their names are left: of a meeting that was held, and of one that was not."""
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))

    def agree(rank: int) -> str:
        return _agree_on_name(TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=60)), rank, 3)

    server.set("meeting", "of a first process that died before the others came")
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as threads:
            late = [threads.submit(agree, rank) for rank in (2, 1)]  # they find the old name first
            assert not any(one.done() for one in late)
            found = {one.result() for one in (*late, threads.submit(agree, 0))}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3
