"""How near do the token kernels come to the memory they move, and how far ahead of plain torch are they?

    python -m bench.kernels [--rounds 5] [--batches 32 64 128] [--ratios 0.6 0.9]

Takes half a minute. Writes bench/results/kernels.<cpu or GPU>.json.

Each operation of kernels/ has a table, in GB/s: the bytes it must move (inputs read once, outputs written once, counted
from shapes) by the time it takes. `limit`, and the row "copy", is what a large copy moves on the same machine in the
same rounds, read and write counted. The share of it can pass 1 where a machine reads faster than it writes.

On CUDA kernel and reference run at production size, tokens and predictions in bfloat16. On a CPU the operations take
the reference, so that is all there is to time (Triton's interpreter is no speed), in float32 and for small batches.
Before every run a buffer larger than the caches is written, so that inputs come from memory. `topk_mask` moves so
little that its time is the launch and the search, never the memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import tyro
from torch import Tensor

from bench.harness.report import Row, Table, measure, run_from_shell, save_report, write_report
from kernels.gather_tokens import MEAN, STD, gather_tokens_kernel, gather_tokens_reference
from kernels.launch import Launch
from kernels.masked_mse import masked_mse_kernel, masked_mse_reference
from kernels.topk_mask import topk_mask_kernel, topk_mask_reference
from tgmae.masks.config import MaskConfig
from tgmae.model.config import ModelConfig
from tgmae.presets import PRESETS
from tgmae.training.parallel import choose_device

OPERATIONS = ("topk_mask", "gather_tokens", "masked_mse forward", "masked_mse backward")
COPY = "copy"


@dataclass(frozen=True)
class Options:
    rounds: int = 5
    batches: Annotated[tuple[int, ...], tyro.conf.arg(help="clips, on CUDA")] = (32, 64, 128)
    ratios: tuple[float, ...] = (0.6, 0.9)
    repeats: int = 20  # runs of each operation a round; on a CPU a quarter of it
    copy_mib: int = 1024  # size of the copied tensor and of the buffer that empties the caches; on a CPU an eighth


@dataclass(frozen=True)
class Size:
    """What the operations work on: clips of a model's geometry and a mask ratio."""

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
        """What an operation must read and write at least; see the kernels' own docstrings."""
        model, value = self.model, self.dtype.itemsize
        values = model.values_per_token
        visible = self.batch * (model.num_tokens - self.num_masked)
        masked = self.batch * self.num_masked
        if operation == "topk_mask":  # float32 scores in, every token's number out
            return self.batch * model.num_tokens * (4 + 4)
        if operation == "gather_tokens":  # a number and its bytes in, its values out
            return visible * (4 + values + value * values)
        statistics_size = 3 * 2 * 4  # mean and reciprocal deviation of three channels
        if operation == "masked_mse forward":  # a number, its bytes and prediction in, statistics and its sum out
            return masked * (4 + values + value * values + statistics_size + 4)
        assert operation == "masked_mse backward"  # the same and the statistics in, the gradient out
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
        """What is to be timed; what it prepares is done here. `launch` is the kernel's, by default its own choice."""
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
    """Median seconds of a run, each on cold caches.

    On CUDA by events. Writing the buffer takes longer than the launches that follow it, so that these do not count.
    """
    work()  # compiles on the first round, and fills torch's pool of memory
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


def make_sizes(options: Options, device: torch.device) -> list[Size]:
    """Production size on CUDA; on a CPU the demo's size, and production size for two clips."""
    production, demo = PRESETS["ssv2"].model, PRESETS["demo"]
    if device.type == "cuda":
        kinds = [(f"{batch} clips 16×224²", production, batch, torch.bfloat16) for batch in options.batches]
    else:
        kinds = [
            (f"demo, {demo.device_batch_size} clips 8×96²", demo.model, demo.device_batch_size, torch.float32),
            ("2 clips 16×224²", production, 2, torch.float32),
        ]
    return [
        Size(f"{name}, γ {ratio}", model, batch, ratio, dtype)
        for name, model, batch, dtype in kinds
        for ratio in options.ratios
    ]


def measure_operation(
    operation: str, sizes: Sequence[Size], options: Options, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a round of "copy" and, for every size, of "<size>: reference" and on CUDA "<size>: kernel"."""
    on_cuda = device.type == "cuda"
    repeats = options.repeats if on_cuda else max(options.repeats // 4, 1)
    count = options.copy_mib * 2**20 // (1 if on_cuda else 8)
    source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
    work: dict[str, Callable[[], object]] = {COPY: partial(target.copy_, source)}
    for size in sizes:
        inputs = Inputs(size, device)
        for kind in ("kernel", "reference") if on_cuda else ("reference",):
            work[f"{size.name}: {kind}"] = inputs.operation(operation, kind == "kernel")
    timed = {name: partial(seconds_of, run, target, repeats) for name, run in work.items()}
    return measure(timed, options.rounds, operation)


def make_table(operation: str, sizes: Sequence[Size], seconds: Mapping[str, Sequence[float]], copied: int) -> Table:
    """Rates of one operation; `copied` bytes are what "copy" moves."""
    copy = [copied / spent / 1e9 for spent in seconds[COPY]]
    rows = []
    for size in sizes:
        moved = size.bytes_moved(operation)
        reference = seconds[f"{size.name}: reference"]
        for kind in ("kernel", "reference"):
            if (spent := seconds.get(f"{size.name}: {kind}")) is None:
                continue
            rates = [moved / s / 1e9 for s in spent]
            facts: dict[str, float | str] = {
                "µs": statistics.median(spent) * 1e6,
                "MB moved": moved / 1e6,
                "of copy": statistics.median(a / b for a, b in zip(rates, copy, strict=True)),
                "× reference": statistics.median(b / a for a, b in zip(spent, reference, strict=True)),
            }
            rows.append(Row(f"{size.name}: {kind}", rates, facts))
    rows.append(Row(COPY, copy, {"µs": statistics.median(seconds[COPY]) * 1e6, "MB moved": copied / 1e6}))
    note = "" if len(rows) > len(sizes) + 1 else "On a CPU the reference is what runs; the kernel needs CUDA."
    return Table(operation, "GB/s", rows, limit=statistics.median(copy), note=note)


def run(options: Options) -> None:
    device = choose_device("auto")
    sizes = make_sizes(options, device)
    tables = []
    headline: dict[str, str] = {}
    for operation in OPERATIONS:
        seconds = measure_operation(operation, sizes, options, device)
        copied = 2 * (options.copy_mib * 2**20 // (1 if device.type == "cuda" else 8))
        table = make_table(operation, sizes, seconds, copied)
        tables.append(table)
        first = table.rows[0].facts
        headline[f"{operation}, {table.rows[0].name}"] = (
            f"{first['µs']:,.0f} µs, {first['of copy']:.2g} of copy bandwidth, {first['× reference']:.3g} × reference"
        )
        save_report("kernels", tables, headline, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    write_report("kernels", tables, headline, device)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
