"""Qualify a GPU: its tests, then every benchmark, and one report that answers the project's questions in order.

    make gpu PYTHON=python3        # or python -m bench.gpu [MANIFEST] [--only decode train] [--minutes 8]

Needs no network and installs nothing. A part that fails or runs out of time is named in the report, and the others go
on; the exit status says whether all went well. Writes bench/results/gpu.<GPU>.md and .json beside the parts' own
reports, anew after every part, so that an interruption loses one part. It has not run on a GPU yet.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from bench.harness.gpu_targets import judge, memory_markdown, peak_memory, targets_markdown
from bench.harness.gpu_watch import GpuWatch
from bench.harness.report import RESULTS, device_name, environment, markdown, run_from_shell
from dali_pipelines.processes import count_cores
from tgmae.data.compact import CompactConfig, compact
from tgmae.data.config import DEMO_MANIFEST
from tgmae.data.manifest import read_manifest
from tgmae.shapes.demo import provide_demo

_GRACE_S = 5.0  # for a part that is told to stop
_LEAST_S = 10.0  # for a part, however late it is
ENLARGED = Path("data/bench/shapes-256")
ROOT = Path(__file__).resolve().parent.parent
MEMORY = "memory.used, most"  # MiB, of bench/gpu_watch.py


@dataclass(frozen=True)
class Part:
    """A command, the question that it answers, and its share of the time."""

    name: str
    question: str
    command: tuple[str, ...]
    share: float
    reports: str = ""  # glob of what it leaves in bench/results, without the device


@dataclass(frozen=True)
class Outcome:
    part: Part
    status: str  # ok, or what went wrong
    seconds: float
    tail: str  # of its output
    utilisation: dict[str, float]  # means and maxima of what nvidia-smi saw meanwhile


@dataclass(frozen=True)
class Options:
    # By default the demo's videos, made where they are missing, and enlarged to what training would have.
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST
    only: tuple[str, ...] = ()  # names of parts; by default all
    minutes: float = 8.0  # for all of them and the videos; each has its share of what those before it have left


def list_parts(manifest: Path, since: float) -> list[Part]:
    """In the order of the report; the shares add up to 1. Reports from before `since` do not count."""
    python, file = (sys.executable, "-m"), str(manifest)
    # Scorer patch takes fifty training steps a batch: engines and masks have its speed.
    affordable = ("tgm cached", "tgm student", "tgm dense", "mgm")
    # Most of a test is waiting for a compiler or for DALI's workers.
    at_once = ("-n", "4", "--dist", "loadfile") if find_spec("xdist") else ()
    return [
        Part(
            "tests", "Do the tests that need a GPU pass?",
            (*python, "pytest", "-v", "--tb=short", "-m", "gpu", "--continue-on-collection-errors", *at_once,
             *find_gpu_tests()), 0.15,
        ),
        Part(
            "decode", "Does NVDEC decode through DALI, what, how fast, and how busy are its engines?",
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
            "kernels", "How far is each kernel from the memory limit?",
            (*python, "bench.kernels", "--rounds", "3"), 0.05, "kernels",
        ),
        Part(
            "tuning", "Which launch is best for each kernel?",
            (*python, "bench.kernel_tuning", "--rounds", "2"), 0.04, "kernel_tuning",
        ),
        Part(
            "engines", "How many clips a second does each scorer reach on each engine?",
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
            "loader", "How many clips a second does the loader deliver, and a VideoMAE-style one?",
            (*python, "bench.loader", file, "--rounds", "1"), 0.05, "loader.*",
        ),
        Part(
            "train", "What does TGM cost beside MGM, end to end, and how far is that from the step alone?",
            (*python, "bench.train", file, "--rounds", "2", "--seconds", "4", "--strategies", "tgm cached",
             "tgm student", "mgm"), 0.15, "train",
        ),
        Part(
            "modes", "What do compilation and CUDA graphs bring the step?",
            (*python, "bench.step", "--rounds", "2", "--modes", "graph", "compiled", "compiled graph"),
            0.1, "step_modes",
        ),
        Part(
            "roofline", "How far is each stage from its limit, and which one binds?",
            (*python, "bench.roofline", file, "--no-picture", "--since", str(since)), 0.04, "roofline.*",
        ),
    ]  # fmt: skip


def provide_videos(manifest: Path) -> Path:
    """The manifest, or in place of the demo's one with its videos enlarged: NVDEC takes no HEVC and VP9 as small."""
    if manifest != DEMO_MANIFEST:
        return manifest
    provide_demo(manifest)
    config = CompactConfig(short_side=256, grow=True)
    return compact(read_manifest(manifest), ENLARGED, config, count_cores()).manifest


def find_gpu_tests() -> list[str]:
    """The files with tests that need a GPU: the others would be imported for nothing."""
    folder = ROOT / "tests"
    files = [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in files]


