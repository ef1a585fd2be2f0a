"""The time each stage of the loader and the step takes, measured without making the GPU wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tgmae.telemetry.nvtx_ranges import named_range


class StageClock:
    """Add up the time of each stage in seconds: `with clock("score"): …`.

    Profilers see each stage under its name (`nvtx_ranges`). On CUDA a stage is timed by events on the current stream,
    unless `host=True` asks for the host's time (as for waiting on data). A clock belongs to one thread; any thread may
    read `totals`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # stages the GPU may not have finished

    @contextmanager
    def __call__(self, stage: str, host: bool = False) -> Iterator[None]:
        with named_range(stage):
            if self._on_gpu and not host:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                yield
                end.record()
                self._pending.append((stage, begin, end))
                self.collect()
            else:
                started = time.perf_counter()
                yield
                self._add(stage, time.perf_counter() - started)

    def totals(self) -> dict[str, float]:
        """Return the seconds of each stage, as far as they have been collected."""
        return dict(self._seconds)

    def collect(self) -> None:
        """Add up the stages that the GPU has finished. Each stage does so at its end.

        Only the clock's own thread may call this.
        """
        while self._pending and self._pending[0][2].query():  # type: ignore[no-untyped-call]
            stage, begin, end = self._pending.pop(0)
            self._add(stage, begin.elapsed_time(end) / 1000)

    def _add(self, stage: str, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
