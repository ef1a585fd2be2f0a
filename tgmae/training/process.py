"""The training process: when Python collects garbage, and signals that ask the loop to stop."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Inside the block only `gc.collect` collects cyclic garbage, and objects that exist already are left out.

    Otherwise the collector starts whenever enough objects were made, and walks over all of torch's and the manifest's
    objects: a pause in one process for which all other processes wait. Memory without cycles is freed at once as
    always.
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
    """Catch SIGTERM and SIGINT while the block runs. The second signal interrupts at once (KeyboardInterrupt)."""
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
