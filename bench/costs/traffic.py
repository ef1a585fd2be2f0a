"""How many bytes torch's operators move in a training step, counted on tensors without contents.

Every operator that computes is taken to read each of its inputs once and to write each of its outputs once, as eager
torch does when caches help nobody; views cost nothing. The work of kernels/ is left out: bench/kernels.py counts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tgmae.masks.config import MaskConfig
from tgmae.model.config import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE

# Matrix products and attention: what tensor cores do.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product")
_FREE = ("empty", "detach", "unsafe_view")  # allocate, or are views by another name


@dataclass(frozen=True)
class Traffic:
    """Bytes of a pass, and how many values the operators without matrix products wrote."""

    products: float  # read and written by matrix products and attention
    others: float  # by everything else: norms, GELU, residuals, casts, copies, gradients added up
    values: float  # written by everything else
    by_operator: Mapping[str, float]  # the bytes of `others`, the most first


class _Counter(TorchDispatchMode):
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
        elif outputs:  # what has none asks for a device, or names a range
            self.others[name] += moved
            self.values += sum(x.numel() for x in outputs)
        return out


def _size(tensors: Sequence[Tensor]) -> int:
    """A tensor that is one number expanded counts what is stored."""
    return sum(x.element_size() * _stored(x) for x in tensors)


def _stored(x: Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


@cache
def count_traffic(config: ModelConfig, ratio: float, batch: int) -> Traffic:
    """Of forward and backward of `batch` clips, per clip, under bfloat16 autocast with parameters in float32.

    The weights are read once a batch. Counted for scaled_dot_product_attention's fused kernel.
    """
    num_masked = MaskConfig(ratio=ratio).masked_per_slot(config.patches_per_slot) * config.num_slots
    num_visible = config.num_tokens - num_masked
    size = config.image_size

    with FakeTensorMode():
        network = _WithoutKernels(config)
        frames = torch.empty(batch, config.num_frames, size, size, 3, dtype=torch.uint8)
        visible, masked = (torch.empty(batch, n, dtype=torch.int32) for n in (num_visible, num_masked))
        with _Counter() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                mean, _ = network(frames, TokenMasks(visible=visible, masked=masked))
            mean.backward()
    by_operator = {name: moved / batch for name, moved in counter.others.most_common()}
    return Traffic(counter.products / batch, sum(by_operator.values()), counter.values / batch, by_operator)


class _WithoutKernels(VideoMAE):
    """The network without its Triton kernels, whose traffic is counted elsewhere."""

    def gather(self, frames: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(*visible.shape, self.config.values_per_token, dtype=dtype)

    def loss(self, prediction: Tensor, frames: Tensor, masked: Tensor) -> Tensor:
        return _Free.apply(prediction)  # type: ignore[no-any-return, no-untyped-call]


class _Free(torch.autograd.Function):
    """Stands for the loss, whose kernels are counted elsewhere."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor) -> Tensor:
        ctx.like = prediction
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty_like(ctx.like)
