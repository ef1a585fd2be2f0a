"""Keep batches alive until the CUDA stream that works on them is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """The part of `torch.cuda.Event` that is used here."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class BatchLifetime:
    """Holds each batch that is handed out until the work on it is done.

    A batch may be DALI's memory, and its masks were made on the loader's stream. Either allocator would reuse the
    memory as soon as Python drops the batch, although the training stream may not have read it yet.
    (Tensor.record_stream protects torch's own memory only.)

    record   returns an event that completes when everything queued so far on the working stream is done
    """

    def __init__(self, record: Callable[[], Event]) -> None:
        self._record = record
        self._newest: object | None = None
        self._held: deque[tuple[Event, object]] = deque()

    def hand_out(self, batch: object) -> None:
        """Hold a batch, and drop batches that are done. The work on the previous batch must be queued by now."""
        self._end_newest()
        self._newest = batch
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def close(self) -> None:
        """Wait for the work on all batches, and drop them."""
        self._end_newest()
        while self._held:
            event, _ = self._held[0]
            event.synchronize()
            self._held.popleft()

    def _end_newest(self) -> None:
        if self._newest is not None:
            self._held.append((self._record(), self._newest))
            self._newest = None
