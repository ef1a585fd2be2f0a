"""The training process: when Python collects garbage, and signals that ask it to stop."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

from dali_pipelines.workers.endings import PeerLost
from dali_pipelines.workers.processes import STOPPING

# `timeout` sends its signal to the program and then to the program's group, and batch systems do the like. Within this
# time, in seconds, it is one request.
_ECHO_S = 0.5


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


class Stopped(KeyboardInterrupt):
    """A signal ended the program at once. The message says what that cost."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """Set by the first signal.

    number   of the signal; 0 as long as there was none
    """

    number = 0
    _since_s = 0.0  # time of that signal

    @property
    def requested(self) -> bool:
        return self.number != 0

    def note(self, number: int) -> None:
        """Take note of a signal."""
        if number != self.number:
            self.number, self._since_s = number, time.monotonic()

    def is_echo(self, number: int) -> bool:
        """Return whether this signal is the first one, sent twice."""
        return number == self.number and time.monotonic() - self._since_s < _ECHO_S


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the signals that ask to stop while the block runs. The second one ends the program at once (Stopped)."""
    stop = StopRequest()
    # Ctrl-C reaches every process of a terminal, and torchrun passes its own on. It kills processes 30 s later.
    is_repeated = "TORCHELASTIC_RUN_ID" in os.environ

    def request(number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if stop.requested and not is_repeated and not stop.is_echo(number):
            _end(
                number, "at once, because it was the second signal; the same command resumes from the last checkpoint, "
                "if there is one",
            )  # fmt: skip
        stop.note(number)

    with _handled_by(request):
        try:
            yield stop
        except PeerLost as error:
            if stop.requested:  # torchrun noticed it, too
                raise Stopped(stop.number, str(error)) from error
            raise


@contextmanager
def ending_at_once(message: str) -> Iterator[None]:
    """Have every signal that asks to stop end the block at once: it raises Stopped with the message.

    A signal that arrives while Python shuts down ends the process silently.
    """

    def end(number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        _end(number, message)

    atexit.register(_restore_defaults)
    _start_resource_tracker()
    with _handled_by(end):
        yield


def _start_resource_tracker() -> None:
    """Start the process that multiprocessing keeps beside workers. It is deaf to Ctrl-C, and with this to all STOPPING.

    Otherwise it dies of a signal to the whole group, and its successor complains about what it was not told.
    """
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGUSR1)}
    resource_tracker.ensure_running()
    for number, previous in old.items():
        signal.signal(number, previous)


def _end(number: int, message: str) -> None:
    _restore_defaults()  # a further signal must not interrupt the cleaning up, but kill
    raise Stopped(number, f"stopped by {signal.Signals(number).name} {message}")


def _restore_defaults() -> None:
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Install a handler for the block. nohup starts programs with SIGHUP ignored, and it stays so."""
    numbers = [n for n in STOPPING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    old = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in old.items():
            if signal.getsignal(number) == handler:  # a program that was ended keeps the defaults
                signal.signal(number, previous)


def _leave_terminal() -> None:
    """Send to nowhere what would be printed to a terminal that is gone: writing to it fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                os.dup2(nowhere, stream)
    os.close(nowhere)
