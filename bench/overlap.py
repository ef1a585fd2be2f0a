"""How much of a scorer's time does the training step hide? Measured, not assumed.

    python -m bench.overlap [MANIFEST] [--rounds 3] [--engine tensorrt]

Takes half a minute on two idle cores once motion vectors and score maps are made, which lie below --work-dir. Writes
bench/results/overlap.<cpu or GPU>.json.

For each scorer, in turn in every round: the step alone, the scorer alone (scores and masks, clips in memory), and both
at once, the scorer in a thread of its own on a CUDA stream of its own, one batch ahead, as the loader runs it. Rows are
milliseconds a batch of both; "hidden" is the share of the scorer's own time that they save, (step + scorer - both) /
scorer. 1 means that the scorer costs nothing; 0, that the two might as well run one after the other; less, that they
get in each other's way. It is left out where the scorer takes less time than the step's own spread.

On CUDA a second row has the step on a stream of high priority: a stream's usual priority is already the lowest, so it
is the step's that can be raised. CPU: the demo's network and clips, the tiny CLIP; both share the cores, so little can
be hidden. CUDA: ViT-B, 16×224², and CLIP ViT-B/32 with random weights, which cost what others cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import tyro

from bench.harness.inputs import Engine, choose_mask, make_random_clip, make_strategy, prepare
from bench.harness.report import Row, Table, measure, now, run_from_shell, write_report
from bench.masks import WITH_CLIP
from bench.step import make_step
from tgmae.config import InputConfig
from tgmae.data.config import DEMO_MANIFEST
from tgmae.masks.agreement import load_clips
from tgmae.masks.config import MaskConfig
from tgmae.masks.scorer import BoundScorer
from tgmae.masks.select import select_masks
from tgmae.model.token_masks import TokenMasks
from tgmae.presets import PRESETS
from tgmae.training.parallel import choose_device

STRATEGIES = ("tgm cached", "tgm student", "tgm dense", "tgm patch", "mgm")
FIRST = ", step first"  # of the rows with the step on a stream of high priority


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # the default is made where it is missing
    work_dir: Path = Path("data/bench")  # motion vectors, score maps and caches
    rounds: int = 3
    seconds: float = 0.3  # of a measurement, in whole batches; at least one
    ratio: float = 0.6
    batch: int | None = None  # clips; by default 16 of the demo's, 64 on CUDA
    strategies: tuple[str, ...] = STRATEGIES
    engine: Engine = "torch"  # that runs CLIP


class Overlap:
    """Network, clips and scorers on the device, and the three things that are timed, each in milliseconds a batch."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.device, self.options = device, options
        self.on_cuda = device.type == "cuda"
        preset = PRESETS["ssv2" if self.on_cuda else "demo"]
        self.batch = options.batch or (64 if self.on_cuda else preset.device_batch_size)
        self.config = replace(preset, batch_size=self.batch, device_batch_size=self.batch)
        self.names = options.strategies
        videos = prepare(options.work_dir, options.manifest, preset.model, device)
        clip = make_random_clip() if self.on_cuda and set(self.names) & set(WITH_CLIP) else None
        seen = InputConfig(model=preset.model, data=preset.data, mask=MaskConfig(kind="tube"))
        (self.clips,) = load_clips(seen, videos.manifest, self.batch, self.batch, device)
        self.scorers: dict[str, BoundScorer] = {}
        for name in self.names:
            mask = choose_mask(name, preset.mask, videos, options.ratio)
            self.scorers[name] = make_strategy(replace(seen, mask=mask), videos, device, options.engine, clip)
        self.mask = MaskConfig(kind="tube", ratio=options.ratio)  # how many patches; the scorers have their own
        self.step = make_step(self.config, device)
        self.own, self.high = (self._stream(priority) for priority in (0, -1))
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        now(device)  # what scorers and step hold was put there by this thread's stream
        self.plan = self.thread.submit(self.score, self.names[0]).result()
        self.counts: dict[str, int] = {}  # batches in a measurement

    def _stream(self, priority: int) -> torch.cuda.Stream | None:
        if not self.on_cuda:
            return None
        return torch.cuda.Stream(self.device, priority=priority)  # type: ignore[no-untyped-call]

    def score(self, name: str) -> TokenMasks:
        """In the thread, as the loader does it: done when the GPU is done."""
        with on_stream(self.own):
            plan = select_masks(self.mask, self.config.model, self.scorers[name](self.clips))
        if self.own is not None:
            self.own.synchronize()
        return plan

    def scorer_alone(self, name: str) -> float:
        def batches(count: int) -> None:
            for _ in range(count):
                self.thread.submit(self.score, name).result()

        return self._time(f"{name} alone", batches)

    def step_alone(self) -> float:
        def batches(count: int) -> None:
            for _ in range(count):
                self.step(self.clips.frames, self.plan)

        return self._time("step", batches)

    def both(self, name: str, step_first: bool) -> float:
        """As many steps as batches are scored."""

        def batches(count: int) -> None:
            plan = self.plan
            with on_stream(self.high if step_first else None):
                for _ in range(count):
                    coming = self.thread.submit(self.score, name)
                    self.step(self.clips.frames, plan)
                    plan = coming.result()
                    if self.on_cuda:  # it is the scorer's memory: kept until the step is done with it
                        for tensor in (plan.visible, plan.masked):
                            tensor.record_stream(torch.cuda.current_stream(self.device))

        return self._time(name + FIRST * step_first, batches)

    def _time(self, name: str, batches: Callable[[int], None]) -> float:
        """Milliseconds a batch. The first call warms up, and finds out how many batches fill the time."""
        started = now(self.device)  # the last measurement may have run on another stream
        if name not in self.counts:
            batches(1)
            if (spent := now(self.device) - started) < self.options.seconds or not self.options.seconds:
                started = now(self.device)
                batches(1)
                spent = now(self.device) - started
            self.counts[name] = max(1, round(self.options.seconds / spent))
        started = now(self.device)
        batches(self.counts[name])
        return 1000 * (now(self.device) - started) / self.counts[name]

    def close(self) -> None:
        self.thread.shutdown()


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """torch's context, or none without a stream."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def hidden(step: Sequence[float], scorer: Sequence[float], both: Sequence[float]) -> list[float]:
    """Share of the scorer's time that both at once save, by round."""
    return [(a + b - c) / b for a, b, c in zip(step, scorer, both, strict=True)]


