"""How fast is the training step alone, and how much of the machine's arithmetic does it use?

    python -m bench.step
    python -m bench.step --rounds 5 --ratios 0.9 0.6
    python -m bench.step --contrast --rounds 15    # what the contrastive loss costs, and nothing else

Takes about a minute. Writes bench/results/step.<cpu or GPU>.json, or step_modes with --modes, step_contrast with
--contrast.

A batch of random frames and masks lies on the device. A step is what train.py does with it: forward and loss, backward,
then gradient norm, AdamW and zero_grad (the stage optimizer), and the two numbers that it reads back a step later. It
runs under bfloat16 autocast on CUDA, in float32 on a CPU. Rows are in TFLOP/s: the matrix products of a clip, counted
in the forward pass and taken three times for forward and backward, divided by the time of the step. `limit` is the
fastest large matrix product of that precision in the same rounds. "of peak" is model FLOP utilisation: the share of the
data sheet's figure, for GPUs with a known one.

There are tables of the large presets' network by mask ratio, by batch size and by attention, and one of the demo's
network. On CUDA, --modes graph compiled "compiled graph" measures --cuda-graph and --compile instead, and with "half
residual" a residual stream in bfloat16, which train.py does not have. Compiled steps run the fastest attention that is
there. The note below a table says how long the first
step took. A CPU takes one clip of the large network a step, at two ratios. Cases that do not fit into the GPU's memory
are left out and named.

--contrast measures the demo's step in ms without the contrastive loss, observing it, and optimising it; with its batch
in one forward pass and in two, where it can also be contrasted over the whole step, which encodes every clip twice.
"the term alone" is what the loss adds: head, loss, their backward, and the head's update, without the encoder.
"CPU" is this process's own time, which other programs disturb less. The text of a batch is read in the loader, beside
the step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.costs.step_flops import count_step_gflop
from bench.harness.ceilings import MATMUL, matmul_ceiling, peak_tflops
from bench.harness.command_line import first_line, run_from_shell
from bench.harness.measure import measure, prepare_each
from bench.harness.report import save_report, write_report
from bench.harness.tables import Row, Table, spread_of
from bench.workloads.attention import Kernel, find_attention
from bench.workloads.contrastive_step import OFF, ROLES, TERM, ContrastiveStep, Spent
from bench.workloads.training_step import Mode, StepCase, StepTimer
from tgmae.model.attention import choose_attention
from tgmae.presets import PRESETS
from tgmae.training.parallel import choose_device

_FAST: tuple[Kernel, ...] = ("FlashAttention 3", "cudnn")  # attention of compiled steps, the first that runs here


@dataclass(frozen=True)
class Options:
    rounds: int = 3  # measurements of every row, taken in turn
    steps: int = 5  # steps timed in a round; on a CPU one of the large network
    batch: int = 64  # clips in the tables by mask ratio and by attention, on CUDA
    batches: tuple[int, ...] = (32, 64, 128)  # clips in the table by batch size, on CUDA
    ratios: tuple[float, ...] = (0.9, 0.75, 0.65, 0.6)  # mask ratios
    modes: tuple[Mode, ...] = ()  # on CUDA: compare these with the plain step, and measure nothing else
    large: bool = True  # measure the large presets' network too, not only the demo's
    contrast: bool = False  # measure what the contrastive loss costs the demo's step, and nothing else


def measure_cases(title: str, cases: Sequence[StepCase], options: Options, device: torch.device) -> Table:
    """Measure the cases of one table, and the matrix product, in turn, round after round."""
    largest, left_out = max(case.batch for case in cases), []
    timers: dict[str, StepTimer] = {}  # by mode; a captured graph serves one case only
    work: dict[str, Callable[[], float]] = {}
    fitting = []
    for name, case in prepare_each({case.name: case for case in cases}, f"preparing, {title}"):
        key = name if "graph" in case.mode else case.mode
        try:
            if key not in timers:
                timers[key] = StepTimer(case, largest, device)
            if device.type == "cuda":  # warm-up: memory, libraries, compilation
                timers[key].run(case)
        except RuntimeError as error:  # out of memory; no such attention on this GPU; no compiler
            if timer := timers.pop(key, None) if key == name else timers.get(key):
                timer.step.training.optimizer.zero_grad(set_to_none=True)
            left_out.append(f"left out: {name} ({first_line(error)})")
            continue
        case.forget()
        fitting.append(case)
        work[name] = partial(timers[key].run, case)
    work[MATMUL] = partial(matmul_ceiling, device)
    found = measure(work, options.rounds, title)
    limit = statistics.median(found[MATMUL])
    rows = [_make_row(case, found[case.name], limit, device) for case in fitting]
    rows.append(Row(MATMUL, found[MATMUL]))
    prepared = "; ".join(f"{name}: {timer.prepare_s:.1f} s" for name, timer in timers.items())
    if device.type == "cuda" and peak_tflops(device) is None:
        left_out.append(f"of peak is left out: no figure is known for {torch.cuda.get_device_name(device)}")
    note = "\n".join([f"time until the first step was done: {prepared}", *left_out])
    return Table(title, "TFLOP/s", rows, limit=limit, note=note)


def _make_row(case: StepCase, milliseconds: Sequence[float], limit: float, device: torch.device) -> Row:
    """Turn milliseconds per step into TFLOP/s; `limit` is the matrix product's."""
    gflop, usual = count_step_gflop(case.preset.model, case.ratio), statistics.median(milliseconds)
    rates = [gflop * case.batch / spent for spent in milliseconds]
    rate = statistics.median(rates)
    facts: dict[str, float | str] = {
        "clips/s": case.batch / usual * 1000,
        "ms a step": usual,
        "GFLOP a clip": gflop,
        **{stage: f"{statistics.median(shares):.0%}" for stage, shares in case.shares.items()},
        "of limit": rate / limit,
    }
    if (peak := peak_tflops(device)) is not None:
        facts["of peak"] = rate / peak
    if device.type == "cuda":
        facts["peak GiB"] = case.peak_gib
    return Row(case.name, rates, facts)


