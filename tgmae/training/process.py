"""The training process: when Python collects garbage, and signals that ask the loop to stop."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Inside, garbage that refers to itself is collected by `gc.collect` only, and what exists already is left out.

    The collector otherwise starts whenever enough objects were made, and looks at all of torch's and the manifest's: a
    pause in one process that every other process then waits for. Memory without cycles is freed at once as always.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


class StopRequest:
    """Set by the first signal."""

    requested = False
    name = ""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the two signals while the block runs; a second one interrupts at once (KeyboardInterrupt)."""
    stop = StopRequest()

    def request(number: int, _frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested, stop.name = True, signal.Signals(number).name

    old = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
