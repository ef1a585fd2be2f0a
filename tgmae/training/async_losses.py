"""Losses and gradient norms, read a step later so that the GPU never waits for the host."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dali_pipelines.types import ClipRequest
from tgmae.model.pretraining import Losses


@dataclass(frozen=True)
class StepRecord:
    step: int  # counted from 1
    passes: list[dict[str, float]]  # the losses of each forward pass (`Losses`)
    grad_norms: list[float]  # of the autoencoder; of the head where there is one
    requests: list[ClipRequest]  # its clips, in the order of the forward passes

    @property
    def losses(self) -> list[float]:
        """What each forward pass minimised."""
        return [one["total"] for one in self.passes]

    @property
    def means(self) -> dict[str, float]:
        """The mean of each loss over the forward passes."""
        return {name: sum(one[name] for one in self.passes) / len(self.passes) for name in Losses._fields}

    @property
    def is_finite(self) -> bool:
        return math.isfinite(sum(self.losses) + sum(self.grad_norms))


class AsyncLosses:
    """`push` the scalars of a step while they are on the device, `pop` them when they have arrived on the host.

    While the GPU works on a step, the host waits for the step before it at most. It therefore launches ahead, but never
    by more than one step. On a CPU everything arrives at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # For each step its number, the forward passes, what is on the way, and its clips.
        self._pending: deque[tuple[int, int, Tensor, torch.cuda.Event | None, list[ClipRequest]]] = deque()

    def push(self, step: int, passes: Sequence[Losses], grad_norms: Tensor, requests: list[ClipRequest]) -> None:
        """Start to copy the losses of a step's forward passes, and its gradients' norms [1 or 2], to the host."""
        losses = torch.stack([loss.detach().float() for one in passes for loss in one])
        values, arrived = torch.cat([losses, grad_norms.detach().float()]), None
        if self._on_gpu:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            # A blocking event lets the waiting thread sleep. By default CUDA spins on a core that the decoders need.
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            arrived.record()
        self._pending.append((step, len(passes), values, arrived, requests))

    def pop(self, wait: bool) -> Iterator[StepRecord]:
        """Yield the steps that have arrived, oldest first; with `wait`, all that were pushed."""
        keep = 1 if self._on_gpu and not wait else 0
        while len(self._pending) > keep:
            step, num_passes, values, arrived, requests = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            numbers, names = values.tolist(), Losses._fields
            starts = range(0, num_passes * len(names), len(names))
            passes = [dict(zip(names, numbers[start : start + len(names)], strict=True)) for start in starts]
            yield StepRecord(step, passes, numbers[num_passes * len(names) :], requests)
