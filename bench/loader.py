"""How many clips a second does the loader deliver, against a plain VideoMAE-style loader, and where does the time go?

    python -m bench.loader data/shapes/manifest.parquet [--clips 48] [--rounds 3] [--workers 2]

About a minute and a half on two cores; the default manifest is made where it is missing. Writes
bench/results/loader.<name>.<device>.json, named after the manifest or its folder.

Clips of 16 frames, stride 2, multi-scale crop to 224², in batches of 8; every loader gets the same requests and runs
alone, in turn in every round. Start-up is not counted. Nothing is done with the batches:

  VideoMAE, decord   bench/videomae_loader.py: torch workers, PIL, float32, tube masks; where decord is installed
  VideoMAE, PyAV     the same, decoding with PyAV
  pyav               our readable pipeline, in one process, tube masks
  dali               our loader: on CUDA it decodes on the GPU
  dali, random/tgm   its other masks; tgm is the paper's scorer with the demo's tiny CLIP and few clips
  dali, no masks     the pipeline alone

The stages of a loader are timed one by one in a process of their own; "hand-over" is what the whole loader takes, all
its processes together, beyond them: planning, collating, queues, copies between processes.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.compute as pc
import torch
import tyro

from bench.report import Row, Table, measure, source_name, write_report
from bench.videomae_loader import (
    INSTALL_DECORD,
    Decoder,
    VideoMAEDataset,
    decode_only,
    find_decoders,
    make_videomae_loader,
    time_clip,
)
from dali_pipelines.decode import decode_clips
from tgmae.cli.train import provide_demo
from tgmae.config import DEMO_MANIFEST, ClipConfig, DataConfig, InputConfig, MaskConfig, ModelConfig
from tgmae.distributed import choose_device
from tgmae.loader import Loader, make_pipeline
from tgmae.manifest import Manifest, read_manifest
from tgmae.masking import NoiseScorer, Scorer, plan_masks
from tgmae.sampling import ClipSampler
from tgmae.scoring.captions import require_captions
from tgmae.types import ClipBatch, ClipPipeline, ClipRequest
from tgmae.workers import make_pool

BATCH, STRIDE, WARM_UP = 8, 2, 2  # clips, frames, batches
STAGES = ("decode", "to RGB", "crop and resize", "to float, normalise", "mask")


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # the default is made where it is missing
    clips: int = 48  # of one measurement; a multiple of 8. The pyav pipeline takes a third, tgm as many as tgm_clips
    tgm_clips: int = 16
    rounds: int = 3
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    image_size: int = 224  # pixels


def cpu_seconds() -> float:
    """CPU time of this process and its living children so far."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


@dataclass
class Cycle(ClipSampler):
    """The same batches over and over, so that every measurement takes the same clips wherever it begins."""

    num_batches: int = 1

    def unit(self, batch: int, unit: int) -> tuple[ClipRequest, ...]:
        return super().unit(batch % self.num_batches, unit)


