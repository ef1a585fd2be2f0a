"""SIGTERM and SIGINT as a request that the training loop answers after the step under way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
