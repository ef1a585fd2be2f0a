"""How close do the token kernels come to memory bandwidth, and how much faster than plain torch are they?

    python -m bench.kernels
    python -m bench.kernels --batches 64 --ratios 0.6

Takes half a minute. Writes bench/results/kernels.<cpu or GPU>.json.

Each operation of kernels/ has a table in GB/s: the bytes it must move (inputs read once, outputs written once, counted
from shapes) divided by its time. `limit`, and the row "copy", is what a large copy moves on the same machine in the
same rounds, counting both reads and writes. A share of it can exceed 1 on machines that read faster than they write.

On CUDA the kernel and the reference run at production size, with tokens and predictions in bfloat16. On a CPU the
operations run their reference, so only that is timed (the speed of Triton's interpreter means nothing), in float32 and
with small batches. Before every run a buffer larger than the caches is written, so that inputs come from memory. The
operation topk_mask moves so little that its time is the launch and the search, never the memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.harness.command_line import run_from_shell
from bench.harness.measure import measure
from bench.harness.report import save_report, write_report
from bench.harness.tables import Row, Table
from bench.workloads.kernel_operations import COPY, OPERATIONS, Inputs, Size, seconds_of
from tgmae.presets import PRESETS
from tgmae.training.parallel import choose_device


@dataclass(frozen=True)
class Options:
    rounds: int = 5  # measurements of every row, taken in turn
    batches: tuple[int, ...] = (32, 64, 128)  # clips, on CUDA
    ratios: tuple[float, ...] = (0.6, 0.9)  # mask ratios
    repeats: int = 20  # runs of each operation in a round; on a CPU a quarter of them
    copy_mib: int = 1024  # MiB of the copied tensor and of the buffer that empties the caches; on a CPU an eighth


def make_sizes(options: Options, device: torch.device) -> list[Size]:
    """List production sizes on CUDA; on a CPU the demo's size, and production size with two clips."""
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
    """Return seconds by round of "copy" and, for every size, of "<size>: reference" and on CUDA of "<size>: kernel"."""
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
    """Turn the seconds of one operation into a table of rates; "copy" moves `copied` bytes."""
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
    note = "" if len(rows) > len(sizes) + 1 else "A CPU runs the reference; the kernel needs CUDA."
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
