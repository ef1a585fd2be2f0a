"""How fast is the training step alone, and how much of the machine's arithmetic does it use?

    python -m bench.step [--rounds 3] [--batches 32 64 128] [--ratios 0.9 0.75 0.65 0.6]

Takes about a minute. Writes bench/results/step.<cpu or GPU>.json, or step_modes.

The batch (random frames and masks) lies on the device; a step is what train.py does with it: forward and loss,
backward, then gradient norm, AdamW and zero_grad (the stage optimizer), and the two numbers it reads back a step later;
bfloat16 autocast on CUDA, float32 on a CPU. Rows are in TFLOP/s: a clip's matrix products, counted in the forward pass
and taken three times for forward and backward, by the time of the step. `limit` is the fastest large matrix product of
that precision in the same rounds; "of peak" the share of the data sheet's figure (model FLOP utilisation), where known.

Tables: the large presets' network by mask ratio, by batch size and by attention; the demo's network. On CUDA --modes
graph compiled "compiled graph" measures --cuda-graph and --compile in their place. How long it took until the first
step was done stands below each table. A CPU takes one clip of the large network a step, at two ratios. What does
not fit the GPU's memory is left out and named.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.attention import available_attention
from bench.harness.chips import find_chip
from bench.harness.report import (
    Row,
    Table,
    first_line,
    measure,
    now,
    prepare_each,
    run_from_shell,
    save_report,
    write_report,
)
from kernels.topk_mask import topk_mask
from tgmae.config import TrainConfig
from tgmae.masks.config import MaskConfig
from tgmae.model.attention import Backend, choose_attention
from tgmae.model.config import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import Attention, VideoMAE
from tgmae.presets import PRESETS
from tgmae.training.async_losses import AsyncLosses
from tgmae.training.optim import make_optimizer
from tgmae.training.parallel import World, choose_device
from tgmae.training.step import TrainingStep

MATMUL = "matrix product"
Mode = Literal["graph", "compiled", "compiled graph"]


@dataclass(frozen=True)
class Options:
    rounds: int = 3
    steps: int = 5  # timed in a round; on a CPU one of the large network
    batch: int = 64  # of the table of ratios, on CUDA
    batches: tuple[int, ...] = (32, 64, 128)  # on CUDA
    ratios: tuple[float, ...] = (0.9, 0.75, 0.65, 0.6)
    modes: tuple[Mode, ...] = ()  # on CUDA: measure each beside the plain step, and nothing else
    large: bool = True  # --no-large measures the demo's network only


@dataclass
class Case:
    """One row: what is run, and what was seen of it."""

    preset: TrainConfig
    batch: int
    ratio: float
    attention: Backend
    steps: int  # timed in a round
    warmup: int  # before them
    mode: Literal["plain"] | Mode = "plain"
    shares: dict[str, list[float]] = field(default_factory=dict)  # of the step, by stage
    milliseconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0

    def forget(self) -> None:
        """Throw away what was seen: it was a warm-up."""
        self.milliseconds.clear()
        self.shares.clear()

    def config(self) -> TrainConfig:
        """What a run with these choices is configured with."""
        return replace(
            self.preset, batch_size=self.batch, device_batch_size=self.batch,
            mask=replace(self.preset.mask, ratio=self.ratio), compile="compiled" in self.mode,
            cuda_graph="graph" in self.mode,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return f"γ {self.ratio}, {self.attention}, batch {self.batch}" + f", {self.mode}" * (self.mode != "plain")


@cache
def count_gflop(model: ModelConfig, ratio: float) -> float:
    """Floating-point operations of forward and backward for one clip, in 1e9; a multiply-add counts as two.

    Counted on tensors without contents: matrix products and attention of the forward pass, taken three times.
    """
    num_masked = MaskConfig(ratio=ratio).masked_per_slot(model.patches_per_slot) * model.num_slots
    # torch counts matrix products only; attention shows as such under its plain kernel.
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network = VideoMAE(model)
        frames = torch.empty(1, model.num_frames, model.image_size, model.image_size, 3, dtype=torch.uint8)
        visible, masked = (torch.empty(1, n, dtype=torch.int32) for n in (model.num_tokens - num_masked, num_masked))
        network(frames, TokenMasks(visible=visible, masked=masked))
    return 3 * float(counter.get_total_flops()) / 1e9


class Step:
    """A network's optimiser, and one step of train.py."""

    def __init__(self, model: VideoMAE, config: TrainConfig, device: torch.device) -> None:
        self.rate, self.readback = config.optim.base_lr, AsyncLosses(device)
        optimizer = make_optimizer(model, config.optim)
        self.training = TrainingStep(model, optimizer, config, World(0, 1, device), device.type == "cuda")

    def __call__(self, frames: Tensor, plan: TokenMasks) -> None:
        loss, _ = self.training.add_gradients(frames, plan)
        self.readback.push(0, [loss], self.training.update(self.rate), [])
        assert all(seen.is_finite for seen in self.readback.pop(wait=False))


