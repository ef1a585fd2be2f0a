"""How many clips per second does the loader deliver, beside a plain VideoMAE-style loader, and where does the time go?

    python -m bench.loader
    python -m bench.loader data/mine.parquet --workers 4 --clips 96

Takes about a minute and a half on two cores. Writes bench/results/loader.<name>.<cpu or GPU>.json, named after the
manifest or its folder.

Clips have 16 frames at stride 2, cropped at several scales to 224², in batches of 8. Every loader gets the same
requests and runs alone, in turn in every round; after them, our loader with each kind of mask. Start-up does not count,
and nothing is done with the batches:

  VideoMAE, decord   bench/rivals/videomae_loader.py: torch workers, PIL, float32, tube masks; needs decord
  VideoMAE, PyAV     the same, decoding with PyAV
  pyav               our readable pipeline, in one process, tube masks
  dali               our loader, tube masks; on CUDA it decodes on the GPU
  dali, random/tgm   the same with other masks; tgm is the paper's scorer with the demo's tiny CLIP, on few clips
  dali, no masks     its pipeline alone

On CUDA dali's batches have 64 clips, as in training. Batches that its pipelines prepared during the others' turns are
discarded, and a turn ends after two seconds even if not all its clips are done.

On a CPU the stages of a loader are timed one by one in a separate process. The whole loader, with all its processes,
also plans, collates, queues, and copies between processes.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.compute as pc
import tyro

from bench.harness.command_line import run_from_shell
from bench.harness.measure import cpu_seconds, measure, now
from bench.harness.report import save_report, source_name, write_report
from bench.harness.tables import Row, Table
from bench.rivals.loader_stages import stage_table, time_stages
from bench.rivals.videomae_loader import INSTALL_DECORD, Decoder, VideoMAEDataset, find_decoders, make_videomae_loader
from bench.workloads.cycle import Cycle
from dali_pipelines.open import open_pipeline
from dali_pipelines.placement import choose_placement
from dali_pipelines.types import ClipPipeline, ClipRequest
from dali_pipelines.workers.processes import make_pool
from engines.config import CLIPConfig
from tgmae.captions.policy import require_captions
from tgmae.config.data import DEMO_MANIFEST, DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.noise_scorer import NoiseScorer
from tgmae.masks.scorer import BoundScorer, bind_scorer
from tgmae.shapes.demo import provide_demo
from tgmae.training.loader import Loader
from tgmae.training.parallel import choose_device

BATCH, STRIDE, WARM_UP = 8, 2, 2  # clips, frames, batches
CUDA_BATCH, CUDA_BATCHES, CUDA_SECONDS = 64, 20, 2.0  # a turn of dali on CUDA: clips, batches, seconds


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    rounds: int = 3  # measurements of every row, taken in turn
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))  # worker processes; default: all cores
    # Clips of one measurement, a multiple of dali's batch; by default 48, on CUDA 1280. The pyav pipeline does a third.
    clips: int | None = None
    tgm_clips: int = 16  # clips of one measurement with tgm masks, on a CPU
    image_size: int = 224  # width and height of a clip, in pixels


class Bench:
    """Everything that is measured, as functions that return clips/s. `cpu_ms` collects CPU time per clip."""

    def __init__(self, options: Options) -> None:
        self.options, self.device = options, choose_device("auto")
        self.on_gpu = self.device.type == "cuda"
        self.batch = CUDA_BATCH if self.on_gpu else BATCH  # clips in the DALI pipeline's batches
        self.clips = options.clips or (CUDA_BATCH * CUDA_BATCHES if self.on_gpu else 48)
        if self.clips < self.batch or self.clips % self.batch:
            raise ValueError(f"--clips must be a multiple of {self.batch}, got {self.clips}")
        whole = read_manifest(options.manifest)
        # The plain loader does not handle rotated videos.
        upright = whole.table.filter(pc.equal(whole.table.column("rotation"), 0))
        self.manifest = Manifest(upright, whole.root)
        self.no_text = ""  # why there are no text-guided masks
        try:
            self.manifest, _ = require_captions(self.manifest, "label")
        except ValueError as error:
            self.no_text = str(error)
        self.model = ModelConfig(image_size=options.image_size)
        self.data = DataConfig(manifest=options.manifest, split="", stride=STRIDE, num_workers=options.workers)
        self.placement = choose_placement(self.data, self.device)
        # The same clips in the same order.
        self.sampler, self.dali_sampler = self.make_sampler(BATCH), self.make_sampler(self.batch)
        self.pipelines: dict[str, ClipPipeline] = {}
        self.cpu_ms: dict[str, list[float]] = {}

    def make_sampler(self, batch: int) -> Cycle:
        return Cycle(
            manifest=self.manifest, data=self.data, num_frames=self.model.num_frames, batch_size=batch, seed=0,
            num_batches=self.clips // batch,
        )  # fmt: skip

    def requests(self, batches: Iterable[int]) -> list[ClipRequest]:
        return [request for batch in batches for request in self.sampler(batch)]

    def videomae(self, decoder: Decoder) -> float:
        """Measure the plain loader."""
        num_batches, ahead = self.clips // BATCH, 2 * self.options.workers  # torch workers prepare two batches each
        warm_up = WARM_UP
        if self.on_gpu:  # its many workers start together, so that their first batches come all at once
            num_batches, warm_up = -(-num_batches // 2), ahead + WARM_UP
        # More requests than are taken keep the workers busy to the end, as ours are.
        requests = self.requests(range(warm_up + num_batches + ahead + 1))
        dataset = VideoMAEDataset(decoder, self.manifest, requests, self.model, MaskConfig(kind="tube"))
        batches = make_videomae_loader(dataset, BATCH, self.options.workers, pin_memory=self.on_gpu)

        def take() -> None:
            for part in next(batches):
                part.to(self.device, non_blocking=True)

        rate = self.rate(f"VideoMAE, {decoder}", take, BATCH, num_batches, warm_up)
        for _ in batches:  # a worker that is stopped while handing over a batch may abort
            pass
        return rate

    def ours(self, name: str, kind: Literal["dali", "pyav"], mask: MaskConfig, scorer: BoundScorer | None) -> float:
        """Measure our whole loader, or the pipeline alone if there is no scorer."""
        clips, warm_up, seconds, least = self.clips, WARM_UP, math.inf, 2
        batch, sampler = (self.batch, self.dali_sampler) if kind == "dali" else (BATCH, self.sampler)
        if kind == "pyav":
            clips //= 3
        elif kind not in self.pipelines:  # for a second workers start and memory is touched for the first time
            warm_up = 24
        if name == "dali, tgm" and not self.on_gpu:
            clips = self.options.tgm_clips
        if self.on_gpu:
            seconds = CUDA_SECONDS
            if kind == "dali":  # batches that DALI and its workers have ready, and one under way in the loader
                warm_up = self.placement.pipelines * (2 + self.placement.prefetch) + WARM_UP
                least = 2 * self.placement.pipelines
        pipeline = self.pipelines.get(kind) or open_pipeline(
            kind, self.manifest, sampler, self.data, self.model.image_size, 0, self.device
        )
        self.pipelines[kind] = pipeline
        lent = _LentPipeline(pipeline)
        loader: Loader | _LentPipeline = lent
        if scorer:
            loader = Loader(lent, scorer, mask, self.model, self.device)
        try:
            return self.rate(name, loader.next_batch, batch, max(clips // batch, 1), warm_up, seconds, least)
        finally:
            loader.close()

    def close(self) -> float:
        """End our worker processes, so that they take no CPU time from the next loader. Returns 0."""
        while self.pipelines:
            self.pipelines.popitem()[1].close()
        return 0.0

    def rate(
        self, name: str, take: Callable[[], Any], batch: int, num_batches: int, warm_up: int,
        seconds: float = math.inf, least: int = 1,
    ) -> float:  # fmt: skip
        """Return clips/s after `warm_up` batches, which start the workers or were ready before.

        seconds   end the turn after them, with fewer than `num_batches` but at least `least` batches
        """
        for _ in range(warm_up):
            take()
        cpu, started, count = cpu_seconds(), now(self.device), 0
        while count < num_batches and (count < least or time.perf_counter() - started < seconds):
            take()
            count += 1
        taken = now(self.device) - started
        self.cpu_ms.setdefault(name, []).append(1000 * (cpu_seconds() - cpu) / count / batch)
        return count * batch / taken

    def noise(self, kind: Literal["random", "tube"]) -> BoundScorer:
        return BoundScorer(NoiseScorer(kind, self.model.num_slots, self.model.patches_per_slot, self.device), None)

    def text(self, mask: MaskConfig) -> BoundScorer:
        config = InputConfig(data=self.data, model=self.model, mask=mask, clip=CLIPConfig(model="shapes"))
        return bind_scorer(config, self.manifest, self.device)


class _LentPipeline:
    """A pipeline that outlives the loader that uses it."""

    def __init__(self, pipeline: ClipPipeline) -> None:
        self.next_batch, self.describe = pipeline.next_batch, pipeline.describe

    def interrupt(self) -> None:
        """Do nothing: the loader's thread ends with the batch that it makes."""

    def close(self) -> None:
        """Do nothing: `Bench.close` closes the pipeline."""


