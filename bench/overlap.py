"""How much of a scorer's time does the training step hide?

    python -m bench.overlap
    python -m bench.overlap data/mine.parquet --strategies "tgm student" mgm --engine tensorrt

Takes half a minute on two idle cores, once motion vectors and score maps exist below --work-dir. Writes
bench/results/overlap.<cpu or GPU>.json.

Three things are timed for each scorer, in turn in every round: the step alone, the scorer alone (scores and masks,
clips in memory), and both at once. Then the scorer runs as in the loader: in its own thread, on its own CUDA stream,
one batch ahead. Rows are milliseconds per batch for both at once. "hidden" is the share of the scorer's own time that
this saves, (step + scorer - both) / scorer. 1 means that the scorer costs nothing, 0 that running them one after the
other would take as long, and less than 0 that they slow each other down. It is left out where the step's own time
varies by more than the scorer takes.

On CUDA a second row has the step on a high-priority stream. (A stream's default priority is already the lowest, so the
scorer's cannot be lowered.) A CPU measures the demo's network and clips with the tiny CLIP; both share its cores, so
little can be hidden. CUDA measures ViT-B at 16×224² with CLIP ViT-B/32 and random weights, which take as long as
trained ones.
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

from bench.harness.command_line import run_from_shell
from bench.harness.measure import measure, now
from bench.harness.report import write_report
from bench.harness.tables import Row, Table
from bench.workloads.inputs import (
    WITH_CLIP,
    Engine,
    choose_mask,
    make_random_clip,
    make_strategy_scorer,
    prepare_videos,
)
from bench.workloads.training_step import make_step
from tgmae.config.data import DEMO_MANIFEST
from tgmae.config.masks import MaskConfig
from tgmae.config.run import InputConfig
from tgmae.masks.agreement import load_clips
from tgmae.masks.scorer import BoundScorer
from tgmae.masks.select import select_masks
from tgmae.model.token_masks import TokenMasks
from tgmae.presets import PRESETS
from tgmae.training.parallel import choose_device

DEFAULT_STRATEGIES = ("tgm cached", "tgm student", "tgm dense", "tgm patch", "mgm")
FIRST = ", step first"  # marks rows with the step on a high-priority stream


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    rounds: int = 3  # measurements of every row, taken in turn
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES  # mask strategies whose scorers are measured
    batch: int | None = None  # clips; by default 16 on a CPU, 64 on CUDA
    engine: Engine = "torch"  # engine that runs CLIP
    ratio: float = 0.6  # mask ratio
    seconds: float = 0.3  # seconds of one measurement, in whole batches; at least one
    work_dir: Path = Path("data/bench")  # folder for motion vectors, score maps and caches


class Overlap:
    """Network, clips and scorers on the device, and the three measurements, each in milliseconds per batch."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.device, self.options = device, options
        self.on_cuda = device.type == "cuda"
        preset = PRESETS["ssv2" if self.on_cuda else "demo"]
        self.batch = options.batch or (64 if self.on_cuda else preset.device_batch_size)
        self.config = replace(preset, batch_size=self.batch, device_batch_size=self.batch)
        self.names = options.strategies
        videos = prepare_videos(options.work_dir, options.manifest, preset.model, device)
        clip = make_random_clip() if self.on_cuda and set(self.names) & set(WITH_CLIP) else None
        seen = InputConfig(model=preset.model, data=preset.data, mask=MaskConfig(kind="tube"))
        (self.clips,) = load_clips(seen, videos.manifest, self.batch, self.batch, device)
        self.scorers: dict[str, BoundScorer] = {}
        for name in self.names:
            mask = choose_mask(name, preset.mask, videos, options.ratio)
            self.scorers[name] = make_strategy_scorer(
                replace(seen, mask=mask), videos, device, options.engine, self.batch, clip
            )
        self.mask = MaskConfig(kind="tube", ratio=options.ratio)  # says how many patches to mask, for all scorers
        self.step = make_step(self.config, device)
        self.own, self.high = (self._stream(priority) for priority in (0, -1))
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        now(device)  # the weights were written on this thread's stream; the others must not start before
        self.masks = self.thread.submit(self.score, self.names[0]).result()
        self.counts: dict[str, int] = {}  # batches of each measurement

    def _stream(self, priority: int) -> torch.cuda.Stream | None:
        if not self.on_cuda:
            return None
        return torch.cuda.Stream(self.device, priority=priority)  # type: ignore[no-untyped-call]

    def score(self, name: str) -> TokenMasks:
        """Score and mask the batch, in the thread, and wait for the GPU, as the loader does."""
        with on_stream(self.own):
            masks = select_masks(self.mask, self.config.model, self.scorers[name](self.clips))
        if self.own is not None:
            self.own.synchronize()
        return masks

    def scorer_alone(self, name: str) -> float:
        def batches(count: int) -> None:
            for _ in range(count):
                self.thread.submit(self.score, name).result()

        return self._time(f"{name} alone", batches)

    def step_alone(self) -> float:
        def batches(count: int) -> None:
            for _ in range(count):
                self.step(self.clips.frames, self.masks)

        return self._time("step", batches)

    def both(self, name: str, step_first: bool) -> float:
        """Score one batch for each step, at the same time."""

        def batches(count: int) -> None:
            masks = self.masks
            with on_stream(self.high if step_first else None):
                for _ in range(count):
                    coming = self.thread.submit(self.score, name)
                    self.step(self.clips.frames, masks)
                    masks = coming.result()
                    if self.on_cuda:  # memory of the scorer's stream: keep it until the step is done with it
                        for tensor in (masks.visible, masks.masked):
                            tensor.record_stream(torch.cuda.current_stream(self.device))

        return self._time(name + FIRST * step_first, batches)

    def _time(self, name: str, batches: Callable[[int], None]) -> float:
        """Return milliseconds per batch. The first call is a warm-up and finds out how many batches fill the time."""
        started = now(self.device)  # also waits for the last measurement, which may have run on another stream
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
    """Return torch's context for a stream, or an empty one for None."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def hidden(step: Sequence[float], scorer: Sequence[float], both: Sequence[float]) -> list[float]:
    """Return the share of the scorer's time that running both at once saves, by round."""
    return [(a + b - c) / b for a, b, c in zip(step, scorer, both, strict=True)]


def make_table(found: Mapping[str, Sequence[float]], names: Sequence[str], title: str, note: str) -> Table:
    """Make a row, or two, for each scorer.

    found   milliseconds by round of "<scorer>: step", "<scorer>: scorer" and "<scorer>: both"; on CUDA the last with
            FIRST too
    """
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
        row.name: f"with it a step takes {row.facts['× step']:.3f} times as long; share of the scorer hidden: "
        f"{row.facts['hidden'] or 'too small to tell from the spread of the step'}"
        for row in table.rows
    }
    write_report("overlap", [table], headline, device)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
