"""What does a mask cost, by strategy and scorer, beside the training step it is for?

    python -m bench.masks
    python -m bench.masks data/mine.parquet --engine tensorrt --no-large

Takes about a minute on two idle cores. Writes bench/results/masks.<cpu or GPU>.json.

Rows are milliseconds per clip, with clips in memory: the scores of a batch and top-k in each slot, timed separately and
added. "of limit" is CLIP's arithmetic divided by that time, as a share of the fastest large matrix product in the same
rounds. Motion vectors and score maps are read from disk, after the first time from the page cache. They are created
below --work-dir if they are missing, and so is the demo data set.

One table has the demo's clips (8×96², its tiny CLIP), the other clips of production size (16×224²). There CLIP is
ViT-B/32 with random weights, which take as long as trained ones; a CPU leaves its scorers out. The student has random
weights too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import tyro

from bench.harness.ceilings import MATMUL, matmul_ceiling
from bench.harness.command_line import run_from_shell
from bench.harness.measure import measure, now
from bench.harness.report import save_report, write_report
from bench.harness.tables import Row, Table
from bench.workloads.inputs import (
    STRATEGIES,
    WITH_CLIP,
    Engine,
    choose_mask,
    make_random_clip,
    make_strategy_scorer,
    prepare_videos,
)
from bench.workloads.training_step import StepCase, StepTimer
from dali_pipelines.types import ClipBatch
from engines.clip_model import load_clip
from engines.config import CLIPConfig
from tgmae.config.data import DEMO_MANIFEST
from tgmae.config.masks import MaskConfig
from tgmae.config.run import InputConfig, TrainConfig
from tgmae.masks.agreement import count_gflop, load_clips
from tgmae.masks.scorer import BoundScorer
from tgmae.masks.select import select_masks
from tgmae.model.attention import choose_attention
from tgmae.presets import PRESETS
from tgmae.training.parallel import choose_device

STEP = "training step"
_BATCHES = 2  # scored in turn


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    rounds: int = 3  # measurements of every row, taken in turn
    batch: int | None = None  # clips; by default 16 at the demo's size; at production size 8 on a CPU, 64 on CUDA
    engine: Engine = "torch"  # engine that runs CLIP
    ratio: float = 0.6  # mask ratio
    large: bool = True  # measure production size too, not only the demo's
    seconds: float = 0.3  # seconds of scoring in a round, and as many of top-k; at least one batch
    work_dir: Path = Path("data/bench")  # folder for motion vectors, score maps and caches
    prepare: bool = False  # make motion vectors and score maps, and measure nothing


@dataclass
class Strategy:
    """One row: scores and masks of batches in memory."""

    config: InputConfig
    scorer: BoundScorer
    batches: Sequence[ClipBatch]
    seconds: float
    gflop: float | None  # CLIP's, for a clip
    score_ms: list[float] = field(default_factory=list)  # per clip, by round
    topk_ms: list[float] = field(default_factory=list)

    def run(self) -> float:
        """Return milliseconds per clip."""
        scores = [self.scorer(clips) for clips in self.batches]
        masks = [partial(select_masks, self.config.mask, self.config.model, x) for x in scores]
        self.score_ms.append(self._time([partial(self.scorer, clips) for clips in self.batches]))
        self.topk_ms.append(self._time(masks))
        return self.score_ms[-1] + self.topk_ms[-1]

    def _time(self, work: Sequence[Callable[[], object]]) -> float:
        """Repeat work on batches and return milliseconds per clip; the first call does not count."""
        device = self.batches[0].frames.device
        work[0]()
        started, count = now(device), 0
        while not count or time.perf_counter() - started < self.seconds:
            work[count % len(work)]()
            count += 1
        return (now(device) - started) * 1000 / count / len(self.batches[0].requests)

    def facts(self, limit: float) -> dict[str, float | str]:
        """Return further columns; `limit` is the matrix product's TFLOP/s."""
        score, topk = median(self.score_ms), median(self.topk_ms)
        found: dict[str, float | str] = {"clips/s": 1000 / (score + topk), "score ms": score, "top-k ms": topk}
        if self.gflop is not None:
            found |= {"GFLOP a clip": self.gflop, "of limit": self.gflop / score / limit}
        return found


