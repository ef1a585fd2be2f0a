"""How a process ends that is one of several: the reason is said once, and the processes that go with it are silent.

torchrun asks the other processes of its machine to end (SIGTERM) as soon as one has failed. Without restarts left it
then prints a page whose last lines are the message that the failed one left in the file TORCHELASTIC_ERROR_FILE; each
process that ended with another code than 0 is on that page, too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dali_pipelines.workers.meeting import read_place

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Seconds that a process waits for torchrun's SIGTERM before it speaks. What concerns all processes alike, the first one
# of the machine says, and the others have this time to find that out. Where another process was lost, torchrun knows
# within a tenth of a second if it was on this machine; the rest is for the reason to come from another one.
_SAME_ERROR_S = 10
_LOST_S = 40
_AFTER_THE_FIRST_S = 10


_HEARD_S = 2  # seconds in which a reason that was told is heard by the others


class PeerLost(ConnectionError):
    """Another process of the job has ended or cannot be reached.

    reason   what it has said of that, "" for nothing
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def noticing_losses(rank: int, size: int, store: Store | None) -> Iterator[None]:
    """Inside the block, the end of another process is a PeerLost, and what ends this one is told to the others.

    torchrun's page on another machine then gives the reason, too.
    """
    try:
        yield
    except Exception as error:
        is_loss = _is_loss(error)
        if store is None or isinstance(error, PeerLost) or not (is_loss or is_launched()):
            raise
        if not is_loss:
            with suppress(RuntimeError):  # the store may be gone
                text = f"rank {rank} of {size} on {socket.gethostname()} has ended: {first_line(error)}"
                tell(store, Reason(text, find_machine()))
            raise
        reason = None
        with suppress(RuntimeError):
            reason = hear(store, _HEARD_S) if is_launched() else None
        why = reason.text if reason else "another one has ended; its message says why"
        raise PeerLost(f"rank {rank} of {size} ends because {why}", reason.text if reason else "") from error


def _is_loss(error: Exception) -> bool:
    """Return whether gloo, the store or NCCL says so: connection closed, reset, refused; a remote process exiting."""
    text, is_torchs = str(error), "gloo" in str(error) or type(error).__name__.startswith("Dist")
    return isinstance(error, RuntimeError) and is_torchs and ("onnection" in text or "remote process" in text)


@dataclass(frozen=True)
class Reason:
    """Why the job ends.

    machine   whose torchrun knows it already, as the process that tells it ends by itself; "" for none
    """

    text: str
    machine: str


def tell(store: Store, reason: Reason) -> None:
    """Tell the other processes why the job ends, unless one has done so."""
    store.compare_set("reason", "", json.dumps([reason.text, reason.machine]))


def hear(store: Store, patience_s: float = 0) -> Reason | None:
    """Return why the job ends, None if nobody has told. Raises RuntimeError where the store is gone."""
    deadline = time.monotonic() + patience_s
    while not store.check(["reason"]):
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)
    return Reason(*json.loads(store.get("reason")))


def find_machine() -> str:
    """Return torchrun's number of this machine, or the process itself without torchrun."""
    return os.environ.get("GROUP_RANK", f"process {read_place(os.environ)[0]}")


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return str(error).partition("\n")[0]


def is_launched() -> bool:
    """Return whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave(message: str, code: int = 1, was_lost: bool = False) -> NoReturn:
    """End this process with a message on stderr and an exit code, or silently where torchrun asks it to end.

    was_lost   the reason is the end of another process (PeerLost)
    """
    take_turn(message, was_lost)
    if not is_said_here():
        sys.exit(code)
    if code != 1:
        print(message, file=sys.stderr, flush=True)
    sys.exit(message if code == 1 else code)  # Python prints the message and ends with 1


def take_turn(message: str, was_lost: bool = False) -> None:
    """Wait until it is this process's turn to say why it ends, and leave the message for torchrun's page.

    Exits with 0 where torchrun asks it to end meanwhile. Must be called in the main thread.
    """
    if not is_launched():
        return
    is_first = os.environ["LOCAL_RANK"] == "0"
    patience = _LOST_S + _AFTER_THE_FIRST_S * (not is_first) if was_lost else _SAME_ERROR_S * (not is_first)

    def end(*_: object) -> NoReturn:
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    time.sleep(patience)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # too late: this process speaks
    leave_for_page(message)


def is_said_here() -> bool:
    """Return whether this process prints why it ends. torchrun's page does it where no restarts are left."""
    return not is_launched() or int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(
        os.environ["TORCHELASTIC_MAX_RESTARTS"]
    )


def leave_for_page(message: str) -> None:
    """Write the message where torchrun looks for it: as a "traceback", which is the last line of its page."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def leave_on_signal(message: str, number: int) -> NoReturn:
    """End this process because of a signal, with 128 + its number.

    The SIGTERM that torchrun sends where another process has failed is answered silently and with 0: it is not this
    process that failed.
    """
    is_asked = is_launched() and read_place(os.environ)[1] > 1 and number == signal.SIGTERM
    if not is_asked:
        print(message, file=sys.stderr, flush=True)
    sys.exit(0 if is_asked else 128 + number)
