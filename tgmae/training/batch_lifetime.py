"""Batches whose memory another stream made, kept until the stream that works on them is done with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """What is needed of a `torch.cuda.Event`."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class BatchLifetime:
    """Holds each batch that is handed out until the work on it is done.

    A batch may be DALI's memory, and its masks were made on the loader's stream: either allocator would use them again
    as soon as Python lets go of them, although the training stream may not have read them yet. (Tensor.record_stream
    holds back torch's own memory only.)

    record   returns an event that has passed when all that is queued by now on the working stream is done
    """

    def __init__(self, record: Callable[[], Event]) -> None:
        self._record = record
        self._newest: object | None = None
        self._held: deque[tuple[Event, object]] = deque()

    def hand_out(self, batch: object) -> None:
        """Take note of a batch. The work on the one before must be queued by now; those that are done are dropped."""
        self._end_newest()
        self._newest = batch
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def close(self) -> None:
        """Wait for the work on all of them, and let go."""
        self._end_newest()
        while self._held:
            event, _ = self._held[0]
            event.synchronize()
            self._held.popleft()

    def _end_newest(self) -> None:
        if self._newest is not None:
            self._held.append((self._record(), self._newest))
            self._newest = None