def make_step(config: TrainConfig, device: torch.device) -> Step:
    """Of a network with the attention that `config` names."""
    torch.manual_seed(0)
    model = VideoMAE(config.model, choose_attention(config.model.attention, device)).to(device)
    return Step(model, config, device)


class Trainer:
    """Network, optimiser and batches of one preset on the device, and the training step.

    case        the first to be run: its mode holds for all others, and as a CUDA graph it is the only one
    prepare_s   of making the step and taking it for the first time: compilation, capture, libraries
    """

    def __init__(self, case: Case, largest_batch: int, device: torch.device) -> None:
        self.device, self.config = device, case.config()
        config, held = self.config.model, _allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        shape = (largest_batch, config.num_frames, config.image_size, config.image_size, 3)
        self.frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.scores = torch.rand(largest_batch, config.num_slots, config.patches_per_slot, device=device)
        torch.manual_seed(0)
        with device:  # drawn on the GPU, which is quicker
            self.model = VideoMAE(config, case.attention)
        started = now(device)
        self.step = Step(self.model, self.config, device)
        self.step(*self._batch(case))
        self.prepare_s = now(device) - started
        self.held = _allocated(device) - held
        # Replays allocate nothing: what a graph holds shows while it is recorded.
        self.recorded = torch.cuda.max_memory_allocated() - held if self.config.cuda_graph else 0

    def run(self, case: Case) -> float:
        """Train for the case's steps; TFLOP/s. Notes milliseconds a step, each stage's share and the peak of memory."""
        for module in self.model.modules():
            if isinstance(module, Attention):
                module.backend = case.attention
        batch, on_cuda = self._batch(case), self.device.type == "cuda"
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        others = _allocated(self.device) - self.held
        for _ in range(case.warmup):
            self.step(*batch)
        started, before = now(self.device), self._stages()
        for _ in range(case.steps):
            self.step(*batch)
        seconds = (now(self.device) - started) / case.steps
        for stage, spent in self._stages().items():
            share = (spent - before.get(stage, 0.0)) / case.steps / seconds
            case.shares.setdefault(stage, []).append(share)
        case.milliseconds.append(seconds * 1000)
        if on_cuda:
            case.peak_gib = max(torch.cuda.max_memory_allocated() - others, self.recorded) / 2**30
        return count_gflop(case.preset.model, case.ratio) * case.batch / seconds / 1000

    def _batch(self, case: Case) -> tuple[Tensor, TokenMasks]:
        k = MaskConfig(ratio=case.ratio).masked_per_slot(case.preset.model.patches_per_slot)
        visible, masked = topk_mask(self.scores[: case.batch], k)
        return self.frames[: case.batch], TokenMasks(visible=visible, masked=masked)

    def _stages(self) -> dict[str, float]:
        self.step.training.clock.collect()
        return self.step.training.clock.totals()


def _allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def matmul_ceiling(device: torch.device) -> float:
    """TFLOP/s of the fastest of some large square matrix products, in the step's precision."""
    on_cuda = device.type == "cuda"
    dtype, repeats = (torch.bfloat16, 10) if on_cuda else (torch.float32, 2)
    best = 0.0
    for side in (4096, 8192) if on_cuda else (1024, 2048):
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        a @ b
        started = now(device)
        for _ in range(repeats):
            a @ b
        best = max(best, 2 * side**3 * repeats / (now(device) - started) / 1e12)
    return best


def peak_tflops(device: torch.device) -> float | None:
    """The data sheet's dense bfloat16 figure; None for a GPU that bench/chips.py does not know, and for a CPU."""
    try:
        return find_chip(torch.cuda.get_device_name(device)).tensor_tflops if device.type == "cuda" else None
    except ValueError:
        return None


