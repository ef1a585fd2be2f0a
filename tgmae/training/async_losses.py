"""Losses and gradient norms, read a step later so that the GPU never waits for the host."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dali_pipelines.types import ClipRequest


@dataclass(frozen=True)
class StepRecord:
    step: int  # counted from 1
    losses: list[float]  # one per forward pass
    grad_norm: float
    requests: list[ClipRequest]  # its clips, in the order of the forward passes

    @property
    def is_finite(self) -> bool:
        return math.isfinite(sum(self.losses) + self.grad_norm)


class AsyncLosses:
    """`push` the scalars of a step while they are on the device, `pop` them when they have arrived on the host.

    While the GPU works on a step, the host waits for the step before it at most. It therefore launches ahead, but never
    by more than one step. On a CPU everything arrives at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None, list[ClipRequest]]] = deque()

    def push(self, step: int, losses: list[Tensor], grad_norm: Tensor, requests: list[ClipRequest]) -> None:
        """Start to copy a step's losses (scalars of any precision) and gradient norm (a scalar) to the host."""
        values, arrived = torch.stack([*(loss.detach().float() for loss in losses), grad_norm.detach().float()]), None
        if self._on_gpu:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            # A blocking event lets the waiting thread sleep. By default CUDA spins on a core that the decoders need.
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            arrived.record()
        self._pending.append((step, values, arrived, requests))

    def pop(self, wait: bool) -> Iterator[StepRecord]:
        """Yield the steps that have arrived, oldest first; with `wait`, all that were pushed."""
        keep = 1 if self._on_gpu and not wait else 0
        while len(self._pending) > keep:
            step, values, arrived, requests = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            *losses, grad_norm = values.tolist()
            yield StepRecord(step, losses, grad_norm, requests)
