"""From worker processes to DALI graphs: batches of prepared decodes, in order, ahead of the graphs that take them.

Clips that workers decode lie in a ring of batches in shared memory, and DALI reads them there. A slot of the ring is
written again when its batch is released.

Dimensions: U decodes per batch, R clips per decode (data.repeat), T frames, S height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.nvdec import CodecLimits
from dali_pipelines.types import BatchSampler, ClipRequest, VideoTable
from dali_pipelines.workers.clip_worker import ClipWorker, Prepared
from dali_pipelines.workers.pool import Death, WorkerPool

_NO_FRAME: NDArray[np.uint8] = np.zeros((1, 1, 1, 3), np.uint8)
_NO_BYTES: NDArray[np.uint8] = np.zeros(1, np.uint8)


@dataclass
class PreparedBatch:
    """A batch on its way to a graph."""

    requests: tuple[ClipRequest, ...]
    units: list[Prepared | None]  # U decodes; None where a worker is not done yet
    is_lent: bool = False  # whether a graph may be reading it

    def decodes(self) -> list[tuple[ClipRequest, Prepared | None]]:
        """Return one of the requests of each decode, with what a worker made of it."""
        return list(zip(self.requests[:: len(self.requests) // len(self.units)], self.units, strict=True))

    def errors(self) -> dict[int, str]:
        """Return why videos could not be read, by row of the manifest."""
        return {request.row: unit.error for request, unit in self.decodes() if unit is not None and unit.error}

    def native(self) -> dict[int, ClipRequest]:
        """Return requests that DALI decodes, one for each row of the manifest."""
        return {request.row: request for request, unit in self.decodes() if unit is not None and unit.is_native}


class ClipFeed:
    """Prepares the batches from `first_batch` on in worker processes.

    limits      what NVDEC can decode; None where DALI decodes on the CPU
    depth       batches in the ring: those that graphs may be reading, and those that are prepared ahead
    distrusted  rows that DALI must not decode; the caller may add some, see `withdraw`
    """

    def __init__(
        self, videos: VideoTable, sampler: BatchSampler, *, size: int, repeat: int,
        limits: Mapping[str, CodecLimits] | None, first_batch: int, num_workers: int, depth: int, distrusted: set[int],
    ) -> None:  # fmt: skip
        requests = sampler(first_batch)
        self.videos, self.sampler, self.repeat, self.depth = videos, sampler, repeat, depth
        self.num_units = len(requests) // repeat
        shape = depth, self.num_units, repeat, len(requests[0].frames), size, size, 3
        self.worker = ClipWorker(videos=videos, sampler=sampler, limits=limits, shape=shape)
        self.distrusted = distrusted
        self._killers: dict[int, str] = {}  # rows that killed their worker again and again, and how
        self._batches: dict[int, PreparedBatch] = {}
        self._next = first_batch
        self._pool: WorkerPool[Prepared] = WorkerPool(self.worker, num_workers, self._describe, math.prod(shape))
        self._ring = np.frombuffer(self._pool.room, np.uint8).reshape(shape)
        self._prepare_ahead()

    def fetch(self, batch: int) -> PreparedBatch:
        """Wait for a batch. Raises WorkersFailed where workers keep dying."""
        prepared = self._batches[batch]
        while None in prepared.units:
            task, result = self._pool.take()
            number, unit, _ = self.worker.split(task)
            row = self._row(number, unit)
            if isinstance(result, Death):
                self._killers[row] = str(result)
                self._submit(number, unit)
            elif result.is_native and row in self.distrusted:  # distrusted while it was prepared
                self._submit(number, unit)
            else:
                self._batches[number].units[unit] = result
        prepared.is_lent = True
        return prepared

    def inputs(self, batch: int) -> tuple[list[NDArray[Any]], ...]:
        """Wait for a batch and return its graph's inputs (`graph.read_samples`), each with one array per decode."""
        samples = []
        for place, unit in enumerate(self.fetch(batch).units):
            assert unit is not None
            clips = self._ring[batch % self.depth, place]
            encoded, decoded = _NO_BYTES, list(clips)
            if unit.is_native:
                in_ring = clips.reshape(-1)[: unit.num_bytes]
                encoded, decoded = in_ring if unit.encoded is None else unit.encoded, [_NO_FRAME] * self.repeat
            samples.append((encoded, *unit.arrays(), *decoded))
        return tuple(map(list, zip(*samples, strict=True)))

    def release(self, batch: int) -> None:
        """Let the slot of a batch be written again: its graph is done with it."""
        del self._batches[batch]
        self._prepare_ahead()

    def withdraw(self, batches: Iterable[int]) -> None:
        """Take batches back from a graph that failed, and prepare again what is distrusted by now."""
        for batch in batches:
            self._batches[batch].is_lent = False
        for batch, prepared in self._batches.items():
            if prepared.is_lent:
                continue
            for place, unit in enumerate(prepared.units):
                if unit is not None and unit.is_native and self._row(batch, place) in self.distrusted:
                    self._submit(batch, place)

    def close(self) -> None:
        """End the worker processes. A `fetch` in another thread raises WorkersFailed."""
        self._pool.close()

    def _prepare_ahead(self) -> None:
        while self._next < min(self._batches, default=self._next) + self.depth:
            self._batches[self._next] = PreparedBatch(self.sampler(self._next), [None] * self.num_units)
            for unit in range(self.num_units):
                self._submit(self._next, unit)
            self._next += 1

    def _submit(self, batch: int, unit: int) -> None:
        row = self._row(batch, unit)
        self._batches[batch].units[unit] = None
        if row in self._killers:
            requests = self._batches[batch].requests[unit * self.repeat : (unit + 1) * self.repeat]
            into = self._ring[batch % self.depth, unit]
            self._batches[batch].units[unit] = self.worker.give_up(requests, self._killers[row], into)
        else:
            self._pool.submit(self.worker.number(batch, unit, row not in self.distrusted))

    def _row(self, batch: int, unit: int) -> int:
        return self._batches[batch].requests[unit * self.repeat].row

    def _describe(self, task: int) -> str:
        batch, unit, _ = self.worker.split(task)
        return f"a clip of {self.videos[self._row(batch, unit)].name}"
