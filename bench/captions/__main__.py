"""How many keyframes a second are offered to a captioner that takes no time?

    python -m bench.captions
    python -m bench.captions data/mine.parquet --frames 3

Takes two minutes on two cores. Writes bench/results/captions.<name>.<cpu or GPU>.json, named after the manifest or its
folder. Three uniformly spaced frames of each video reach this process as RGB frames uint8 [H, W, 3] of the video's own
size, and are dropped. The clock of every way runs from the first video to the last, so that no start of a process
counts.

  tgmae                          `tgmae-caption generate`: its worker processes, with the manifest's keyframes
  PyAV, decoding from the start  the loop of PyAV's examples, in this process, with FFmpeg's threads
  PyAV, seeking                  a seek for each frame; shows other frames than the wanted ones where times are uneven
  decord                         VideoReader(file).get_batch(numbers), if it is installed

Each loop also runs in a pool of as many processes as tgmae uses. The CPU time of a frame counts all processes; it says
more than frames/s where other programs run beside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from bench.captions.loops import INSTALL, LOOPS, Frames, Wanted
from bench.harness.command_line import first_line, run_from_shell
from bench.harness.measure import cpu_seconds, measure
from bench.harness.report import source_name, write_report
from bench.harness.tables import Row, Table
from dali_pipelines.workers.processes import count_cores, make_pool
from tgmae.captions.generate.frames import choose_frames, read_frames
from tgmae.config.data import DEMO_MANIFEST
from tgmae.data.manifest import Manifest, count_videos, read_manifest
from tgmae.shapes.demo import provide_demo

_LARGEST = 2**14  # --max-side: no frame is made smaller, since the loops do not


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    frames: int = 3  # keyframes of each video
    rounds: int = 5  # measurements of every row, taken in turn
    videos: int = 300  # videos taken from the manifest
    workers: int = field(default_factory=count_cores)  # processes of tgmae, and of the pools


def rate(offer: Callable[[], Iterator[Frames]], cpu_ms: list[float]) -> float:
    """Return the frames/s from the first video's arrival to the last one's, and note the CPU time of a frame."""
    offered = offer()
    next(offered)
    count, started, cpu_started = 0, time.perf_counter(), cpu_seconds()
    for frames in offered:
        count += len(frames)
        ended, cpu_ended = time.perf_counter(), cpu_seconds()  # before the last of the worker processes ends
    cpu_ms.append(1000 * (cpu_ended - cpu_started) / count)
    return count / (ended - started)


def offer_ours(manifest: Manifest, count: int, workers: int) -> Iterator[Frames]:
    for _, frames, _ in read_frames(manifest, range(len(manifest)), count, _LARGEST, workers):
        yield frames


def offer_loop(name: str, wanted: Sequence[Wanted]) -> Iterator[Frames]:
    return map(LOOPS[name], wanted)


def offer_pool(name: str, wanted: Sequence[Wanted], pool: ProcessPoolExecutor) -> Iterator[Frames]:
    return pool.map(LOOPS[name], wanted)


def run(options: Options) -> None:
    if options.manifest == DEMO_MANIFEST:
        provide_demo(options.manifest)
    whole = read_manifest(options.manifest)
    manifest = Manifest(whole.table.slice(0, options.videos), whole.root)
    rows = range(len(manifest))
    wanted = [
        Wanted(manifest.file(row), tuple(choose_frames(manifest[row], options.frames)), manifest[row].fps)
        for row in rows
    ]
    processes = f"{options.workers} processes"
    base = f"tgmae, {processes}"
    offers: dict[str, Callable[[], Iterator[Frames]]] = {
        base: partial(offer_ours, manifest, options.frames, options.workers)
    }
    missing = []
    pool = make_pool(options.workers)
    for name in LOOPS:
        try:
            for one in pool.map(LOOPS[name], wanted[: 4 * options.workers]):
                assert one
        except Exception as error:  # of a package that is missing, or that cannot decode these videos
            how = f"missing ({INSTALL[name]})" if isinstance(error, ImportError) else f"left out: {first_line(error)}"
            missing.append(f"{name} is {how}")
            continue
        offers[name] = partial(offer_loop, name, wanted)
        offers[f"{name}, {processes}"] = partial(offer_pool, name, wanted, pool)
    cpu_ms: dict[str, list[float]] = {name: [] for name in offers}
    rates = measure(
        {name: partial(rate, offer, cpu_ms[name]) for name, offer in offers.items()}, options.rounds, "measuring"
    )
    pool.shutdown()
    lengths = [manifest[row].length for row in rows]
    sizes = {f"{manifest[row].width}×{manifest[row].height}" for row in rows}
    size = sizes.pop() if len(sizes) == 1 else f"{len(sizes)} sizes"
    title = f"{options.frames} keyframes of each of {count_videos(len(manifest))}, {size}"
    costs = {name: statistics.median(values) for name, values in cpu_ms.items()}
    measured = [Row(name, values, {"CPU ms a frame": costs[name]}) for name, values in rates.items()]
    table = Table(title, "frames/s", measured, base, None, "\n".join(missing))
    facts = {"videos": len(manifest), "median frames of a video": statistics.median(lengths), "absent": missing}
    write_report(
        f"captions.{source_name(options.manifest)}", [table], compare(rates, costs, base, processes), results=facts
    )


def compare(
    rates: Mapping[str, Sequence[float]], costs: Mapping[str, float], base: str, processes: str
) -> dict[str, str]:
    """Return how many frames tgmae offers, and what they cost, relative to the best loop of each kind."""
    found = {}
    for kind in ("one process", processes):
        names = [name for name in rates if name != base and (processes in name) == (kind == processes)]
        best = max(names, key=lambda name: statistics.median(rates[name]))
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates[base], rates[best], strict=True))
        found[f"offered, relative to the fastest loop in {kind}"] = f"{ratio:.2f} ({best})"
    cheapest = min((name for name in costs if name != base), key=lambda name: costs[name])
    found["CPU time of a frame, relative to the cheapest loop"] = f"{costs[base] / costs[cheapest]:.2f} ({cheapest})"
    return found


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
