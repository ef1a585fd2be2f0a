"""Where the processes of a job meet: a store that they share, under a name that no meeting before this one had."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds, which one process alone does without
    from torch.distributed.distributed_c10d import Store

_PORTS = range(20_000, 30_000)  # for jobs of srun, which names none; below those that Linux gives to outgoing calls
_PATIENCE_S = 1800  # torch's own for processes that are late


def read_place(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as torchrun says, or else srun.

    A batch script is not started by srun, but has SLURM_PROCID and SLURM_NTASKS, too; it is one process.
    """
    if "RANK" in environment:
        return int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1"))
    if "SLURM_STEP_ID" in environment:
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
    return 0, 1


def find_meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return the first host of a job step of Slurm, and a port that other steps are unlikely to use."""
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)  # n7, n7,n9 or rack1-n[007-010,12]
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {hosts!r}, expected hosts; set MASTER_ADDR and MASTER_PORT instead")
    step = 31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return "".join(part or "" for part in found.groups()), _PORTS[step % len(_PORTS)]


def join_group(backend: str, rank: int, size: int) -> Store:
    """Make the default process group as soon as all processes are at MASTER_ADDR; return the store that they share.

    torchrun keeps its store when it restarts processes (torch 2.11), with all that the dead ones wrote there: the new
    ones would call their addresses. So each meeting writes under a name of its own.

    Raises ConnectionError where a process does not come, or the host or the port cannot be used.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store: Store = next(rendezvous("env://", rank, size))[0]
        store = PrefixStore(f"meeting/{_agree_on_name(store, rank, size)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except RuntimeError as error:  # a port that is taken, a host that is not there, a process that never came
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"rank {rank} of {size} did not meet the others: {reason}") from error
    return store


def _agree_on_name(store: Store, rank: int, size: int) -> str:
    """Return a name for this meeting: the first process chooses it, and lists those that have answered.

    A process may read the name of an earlier meeting first. It knows by the list, which does not have it, and asks
    again.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("meeting", me)
        answers = [store.get(f"{me}/{other}").decode() for other in range(1, size)]
        store.set(f"{me}/all", " ".join(answers))
        return me
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        name: str = store.get("meeting").decode()
        store.set(f"{name}/{rank}", me)
        if store.check([f"{name}/all"]) and me in store.get(f"{name}/all").decode():
            return name
        time.sleep(0.1)
    raise RuntimeError(f"no list of processes within {_PATIENCE_S // 60} minutes")
