"""Which launch is best for each kernel on this GPU?

    python -m bench.kernel_tuning [--rounds 3]        # CUDA only

Every sensible launch (kernels/launch.py) of every kernel at one size, in turn in every round, each checked against the
reference before it is timed. Rows are microseconds; "now" marks what the kernel takes by itself. To take over the best,
edit kernels/launch.py. Writes bench/results/kernel_tuning.<GPU>.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness.report import (
    Row,
    Table,
    first_line,
    measure,
    prepare_each,
    run_from_shell,
    save_report,
    write_report,
)
from bench.kernels import COPY, OPERATIONS, Inputs, Size, seconds_of
from kernels.launch import Launch, block_of_values, whole_block
from tgmae.model.config import ModelConfig
from tgmae.presets import PRESETS
from tgmae.training.parallel import choose_device

WARPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Options:
    rounds: int = 3
    repeats: int = 20  # runs of each launch a round
    copy_mib: int = 1024  # size of the buffer that empties the caches


def launches(operation: str, model: ModelConfig) -> list[Launch]:
    """What is worth trying; today's is the first.

    Top-k and the loss's forward hold everything at once, so that only the warps are free; the others have four bytes of
    the frames a lane at least.
    """
    pixels = model.tubelet_size * model.patch_size**2
    if operation in ("topk_mask", "masked_mse forward"):
        now = whole_block(model.patches_per_slot if operation == "topk_mask" else pixels)
        blocks, fewest = [now.block], 1
    else:
        now = block_of_values(3 * pixels)
        blocks, fewest = [now.block, now.block // 2, now.block // 4], 4
    tried = [Launch(block, warps) for block in blocks for warps in WARPS if block >= fewest * 32 * warps]
    return list(dict.fromkeys([now, *tried]))


def name_of(launch: Launch) -> str:
    return f"block {launch.block}, {launch.num_warps} warp{'s' * (launch.num_warps > 1)}"


def check(operation: str, inputs: Inputs, launch: Launch) -> None:
    """Raises AssertionError where a launch changes the result: top-k exactly, others but for rounding."""
    got, expected = (_result(inputs, operation, kernel, launch) for kernel in (True, False))
    for one, other in zip(got, expected, strict=True):
        if operation == "topk_mask":
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        else:  # what is stored may differ by a unit, and what it is computed from in float32 by some
            rounding, computed = torch.finfo(one.dtype).eps, 1e-5
            torch.testing.assert_close(
                one, other, rtol=max(2 * rounding, computed), atol=computed * float(other.detach().abs().max())
            )


def _result(inputs: Inputs, operation: str, on_kernel: bool, launch: Launch) -> list[Tensor]:
    found = inputs.operation(operation, on_kernel, launch if on_kernel else None)()
    return [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]


def tune(size: Size, rounds: int, repeats: int, copy_mib: int, device: torch.device) -> Iterator[tuple[Table, str]]:
    """Kernel by kernel its table, and which launch was best."""
    inputs = Inputs(size, device)
    source, target = (torch.ones(copy_mib * 2**20, dtype=torch.uint8, device=device) for _ in range(2))
    for operation in OPERATIONS:
        tried = launches(operation, size.model)
        wrong: list[str] = []
        work: dict[str, Callable[[], object]] = {COPY: partial(target.copy_, source)}
        for name, launch in prepare_each({name_of(launch): launch for launch in tried}, f"checking, {operation}"):
            try:
                check(operation, inputs, launch)
            except Exception as error:  # another result, or whatever the compiler says; the others go on
                wrong.append(f"{name} is out: {first_line(error)}")
            else:
                work[name] = inputs.operation(operation, True, launch)
        timed = {name: partial(seconds_of, run, target, repeats) for name, run in work.items()}
        seconds = measure(timed, rounds, operation)
        copied = seconds.pop(COPY)
        yield _table(operation, size, seconds, copied, 2 * target.nbytes, name_of(tried[0]), wrong)


def _table(
    operation: str, size: Size, seconds: dict[str, list[float]], copied: list[float], bytes_copied: int, now: str,
    wrong: list[str],
) -> tuple[Table, str]:  # fmt: skip
    moved = size.bytes_moved(operation)
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    rows = []
    for name in sorted(medians, key=lambda name: medians[name]):
        rates = [moved / spent / (bytes_copied / copy) for spent, copy in zip(seconds[name], copied, strict=True)]
        facts: dict[str, float | str] = {"of copy": statistics.median(rates), "": "now" if name == now else ""}
        rows.append(Row(name, [1e6 * spent for spent in seconds[name]], facts))
    if not rows:
        return Table(f"{operation}, {size.name}", "µs", [], note="\n".join(wrong)), "no launch works"
    best = rows[0].name
    gain = f"{medians[now] / medians[best]:.3g} times as fast as now ({now})" if now in medians else f"{now} is out"
    said = f"best is {best}, {'as now' if best == now else gain}"
    base = now if now in medians else None
    return Table(f"{operation}, {size.name}", "µs", rows, relative_to=base, note="\n".join(wrong)), said


def run(options: Options) -> None:
    device = choose_device("auto")
    if device.type != "cuda":
        raise ValueError("this needs a CUDA device: it times the kernels, and a CPU takes their references")
    size = Size("64 clips 16×224², γ 0.6", PRESETS["ssv2"].model, 64, 0.6, torch.bfloat16)
    tables: list[Table] = []
    headline: dict[str, str] = {}
    for table, best in tune(size, options.rounds, options.repeats, options.copy_mib, device):
        tables.append(table)
        headline[table.title] = best
        save_report("kernel_tuning", tables, headline, device)
    write_report("kernel_tuning", tables, headline, device)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