def measure_size(
    title: str, preset: TrainConfig, names: Sequence[str], batch: int, options: Options, device: torch.device
) -> Table:
    """Measure all strategies at one clip size."""
    is_demo, on_cuda = preset.clip.model == "shapes", device.type == "cuda"
    # Large score maps of all videos would take a CPU minutes.
    first = None if is_demo or on_cuda else _BATCHES * batch
    videos = prepare_videos(options.work_dir, options.manifest, preset.model, device, first)
    clip = load_clip(CLIPConfig(model="shapes")) if is_demo else None
    if clip is None and set(names) & set(WITH_CLIP):
        clip = make_random_clip()
    seen = InputConfig(model=preset.model, data=preset.data, mask=MaskConfig(kind="tube"))
    batches = load_clips(seen, videos.manifest, _BATCHES * batch, batch, device)
    strategies = {}
    for name in names:
        config = replace(seen, mask=choose_mask(name, preset.mask, videos, options.ratio))
        scorer = make_strategy_scorer(config, videos, device, options.engine, batch, None if is_demo else clip)
        gflop = count_gflop(clip, preset.model, config.mask) if clip and name in WITH_CLIP else None
        strategies[name] = Strategy(config, scorer, batches, options.seconds, gflop)
    work: dict[str, Callable[[], float]] = {name: strategy.run for name, strategy in strategies.items()}
    if is_demo or on_cuda:  # a step of the large network takes a CPU seconds; bench.step measures it
        attention = choose_attention("auto", device)
        case = StepCase(preset, batch, options.ratio, attention, steps=5 if on_cuda else 2, warmup=2 if on_cuda else 1)
        timer = StepTimer(case, batch, device)
        work[STEP] = lambda: timer.run(case) / batch
    work[MATMUL] = partial(matmul_ceiling, device)
    found = measure(work, options.rounds, title)
    limit = median(found.pop(MATMUL))
    facts = {name: strategy.facts(limit) for name, strategy in strategies.items()}
    rows = [Row(name, values, facts.get(name, {"clips/s": 1000 / median(values)})) for name, values in found.items()]
    weights = "the tiny CLIP" if is_demo else "CLIP ViT-B/32 with random weights"
    note = f"tgm scores with {weights}; " * (clip is not None) + f"the fastest matrix product: {limit:.3g} TFLOP/s"
    return Table(f"{title}, γ {options.ratio}, batch {batch}", "ms a clip", rows, "mgm", note=note)


def run(options: Options) -> None:
    device = choose_device("auto")
    demo, large = PRESETS["demo"], PRESETS["ssv2"]
    if options.prepare:
        for preset in (demo, large):
            prepare_videos(options.work_dir, options.manifest, preset.model, device)
        return
    tables = [measure_size("demo's clips, 8×96²", demo, STRATEGIES, options.batch or demo.batch_size, options, device)]
    save_report("masks", tables, None, device)
    if options.large:
        on_cuda = device.type == "cuda"
        names = [name for name in STRATEGIES if on_cuda or name not in WITH_CLIP]
        batch = options.batch or (64 if on_cuda else 8)
        tables.append(measure_size("16×224²", large, names, batch, options, device))
    headline = {}
    for table in tables:
        costs = {row.name: median(row.values) for row in table.rows}
        for name in ("tgm patch", "tgm dense", "tgm student", "tgm cached", "mgm"):
            if name in costs:
                share = f", {costs[name] / costs[STEP]:.2g} training steps" if STEP in costs else ""
                headline[f"{table.title}: {name}"] = f"{costs[name]:.3g} ms per clip{share}"
    write_report("masks", tables, headline, device)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
