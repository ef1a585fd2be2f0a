"""The operations of kernels/ at a given size: their inputs, the bytes they must move, and their time on cold caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.gather_tokens import MEAN, STD, gather_tokens_kernel, gather_tokens_reference
from kernels.launch import Launch
from kernels.masked_mse import masked_mse_kernel, masked_mse_reference
from kernels.topk_mask import topk_mask_kernel, topk_mask_reference
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig

OPERATIONS = ("topk_mask", "gather_tokens", "masked_mse forward", "masked_mse backward")
COPY = "copy"  # row of a plain copy, which shows the memory bandwidth


@dataclass(frozen=True)
class Size:
    """Size of the operations' inputs: a batch of clips of a model's geometry, and a mask ratio."""

    name: str
    model: ModelConfig
    batch: int
    ratio: float
    dtype: torch.dtype  # of tokens and predictions

    @property
    def masked_per_slot(self) -> int:
        return MaskConfig(ratio=self.ratio).masked_per_slot(self.model.patches_per_slot)

    @property
    def num_masked(self) -> int:
        return self.masked_per_slot * self.model.num_slots

    def bytes_moved(self, operation: str) -> int:
        """Count the bytes that an operation must at least read and write; see the kernels' own docstrings."""
        model, value = self.model, self.dtype.itemsize
        values = model.values_per_token
        visible = self.batch * (model.num_tokens - self.num_masked)
        masked = self.batch * self.num_masked
        if operation == "topk_mask":  # in: float32 scores; out: the number of every token
            return self.batch * model.num_tokens * (4 + 4)
        if operation == "gather_tokens":  # in: a token's number and its pixels, a byte each; out: its values
            return visible * (4 + values + value * values)
        statistics_size = 3 * 2 * 4  # mean and reciprocal deviation of three channels
        if operation == "masked_mse forward":  # in: number, pixels, prediction; out: statistics and the token's sum
            return masked * (4 + values + value * values + statistics_size + 4)
        assert operation == "masked_mse backward"  # in: the same and the statistics; out: the gradient
        return masked * (4 + values + value * values + statistics_size + value * values)


class Inputs:
    """Random inputs of one size on the device, and the operations on them."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, model = size, size.model
        torch.manual_seed(0)
        shape = (size.batch, model.num_frames, model.image_size, model.image_size, 3)
        self.frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.scores = torch.rand(size.batch, model.num_slots, model.patches_per_slot, device=device)
        self.visible, self.masked = topk_mask_reference(self.scores, size.masked_per_slot)
        self.prediction = torch.randn(
            size.batch, size.num_masked, model.values_per_token, dtype=size.dtype, device=device, requires_grad=True
        )

    def operation(self, name: str, on_kernel: bool, launch: Launch | None = None) -> Callable[[], object]:
        """Return the function to time, with its preparation already done.

        launch   of the kernel; None for the kernel's own choice
        """
        model, size = self.size.model, self.size
        if name == "topk_mask":
            topk = partial(topk_mask_kernel, launch=launch) if on_kernel else topk_mask_reference
            return partial(topk, self.scores, size.masked_per_slot)
        if name == "gather_tokens":
            gather = partial(gather_tokens_kernel, launch=launch) if on_kernel else gather_tokens_reference
            cube = (model.patch_size, model.tubelet_size, size.dtype, MEAN, STD)
            return partial(gather, self.frames, self.visible, *cube)
        mse: Callable[..., Tensor] = masked_mse_reference
        if on_kernel:
            mse = partial(masked_mse_kernel, forward=launch)
            if name == "masked_mse backward":
                mse = partial(masked_mse_kernel, backward=launch)
        forward = partial(mse, self.prediction, self.frames, self.masked, model.patch_size, model.tubelet_size)
        if name == "masked_mse forward":
            return forward
        assert name == "masked_mse backward"
        loss = forward()
        return lambda: torch.autograd.grad(loss, self.prediction, retain_graph=True)


def seconds_of(work: Callable[[], object], buffer: Tensor, repeats: int) -> float:
    """Return the median seconds of `repeats` runs, each on cold caches.

    Writing `buffer`, which is larger than the caches, empties them before each run. On CUDA events take the time, and
    that write outlasts the launches behind it, so that the time of launching does not count.
    """
    work()  # compiles in the first round, and fills torch's memory pool
    if not buffer.is_cuda:
        spent = []
        for _ in range(repeats):
            buffer.zero_()
            started = time.perf_counter()
            work()
            spent.append(time.perf_counter() - started)
        return statistics.median(spent)
    events = []
    for _ in range(repeats):
        buffer.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) / 1000 for begin, end in events)
