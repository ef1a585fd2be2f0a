"""How fast does each decoder deliver clips from random places, by codec, keyframe interval, size and workers?

    python -m bench.decode
    python -m bench.decode data/mine.parquet --tables codec size --workers 1 2 4

Takes a minute on two cores, and on the first run another to re-encode the videos. Writes
bench/results/decode.<name>.<cpu or GPU>.json, named after the manifest or its folder.

The first videos of the manifest are re-encoded into several variants by this project's `tgmae.data.compact`; they stay
below --work-dir. Only decoding is measured: opening a file, seeking to a random place, and decoding 16 frames at
stride 2 into whole RGB frames uint8 [T, H, W, 3] in memory. Each table varies one thing and keeps the others: H.264, a
keyframe every 12 frames, the largest of --short-sides, all workers. "frames/s" counts every frame that a decoder goes
through, from the keyframe before the window to the window's end ("frames a clip"). The decoders are in
bench/rivals/decoders.py:

  PyAV         FFmpeg through PyAV with the manifest's keyframes: how this project decodes on a CPU
  PyAV, YUV    the same without the conversion to RGB, which leaves FFmpeg alone
  decord       if it is installed
  torchcodec   if it is installed, with seek_mode="approximate"
  DALI CPU     fn.decoders.video, which on a CPU takes VP8 and VP9 only; left out for other codecs
  DALI GPU     the same with NVDEC, which takes H.264 and HEVC too; frames stay on the GPU

DALI decodes excerpts (dali_pipelines/video/excerpt.py) that are cut before the clock starts; in training the workers
cut them.

A worker is a process that decodes clip after clip on one thread; for DALI it is one of its threads. In the table turns
several DALI pipelines decode at once, as in training: with NVDEC, or VP9 on a CPU. "engines busy" is nvidia-smi's
decoder utilisation, averaged over the measurement, times the number of NVDEC engines.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
import tyro

from bench.gpu_report.watch import GpuWatch
from bench.harness.command_line import first_line, run_from_shell
from bench.harness.measure import measure
from bench.harness.report import save_report, source_name, write_report
from bench.harness.tables import Row, Table
from bench.rivals.decoders import DECODERS, INSTALL, import_decoder, rate_in_workers, rate_of_dali
from bench.workloads.variants import Variant, make_variant
from dali_pipelines.placement import choose_placement
from dali_pipelines.workers.clip_worker import dali_decodes
from dali_pipelines.workers.processes import make_pool
from tgmae.config.data import DEMO_MANIFEST, DataConfig
from tgmae.data.compact import CompactConfig, compact
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.shapes.demo import provide_demo

BASE_GOP, GOPS, CODECS = 12, (4, 12, 60, 250), ("h264", "hevc", "vp9")
Kind = Literal["codec", "turns", "keyframes", "size", "workers"]  # of a table
# Pipelines, and threads of each. NVDEC has up to eight engines; for seven, training uses 4 × 4.
PAIRS_ON_GPU = ((1, 1), (1, 4), (1, 16), (2, 8), (4, 4), (7, 2), (8, 4))
PAIRS_ON_CPU = ((1, 1), (1, 2), (2, 1), (2, 2))


def _powers_of_two() -> tuple[int, ...]:
    cores = len(os.sched_getaffinity(0))
    return tuple(2**power for power in range(cores.bit_length()))


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    tables: tuple[Kind, ...] = ("codec", "turns", "keyframes", "size", "workers")  # tables to measure, in this order
    rounds: int = 3  # measurements of every row, taken in turn
    # Numbers of workers; by default powers of two up to the number of cores.
    workers: tuple[int, ...] = field(default_factory=_powers_of_two)
    videos: int = 24  # videos taken from the manifest
    clips: int | None = None  # distinct clips; by default one for each video, on CUDA 128: two of DALI's batches
    seconds: float = 0.4  # least seconds of one measurement, in whole passes over the clips
    # Short sides of the variants, in pixels. If the videos are smaller, their own short side and half of it.
    short_sides: tuple[int, ...] = (128, 256)
    work_dir: Path = Path("data/bench/decode")  # folder for the re-encoded videos
    prepare: bool = False  # re-encode what the tables codec and turns need, and measure nothing


class Bench:
    """The variants, created when they are first used, and the decoders."""

    def __init__(self, options: Options) -> None:
        self.options, self.on_gpu = options, torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")
        self.placement = choose_placement(DataConfig(), self.device)
        whole = read_manifest(options.manifest)
        self.source = Manifest(whole.table.slice(0, options.videos), whole.root)
        # nvidia-smi is read five times a second, and its figures are means over up to a second. A second is also long
        # compared with a batch.
        self.seconds_on_gpu = max(options.seconds, 1.0) if options.seconds else 0.0
        self.num_clips = options.clips or (128 if self.on_gpu else len(self.source))
        sizes = zip(*(self.source.table.column(name).to_pylist() for name in ("width", "height")), strict=True)
        self.own_side = int(statistics.median(min(size) for size in sizes)) // 2 * 2
        sides = sorted({min(side, self.own_side) for side in options.short_sides})
        self.sides = sides if len(sides) > 1 else [self.own_side // 4 * 2, self.own_side]
        self.workers = max(options.workers)
        self.pool = make_pool(self.workers)
        self.variants: dict[tuple[str, int, int], Variant] = {}
        self.working: dict[str, dict[str, Callable[[int], float]]] = {}  # by the variant's name
        self.decoders = list(DECODERS)
        self.missing: list[str] = [f"no NVDEC: {self.placement.reason}"] if self.placement.reason else []
        for name, install in INSTALL.items():
            try:
                self.pool.submit(import_decoder, name).result()
            except Exception:  # torchcodec without FFmpeg raises RuntimeError
                self.decoders.remove(name)
                self.missing.append(f"{name} is missing ({install})")

    def variant(self, codec: str, side: int, gop: int) -> Variant:
        """Re-encode the videos, or reuse an earlier run's if they are the same."""
        if (codec, side, gop) not in self.variants:
            name = f"{codec}-{side}-gop{gop}"
            out = self.options.work_dir / source_name(self.options.manifest) / name
            print(f"re-encoding into {out}", flush=True)
            config = CompactConfig(short_side=side, codec=codec, gop=gop)  # type: ignore[arg-type]
            made = compact(self.source, out, config, self.workers)
            if made.excluded:  # so that all variants and the originals hold the same videos
                self.source = Manifest(self.source.table.take(list(made.rows)), self.source.root)
                self.missing.append(f"{len(made.excluded)} videos are left out; {made.report} says why")
            self.variants[codec, side, gop] = make_variant(name, read_manifest(made.manifest), self.num_clips)
        return self.variants[codec, side, gop]

    def ways(self, variant: Variant) -> dict[str, Callable[[int], float]]:
        """Return a function from workers to clips/s for each decoder of a variant, after trying it on a few clips."""
        if variant.name in self.working:
            return self.working[variant.name]
        few = variant.windows[: 2 * self.workers]  # two for each worker, so that it imports the decoder
        ways: dict[str, Callable[[int], float]] = {}
        for name in self.decoders:
            ways[name] = partial(rate_in_workers, name, variant.windows, self.pool, self.options.seconds)
        for name, on_gpu, limits in (("DALI CPU", False, None), ("DALI GPU", True, self.placement.limits)):
            if on_gpu and limits is None:
                continue
            if all(dali_decodes(window.video.coded, limits) for window in variant.windows):
                seconds = self.seconds_on_gpu if on_gpu else self.options.seconds
                ways[name] = partial(rate_of_dali, variant.windows, on_gpu, seconds)
            elif on_gpu:
                self.missing.append(f"NVDEC does not take {variant.name} here")
        for name in list(ways):
            try:
                if name in self.decoders:
                    rate_in_workers(name, few, self.pool, 0, self.workers)
                else:
                    rate_of_dali(few, name == "DALI GPU", 0, self.workers)
            except Exception as error:  # other projects' decoders may raise anything; the rest still run
                del ways[name]
                self.missing.append(f"{name} cannot decode {variant.name}: {first_line(error)}")
        self.working[variant.name] = ways
        return ways

    def table(self, title: str, rows: Sequence[tuple[str, Variant, int]], base: str) -> Table:
        """Measure every decoder on every (label, variant, workers), compared with PyAV on the row labelled `base`."""
        work: dict[str, Callable[[], float]] = {}
        variants: dict[str, Variant] = {}
        for label, variant, workers in rows:
            for decoder, way in self.ways(variant).items():
                work[f"{label}: {decoder}"] = partial(way, workers)
                variants[f"{label}: {decoder}"] = variant
        measured = []
        for name, rates in measure(work, self.options.rounds, title).items():
            per_clip = variants[name].frames_a_clip
            facts = {
                "frames/s": statistics.median(rates) * per_clip, "frames a clip": per_clip,
                "KiB a video": variants[name].kib,
            }  # fmt: skip
            measured.append(Row(name, rates, facts))
        first = f"{base}: PyAV"
        note, self.missing = "\n".join(self.missing), []
        return Table(title, "clips/s", measured, relative_to=first if first in work else None, note=note)

    def table_of_turns(self, variants: Sequence[Variant]) -> Table:
        """Measure DALI alone, by the number of pipelines that decode at once and the threads of each.

        variants   the first is measured with every pair, the others with one thread and with what training uses
        """
        on_gpu, busy, failed = self.placement.limits is not None, dict[str, list[float]](), dict[str, str]()
        seconds = self.seconds_on_gpu if on_gpu else self.options.seconds
        usual = (self.placement.pipelines, self.placement.threads)
        first, *others = variants
        cases = {_name_pair(*pair): (first, *pair) for pair in (*(PAIRS_ON_GPU if on_gpu else PAIRS_ON_CPU), usual)}
        cases |= {f"{_name_pair(*pair)}, {other.name}": (other, *pair) for other in others for pair in ((1, 1), usual)}

        def rate(name: str, is_trial: bool = False) -> float:
            variant, pipelines, threads = cases[name]
            windows, least, batch = variant.windows, seconds, None
            if is_trial:  # one clip for each thread
                windows, least, batch = windows[: pipelines * threads], 0.0, threads
            try:
                with TemporaryDirectory() as folder, GpuWatch(Path(folder) / "smi.csv") as watch:
                    found = rate_of_dali(windows, on_gpu, least, threads, pipelines, watch.forget, batch)
            except Exception as error:  # DALI may raise anything; the other pairs still run
                failed[name] = first_line(error)
                return math.nan
            if (mean := watch.read().get("utilization.decoder, mean")) is not None and not is_trial:
                busy.setdefault(name, []).append(mean)
            return found

        for name in cases:
            rate(name, is_trial=True)
        work = {name: partial(rate, name) for name in cases if name not in failed}
        title = f"By pipelines and threads: DALI on {'NVDEC' if on_gpu else 'the CPU'}, {first.name}"
        rows = []
        for name, rates in measure(work, self.options.rounds, title).items():
            if name in failed:
                continue
            facts = {"frames/s": statistics.median(rates) * cases[name][0].frames_a_clip}
            if on_gpu and name in busy:
                mean = statistics.mean(busy[name])
                facts |= {"decoder, %": mean, "engines busy": mean / 100 * self.placement.engines}
            rows.append(Row(name, rates, facts))
        notes = ["a pipeline has one CUDA stream"] if on_gpu else []
        notes += [f"{name} is left out: {reason}" for name, reason in failed.items()]
        if busy:
            notes.append(
                f"engines busy: nvidia-smi's decoder utilisation times {self.placement.engines} engines, correct only "
                "if the driver averages over engines; 1 pipeline × 1 thread, which keeps at most one busy, shows "
                "whether it does"
            )
        return Table(title, "clips/s", rows, relative_to=rows[0].name if rows else None, note="\n".join(notes))


