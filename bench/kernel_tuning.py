"""Which launch is the fastest for each kernel on this GPU?

    python -m bench.kernel_tuning
    python -m bench.kernel_tuning --rounds 5

Needs CUDA. Times every sensible launch (kernels/launch.py) of every kernel at one size, in turn in every round, after
checking its result against the reference. Rows are in microseconds; "default" marks the launch that the kernel chooses
itself. To adopt a faster one, edit kernels/launch.py. Writes bench/results/kernel_tuning.<GPU>.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness.command_line import first_line, run_from_shell
from bench.harness.measure import measure, prepare_each
from bench.harness.report import save_report, write_report
from bench.harness.tables import Row, Table
from bench.workloads.kernel_operations import COPY, OPERATIONS, Inputs, Size, seconds_of
from kernels.launch import Launch, block_of_values, whole_block
from tgmae.config.model import ModelConfig
from tgmae.presets import PRESETS
from tgmae.training.parallel import choose_device

WARPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Options:
    rounds: int = 3  # measurements of every launch, taken in turn
    repeats: int = 20  # runs of each launch in a round
    copy_mib: int = 1024  # MiB of the buffer that empties the caches


def launches(operation: str, model: ModelConfig) -> list[Launch]:
    """List the launches worth trying, the kernel's own choice first.

    A program of topk_mask or masked_mse forward holds all its items in one block, so that only the number of warps is
    free. The others give each lane at least four bytes of the frames.
    """
    pixels = model.tubelet_size * model.patch_size**2
    if operation in ("topk_mask", "masked_mse forward"):
        default = whole_block(model.patches_per_slot if operation == "topk_mask" else pixels)
        blocks, fewest = [default.block], 1
    else:
        default = block_of_values(3 * pixels)
        blocks, fewest = [default.block, default.block // 2, default.block // 4], 4
    tried = [Launch(block, warps) for block in blocks for warps in WARPS if block >= fewest * 32 * warps]
    return list(dict.fromkeys([default, *tried]))


def name_of(launch: Launch) -> str:
    return f"block {launch.block}, {launch.num_warps} warp{'s' * (launch.num_warps > 1)}"


def check(operation: str, inputs: Inputs, launch: Launch) -> None:
    """Raise AssertionError if a launch changes the result: of top-k at all, of the others by more than rounding."""
    got, expected = (_result(inputs, operation, kernel, launch) for kernel in (True, False))
    for one, other in zip(got, expected, strict=True):
        if operation == "topk_mask":
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        else:  # one unit of the stored dtype, and the rounding of the float32 arithmetic behind it
            rounding, computed = torch.finfo(one.dtype).eps, 1e-5
            torch.testing.assert_close(
                one, other, rtol=max(2 * rounding, computed), atol=computed * float(other.detach().abs().max())
            )


def _result(inputs: Inputs, operation: str, on_kernel: bool, launch: Launch) -> list[Tensor]:
    found = inputs.operation(operation, on_kernel, launch if on_kernel else None)()
    return [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]


def tune(size: Size, rounds: int, repeats: int, copy_mib: int, device: torch.device) -> Iterator[tuple[Table, str]]:
    """Yield the table of each kernel, and a sentence about its fastest launch."""
    inputs = Inputs(size, device)
    source, target = (torch.ones(copy_mib * 2**20, dtype=torch.uint8, device=device) for _ in range(2))
    for operation in OPERATIONS:
        tried = launches(operation, size.model)
        wrong: list[str] = []
        work: dict[str, Callable[[], object]] = {COPY: partial(target.copy_, source)}
        for name, launch in prepare_each({name_of(launch): launch for launch in tried}, f"checking, {operation}"):
            try:
                check(operation, inputs, launch)
            except Exception as error:  # a wrong result, or any compiler error; the others still run
                wrong.append(f"{name} is left out: {first_line(error)}")
            else:
                work[name] = inputs.operation(operation, True, launch)
        timed = {name: partial(seconds_of, run, target, repeats) for name, run in work.items()}
        seconds = measure(timed, rounds, operation)
        copied = seconds.pop(COPY)
        yield _table(operation, size, seconds, copied, 2 * target.nbytes, name_of(tried[0]), wrong)


def _table(
    operation: str, size: Size, seconds: dict[str, list[float]], copied: list[float], bytes_copied: int,
    default: str, wrong: list[str],
) -> tuple[Table, str]:  # fmt: skip
    moved = size.bytes_moved(operation)
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    rows = []
    for name in sorted(medians, key=lambda name: medians[name]):
        rates = [moved / spent / (bytes_copied / copy) for spent, copy in zip(seconds[name], copied, strict=True)]
        facts: dict[str, float | str] = {"of copy": statistics.median(rates), "": "default" if name == default else ""}
        rows.append(Row(name, [1e6 * spent for spent in seconds[name]], facts))
    if not rows:
        return Table(f"{operation}, {size.name}", "µs", [], note="\n".join(wrong)), "no launch works"
    best = rows[0].name
    if default not in medians:
        said = f"fastest is {best}; the default ({default}) is left out"
    elif best == default:
        said = f"fastest is {best}, the default"
    else:
        said = f"fastest is {best}, {medians[default] / medians[best]:.3g} times as fast as the default ({default})"
    base = default if default in medians else None
    return Table(f"{operation}, {size.name}", "µs", rows, relative_to=base, note="\n".join(wrong)), said


def run(options: Options) -> None:
    device = choose_device("auto")
    if device.type != "cuda":
        raise ValueError("bench.kernel_tuning needs a CUDA device: a CPU runs the references, which have no launch")
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
