"""Hand batches to the CUDA stream that works on them: how long they live, how far the host runs ahead, who waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch

from tgmae.telemetry.stage_clock import StageClock

Batch = TypeVar("Batch")

_AHEAD = 2  # passes that may be queued or running on the GPU


class BatchLifetime:
    """Holds each batch that is handed out until the work on it is done, and lets the host run two passes ahead.

    A batch may be DALI's memory, and its masks were made on the loader's stream. Either allocator would reuse the
    memory as soon as Python drops the batch, although the training stream may not have read it yet.
    (Tensor.record_stream protects torch's own memory only.)

    A CUDA graph is launched in no time, so that without a bound the host would queue all passes of an optimiser step,
    each with its batch. One pass that runs and one that is queued keep the GPU busy.

    On a CPU nothing is held: work is done when the call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock = StageClock(device)
        self._newest: object | None = None
        self._held: deque[tuple[torch.cuda.Event, object]] = deque()

    @property
    def waited_s(self) -> float:
        """Seconds that work has waited for its batches, as far as the GPU has come.

        On CUDA that is the time from the end of a pass to the arrival of the next batch in which the stream was idle;
        the host may wait much longer, since it runs ahead. Only the thread that calls `hand_out` may read it.
        """
        self._clock.collect()
        return self._clock.totals().get("wait", 0.0)

    def hand_out(self, take: Callable[[], Batch]) -> Batch:
        """Return the batch that `take` waits for, and hold it. The work on the previous one must be queued by now."""
        with self._clock("wait"):
            self._end_newest()
            while len(self._held) >= _AHEAD or self._is_oldest_done():
                self._drop_oldest()
            batch = take()
        if self._on_gpu:
            self._newest = batch
        return batch

    def close(self) -> None:
        """Wait for the work on all batches, and drop them."""
        self._end_newest()
        while self._held:
            self._drop_oldest()

    def _end_newest(self) -> None:
        if self._newest is not None:
            # The event blocks: the thread sleeps instead of spinning on a core that the decoders need.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            done.record()
            self._held.append((done, self._newest))
            self._newest = None

    def _is_oldest_done(self) -> bool:
        return bool(self._held) and self._held[0][0].query()  # type: ignore[no-untyped-call]

    def _drop_oldest(self) -> None:
        event, _ = self._held[0]
        event.synchronize()
        self._held.popleft()