def allot(parts: Sequence[Part], left_s: float) -> float:
    """Seconds for the first of `parts`: its share of what is left for all of them, and time to stop it."""
    return max(left_s * parts[0].share / sum(part.share for part in parts) - _GRACE_S, _LEAST_S)


def run_part(part: Part, folder: Path, limit_s: float) -> Outcome:
    """Run it in a process group of its own, which is ended when its time is up."""
    log, started = folder / f"{part.name}.log", time.perf_counter()
    print(f"{part.name}: {' '.join(part.command[1:])} (at most {limit_s:.0f} s)", flush=True)
    with GpuWatch(folder / f"{part.name}.csv") as watched, log.open("w") as output:
        environment_ = {**os.environ, "TGMAE_REQUIRE_GPU": "1"}
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment_
        )
        try:
            code = process.wait(limit_s)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"not done after {limit_s:.0f} s"
        finally:  # also where this process is told to stop
            if process.poll() is None:
                stop(process)
    seconds = time.perf_counter() - started
    tail = log.read_text(errors="replace")[-3000:]
    print(f"{tail if status != 'ok' else ''}{part.name}: {status}, {seconds:.0f} s", flush=True)
    return Outcome(part, status, seconds, tail, watched.read())


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that pytest says what has failed by now; then for good."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with suppress(ProcessLookupError):  # also what the part started and left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_reports(part: Part, device: str, since: float) -> dict[str, dict[str, Any]]:
    """What the part wrote, newer than `since`, by name; without what was cut off."""
    if not part.reports:
        return {}
    found = {}
    for file in sorted(RESULTS.glob(f"{part.reports}.{device}.json")):
        if file.stat().st_mtime >= since:
            try:
                found[file.name.removesuffix(f".{device}.json")] = json.loads(file.read_text())
            except ValueError:
                print(f"{file.name} is no JSON: the part was stopped while it wrote")
    return found


def write_summary(outcomes: Sequence[Outcome], device: str, since: float) -> tuple[Path, str]:
    """gpu.<device>.md and .json: the targets, a question a section, peak memory. Returns the path and the targets."""
    about, lines, plain = environment(), [], []
    reports: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        found = read_reports(outcome.part, device, since)
        reports |= found
        lines += describe(outcome, list(found.values()))
        plain.append({
            "name": outcome.part.name, "question": outcome.part.question, "status": outcome.status,
            "seconds": outcome.seconds, "utilisation": outcome.utilisation, "reports": list(found.values()),
        })  # fmt: skip
    targets = judge(reports)
    seen = {o.part.name: o.utilisation[MEMORY] for o in outcomes if MEMORY in o.utilisation}
    memory = peak_memory(seen, reports)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        f"# {', '.join(about['gpu']) or 'no GPU'}\n",
        f"Driver {about['driver'] or 'not known'}, commit {about['commit']}, {about['date']}, {about['cpu']}, "
        f"Python {about['python']}; {versions}.\n",
        "## Targets\n", (wanted := targets_markdown(targets)),
    ]  # fmt: skip
    if failed := [f"{o.part.name} ({o.status})" for o in outcomes if o.status != "ok"]:
        head.append(f"Parts that did not end well: {', '.join(failed)}.\n")
    path = RESULTS / f"gpu.{device}.md"
    path.write_text("\n".join([*head, *lines, "## Peak memory\n", memory_markdown(memory)]))
    whole = {**about, "targets": targets, "parts": plain, "peak_memory": memory}
    path.with_suffix(".json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return path, wanted


def describe(outcome: Outcome, reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """A section: its question, what ran, and what it found."""
    lines = [
        f"## {outcome.part.question}\n",
        f"`{' '.join(outcome.part.command[1:])}`: {outcome.status}, {outcome.seconds:.0f} s.\n",
    ]
    if outcome.utilisation:
        seen = ", ".join(f"{name} {value:.0f}" for name, value in outcome.utilisation.items())
        lines.append(f"nvidia-smi meanwhile: {seen}.\n")
    for report in reports:
        lines += [f"- {name}: {value}" for name, value in report.get("headline", {}).items()]
        lines += ["", *(markdown(table) for table in report.get("tables", []))]
    if outcome.status != "ok" or not reports:
        lines.append(f"```\n{outcome.tail[-1500:].strip()}\n```\n")
    return lines


def run(options: Options) -> bool:
    """Whether every part went well."""
    since = time.time()
    known = [part.name for part in list_parts(options.manifest, since)]
    if unknown := set(options.only) - set(known):
        raise ValueError(f"no parts {sorted(unknown)} (there are: {', '.join(known)})")
    try:
        manifest = provide_videos(options.manifest)
    except Exception as error:  # what needs no video can still be measured
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
        raise ValueError("torch sees no CUDA device; the benchmarks of a CPU are: make bench")
    if not run(options):
        sys.exit(1)


def main() -> None:
    run_from_shell(run_on_gpu, Options, __doc__)


if __name__ == "__main__":
    main()