def measure_cases(title: str, cases: Sequence[Case], options: Options, device: torch.device) -> Table:
    """One table: the cases and the matrix product in turn, round after round."""
    largest, left_out = max(case.batch for case in cases), []
    trainers: dict[str, Trainer] = {}  # by mode; a graph is of one case only
    work: dict[str, Callable[[], float]] = {}
    fitting = []
    for name, case in prepare_each({case.name: case for case in cases}, f"preparing, {title}"):
        key = name if "graph" in case.mode else case.mode
        try:
            if key not in trainers:
                trainers[key] = Trainer(case, largest, device)
            if device.type == "cuda":  # unmeasured: memory, libraries, compilation
                trainers[key].run(case)
        except RuntimeError as error:  # memory; no such attention on this GPU; no compiler
            if trainer := trainers.pop(key, None) if key == name else trainers.get(key):
                trainer.step.training.optimizer.zero_grad(set_to_none=True)
            left_out.append(f"left out: {name} ({first_line(error)})")
            continue
        case.forget()
        fitting.append(case)
        work[name] = partial(trainers[key].run, case)
    work[MATMUL] = partial(matmul_ceiling, device)
    found = measure(work, options.rounds, title)
    limit = statistics.median(found[MATMUL])
    rows = [Row(case.name, found[case.name], _facts(case, found[case.name], limit, device)) for case in fitting]
    rows.append(Row(MATMUL, found[MATMUL]))
    prepared = "; ".join(f"{name}: {trainer.prepare_s:.1f} s" for name, trainer in trainers.items())
    if device.type == "cuda" and peak_tflops(device) is None:
        left_out.append(f"of peak is left out: no figure is known for {torch.cuda.get_device_name(device)}")
    return Table(
        title, "TFLOP/s", rows, limit=limit, note="\n".join([f"until the first step was done: {prepared}", *left_out])
    )


def _facts(case: Case, rates: Sequence[float], limit: float, device: torch.device) -> dict[str, float | str]:
    milliseconds, rate = statistics.median(case.milliseconds), statistics.median(rates)
    facts: dict[str, float | str] = {
        "clips/s": case.batch / milliseconds * 1000,
        "ms a step": milliseconds,
        "GFLOP a clip": count_gflop(case.preset.model, case.ratio),
        **{stage: f"{statistics.median(shares):.0%}" for stage, shares in case.shares.items()},
        "of limit": rate / limit,
    }
    if (peak := peak_tflops(device)) is not None:
        facts["of peak"] = rate / peak
    if device.type == "cuda":
        facts["peak GiB"] = case.peak_gib
    return facts


def plan_tables(options: Options, device: torch.device) -> list[tuple[str, list[Case]]]:
    """What is measured: (title, rows) of each table."""
    large, demo, steps = PRESETS["ssv2"], PRESETS["demo"], options.steps
    if device.type == "cpu":
        cases = [Case(demo, demo.device_batch_size, ratio, "sdpa", steps, 1) for ratio in options.ratios]
        tables = [("demo's network, 8×96²", cases)]
        if options.large:
            ratios = sorted({max(options.ratios), min(options.ratios)}, reverse=True)
            tables.append(("ViT-B, 16×224²", [Case(large, 1, ratio, "sdpa", 1, 0) for ratio in ratios]))
        return tables
    usual, ratio = choose_attention("auto", device), min(options.ratios)
    others = [backend for backend in available_attention(device) if backend != usual]
    make = partial(Case, large, steps=steps, warmup=2)
    by_ratio = [make(options.batch, ratio, usual) for ratio in options.ratios]
    by_batch = [make(batch, ratio, usual) for batch in options.batches]
    by_attention = [make(options.batch, ratio, backend) for backend in (usual, *others)]
    small = [Case(demo, demo.device_batch_size, ratio, "sdpa", 4 * steps, 5) for ratio in options.ratios]
    tables = [
        ("ViT-B, 16×224², by mask ratio", by_ratio), ("ViT-B, 16×224², by batch size", by_batch),
        ("ViT-B, 16×224², by attention", by_attention), ("demo's network, 8×96²", small),
    ]  # fmt: skip
    if options.modes:  # a table each: a compiler that takes its time leaves the others
        tables = [
            (f"ViT-B, 16×224², {mode}", [make(options.batch, ratio, usual, mode=one) for one in ("plain", mode)])
            for mode in options.modes
        ]
    return tables


def run(options: Options) -> None:
    device = choose_device("auto")
    if options.modes and device.type != "cuda":
        raise ValueError("--modes needs a CUDA device: it measures --compile and --cuda-graph")
    name = "step_modes" if options.modes else "step"
    tables, headline = [], {}
    for title, cases in plan_tables(options, device):
        table = measure_cases(title, cases, options, device)
        tables.append(table)
        for row in table.rows[:-1]:  # the last is the matrix product
            facts = row.facts
            headline[f"{title}, {row.name}"] = f"{facts['clips/s']:.3g} clips/s, {facts['of limit']:.0%} of the limit"
        save_report(name, tables, headline, device)
    write_report(name, tables, headline, device, results={"peak_tflops": peak_tflops(device)})


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
