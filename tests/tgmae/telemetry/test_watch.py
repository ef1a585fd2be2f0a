"""A process that keeps the others waiting is named: its input, its step, its silence."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from dali_pipelines.workers.endings import hear
from tests.support.runs import command, wait_for_step
from tests.tgmae.test_stopping import TWO, start_two
from tgmae.telemetry import watch
from tgmae.telemetry.watch import Phase, Watch


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TCPStore, Watch, Watch]]:
    """Two processes that watch each other, here as two threads of one."""
    monkeypatch.setattr(watch, "BEAT_S", 0.02)
    monkeypatch.setattr(watch, "TAKE_OVER_S", math.inf)  # these "processes" must not be ended
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
    first, second = Watch(store, 0, 2), Watch(store, 1, 2)
    yield store, first, second
    first.close()
    second.close()


def wait_until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_whose_input_does_not_come(
    pair: tuple[TCPStore, Watch, Watch], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named once; after minutes the job ends because of it."""
    store, first, second = pair
    monkeypatch.setattr(watch, "SLOW_S", 0.2)
    first.note(Phase.STEP, 7, 1)
    second.note(Phase.INPUT, 7, 1)
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return "rank 1 of 2" in said

    wait_until(is_said)
    assert said.count(" s: rank") == 1
    assert f"rank 1 of 2 (process {os.getpid()} on " in said
    assert "last waiting for input of step 8)" in said
    assert hear(store) is None
    monkeypatch.setattr(watch, "STALLED_S", 0.2)
    wait_until(lambda: hear(store))
    reason = hear(store)
    assert reason is not None
    assert "last waiting for input of step 8) kept the others waiting for" in reason.text
    second.note(Phase.STEP, 7, 1)


def test_a_process_that_has_left_is_not_missed(
    pair: tuple[TCPStore, Watch, Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is closed no longer gives signs of life; one that is silent otherwise is named."""
    store, first, second = pair
    for one in (first, second):
        one.note(Phase.END, 9, 0)
    wait_until(lambda: {0, 1} <= first._seen.keys())
    second.close()
    wait_until(lambda: 1 not in first._seen)
    monkeypatch.setattr(watch, "SILENT_S", 0.5)
    assert hear(store, 1) is None
    third = Watch(store, 1, 2)
    try:
        third.note(Phase.STEP, 9, 0)
        wait_until(lambda: 1 in first._seen and first._seen[1].sign.phase == Phase.STEP)
        third._make_sign = lambda _: first._seen[1].sign  # type: ignore[method-assign]  # the same again and again
        wait_until(lambda: hear(store))
    finally:
        third.close()
    reason = hear(store)
    assert reason is not None
    assert re.fullmatch(
        r"rank 1 of 2 \(process \d+ on \S+, last in step 10\) gave no sign of life for \d+ s", reason.text
    )


QUICK = """
import tgmae.telemetry.watch as watch
watch.SILENT_S, watch.TAKE_OVER_S = 3, 1
from tgmae.cli.train import main
main()
"""


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_the_run(shapes: Path, tmp_path: Path) -> None:
    """It is named, with its host and what it did; the other one waits in a collective that nothing ends."""
    arguments = [sys.executable, "-c", QUICK, *command(shapes, tmp_path / "run", *TWO)[3:]]
    first, second = start_two(arguments)
    wait_for_step(tmp_path / "run", 2, first)
    second.send_signal(signal.SIGSTOP)
    output = first.communicate(timeout=120)[0]
    second.kill()
    second.communicate()
    assert first.returncode == 1, output
    last = output.splitlines()[-1]
    assert last.startswith(f"rank 0 of 2 ends because rank 1 of 2 (process {second.pid} on "), output
    assert last.split(") ")[-1].startswith("gave no sign of life for ")
    assert "Traceback" not in output
