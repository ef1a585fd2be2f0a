"""What do text-guided masks cost in wall clock beside motion-guided ones, and how close is training to the step alone?

    python -m bench.train
    python -m bench.train data/mine.parquet --model vit-b --strategies "tgm cached" mgm --engine tensorrt

Takes about three minutes on two cores; not yet run on CUDA. Writes bench/results/train.<cpu or GPU>.json.

Rows are clips/s of training end to end: files, decoding, scores, masks and the step of train.py, in turn in every
round. "ceiling" is that step alone, on a batch that is already on the device. The first table has all strategies at one
mask ratio, as the paper timed them (TGM 15 h, MGM 13 h: 1.154), the second each at its own. "waiting" is the share of
the time that the step waited for input. load, score and mask are the loader's stages in ms per batch, which run beside
the step. TFLOP/s counts the step's arithmetic only.

A CPU trains the demo's network on its clips (8×96², batch 16) with the tiny CLIP. CUDA trains ViT-B at 16×224² in
bfloat16 with batches of 64, and CLIP ViT-B/32 with random weights. The hours are 168,913 videos (SSv2) × 200 epochs
divided by the clips/s of one such machine, on the manifest's videos, which are smaller than SSv2's. For the demo's
network they are projected from a single forward and backward of ViT-B. Motion vectors and score maps are created below
the folder --work-dir if they are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro

from bench.costs.step_flops import count_step_gflop
from bench.harness.command_line import run_from_shell
from bench.harness.measure import cpu_seconds, measure, now
from bench.harness.report import save_report, write_report
from bench.harness.tables import Row, Table
from bench.harness.wall_clock import CEILING, ratios, ssv2_hours, summarise
from bench.workloads.inputs import (
    WITH_CLIP,
    Engine,
    choose_mask,
    make_random_clip,
    make_strategy_scorer,
    prepare_videos,
)
from bench.workloads.training_step import StepCase, StepTimer, make_step
from dali_pipelines.workers.processes import count_cores
from kernels.topk_mask import topk_mask
from tgmae.config.data import DEMO_MANIFEST
from tgmae.config.masks import MaskConfig
from tgmae.model.attention import choose_attention
from tgmae.model.token_masks import TokenMasks
from tgmae.presets import PRESETS
from tgmae.training.loader import Loader, make_loader
from tgmae.training.parallel import choose_device

NATIVE = {  # each strategy's own mask ratio
    "tgm patch": 0.6, "tgm dense": 0.6, "tgm student": 0.6, "tgm cached": 0.6, "mgm": 0.75, "tube": 0.9,
}  # fmt: skip
_WARM_UP, _LEAST = 2, 3  # steps before the timed ones; steps timed at least, however slow
_PATIENCE_S = 20.0  # for loaders to come to rest; the report says how busy they still were


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    rounds: int = 3  # measurements of every row, taken in turn
    strategies: tuple[str, ...] = tuple(NATIVE)  # mask strategies; mgm must be one of them
    model: Literal["auto", "demo", "vit-b"] = "auto"  # network to train; auto: vit-b on CUDA, demo on a CPU
    batch: int | None = None  # clips; by default 16 for the demo, 64 for vit-b
    workers: int | None = None  # workers of each loader; by default 2 for the demo, up to 8 for vit-b
    decode: Literal["auto", "gpu", "cpu"] = "auto"  # where videos are decoded
    engine: Engine = "torch"  # engine that runs CLIP
    ratio: float = 0.65  # mask ratio of the first table
    steps: int | None = None  # steps timed in a turn; by default 10 on a CPU, 20 on CUDA
    seconds: float = 10.0  # end a turn after this many seconds, with fewer steps
    compile: bool = False  # compile the network's blocks, once for every mask ratio
    project: bool = True  # project the demo's hours from a step of ViT-B
    work_dir: Path = Path("data/bench")  # folder for motion vectors, score maps and caches


@dataclass(frozen=True)
class Turn:
    """Measurements of a strategy in one turn."""

    step_ms: float
    waiting: float = 0.0  # share of the time
    stage_ms: Mapping[str, float] | None = None  # a batch: load, score, mask


class Contest:
    """One network, and a loader for each strategy, which is kept through all rounds."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.is_demo = options.model == "demo" or (options.model == "auto" and device.type == "cpu")
        preset = PRESETS["demo" if self.is_demo else "ssv2"]
        batch = options.batch or (preset.device_batch_size if self.is_demo else 64)
        workers = options.workers or min(count_cores(), 2 if self.is_demo else 8)
        data = replace(preset.data, num_workers=workers, decode=options.decode)
        sizes = {"batch_size": batch, "device_batch_size": batch}
        self.config = replace(preset, data=data, compile=options.compile, **sizes)  # type: ignore[arg-type]
        self.num_steps = options.steps or (20 if device.type == "cuda" else 10)
        videos = prepare_videos(options.work_dir, options.manifest, preset.model, device)
        clip = None if self.is_demo or not set(WITH_CLIP) & set(options.strategies) else make_random_clip()
        self.step = make_step(self.config, device)
        self.turns: dict[tuple[str, float], list[Turn]] = {}
        self.idle_cores: list[float] = []  # CPU cores that all loaders together used just before each turn
        masks = {name: choose_mask(name, preset.mask, videos, options.ratio) for name in options.strategies}
        configs = {name: replace(self.config, mask=mask) for name, mask in masks.items()}
        # All scorers before the first loader: its thread would replay a CUDA graph while another is being captured.
        scorers = {
            name: make_strategy_scorer(config, videos, device, options.engine, batch, clip)
            for name, config in configs.items()
        }
        self.loaders: dict[str, Loader] = {}
        for name, config in configs.items():
            self.loaders[name] = make_loader(config, videos.manifest, scorers[name], 0, device)
        self.frames = self.loaders[options.strategies[0]].next_batch().clips.frames.clone()

    def run(self, name: str, ratio: float) -> float:
        """Give a strategy or the ceiling its turn; return clips/s."""
        self._settle()
        turn, rate = self._run_ceiling(ratio) if name == CEILING else self._run_strategy(self.loaders[name], ratio)
        self.turns.setdefault((name, ratio), []).append(turn)
        return rate

    def _run_strategy(self, loader: Loader, ratio: float) -> tuple[Turn, float]:
        """Train on the loader's batches; return what was seen, and clips/s."""
        # The loader is at rest, and the batches in its queues still have the last turn's ratio.
        loader.mask = replace(loader.mask, ratio=ratio)
        # It filled those queues during the others' turns: one batch of its own, two of DALI's, and the workers'. They
        # would cost this turn nothing, so they are discarded. A loader that takes longer than this is slower than the
        # step, and batches before its scorer do not matter.
        started = time.perf_counter()
        for _ in range(self.config.data.prefetch + 3):
            loader.next_batch()
            if time.perf_counter() - started > self.options.seconds / 4:
                break

        def step() -> None:
            batch = loader.next_batch()
            self.step(batch.clips.frames, batch.masks)

        for _ in range(_WARM_UP):
            step()
        waited, stages = loader.waited_s, loader.clock.totals()
        seconds, count = self._time(step)
        turn = Turn(
            step_ms=1000 * seconds / count,
            waiting=(loader.waited_s - waited) / seconds,
            stage_ms={
                name: 1000 * (now - stages.get(name, 0.0)) / count for name, now in loader.clock.totals().items()
            },
        )
        return turn, len(self.frames) * count / seconds

    def _run_ceiling(self, ratio: float) -> tuple[Turn, float]:
        """Train on one batch that is on the device; return what was seen, and clips/s."""
        model = self.config.model
        scores = torch.rand(len(self.frames), model.num_slots, model.patches_per_slot, device=self.device)
        visible, masked = topk_mask(scores, MaskConfig(ratio=ratio).masked_per_slot(model.patches_per_slot))
        masks = TokenMasks(visible=visible, masked=masked)
        for _ in range(_WARM_UP):
            self.step(self.frames, masks)
        seconds, count = self._time(lambda: self.step(self.frames, masks))
        return Turn(1000 * seconds / count), len(self.frames) * count / seconds

    def _time(self, step: Callable[[], None]) -> tuple[float, int]:
        """Return the seconds taken and the number of steps done."""
        started, count = now(self.device), 0
        while count < self.num_steps:
            step()
            count += 1
            if count >= _LEAST and time.perf_counter() - started > self.options.seconds:
                break
        return now(self.device) - started, count

    def _settle(self) -> None:
        """Wait until all loaders have filled their queues and take no CPU time from the next turn."""
        started = now(self.device)
        while True:
            begin, used = now(self.device), cpu_seconds()
            time.sleep(0.2)
            cores = (cpu_seconds() - used) / (now(self.device) - begin)
            # A worker's clock ticks every hundredth of a second.
            if cores < 0.15 or time.perf_counter() - started > _PATIENCE_S:
                self.idle_cores.append(cores)
                return

    def table(self, title: str, rates: Mapping[tuple[str, float], Sequence[float]], same_ratio: bool) -> Table:
        """Make a row for each strategy and ratio, with its share of the ceiling at that ratio."""
        rows = []
        for (name, ratio), values in rates.items():
            turns = self.turns[name, ratio]
            facts: dict[str, float | str] = {"ms a step": median(turn.step_ms for turn in turns)}
            if name != CEILING:
                facts["waiting"] = median(turn.waiting for turn in turns)
                facts["of ceiling"] = median(ratios(values, rates[CEILING, ratio]))
                stages = [turn.stage_ms for turn in turns if turn.stage_ms]
                facts |= {f"{stage} ms": median(ms[stage] for ms in stages) for stage in ("load", "score", "mask")}
            facts["TFLOP/s"] = median(values) * count_step_gflop(self.config.model, ratio) / 1000
            rows.append(Row(name if same_ratio else f"{name}, γ {ratio}", values, facts))
        limit = median(rates[CEILING, self.options.ratio]) if same_ratio else None
        clip = "the tiny CLIP" if self.is_demo else "CLIP ViT-B/32, random weights"
        note = f"batch {len(self.frames)}; scored with {clip}; loaders at rest used {median(self.idle_cores):.2f} cores"
        return Table(title, "clips/s", rows, "mgm" if same_ratio else f"mgm, γ {NATIVE['mgm']}", limit, note)

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()