def plan_tables(options: Options, device: torch.device) -> list[tuple[str, list[StepCase]]]:
    """List the title and rows of each table."""
    large, demo, steps = PRESETS["ssv2"], PRESETS["demo"], options.steps
    if device.type == "cpu":
        cases = [StepCase(demo, demo.device_batch_size, ratio, "sdpa", steps, 1) for ratio in options.ratios]
        tables = [("demo's network, 8×96²", cases)]
        if options.large:
            ratios = sorted({max(options.ratios), min(options.ratios)}, reverse=True)
            tables.append(("ViT-B, 16×224²", [StepCase(large, 1, ratio, "sdpa", 1, 0) for ratio in ratios]))
        return tables
    usual, ratio = choose_attention("auto", device), min(options.ratios)
    others = [kernel for kernel in find_attention(device)[0] if kernel != usual]
    fast = next((kernel for kernel in _FAST if kernel in others), usual)
    make = partial(StepCase, large, steps=steps, warmup=2)
    by_ratio = [make(options.batch, ratio, usual) for ratio in options.ratios]
    by_batch = [make(batch, ratio, usual) for batch in options.batches]
    by_attention = [make(options.batch, ratio, backend) for backend in (usual, *others)]
    small = [StepCase(demo, demo.device_batch_size, ratio, "sdpa", 4 * steps, 5) for ratio in options.ratios]
    tables = [
        ("ViT-B, 16×224², by mask ratio", by_ratio), ("ViT-B, 16×224², by batch size", by_batch),
        ("ViT-B, 16×224², by attention", by_attention), ("demo's network, 8×96²", small),
    ]  # fmt: skip
    if options.modes:  # one table for each, so that a slow compiler does not cost the others
        tables = [
            (f"ViT-B, 16×224², {mode}", [
                make(options.batch, ratio, usual),
                make(options.batch, ratio, fast if "compiled" in mode else usual, mode=mode),
            ])
            for mode in options.modes
        ]  # fmt: skip
    return tables


def _ratio(spent: Sequence[float], base: Sequence[float]) -> str:
    """Return median, lowest and highest of the ratios within rounds."""
    ratios = spread_of([one / other for one, other in zip(spent, base, strict=True)])
    return f"{ratios['median']:.3f} ({ratios['low']:.3f} to {ratios['high']:.3f})"


def measure_contrast(options: Options, device: torch.device) -> tuple[list[Table], dict[str, str]]:
    """Measure the demo's step with the contrastive loss in every role; return a table for one pass and one for two."""
    demo, cpu_ms = PRESETS["demo"], dict[str, list[float]]()
    roles = [role for role, loss in ROLES.items() if loss.contrast_over == "pass"]
    plan = {1: [*roles, TERM], 2: [*ROLES]}  # rows by the number of forward passes

    def turn(name: str, run: Callable[[int], Spent], num_steps: int) -> float:
        spent = run(num_steps)
        cpu_ms.setdefault(name, []).append(spent.cpu_ms)
        return spent.wall_ms

    work: dict[str, Callable[[], float]] = {}
    for num_passes, row in ((num_passes, row) for num_passes, rows in plan.items() for row in rows):
        step = ContrastiveStep(demo, ROLES["optimised" if row == TERM else row], num_passes, device)
        run, num_steps = (step.run_term, 20 * options.steps) if row == TERM else (step.run, options.steps)
        run(2)  # warm-up
        work[f"{row}, {num_passes}"] = partial(turn, f"{row}, {num_passes}", run, num_steps)
    wall_ms = measure(work, options.rounds, "contrastive loss")
    tables, headline = [], {}
    for num_passes, names in plan.items():
        passes = f"{num_passes} pass{'es' * (num_passes > 1)} of {demo.batch_size // num_passes} clips"
        rows, off = [], f"{OFF}, {num_passes}"
        for row in names:
            name = f"{row}, {num_passes}"
            wall, cpu = _ratio(wall_ms[name], wall_ms[off]), _ratio(cpu_ms[name], cpu_ms[off])
            facts: dict[str, float | str] = {"CPU ms": statistics.median(cpu_ms[name]), f"CPU × {OFF}": cpu}
            rows.append(Row(row, wall_ms[name], facts))
            if row != OFF:
                headline[f"{row}, {passes}"] = f"{wall} times the step without, in CPU time {cpu}"
        tables.append(Table(f"contrastive loss, demo's network, {passes}", "ms a step", rows, relative_to=OFF))
    return tables, headline


def run(options: Options) -> None:
    device = choose_device("auto")
    if options.contrast:
        write_report("step_contrast", *measure_contrast(options, device), device)
        return
    if options.modes and device.type != "cuda":
        raise ValueError("--modes needs a CUDA device, to measure --compile and --cuda-graph; leave it out on a CPU")
    name = "step_modes" if options.modes else "step"
    tables, headline = [], {}
    for title, cases in plan_tables(options, device):
        table = measure_cases(title, cases, options, device)
        tables.append(table)
        for row in table.rows[:-1]:  # the last row is the matrix product
            facts = row.facts
            headline[f"{title}, {row.name}"] = f"{facts['clips/s']:.3g} clips/s, {facts['of limit']:.0%} of the limit"
        save_report(name, tables, headline, device)
    write_report(name, tables, headline, device, results={"peak_tflops": peak_tflops(device)})


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
