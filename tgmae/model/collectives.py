"""Collectives that gradients flow through, alike on gloo and NCCL. Alone, a process keeps what it has.

Dimensions: n rows of this process, N rows of all processes together.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(x: Tensor) -> Tensor:
    """Return the sum of every process's `x`, of one shape everywhere."""
    return x if world_size() == 1 else _all_reduce(x)


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows [N, ...] of all processes, in the order of their ranks; `x` is [n, ...] in each of them.

    The gradient of a process's rows is the sum of what all processes make of them. A sum over zeros gathers exactly,
    and unlike torch's all_gather it has a gradient on gloo, too. It sends twice as much, which for the embeddings of a
    batch is nothing.
    """
    if world_size() == 1:
        return x
    size, rank = world_size(), dist.get_rank()
    placed = torch.cat([x if other == rank else torch.zeros_like(x) for other in range(size)])
    return _all_reduce(placed)


def _all_reduce(x: Tensor) -> Tensor:
    total: Tensor = all_reduce(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return total