def make_table(found: Mapping[str, Sequence[float]], names: Sequence[str], title: str, note: str) -> Table:
    """found: milliseconds by round of "<scorer>: step", ": scorer" and ": both", on CUDA of the last with FIRST too."""
    rows = []
    for name in names:
        step, scorer = found[f"{name}: step"], found[f"{name}: scorer"]
        for label, both in ((name, found[f"{name}: both"]), (name + FIRST, found.get(f"{name}: both{FIRST}"))):
            if both is not None:
                ratios, saved = [a / b for a, b in zip(both, step, strict=True)], hidden(step, scorer, both)
                is_seen = median(scorer) > max(step) - min(step)
                facts: dict[str, float | str] = {
                    "step alone": median(step),
                    "scorer alone": median(scorer),
                    "× step": median(ratios),
                    "hidden": f"{median(saved):.0%} ({min(saved):.0%} to {max(saved):.0%})" if is_seen else "",
                }
                rows.append(Row(label, both, facts))
    return Table(title, "ms a batch", rows, note=note)


def run(options: Options) -> None:
    device = choose_device("auto")
    overlap = Overlap(options, device)
    work: dict[str, Callable[[], float]] = {}
    for name in overlap.names:
        work[f"{name}: step"] = overlap.step_alone
        work[f"{name}: scorer"] = partial(overlap.scorer_alone, name)
        work[f"{name}: both"] = partial(overlap.both, name, False)
        if overlap.on_cuda:
            work[f"{name}: both{FIRST}"] = partial(overlap.both, name, True)
    try:
        found = measure(work, options.rounds, "ms a batch")
    finally:
        overlap.close()
    what = "ViT-B, 16×224²" if overlap.on_cuda else "the demo's network, 8×96²"
    note = "CLIP ViT-B/32, random weights" if overlap.on_cuda else "the tiny CLIP; both share the cores of a CPU"
    table = make_table(
        found, overlap.names, f"step and scorer at once, {what}, γ {options.ratio}, batch {overlap.batch}", note
    )
    headline = {
        row.name: f"with it a step takes {row.facts['× step']:.3f} of its own time; hidden of the scorer: "
        f"{row.facts['hidden'] or 'too little to be seen beside the spread of the step'}"
        for row in table.rows
    }
    write_report("overlap", [table], headline, device)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