def project_clips_per_s(device: torch.device, ratio: float) -> float:
    """Time ViT-B's forward and backward once; return clips/s."""
    batch = 64 if device.type == "cuda" else 1
    case = StepCase(PRESETS["ssv2"], batch, ratio, choose_attention("auto", device), steps=1, warmup=1)
    milliseconds = StepTimer(case, batch, device).run(case)
    share = sum(case.shares[stage][0] for stage in ("forward", "backward"))
    return batch / (milliseconds / 1000 * share)


def run(options: Options) -> None:
    if "mgm" not in options.strategies or set(options.strategies) - set(NATIVE):
        raise ValueError(
            f"--strategies needs mgm to compare with and takes {', '.join(NATIVE)}; got {', '.join(options.strategies)}"
        )
    device = choose_device("auto")
    contest = Contest(options, device)
    equal = [(name, options.ratio) for name in (*options.strategies, CEILING)]
    native = [(name, NATIVE[name]) for name in options.strategies]
    native += [(CEILING, ratio) for ratio in sorted({ratio for _, ratio in native})]
    turns = dict.fromkeys([*equal, *native])  # a strategy whose own ratio is the first table's is measured once
    network = "the demo's network, 8×96²" if contest.is_demo else "ViT-B, 16×224²"

    def make_report(found: Mapping[str, Sequence[float]]) -> tuple[list[Table], dict[str, str], dict[str, Any]]:
        rates = {(name, ratio): found[f"{name}, γ {ratio}"] for name, ratio in turns}
        title = f"training, {network}"
        tables = [
            contest.table(f"{title}, γ {options.ratio}", {key: rates[key] for key in equal}, same_ratio=True),
            contest.table(f"{title}, own ratios", {key: rates[key] for key in native}, same_ratio=False),
        ]
        headline, results = summarise(rates, equal, native, with_hours=not contest.is_demo)
        return tables, headline, results | {"idle_cores": contest.idle_cores}

    def save(found: Mapping[str, Sequence[float]]) -> None:
        tables, headline, results = make_report(found)
        save_report("train", tables, headline, device, results)

    try:
        work = {f"{name}, γ {ratio}": partial(contest.run, name, ratio) for name, ratio in turns}
        found = measure(work, options.rounds, "clips/s", after_round=save)
    finally:
        contest.close()
    tables, headline, results = make_report(found)
    if contest.is_demo and options.project:
        rate = project_clips_per_s(device, options.ratio)
        results["projected_hours"] = {"ViT-B, forward and backward alone": ssv2_hours(rate)}
        headline["SSv2, 200 epochs, projected"] = (
            f"{ssv2_hours(rate):,.0f} h of ViT-B's forward and backward alone, measured once at γ {options.ratio} "
            f"({1 / rate:.3g} s per clip), without loader and optimiser"
        )
    write_report("train", tables, headline, device, results)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
