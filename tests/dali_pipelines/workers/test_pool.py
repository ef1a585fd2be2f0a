"""Worker processes may be killed or stopped at any time: nothing waits for ever, and no result is lost or repeated."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dali_pipelines.workers.pool import Death, WorkerPool, WorkersFailed, map_in_workers
from dali_pipelines.workers.serving import holding_signals

pytestmark = pytest.mark.slow


def double(task: int, room: memoryview) -> int:
    room[task % len(room)] = task % 251
    return 2 * task


def die(how: Callable[[], None], deadly: int, task: int, room: memoryview) -> int:
    if task == deadly:
        how()
    return double(task, room)


def segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    os._exit(3)


def fill(size: int, task: int, _: memoryview) -> bytes:
    return bytes([task % 251]) * size


def name(task: int) -> str:
    return f"video {task}"


def drain(pool: WorkerPool[int], count: int) -> dict[int, int | Death]:
    found: dict[int, int | Death] = {}
    for _ in range(count):
        task, result = pool.take()
        assert task not in found
        found[task] = result
    return found


def test_killed_workers_lose_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """More tasks than a pipe holds, and a kill after every few hundred results, of idle and of busy processes."""
    count, choose, found = 20_000, random.Random(0), {}
    pool = WorkerPool(double, 2, name, room_bytes=1000)
    for task in range(count):
        pool.submit(task)
    kills = set(choose.sample(range(count - 1), 6))
    for place in range(count):
        task, result = pool.take()
        assert task not in found
        found[task] = result
        if place in kills:
            os.kill(choose.choice(pool.processes()), signal.SIGKILL)
    assert found == {task: 2 * task for task in range(count)}
    assert all(pool.room[-task] == (count - task) % 251 for task in range(1, 1000))
    pool.close()
    assert 1 <= capfd.readouterr().err.count("was killed by SIGKILL while it had") <= 6


@pytest.mark.parametrize(
    ("how", "said"), [(segfault, "was killed by SIGSEGV"), (leave, "ended with exit code 3")]
)  # fmt: skip
def test_a_deadly_task_is_given_up(how: Callable[[], None], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    pool = WorkerPool(partial(die, how, 3), 2, name, room_bytes=8)
    for task in range(8):
        pool.submit(task)
    found = drain(pool, 8)
    pool.close()
    assert found.pop(3) == Death(said)
    assert found == {task: 2 * task for task in range(8) if task != 3}
    err = capfd.readouterr().err
    assert f"{said} while it had video 3, for the 3rd time; skipping that" in err


def die_always(task: int, room: memoryview) -> int:
    os._exit(3)


def test_a_pool_that_only_dies_is_an_error() -> None:
    """Ten times without a result, as where memory is too short."""
    pool = WorkerPool(die_always, 1, name)
    for task in range(10):
        pool.submit(task)
    with pytest.raises(WorkersFailed, match=r"before they finish anything, 10 times in a row\. .*with exit code 3"):
        drain(pool, 10)
    pool.close()


def test_what_the_work_raises_is_raised_here() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere") as caught:
        list(map_in_workers(Path.read_text, [Path("/nowhere/at/all")], 1, str))
    assert "in read_text" in str(caught.value.__cause__)


def test_stopped_workers_are_named_and_closing_ends_the_wait(capfd: pytest.CaptureFixture[str]) -> None:
    pool = WorkerPool(double, 2, name, room_bytes=8, stall_s=0.5)
    pool.submit(0)
    assert pool.take() == (0, 0)
    for process in pool.processes():
        os.kill(process, signal.SIGSTOP)
    pool.submit(1)
    err = ""
    closer = threading.Timer(4, pool.close)
    closer.start()
    started = time.monotonic()
    with pytest.raises(WorkersFailed, match="were stopped"):
        pool.take()
    closer.join()
    err = capfd.readouterr().err
    assert "no worker process has finished anything for" in err
    for process in pool.processes():
        assert f"{process} is stopped (kill -CONT {process} continues it)" in err or f"{process} has video 1 and" in err
    assert time.monotonic() - started < 60


def test_results_larger_than_a_pipe_survive_kills() -> None:
    """A worker dies in the middle of a message, whose beginning has been read."""
    pool = WorkerPool(partial(fill, 3_000_000), 2, name)
    for task in range(12):
        pool.submit(task)
    time.sleep(1.5)  # both are likely to be writing: nobody reads
    os.kill(pool.processes()[0], signal.SIGKILL)
    found = dict(pool.take() for _ in range(12))
    pool.close()
    assert found == {task: bytes([task % 251]) * 3_000_000 for task in range(12)}


def slow_first(seconds: float, item: str) -> str:
    time.sleep(seconds if item == "a" else 0)
    return item.upper()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_come_in_order_or_as_they_are_finished(num_workers: int) -> None:
    items = list("abcdefgh")
    assert list(map_in_workers(str.upper, items, num_workers, str)) == [(item, item.upper()) for item in items]
    found = list(map_in_workers(partial(slow_first, 3.0), items, 2, str, ordered=False))
    assert sorted(found) == [(item, item.upper()) for item in items]
    assert found[0][0] != "a"


def test_stopping_early_lets_workers_finish(tmp_path: Path) -> None:
    """What a worker is writing becomes whole, and no further item is begun."""
    files = [tmp_path / str(number) for number in range(40)]
    found = map_in_workers(_write_slowly, files, 2, str, ordered=False, finish=True)
    next(found)
    found.close()  # type: ignore[attr-defined]
    written = [file for file in files if file.exists()]
    assert 1 <= len(written) <= 6
    assert all(file.read_text() == "whole" for file in written)


def _write_slowly(file: Path) -> None:
    with file.open("w") as stream:
        stream.write("wh")
        stream.flush()
        time.sleep(0.5)
        stream.write("ole")


def test_no_room_in_dev_shm_is_needed(tmp_path: Path) -> None:
    """A container has 64 MiB of it, or less."""
    script = tmp_path / "fill.py"
    script.write_text(
        "from dali_pipelines.workers.pool import WorkerPool\n"
        "from tests.dali_pipelines.workers.test_pool import double\n"
        "if __name__ == '__main__':\n"
        "    pool = WorkerPool(double, 1, str, room_bytes=1 << 23)\n"
        "    pool.submit((1 << 23) - 1)\n"
        "    print(pool.take()[1], pool.room[-1])\n"
        "    pool.close()\n"
    )
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small /dev/shm here")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {sys.executable} {script}"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}, check=False,
    )  # fmt: skip
    assert done.stdout == f"{(1 << 24) - 2} {((1 << 23) - 1) % 251}\n", done.stderr


SCRIPT = """
from dali_pipelines.workers.pool import WorkerPool
{work}
pool = WorkerPool({name}, 1, str, room_bytes=8)
pool.submit(3)
print(pool.take()[1])
pool.close()
"""


@pytest.mark.parametrize("is_file", [True, False])
def test_a_script_needs_no_guard_and_no_file(is_file: bool, tmp_path: Path) -> None:
    """Workers do not import it. On stdin, as notebooks and shells have it, there is nothing to import."""
    script = SCRIPT.format(work="from tests.dali_pipelines.workers.test_pool import double", name="double")
    (tmp_path / "script.py").write_text(script)
    done = run_script(tmp_path / "script.py" if is_file else "-", script)
    assert (done.stdout, done.stderr) == ("6\n", "")


def test_a_script_that_workers_must_import_is_told_to_guard_itself(tmp_path: Path) -> None:
    script = SCRIPT.format(work="def work(task, room):\n    return task", name="work")
    (tmp_path / "script.py").write_text(script)
    done = run_script(tmp_path / "script.py")
    [message] = [line for line in done.stderr.splitlines() if "worker processes" in line]
    assert message.endswith('put all else in it below a line `if __name__ == "__main__":`')
    assert done.stderr.count("Traceback") == 1


def run_script(script: Path | str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script], input=text, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )  # fmt: skip


def test_a_signal_waits_while_workers_start_whichever_thread_gets_it() -> None:
    """The kernel gives it to a thread that does not block it, and Python runs its handler in the main thread."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which nohup ignores
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    done = []

    def start_workers() -> None:
        with holding_signals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            done.append("start")

    try:
        with pytest.raises(KeyboardInterrupt):
            start_workers()
    finally:
        end.set()
        other.join()
        signal.signal(signal.SIGINT, before)
    assert done == ["start"]
