"""When NVDEC decodes, how many clips per second can the host plan, read and hand to DALI?

    python -m bench.host
    python -m bench.host data/mine.parquet --workers 1 2 4

Takes half a minute and needs no GPU. It runs a GPU's loader up to the decoder's input, with the same worker processes
that hand over the same excerpts, and with a copy in place of the decoder: one pipeline, batches of 64 clips of 16
frames. Rows are clips/s by number of workers. "main ms" is how long a clip occupies the main process's thread, which
the training loop's Python needs too. From the second round on the page cache holds the files. Writes
bench/results/host.<name>.cpu.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import tyro
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def

from bench.gpu_report.targets import LOADER_CLIPS_S
from bench.harness.command_line import run_from_shell
from bench.harness.measure import measure
from bench.harness.report import source_name, write_report
from bench.harness.tables import Row, Table
from dali_pipelines.graph import read_samples
from dali_pipelines.nvdec import CODECS, CodecLimits
from dali_pipelines.workers.feed import ClipFeed
from dali_pipelines.workers.processes import count_cores
from tgmae.config.data import DEMO_MANIFEST, DataConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.shapes.demo import provide_demo

BATCH = 64
_QUEUE = 2  # batches that DALI works on at once
ANY_SIZE = CodecLimits(
    engines=1, min_width=1, min_height=1, max_width=8192, max_height=8192, max_macroblocks=2**18
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    # Numbers of worker processes, a row for each; by default 1 to the number of cores, at most 4.
    workers: tuple[int, ...] = field(default_factory=lambda: tuple(range(1, count_cores() + 1))[:4])
    rounds: int = 3  # measurements of every row, taken in turn
    batches: int = 30  # batches in a round


class Feeder:
    """Worker processes that read files, and a DALI graph that takes what they read."""

    def __init__(self, manifest: Manifest, num_workers: int) -> None:
        sampler = ClipSampler(manifest=manifest, data=DataConfig(stride=2), num_frames=16, batch_size=BATCH, seed=0)
        self.feed = ClipFeed(
            manifest, sampler, size=224, repeat=1, limits=dict.fromkeys(CODECS, ANY_SIZE), first_batch=0,
            num_workers=num_workers, depth=_QUEUE + 3, distrusted=set(),
        )  # fmt: skip
        self.entering = 0

        @pipeline_def(  # type: ignore[untyped-decorator]  # DALI is not typed
            batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=_QUEUE
        )
        def graph() -> tuple[Any, ...]:
            return tuple(fn.copy(output) for output in read_samples(self._next, repeat=1))

        self.pipe = graph()
        self.pipe.build()
        for _ in range(4):  # fills the queues
            self.pipe.run()
        self.main_ms: list[float] = []  # per clip, by round

    def _next(self) -> tuple[list[NDArray[Any]], ...]:
        if self.entering > _QUEUE:  # no run still reads that batch
            self.feed.release(self.entering - _QUEUE - 1)
        self.entering += 1
        return self.feed.inputs(self.entering - 1)

    def rate(self, batches: int) -> float:
        """Return clips/s over `batches` batches."""
        started, worked = time.perf_counter(), time.thread_time()
        for _ in range(batches):
            self.pipe.run()
        self.main_ms.append((time.thread_time() - worked) * 1000 / batches / BATCH)
        return batches * BATCH / (time.perf_counter() - started)


def run(options: Options) -> None:
    provide_demo(options.manifest)
    manifest = read_manifest(options.manifest)
    feeders = {f"{number} worker{'s' * (number > 1)}": Feeder(manifest, number) for number in options.workers}
    work: dict[str, Callable[[], float]] = {name: partial(f.rate, options.batches) for name, f in feeders.items()}
    found = measure(work, options.rounds, "clips/s")
    rows = [Row(name, rates, {"main ms": median(feeders[name].main_ms)}) for name, rates in found.items()]
    size = mean(manifest.table.column("num_bytes").to_pylist()) / 1024
    table = Table(
        f"Files to DALI, {size:.0f} KiB each", "clips/s", rows, rows[0].name, note=f"target: {LOADER_CLIPS_S} clips/s"
    )
    headline = {row.name: f"{median(row.values):,.0f} clips/s, {row.facts['main ms']:.3f} ms per clip" for row in rows}
    write_report(f"host.{source_name(options.manifest)}", [table], headline)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
