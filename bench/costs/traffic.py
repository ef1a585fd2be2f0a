"""Bytes that torch's operators move in a training step, counted on tensors without contents.

Each operator that computes is assumed to read every input once and write every output once, as eager torch does when
caches do not help. Views cost nothing. The kernels of kernels/ are left out:
bench/workloads/kernel_operations.py counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.workloads.training_step import halve_residual
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE

# Matrix products and attention, which run on tensor cores.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product")
_FREE = ("empty", "detach", "unsafe_view")  # allocate only, or are views by another name


@dataclass(frozen=True)
class Traffic:
    """Bytes that a pass moves, and the number of values that operators other than matrix products write."""

    products: float  # read and written by matrix products and attention
    others: float  # by everything else: norms, GELU, residuals, casts, copies, sums of gradients
    values: float  # written by everything else
    by_operator: Mapping[str, float]  # `others` by operator, largest first


class _Counter(TorchDispatchMode):
    """Adds up the bytes of every operator that is dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.values = 0
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.lstrip("_")
        if func.is_view or name.startswith(_FREE):
            return out
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        moved = _size(inputs) + _size(outputs)
        if name.startswith(_PRODUCTS):
            self.products += moved
        elif outputs:  # operators without any query a device or name a profiler range
            self.others[name] += moved
            self.values += sum(x.numel() for x in outputs)
        return out


def _size(tensors: Sequence[Tensor]) -> int:
    """Return the bytes stored. An expanded dimension counts once."""
    return sum(x.element_size() * _stored(x) for x in tensors)


def _stored(x: Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


@cache
def count_traffic(config: ModelConfig, ratio: float, batch: int, half_residual: bool = False) -> Traffic:
    """Count the traffic per clip of forward and backward on `batch` clips.

    Runs under bfloat16 autocast with float32 parameters, and with scaled_dot_product_attention's fused kernel. Weights
    are read once a batch.
    """
    with FakeTensorMode():
        network, run = make_pass(config, ratio, batch)
        if half_residual:
            halve_residual(network)
        with _Counter() as counter:
            run()
    by_operator = {name: moved / batch for name, moved in counter.others.most_common()}
    return Traffic(counter.products / batch, sum(by_operator.values()), counter.values / batch, by_operator)


def make_pass(config: ModelConfig, ratio: float, batch: int) -> tuple[VideoMAE, Callable[[], None]]:
    """Return the network without its Triton kernels, and a function that runs forward and backward on `batch` clips."""
    num_masked = MaskConfig(ratio=ratio).masked_per_slot(config.patches_per_slot) * config.num_slots
    size, network = config.image_size, _WithoutKernels(config)
    frames = torch.empty(batch, config.num_frames, size, size, 3, dtype=torch.uint8)
    visible, masked = (torch.empty(batch, n, dtype=torch.int32) for n in (config.num_tokens - num_masked, num_masked))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            mean = network(frames, TokenMasks(visible=visible, masked=masked)).loss
        mean.backward()

    return network, run


class _WithoutKernels(VideoMAE):
    """The network without its Triton kernels, whose traffic is counted separately."""

    def gather(self, frames: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(*visible.shape, self.config.values_per_token, dtype=dtype)

    def loss(self, prediction: Tensor, frames: Tensor, masked: Tensor) -> Tensor:
        return _Free.apply(prediction)  # type: ignore[no-any-return, no-untyped-call]


class _Free(torch.autograd.Function):
    """A loss that costs nothing: its kernels are counted separately."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor) -> Tensor:
        ctx.like = prediction
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty_like(ctx.like)
