"""Which process of a run stalls: each says what it is doing in the store that all share, and reads what the others say.

Collectives wait for the last process, and neither gloo nor NCCL says which one that is. A thread of each process writes
a sign of life every two seconds. It goes on while the process waits, for input, a GPU or the others; it does not in a
process that was stopped or killed, or whose machine is gone.
"""

from __future__ import annotations

import atexit
import enum
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from dali_pipelines.workers.endings import Reason, find_machine, first_line, hear, is_said_here, leave_for_page, tell

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

BEAT_S = 2.0  # between two signs of life
# Without a sign of life for so long, a process is taken for dead, and the job ends. Until a step is done, a library
# that is read from a slow network disk may keep all threads of a process from running for minutes.
SILENT_S, SILENT_AT_FIRST_S = 30.0, 300.0
SLOW_S = 60.0  # a process that keeps the others waiting for so long is named
STALLED_S = 540.0  # and after so long the job ends: before NCCL, which after ten minutes ends it without a name
TAKE_OVER_S = 10.0  # for the main thread to end by itself, once the reason is known; then this process is ended


class Phase(enum.IntEnum):
    """What a process is doing, in the order of a step."""

    SET_UP = 0
    INPUT = 1
    STEP = 2
    REPORT = 3
    END = 4


_WORDS = {
    Phase.SET_UP: "setting up",
    Phase.INPUT: "waiting for input of step {}",
    Phase.STEP: "in step {}",
    Phase.REPORT: "reporting, validating or saving after step {}",
    Phase.END: "saving and exporting after step {}",
}


@dataclass(frozen=True)
class Sign:
    """A sign of life. Who is farther has the larger (step, forward_pass, phase)."""

    count: int
    rank: int
    machine: str
    host: str
    pid: int
    step: int  # steps done
    forward_pass: int
    phase: int

    @property
    def progress(self) -> tuple[int, int, int]:
        return self.step, self.forward_pass, self.phase

    @property
    def doing(self) -> str:
        return _WORDS[Phase(self.phase)].format(self.step + (self.phase in (Phase.INPUT, Phase.STEP)))

    def describe(self, size: int) -> str:
        return f"rank {self.rank} of {size} (process {self.pid} on {self.host}, last {self.doing})"


@dataclass
class _Seen:
    """The newest sign of a process, when it came, and since when it shows the same progress, on this one's clock."""

    sign: Sign
    at_s: float
    since_s: float


