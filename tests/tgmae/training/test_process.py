"""Garbage waits for the loop to ask, and signals for the end of a step."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Iterator

import pytest

from tgmae.training import process
from tgmae.training.process import STOPPING, Stopped, ending_at_once, manual_garbage_collection, stop_requests


class _Node:
    """Refers to itself, so that counting references does not free it."""

    def __init__(self) -> None:
        self.me = self


def test_cycles_stay_until_collected() -> None:
    with manual_garbage_collection():
        assert not gc.isenabled()
        node = _Node()
        gone = weakref.ref(node)
        del node
        for _ in range(5000):  # more than the collector's threshold
            _Node()
        assert gone() is not None
        gc.collect(1)
        assert gone() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_comes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), manual_garbage_collection():
        raise RuntimeError("stop")
    assert gc.isenabled()


def test_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with manual_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in STOPPING]


@pytest.fixture
def _same_handlers_afterwards() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.usefixtures("_same_handlers_afterwards")
def test_the_first_signal_is_noted_and_the_second_ends(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_ECHO_S", 0.0)
    before = handlers()
    with stop_requests() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.number) == (True, number)
    assert handlers() == before
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match=f"stopped by {number.name} at once, .* if there is one") as caught:
            os.kill(os.getpid(), number)
    assert caught.value.number == number
    assert handlers() == [signal.SIG_DFL] * 4  # a third one kills


def test_timeout_sends_its_signal_twice() -> None:
    with stop_requests() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM


def test_torchrun_may_pass_a_signal_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stop_requests() as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert stop.requested


@pytest.mark.usefixtures("_same_handlers_afterwards")
def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ending_at_once("in vain"), stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.usefixtures("_same_handlers_afterwards")
def test_outside_the_loop_a_signal_ends_at_once() -> None:
    before = handlers()
    with ending_at_once("in vain"):
        pass
    assert handlers() == before
    with pytest.raises(Stopped, match="stopped by SIGUSR1 in vain"), ending_at_once("in vain"):
        os.kill(os.getpid(), signal.SIGUSR1)