def _name_pair(pipelines: int, threads: int) -> str:
    return f"{pipelines} pipeline{'s' * (pipelines > 1)} × {threads} thread{'s' * (threads > 1)}"


def make_table(bench: Bench, kind: Kind) -> Table:
    """Measure one table, after re-encoding the videos it needs."""
    side, workers = bench.sides[-1], bench.workers
    gop, sized, working = f"keyframe every {BASE_GOP}", f"short side {side}", f"{workers} workers"
    if kind == "turns":
        codecs = ("vp9",) if bench.placement.limits is None else CODECS
        return bench.table_of_turns([bench.variant(codec, side, BASE_GOP) for codec in codecs])
    if kind == "codec":
        title, base = f"By codec: {sized}, {gop}, {working}", "h264"
        rows = [(codec, bench.variant(codec, side, BASE_GOP), workers) for codec in CODECS]
    elif kind == "keyframes":
        title, base = f"By keyframes: H.264, {sized}, {working}", f"every {BASE_GOP}"
        rows = [(f"every {length}", bench.variant("h264", side, length), workers) for length in GOPS]
    elif kind == "size":
        title, base = f"By size: H.264, {gop}, {working}", sized
        rows = [(f"short side {s}", bench.variant("h264", s, BASE_GOP), workers) for s in bench.sides[::-1]]
        original = make_variant("as it came", bench.source, bench.num_clips)
        rows.append((f"as it came ({', '.join(sorted(original.codecs))})", original, workers))
    else:
        title, base = f"By workers: {sized}, {gop}", f"h264, {bench.options.workers[0]}"
        rows = [
            (f"{codec}, {number}", bench.variant(codec, side, BASE_GOP), number)
            for codec in ("h264", "vp9")  # VP9 for DALI on a CPU
            for number in bench.options.workers
        ]
    return bench.table(title, rows, base)


def run(options: Options) -> None:
    provide_demo(options.manifest)
    bench = Bench(options)
    tables: list[Table] = []
    with bench.pool:
        if options.prepare:
            for codec in CODECS:
                bench.variant(codec, bench.sides[-1], BASE_GOP)
            return
        for kind in options.tables:
            tables.append(make_table(bench, kind))
            save_report(f"decode.{source_name(options.manifest)}", tables, None, bench.device)
    headline = {}
    for table in tables:
        rows = [row for row in table.rows if "YUV" not in row.name]
        if best := max(rows, key=lambda row: statistics.median(row.values), default=None):
            headline[table.title] = f"fastest is {best.name}, {statistics.median(best.values):.3g} clips/s"
    results = {"clips": bench.num_clips, "nvdec": {k: asdict(v) for k, v in (bench.placement.limits or {}).items()}}
    write_report(f"decode.{source_name(options.manifest)}", tables, headline, bench.device, results)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
