"""How fast do clips come off the disk on a CPU, and what does each stage cost?

    python -m bench.decode data/shapes/manifest.parquet [--clips 96] [--rounds 3] [--workers 2]

Stages, each on the same requests (16 frames, stride 2, multi-scale crop, 224²), taken in turn in every round so that a
drifting machine hurts all alike; clips/s as median (lowest to highest) over the rounds:

  decode      PyAV decodes the window, nothing is converted: the ceiling of one process
  crop        PyAV decodes; FFmpeg crops, resizes and converts in one pass: what a DALI worker does
  full rgb    PyAV decodes and converts whole frames: what a worker would do that leaves the crop to DALI
  reference   the PyAV + torch pipeline, one process
  dali        the DALI pipeline with its worker processes; start-up is not counted

Writes bench/results/decode.<folder of the manifest>.cpu.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench.report import format_rates, write_report
from dali_pipelines.clips import DaliPipeline
from dali_pipelines.decode import decode_clips, decode_frames
from dali_pipelines.reference import ReferencePipeline
from tgmae.config import DataConfig
from tgmae.manifest import Manifest, read_manifest
from tgmae.sampling import ClipSampler
from tgmae.types import ClipPipeline, ClipRequest

NUM_FRAMES, SIZE, BATCH = 16, 224, 8


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional]
    clips: int = 96  # a stage and round; a multiple of 8
    rounds: int = 3
    workers: int = 2


def decode_only(manifest: Manifest, request: ClipRequest) -> None:
    for _ in decode_frames(manifest.file(request.row), manifest[request.row], request.frames, seek=True):
        pass


def decode_rgb(manifest: Manifest, request: ClipRequest) -> None:
    video = manifest[request.row]
    for _, frame in decode_frames(manifest.file(request.row), video, request.frames, seek=True):
        frame.to_ndarray(format="rgb24")


def decode_cropped(manifest: Manifest, request: ClipRequest) -> None:
    decode_clips(manifest.file(request.row), manifest[request.row], [request], SIZE)


def rate_of_function(
    work: Callable[[Manifest, ClipRequest], None], manifest: Manifest, requests: Sequence[ClipRequest]
) -> float:
    """Clips a second in this process."""
    started = time.perf_counter()
    for request in requests:
        work(manifest, request)
    return len(requests) / (time.perf_counter() - started)


def rate_of_pipeline(pipeline: ClipPipeline, num_batches: int) -> float:
    """Clips a second after the first two batches, which start the workers and fill the queues."""
    try:
        for _ in range(2):
            pipeline.next_batch()
        started = time.perf_counter()
        for _ in range(num_batches):
            pipeline.next_batch()
        return num_batches * BATCH / (time.perf_counter() - started)
    finally:
        pipeline.close()


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    manifest = read_manifest(options.manifest)
    data = DataConfig(manifest=options.manifest, stride=2, num_workers=options.workers)
    plan = ClipSampler(manifest=manifest, data=data, num_frames=NUM_FRAMES, batch_size=BATCH, seed=0)
    num_batches = options.clips // BATCH
    requests = [request for batch in range(num_batches) for request in plan(batch)]
    stages: dict[str, Callable[[], float]] = {
        "decode": lambda: rate_of_function(decode_only, manifest, requests),
        "crop": lambda: rate_of_function(decode_cropped, manifest, requests),
        "full rgb": lambda: rate_of_function(decode_rgb, manifest, requests),
        "reference": lambda: rate_of_pipeline(ReferencePipeline(manifest, plan, SIZE), num_batches),
        "dali": lambda: rate_of_pipeline(DaliPipeline(manifest, plan, data, SIZE), num_batches),
    }
    rates: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(options.rounds):
        for name, measure in stages.items():
            rates[name].append(measure())
    print(format_rates(rates, "clips/s", relative_to="decode"))
    name = f"decode.{options.manifest.resolve().parent.name}.cpu"
    print(write_report(name, {"clips_per_s": rates, "clips": options.clips, "workers": options.workers}))


if __name__ == "__main__":
    main()
