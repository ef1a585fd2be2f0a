"""Stage times add up, on the host and on the GPU."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tgmae.telemetry.stage_clock import StageClock

CPU = torch.device("cpu")


def test_times_add_up_by_stage() -> None:
    """Clock readings bracket the times, so that a busy machine changes nothing."""
    clock, longest = StageClock(CPU), 0.0
    assert clock.totals() == {}
    for _ in range(3):
        before = time.perf_counter()
        with clock("load", host=True):
            time.sleep(0.01)
        longest += time.perf_counter() - before
    before = time.perf_counter()
    with clock("score"):
        pass
    shortest = time.perf_counter() - before
    totals = clock.totals()
    assert list(totals) == ["load", "score"]
    assert 0.03 <= totals["load"] <= longest
    assert 0 <= totals["score"] <= shortest


def test_totals_are_a_copy() -> None:
    clock = StageClock(CPU)
    with clock("mask"):
        pass
    totals = clock.totals()
    totals["mask"] = 99.0
    with clock("mask"):
        pass
    assert clock.totals()["mask"] < 99


def test_stages_nest_and_errors_pass() -> None:
    clock = StageClock(CPU)
    with clock("outer"), clock("inner"):
        time.sleep(0.005)
    assert clock.totals()["outer"] >= clock.totals()["inner"] >= 0.005
    with pytest.raises(RuntimeError, match="broken"), clock("outer"):
        raise RuntimeError("broken")


def test_any_thread_may_read_while_another_counts() -> None:
    clock, stop, seen = StageClock(CPU), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(len(clock.totals()))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(2000):
        with clock(f"stage {number}"):
            pass
    stop.set()
    reader.join()
    assert seen == sorted(seen)
    assert len(clock.totals()) == 2000


@pytest.mark.gpu
def test_gpu_time_is_the_gpus() -> None:
    """Events measure the kernels although the host runs ahead; host=True measures the host."""
    device = torch.device("cuda")
    clock = StageClock(device)
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    with clock("work"):
        for _ in range(30):
            matrix = matrix @ matrix * 1e-4
    with clock("waiting", host=True):
        time.sleep(0.01)
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    with clock("after"):
        pass
    totals = clock.totals()
    assert 0 < totals["work"] <= elapsed
    assert totals["waiting"] >= 0.01
