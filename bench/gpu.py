"""Qualify a GPU: run its tests and every benchmark, and answer the project's questions in one report.

    make gpu PYTHON=python3
    python -m bench.gpu data/mine.parquet --only decode train --minutes 4

Needs no network and installs nothing. The report names parts that failed or ran out of time, and the others still run.
The exit status is 0 if all parts succeed. Writes bench/results/gpu.<GPU>.md and .json beside the parts' own reports,
again after every part, so that an interruption loses only one part. Not yet run on a GPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro

from bench.gpu_report.parts import Outcome, Part, allot, run_part
from bench.gpu_report.summary import write_summary
from bench.harness.command_line import run_from_shell
from bench.harness.environment import device_name
from dali_pipelines.workers.processes import count_cores
from tgmae.config.data import DEMO_MANIFEST
from tgmae.data.compact import CompactConfig, compact
from tgmae.data.manifest import read_manifest
from tgmae.shapes.demo import provide_demo

ENLARGED = Path("data/bench/shapes-256")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    # Manifest; the demo's is created if missing, and its videos are enlarged to a size that is usual in training.
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST
    only: tuple[str, ...] = ()  # parts to run; by default all
    minutes: float = 8.0  # minutes for all parts and the videos; each part has its share of the time that is left


def list_parts(manifest: Path, since: float) -> list[Part]:
    """List the parts in the order of the report; their shares add up to 1.

    since   seconds since 1970; the roofline ignores older reports
    """
    python, file = (sys.executable, "-m"), str(manifest)
    # Scorer patch takes as long as fifty training steps a batch; engines and masks measure its speed.
    affordable = ("tgm cached", "tgm student", "tgm dense", "mgm")
    # Tests mostly wait for a compiler or for DALI's workers.
    at_once = ("-n", "4", "--dist", "loadfile") if find_spec("xdist") else ()
    return [
        Part(
            "tests", "Do the tests that need a GPU pass?",
            (*python, "pytest", "-v", "--tb=short", "-m", "gpu", "--continue-on-collection-errors", *at_once,
             *find_gpu_tests()), 0.15,
        ),
        Part(
            "decode", "Which codecs does NVDEC decode through DALI, how fast, and how busy are its engines?",
            (*python, "bench.decode", file, "--rounds", "2", "--workers", "16", "--tables", "turns", "codec"),
            0.13, "decode.*",
        ),
        Part(
            "attention", "Which attention operator does xformers choose, and how does it compare with SDPA?",
            (*python, "bench.attention", "--rounds", "3"), 0.03, "attention",
        ),
        Part(
            "step", "How long does a step take, and how much of the arithmetic does it use?",
            (*python, "bench.step", "--rounds", "2"), 0.09, "step",
        ),
        Part(
            "kernels", "How close does each kernel come to memory bandwidth?",
            (*python, "bench.kernels", "--rounds", "3"), 0.05, "kernels",
        ),
        Part(
            "tuning", "Which launch is the fastest for each kernel?",
            (*python, "bench.kernel_tuning", "--rounds", "2"), 0.04, "kernel_tuning",
        ),
        Part(
            "engines", "How many clips per second does each scorer reach on each engine?",
            (*python, "bench.engines", file, "--rounds", "2"), 0.08, "engines",
        ),
        Part(
            "masks", "What does each mask cost?",
            (*python, "bench.masks", file, "--rounds", "2", "--seconds", "0.1", "--batch", "32"), 0.04, "masks",
        ),
        Part(
            "overlap", "How much of a scorer's time does the step hide?",
            (*python, "bench.overlap", file, "--rounds", "2", "--strategies", *affordable), 0.05, "overlap",
        ),
        Part(
            "loader", "How many clips per second does the loader deliver, beside a VideoMAE-style one?",
            (*python, "bench.loader", file, "--rounds", "1"), 0.05, "loader.*",
        ),
        Part(
            "train", "What does TGM cost beside MGM, end to end, and how close is training to the step alone?",
            (*python, "bench.train", file, "--rounds", "2", "--seconds", "4", "--strategies", "tgm cached",
             "tgm student", "mgm"), 0.15, "train",
        ),
        Part(
            "modes", "How much faster do compilation and CUDA graphs make the step?",
            (*python, "bench.step", "--rounds", "2", "--modes", "graph", "compiled", "compiled graph"),
            0.1, "step_modes",
        ),
        Part(
            "roofline", "How close does each stage come to its limit, and which one binds?",
            (*python, "bench.roofline", file, "--no-picture", "--since", str(since)), 0.04, "roofline.*",
        ),
    ]  # fmt: skip


def provide_videos(manifest: Path) -> Path:
    """Return the manifest, or for the demo's one with enlarged videos: NVDEC does not take HEVC and VP9 that small."""
    if manifest != DEMO_MANIFEST:
        return manifest
    provide_demo(manifest)
    config = CompactConfig(short_side=256, grow=True)
    return compact(read_manifest(manifest), ENLARGED, config, count_cores()).manifest


def find_gpu_tests() -> list[str]:
    """List the test files with tests that need a GPU, so that pytest need not import the others."""
    folder = ROOT / "tests"
    files = [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in files]


def run(options: Options) -> bool:
    """Run the parts and write the report after each; return whether all succeeded."""
    since = time.time()
    known = [part.name for part in list_parts(options.manifest, since)]
    if unknown := set(options.only) - set(known):
        raise ValueError(f"unknown parts in --only: {', '.join(sorted(unknown))}; use any of: {', '.join(known)}")
    try:
        manifest = provide_videos(options.manifest)
    except Exception as error:  # parts without videos can still run
        manifest = options.manifest
        print(f"the demo's videos could not be enlarged: {type(error).__name__}: {error}", flush=True)
    parts = [part for part in list_parts(manifest, since) if not options.only or part.name in options.only]
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            limit_s = allot(parts[number:], since + options.minutes * 60 - time.time())
            outcomes.append(run_part(part, Path(folder), limit_s))
            path, targets = write_summary(outcomes, device, since)
    print(f"{targets}report: {path}")
    return all(outcome.status == "ok" for outcome in outcomes)


def run_on_gpu(options: Options) -> None:
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device; on a CPU use: make bench")
    if not run(options):
        sys.exit(1)


def main() -> None:
    run_from_shell(run_on_gpu, Options, __doc__)


if __name__ == "__main__":
    main()