def run(options: Options) -> None:
    provide_demo(options.manifest)
    bench, decoders = Bench(options), find_decoders()
    baselines = [f"VideoMAE, {decoder}" for decoder in decoders]
    tube, random, text = (MaskConfig(kind=kind, frames_per_tubelet=1) for kind in ("tube", "random", "tgm"))
    loaders: dict[str, Callable[[], float]] = {
        **{f"VideoMAE, {decoder}": partial(bench.videomae, decoder) for decoder in decoders},
        "pyav": partial(bench.ours, "pyav", "pyav", tube, bench.noise("tube")),
        "dali": partial(bench.ours, "dali", "dali", tube, bench.noise("tube")),
    }
    masks: dict[str, Callable[[], float]] = {
        "dali, tube": partial(bench.ours, "dali, tube", "dali", tube, bench.noise("tube")),
        "dali, no masks": partial(bench.ours, "dali, no masks", "dali", tube, None),
        "dali, random": partial(bench.ours, "dali, random", "dali", random, bench.noise("random")),
    }
    if not bench.no_text:
        masks["dali, tgm"] = partial(bench.ours, "dali, tgm", "dali", text, bench.text(text))
    notes = [f"batches of {bench.batch} for dali, of {BATCH} for the others"] * bench.on_gpu
    if "decord" not in decoders:
        notes.append(f"decord is missing ({INSTALL_DECORD})")
    stage_ms: dict[str, dict[str, list[float]]] = {name: {} for name in [*baselines, "dali"] if not bench.on_gpu}
    with make_pool(1) as pool:

        def time_all_stages() -> float:
            """Time the stages on a round's share of the clips, in another process: decord brings a second FFmpeg."""
            started, num_batches = time.perf_counter(), bench.sampler.num_batches
            done = len(stage_ms["dali"].get("mask", []))
            share = range(done, num_batches, options.rounds) or [done % num_batches]
            requests = bench.requests(share)
            found = pool.submit(time_stages, decoders, bench.manifest, requests, bench.model).result()
            for name, stages in found.items():
                for stage, value in stages.items():
                    stage_ms[name].setdefault(stage, []).append(value)
            return time.perf_counter() - started

        end: dict[str, Callable[[], float]] = {"end workers": bench.close}
        stages: dict[str, Callable[[], float]] = {"stages": time_all_stages} if stage_ms else {}
        rates = measure(loaders | end | stages, options.rounds, "clips/s of loaders")

    best = max(baselines, key=lambda name: statistics.median(rates[name]))
    ratios = [ours / base for ours, base in zip(rates["dali"], rates[best], strict=True)]
    cpu_ratios = [base / ours for ours, base in zip(bench.cpu_ms["dali"], bench.cpu_ms[best], strict=True)]
    headline = {
        f"dali / {best}": round(statistics.median(ratios), 2),
        "lowest to highest": f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"CPU time a clip, {best} / dali": round(statistics.median(cpu_ratios), 2),
    }
    tables = [
        _table("loaders, tube masks", rates, bench, loaders, best, "; ".join(notes)),
        *(stage_table(name, stages, bench.cpu_ms[name]) for name, stages in stage_ms.items()),
    ]
    name = f"loader.{source_name(options.manifest)}"
    save_report(name, tables, headline, bench.device)  # in case the time for the masks runs out
    rates = measure(masks | end, options.rounds, "clips/s by masks")
    tables.insert(1, _table("masks of our loader", rates, bench, masks, "dali, tube", bench.no_text))
    write_report(name, tables, headline, bench.device)


def _table(
    title: str, rates: dict[str, list[float]], bench: Bench, names: Iterable[str], relative_to: str, note: str = ""
) -> Table:
    rows = [Row(name, rates[name], {"ms of CPU a clip": statistics.median(bench.cpu_ms[name])}) for name in names]
    return Table(title, "clips/s", rows, relative_to, note=note)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
