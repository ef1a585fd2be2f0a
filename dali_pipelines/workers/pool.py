"""Worker processes that may be killed at any time: nothing waits for ever, and no result is lost.

DALI's and Python's own pools share locks between processes. A process that is killed while it holds one leaves all
others waiting. Here processes share nothing that can be held:

    tasks     one pipe that all workers read. The kernel hands every eight bytes, one task, to exactly one of them.
    results   one pipe from each worker.
    memory    anonymous shared memory: what each worker is doing, the work itself (pickled once), and room for results
              that are too large for a pipe. It needs no room in /dev/shm, and no kill leaves anything behind.

After a death all workers are replaced, which takes a second, and whatever had no result yet is done again.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from multiprocessing import connection, util
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from dali_pipelines.workers.processes import hiding_main_module, is_importing_main_module
from dali_pipelines.workers.serving import TASK, Inbox, SharedMemory, holding_signals, serve

Item = TypeVar("Item")
Result = TypeVar("Result")

_DEATHS_PER_TASK = 3  # after which a task is given up
_BARREN_DEATHS = 10  # deaths in a row, without a result in between, after which everything is given up
_POLL_S = 1.0
_SLOW_S = 300.0  # `stall_s` where a task is a whole video
_UNGUARDED = 78  # exit code of a worker that imports a script which starts workers of its own
_FINISH_S = 60.0  # seconds that workers get to finish a task when a pool is closed that lets them


class WorkersFailed(ValueError):
    """Worker processes die again and again, or the pool was closed while it was waited for."""


@dataclass(frozen=True)
class Death:
    """Takes the place of a result: the task killed its worker several times."""

    how: str  # "was killed by SIGSEGV"

    def __str__(self) -> str:
        return f"the worker process that read it {self.how}, {_DEATHS_PER_TASK} times"


class WorkerPool(Generic[Result]):
    """Computes `work(task, room)` for numbered tasks in worker processes.

    work         is pickled once; tasks are numbers from 0. Workers import the program's main module only if `work` is
                 defined there
    describe     names a task, for messages
    room_bytes   size of `room`, memory shared by all workers and this process (`self.room`)
    stall_s      seconds without any result after which the workers' tasks are named on the terminal

    Workers ignore Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, so that their parent can finish what it is doing. They end with
    it, even if it is killed.
    """

    def __init__(
        self, work: Callable[[int, memoryview], Result], num_workers: int, describe: Callable[[int], str],
        room_bytes: int = 0, stall_s: float = 30.0,
    ) -> None:  # fmt: skip
        pickled = pickle.dumps(work)
        self._needs_main = b"__main__" in pickled
        self._memory = SharedMemory.allocate(num_workers, pickled, room_bytes)
        self.room = self._memory.room
        self._num_workers, self._describe, self._stall_s = num_workers, describe, stall_s
        self._outstanding: dict[int, None] = {}  # tasks without a result, in the order of submission
        self._unsent: deque[int] = deque()
        self._results: deque[tuple[int, Result | Death]] = deque()
        self._deaths: Counter[int] = Counter()
        self._barren = 0
        self._lock = threading.Lock()  # `close` may come from another thread than `take`
        self._is_closed = False
        self._start()

    def submit(self, task: int) -> None:
        """Queue a task. Its result will come once from `take`."""
        assert task not in self._outstanding
        self._outstanding[task] = None
        self._unsent.append(task)
        self._send()

    def take(self) -> tuple[int, Result | Death]:
        """Wait for the next task that is finished, in any order, and return its number and result.

        Raises what `work` raised, and WorkersFailed where workers keep dying.
        """
        assert self._results or self._outstanding
        started, patience_s = time.monotonic(), self._stall_s
        while not self._results:
            with self._lock:
                if self._is_closed:
                    raise WorkersFailed("the worker processes were stopped")
                self._send()
                workers = self._workers
            sources = {worker.inbox.fd: worker for worker in workers}
            sentinels = [worker.process.sentinel for worker in workers]
            for source in connection.wait([*sources, *sentinels], timeout=_POLL_S):
                if source in sources:
                    self._receive(sources[source])
            with self._lock:
                if not self._is_closed:
                    if dead := [worker for worker in workers if worker.process.exitcode is not None]:
                        self._replace(dead)
                    if not self._results and (waited_s := time.monotonic() - started) > patience_s:
                        self._name_stalled(waited_s)
                        patience_s *= 2
        return self._results.popleft()

    def close(self, finish: bool = False) -> None:
        """End the workers, at once or when each has finished its task.

        A `take` in another thread raises WorkersFailed.
        """
        with self._lock:
            self._is_closed = True
            if finish:
                self._memory.stop[:] = 1
                self._tasks.close()
                self._queue.close()
                deadline = time.monotonic() + _FINISH_S
                for worker in self._workers:
                    worker.process.join(max(deadline - time.monotonic(), 0))
            self._finalizer()

    def processes(self) -> list[int]:
        """Return the process numbers of the workers."""
        return [worker.process.pid or 0 for worker in self._workers]

    def _start(self) -> None:
        if is_importing_main_module():
            os._exit(_UNGUARDED)  # `_replace` says why
        context = multiprocessing.get_context("spawn")
        self._memory.doing[:], self._memory.stop[:] = 0, 0
        # This process keeps the end that workers read from, too: writing must not fail when the last of them is dead.
        self._queue, self._tasks = context.Pipe(duplex=False)
        os.set_blocking(self._tasks.fileno(), False)
        self._unsent = deque(self._outstanding)
        self._workers: list[_Worker] = []
        with holding_signals(), nullcontext() if self._needs_main else hiding_main_module():
            for place in range(self._num_workers):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=serve, args=(place, self._memory, self._queue, writer), daemon=True)
                process.start()
                writer.close()  # a dead worker then leaves a pipe with an end
                self._workers.append(_Worker(place, process, Inbox(reader)))
            # Also runs before Python joins its daemons at exit, which would wait for processes that ignore SIGTERM.
            self._finalizer = util.Finalize(self, _kill, args=(self._workers,), exitpriority=20)

    def _send(self) -> None:
        """Write queued tasks to the pipe until it is full."""
        while self._unsent:
            try:
                os.write(self._tasks.fileno(), TASK.pack(self._unsent[0]))
            except BlockingIOError:
                return
            self._unsent.popleft()

    def _receive(self, worker: _Worker) -> None:
        for task, result, error in worker.inbox.read():
            del self._outstanding[task]
            self._barren = 0
            self._deaths.pop(task, None)
            if error is not None:
                raise result from RuntimeError(error)
            self._results.append((task, result))

    def _replace(self, dead: list[_Worker]) -> None:
        """Kill the workers that are left, blame the tasks of the `dead`, and start again."""
        how = {worker.place: _describe_end(worker.process.exitcode or 0) for worker in dead}
        self._finalizer()
        for worker in self._workers:
            self._receive(worker)
        self._barren += 1
        for worker in dead:
            task = self._task_of(worker)
            doing = self._describe(task) if task in self._outstanding else "nothing to do"
            said = f"worker process {worker.process.pid} {how[worker.place]} while it had {doing}"
            if worker.process.exitcode == _UNGUARDED:
                self._is_closed = True
                raise WorkersFailed(
                    "worker processes import the script that was started, because it defines what they run: put all "
                    'else in it below a line `if __name__ == "__main__":`'
                )
            if self._barren >= _BARREN_DEATHS:
                self._is_closed = True
                raise WorkersFailed(
                    f"worker processes die before they finish anything, {self._barren} times in a row. The last "
                    f"{said.removeprefix('worker process ')}.{_advise(worker)}"
                )
            self._deaths[task] += 1
            if task in self._outstanding and self._deaths[task] == _DEATHS_PER_TASK:
                del self._outstanding[task]
                self._results.append((task, Death(how[worker.place])))
                said += f", for the {_DEATHS_PER_TASK}rd time; skipping that"
            else:
                said += "; restarting the workers and repeating what was not finished"
            tqdm.write(f"{said}.{_advise(worker)}", file=sys.stderr)
        self._start()

    def _task_of(self, worker: _Worker) -> int:
        """Return the task that a worker has, or −1."""
        return int(self._memory.doing[worker.place]) - 1

    def _name_stalled(self, seconds: float) -> None:
        """Say what the workers have been doing all the time."""
        said = []
        for worker in self._workers:
            task, pid = self._task_of(worker), worker.process.pid
            doing = f" has {self._describe(task)}" if task in self._outstanding else ""
            if _is_stopped(pid):
                doing += f"{' and' * bool(doing)} is stopped (kill -CONT {pid} continues it)"
            said += [f"{pid}{doing}"] if doing else []
        listed = ", ".join(said) or "none of them has begun anything"
        tqdm.write(f"no worker process has finished anything for {seconds:.0f} s: {listed}", file=sys.stderr)


class _Worker:
    """A process, as its parent sees it."""

    def __init__(self, place: int, process: Any, inbox: Inbox) -> None:
        self.place, self.process, self.inbox = place, process, inbox


def _kill(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # SIGKILL: they ignore everything else, and one may be stopped
    for worker in workers:
        worker.process.join()


def _describe_end(exit_code: int) -> str:
    return f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"


def _advise(worker: _Worker) -> str:
    if worker.process.exitcode != -signal.SIGKILL:
        return ""
    return " The kernel does that where memory runs out: fewer workers need less"


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def map_in_workers(
    work: Callable[[Item], Result], items: Sequence[Item], num_workers: int, describe: Callable[[Item], str],
    *, ordered: bool = True, finish: bool = False,
) -> Iterator[tuple[Item, Result | Death]]:  # fmt: skip
    """Yield every item with work(item), computed a few items ahead in worker processes; with no workers, in this one.

    describe  names an item, for messages
    ordered   whether results come in the order of `items`, or as they are finished
    finish    whether workers may finish their item when the caller stops early

    A `Death` takes the place of a result where an item killed its worker several times. Raises WorkersFailed where
    workers keep dying.
    """
    if not num_workers:
        yield from ((item, work(item)) for item in items)
        return
    if not items:  # a finished folder starts none
        return
    num_workers = min(num_workers, len(items))
    pickled = [pickle.dumps(item) for item in items]
    ends = list(accumulate(map(len, pickled), initial=0))
    pool = WorkerPool(
        partial(_work_on_item, work, ends), num_workers, lambda place: describe(items[place]), ends[-1], _SLOW_S
    )
    pool.room[:] = b"".join(pickled)
    left, ahead = iter(range(len(items))), 3 * num_workers
    waited_for: deque[int] = deque()
    finished: dict[int, Result | Death] = {}
    try:
        while True:
            for place in islice(left, ahead - len(waited_for)):
                pool.submit(place)
                waited_for.append(place)
            if not waited_for:
                break
            while waited_for[0] not in finished if ordered else not finished:
                place, result = pool.take()
                finished[place] = result
            place = waited_for[0] if ordered else next(iter(finished))
            waited_for.remove(place)
            yield items[place], finished.pop(place)
    finally:
        pool.close(finish)


def _work_on_item(work: Callable[[Any], Result], ends: list[int], place: int, room: memoryview) -> Result:
    return work(pickle.loads(room[ends[place] : ends[place + 1]]))