class Watch:
    """Watches over all processes of a run from a thread, until `close`.

    It ends this process (exit code 1) where another one gives no sign of life, or keeps the others waiting for minutes.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        # A connection of its own: the main thread keeps the first one while it waits.
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self._now = (Phase.SET_UP, 0, 0)
        self._seen: dict[int, _Seen] = {}
        self._named = self._reason = ""
        self._has_given_up = self._has_trained = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that uses the store while Python ends would abort the process

    def note(self, phase: Phase, step: int, forward_pass: int) -> None:
        """Note what this process is doing. It takes no time: the thread tells the others."""
        self._now = (phase, step, -1 if phase > Phase.STEP else forward_pass)
        self._has_trained |= phase > Phase.STEP

    def give_up(self, reason: str) -> None:
        """End this process as soon as a reason is known, which may be given here: another process was lost."""
        self._has_given_up, self._reason = True, self._reason or reason

    def close(self) -> None:
        """Stop watching; the others no longer expect signs of life."""
        self._closed.set()
        self._thread.join(timeout=2 * BEAT_S)
        atexit.unregister(self.close)

    def _run(self) -> None:
        count, known_s, before_s = 0, 0.0, time.monotonic()
        try:
            while not self._closed.is_set():
                if time.monotonic() - before_s > BEAT_S + SILENT_S / 2:
                    self._seen.clear()  # Slurm may have stopped the whole job, and let it go on
                before_s = time.monotonic()
                count += 1
                self._store.set(self._key(self.rank), json.dumps(asdict(self._make_sign(count))))
                self._read_signs()
                self._judge()
                if reason := hear(self._store):
                    known_s, self._reason = known_s or time.monotonic(), reason.text
                    self._end_if_stuck(reason, time.monotonic() - known_s)
                self._closed.wait(BEAT_S)
            self._store.set(self._key(self.rank), "")
        except RuntimeError as error:  # the store is gone, and with it the first machine or torchrun
            if not self._closed.wait(TAKE_OVER_S):
                self._end(self._reason or f"rank 0 does not answer: {first_line(error)}")

    def _make_sign(self, count: int) -> Sign:
        phase, step, forward_pass = self._now
        return Sign(count, self.rank, find_machine(), socket.gethostname(), os.getpid(), step, forward_pass, int(phase))

    @staticmethod
    def _key(rank: int) -> str:
        return f"sign/{rank}"

    def _read_signs(self) -> None:
        keys, now = [self._key(rank) for rank in range(self.size)], time.monotonic()
        if not self._store.check(keys):  # some have not started
            return
        for rank, text in enumerate(self._store.multi_get(keys)):
            if not text:  # it has left
                self._seen.pop(rank, None)
                continue
            sign, before = Sign(**json.loads(text)), self._seen.get(rank)
            if before is None or before.sign.progress != sign.progress:
                self._seen[rank] = _Seen(sign, now, now)
            elif before.sign.count != sign.count:
                before.sign, before.at_s = sign, now

    def _judge(self) -> None:
        """Tell all processes why the job must end, if it must. The first one says which processes are slow."""
        if silent := self._find_silent():
            silent_s = time.monotonic() - min(self._seen[rank].at_s for rank in silent)
            tell(self._store, Reason(f"{self._name(silent)} gave no sign of life for {silent_s:.0f} s", ""))
            return
        signs = [seen.sign for seen in self._seen.values()]
        last = min((sign.progress for sign in signs), default=None)
        late = [sign.rank for sign in signs if sign.progress == last]
        waited_s = time.monotonic() - max((seen.since_s for seen in self._seen.values()), default=math.inf)
        if waited_s > STALLED_S and len(late) < len(signs):
            tell(self._store, Reason(f"{self._name(late)} kept the others waiting for {waited_s / 60:.0f} min", ""))
        elif waited_s > SLOW_S and self.rank == min(self._seen):
            if len(late) < len(signs):
                self._say(f"waiting for {waited_s:.0f} s: {self._name(late)}", str(last))
            elif signs[0].phase in (Phase.INPUT, Phase.STEP):
                self._say(f"all processes have been {signs[0].doing} for {waited_s:.0f} s", "all")

    def _find_silent(self) -> list[int]:
        before_s = time.monotonic() - (SILENT_S if self._has_trained else SILENT_AT_FIRST_S)
        return [rank for rank, seen in self._seen.items() if seen.at_s < before_s]

    def _name(self, ranks: Sequence[int]) -> str:
        more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
        return ", ".join(self._seen[rank].sign.describe(self.size) for rank in ranks[:3]) + more

    def _say(self, text: str, progress: str) -> None:
        if progress != self._named:
            self._named = progress
            with tqdm.external_write_mode():
                print(text, flush=True)

    def _end_if_stuck(self, reason: Reason, known_s: float) -> None:
        """End this process where the main thread does not, if it is the first living one of its machine.

        Without a SIGTERM, torchrun is then told by this process.
        """
        machine, silent = find_machine(), self._find_silent()
        here = [r for r, seen in self._seen.items() if seen.sign.machine == machine and r not in silent]
        patience_s = STALLED_S if self._now[0] == Phase.END else TAKE_OVER_S  # it may be saving
        is_stuck = self._has_given_up or known_s > patience_s
        if is_stuck and reason.machine != machine and self.rank == min(here, default=self.rank):
            self._end(reason.text)

    def _end(self, reason: str) -> None:
        """End this process, whose main thread is stuck. Its checkpoints are whole; what they lack is lost."""
        message = f"rank {self.rank} of {self.size} ends because {reason}"
        leave_for_page(message)
        if is_said_here():
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
