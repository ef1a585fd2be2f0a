"""Qualify a GPU: run its tests and every benchmark, and answer the project's questions in one report.

    make gpu PYTHON=python3
    python -m bench.gpu --third 2
    python -m bench.gpu data/mine.parquet --only decode train --minutes 4

Takes twenty minutes, or eight for each third: 1 decoding and loading, 2 the step, 3 scorers and training. What is run
alone is merged into the report that is there; every part says of which commit it is. Needs no network and installs
nothing. The report names parts that failed or ran out of time, and the others still run. The exit status is 0 if all
parts succeed. Writes bench/results/gpu.<GPU>.md and .json beside the parts' own reports, again after every part: an
interruption loses only one. --dry says what would run, and --device cpu rehearses it without a GPU. Not yet run on a
GPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from bench.gpu_report.parts import Outcome, allot, run_part
from bench.gpu_report.plan import THIRD_MINUTES, choose_parts, describe_plan, list_parts
from bench.gpu_report.summary import write_summary
from bench.harness.command_line import run_from_shell
from bench.harness.environment import device_name
from dali_pipelines.workers.processes import count_cores
from tgmae.config.data import DEMO_MANIFEST
from tgmae.data.compact import CompactConfig, compact
from tgmae.data.manifest import read_manifest
from tgmae.shapes.demo import provide_demo

ENLARGED = Path("data/bench/shapes-256")


@dataclass(frozen=True)
class Options:
    # Manifest; the demo's is created if missing, and its videos are enlarged to a size that is usual in training.
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST
    third: Literal[1, 2, 3] | None = None  # the third to run; by default all of them
    only: tuple[str, ...] = ()  # parts to run; by default all
    # Minutes for all parts and the videos; each part has its share of the time that is left. By default what the parts
    # need, and for a third eight.
    minutes: float | None = None
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: without a GPU, to rehearse; parts that need one fail
    dry: bool = False  # say what would run, and stop


def provide_videos(manifest: Path) -> Path:
    """Return the manifest, or for the demo's one with enlarged videos: NVDEC does not take HEVC and VP9 that small."""
    if manifest != DEMO_MANIFEST:
        return manifest
    provide_demo(manifest)
    config = CompactConfig(short_side=256, grow=True)
    return compact(read_manifest(manifest), ENLARGED, config, count_cores()).manifest


def run(options: Options) -> bool:
    """Run the parts and write the report after each; return whether all succeeded."""
    since = time.time()
    parts = choose_parts(list_parts(options.manifest), options.only, options.third)
    minutes = options.minutes or (THIRD_MINUTES if options.third else sum(part.minutes for part in parts))
    if options.dry:
        print(describe_plan(parts, minutes))
        return True
    try:
        manifest = provide_videos(options.manifest)
    except Exception as error:  # parts without videos can still run
        manifest = options.manifest
        print(f"the demo's videos could not be enlarged: {type(error).__name__}: {error}", flush=True)
    print(f"videos: {time.time() - since:.0f} s", flush=True)
    everything = list_parts(manifest)
    parts = choose_parts(everything, options.only, options.third)
    on_gpu = options.device == "cuda" and torch.cuda.is_available()
    device = device_name(torch.device("cuda" if on_gpu else "cpu"))
    environment = {"TGMAE_REQUIRE_GPU": "1"} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            limit_s = allot(parts[number:], since + minutes * 60 - time.time())
            outcomes.append(run_part(part, Path(folder), limit_s, environment))
            path, targets = write_summary(outcomes, device, since, [part.name for part in everything])
    print(f"{targets}report: {path}")
    return all(outcome.status == "ok" for outcome in outcomes)


def run_on_gpu(options: Options) -> None:
    if options.device == "cuda" and not options.dry and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device; on a CPU use make bench, or --device cpu to rehearse")
    if not run(options):
        sys.exit(1)


def main() -> None:
    run_from_shell(run_on_gpu, Options, __doc__)


if __name__ == "__main__":
    main()