class Bench:
    """Everything that is measured, as functions that return clips/s; `cpu_ms` gathers CPU time a clip beside them."""

    def __init__(self, options: Options) -> None:
        self.options, self.device = options, choose_device("auto")
        whole = read_manifest(options.manifest)
        # The plain loader knows nothing of rotated pictures.
        upright = whole.table.filter(pc.equal(whole.table.column("rotation"), 0))
        self.manifest = Manifest(upright, whole.root)
        self.no_text = ""  # why there is no text-guided mask
        try:
            self.manifest, _ = require_captions(self.manifest, "label")
        except ValueError as error:
            self.no_text = str(error)
        self.model = ModelConfig(image_size=options.image_size)
        self.data = DataConfig(manifest=options.manifest, split="", stride=STRIDE, num_workers=options.workers)
        self.plan = Cycle(
            manifest=self.manifest, data=self.data, num_frames=self.model.num_frames, batch_size=BATCH, seed=0,
            num_batches=options.clips // BATCH,
        )  # fmt: skip
        self.pipelines: dict[str, ClipPipeline] = {}
        self.cpu_ms: dict[str, list[float]] = {}

    def requests(self, batches: Iterable[int]) -> list[ClipRequest]:
        return [request for batch in batches for request in self.plan(batch)]

    def videomae(self, decoder: Decoder) -> float:
        num_batches = self.options.clips // BATCH
        # More than is taken, so that the workers are busy to the end, as ours are.
        requests = self.requests(range(WARM_UP + num_batches + 2 * self.options.workers + 1))
        dataset = VideoMAEDataset(decoder, self.manifest, requests, self.model, MaskConfig(kind="tube"))
        batches = make_videomae_loader(dataset, BATCH, self.options.workers, pin_memory=self.device.type == "cuda")

        def take() -> None:
            for part in next(batches):
                part.to(self.device, non_blocking=True)

        rate = self.rate(f"VideoMAE, {decoder}", take, num_batches)
        for _ in batches:  # a worker that is stopped while it hands over a batch may abort
            pass
        return rate

    def ours(self, name: str, kind: Literal["dali", "pyav"], mask: MaskConfig, scorer: Scorer | None) -> float:
        """The whole loader, or the pipeline alone where there is no scorer."""
        clips = {"pyav": self.options.clips // 3, "dali, tgm": self.options.tgm_clips}.get(name, self.options.clips)
        pipeline = self.pipelines.get(kind) or make_pipeline(
            InputConfig(data=self.data, model=self.model, mask=mask), kind, self.manifest, self.plan, 0, self.device
        )
        self.pipelines[kind] = pipeline
        kept = _Kept(pipeline)
        loader = Loader(kept, scorer, mask, self.model, self.device) if scorer else kept
        try:
            return self.rate(name, loader.next_batch, max(clips // BATCH, 1))
        finally:
            loader.close()

    def close(self) -> float:
        """End our worker processes, so that they take nothing from the next loader."""
        while self.pipelines:
            self.pipelines.popitem()[1].close()
        return 0.0

    def rate(self, name: str, take: Callable[[], Any], num_batches: int) -> float:
        """Clips/s after the first batches, which start the workers."""
        for _ in range(WARM_UP):
            take()
        cpu, started = cpu_seconds(), time.perf_counter()
        for _ in range(num_batches):
            take()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken = time.perf_counter() - started
        self.cpu_ms.setdefault(name, []).append(1000 * (cpu_seconds() - cpu) / num_batches / BATCH)
        return num_batches * BATCH / taken

    def noise(self, kind: Literal["random", "tube"]) -> Scorer:
        return NoiseScorer(kind, self.model.num_slots, self.model.patches_per_slot, self.device)

    def text(self, mask: MaskConfig) -> Scorer:
        from tgmae.scoring.choose import make_scorer

        config = InputConfig(data=self.data, model=self.model, mask=mask, clip=ClipConfig(model="shapes"))
        return make_scorer(config, self.manifest, self.device)


class _Kept:
    """A pipeline that outlives the loader it is lent to."""

    def __init__(self, pipeline: ClipPipeline) -> None:
        self.next_batch = pipeline.next_batch

    def close(self) -> None:
        """Done by `Bench.close`."""


def run(options: Options) -> None:
    if options.clips < BATCH or options.clips % BATCH:
        raise ValueError(f"--clips must be a multiple of {BATCH}, got {options.clips}")
    provide_demo(options.manifest)
    bench, decoders = Bench(options), find_decoders()
    baselines = [f"VideoMAE, {decoder}" for decoder in decoders]
    tube, random, text = (MaskConfig(kind=kind, frames_per_tubelet=1) for kind in ("tube", "random", "tgm"))
    work: dict[str, Callable[[], float]] = {
        **{f"VideoMAE, {decoder}": partial(bench.videomae, decoder) for decoder in decoders},
        "pyav": partial(bench.ours, "pyav", "pyav", tube, bench.noise("tube")),
        "dali": partial(bench.ours, "dali", "dali", tube, bench.noise("tube")),
        "dali, no masks": partial(bench.ours, "dali, no masks", "dali", tube, None),
        "dali, random": partial(bench.ours, "dali, random", "dali", random, bench.noise("random")),
    }
    if not bench.no_text:
        work["dali, tgm"] = partial(bench.ours, "dali, tgm", "dali", text, bench.text(text))
    note = "" if "decord" in decoders else f"decord is missing ({INSTALL_DECORD})"
    with make_pool(1) as pool:
        stage_ms: dict[str, dict[str, list[float]]] = {name: {} for name in [*baselines, "dali"]}

        def time_all_stages() -> float:
            """A round's share of the clips, in a process of its own: decord brings a second FFmpeg."""
            started, done, num_batches = (
                time.perf_counter(),
                len(stage_ms["dali"].get("mask", [])),
                bench.plan.num_batches,
            )
            share = range(done, num_batches, options.rounds) or [done % num_batches]
            requests = bench.requests(share)
            found = pool.submit(time_stages, decoders, bench.manifest, requests, bench.model).result()
            for name, stages in found.items():
                for stage, value in stages.items():
                    stage_ms[name].setdefault(stage, []).append(value)
            return time.perf_counter() - started

        steps = {**work, "end workers": bench.close, "stages": time_all_stages}
        rates = measure(steps, options.rounds, "clips/s")

    best = max(baselines, key=lambda name: statistics.median(rates[name]))
    ratios = [ours / base for ours, base in zip(rates["dali"], rates[best], strict=True)]
    cpu_ratios = [base / ours for ours, base in zip(bench.cpu_ms["dali"], bench.cpu_ms[best], strict=True)]
    tables = [
        _table("loaders, tube masks", rates, bench, [*baselines, "pyav", "dali"], best, note),
        _table("masks of our loader", rates, bench, [n for n in work if n.startswith("dali")], "dali", bench.no_text),
        *(_stage_table(name, stages, bench) for name, stages in stage_ms.items()),
    ]
    headline = {
        f"dali / {best}": round(statistics.median(ratios), 2),
        "lowest to highest": f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"CPU time a clip, {best} / dali": round(statistics.median(cpu_ratios), 2),
    }
    write_report(f"loader.{source_name(options.manifest)}", tables, headline, bench.device)


def _table(
    title: str, rates: dict[str, list[float]], bench: Bench, names: Sequence[str], relative_to: str, note: str = ""
) -> Table:
    rows = [Row(name, rates[name], {"ms of CPU a clip": statistics.median(bench.cpu_ms[name])}) for name in names]
    return Table(title, "clips/s", rows, relative_to, note=note)


def _stage_table(name: str, stages: dict[str, list[float]], bench: Bench) -> Table:
    whole = bench.cpu_ms[name]
    timed = sum(statistics.mean(values) for values in stages.values())  # each round times other clips
    note = "to RGB is part of crop and resize; frames stay uint8" if name == "dali" else ""
    if name == "VideoMAE, decord":
        note = "decord converts to RGB while it decodes"
    if name == "dali" and bench.device.type == "cuda":
        note = "the stages of decoding on the CPU; the whole is of decoding on the GPU"
    rest = Row("hand-over", [value - timed for value in whole])
    rows = [*(Row(stage, values) for stage, values in stages.items()), rest, Row("whole", whole)]
    return Table(f"stages of {name}", "ms of CPU a clip", rows, note=note)


def time_stages(
    decoders: Sequence[Decoder], manifest: Manifest, requests: Sequence[ClipRequest], model: ModelConfig
) -> dict[str, dict[str, float]]:
    """CPU milliseconds a clip of each stage in this process, for each loader."""
    torch.set_num_threads(1)  # as DataLoader's workers do
    tube = MaskConfig(kind="tube")
    clock: dict[tuple[str, str], float] = {}

    def timed(name: str, stage: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        clock[name, stage] = clock.get((name, stage), 0.0) + time.process_time() - started
        return result

    for request in requests:
        file, video = manifest.file(request.row), manifest[request.row]
        decode_only(file, video, request)  # so that no loader is the first to read the file
        for decoder in decoders:
            time_clip(decoder, manifest, request, model, tube, partial(timed, f"VideoMAE, {decoder}"))
        timed("dali", "decode", partial(decode_only, file, video, request))
        timed("dali", "decode, crop and resize", partial(decode_clips, file, video, [request], model.image_size))
    noise = NoiseScorer("tube", model.num_slots, model.patches_per_slot, torch.device("cpu"))
    frames = torch.zeros((BATCH, model.num_frames, model.image_size, model.image_size, 3), dtype=torch.uint8)
    for first in range(0, len(requests), BATCH):
        clips = ClipBatch(frames=frames, requests=tuple(requests[first : first + BATCH]))
        timed("dali", "mask", partial(_plan_tube_masks, noise, clips, model))
    names = ["dali", *(f"VideoMAE, {decoder}" for decoder in decoders)]
    for name in names[1:]:
        clock[name, "to RGB"] = clock.pop((name, "decode, to RGB")) - clock[name, "decode"]
    clock["dali", "crop and resize"] = clock.pop(("dali", "decode, crop and resize")) - clock["dali", "decode"]
    return {name: {stage: 1000 * clock.get((name, stage), 0.0) / len(requests) for stage in STAGES} for name in names}


def _plan_tube_masks(noise: NoiseScorer, clips: ClipBatch, model: ModelConfig) -> None:
    plan_masks(MaskConfig(kind="tube"), model, noise(clips))


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
