"""The plan of the GPU report: which commands answer which questions, in what order, in how many minutes.

Twenty minutes in thirds, each of which fits into eight with the demo's videos enlarged before it: decoding and loading,
the step, scorers and training. Whatever a third measures is made before its first timed part.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from bench.gpu_report.parts import Part

ROOT = Path(__file__).resolve().parents[2]
THIRD_MINUTES = 8.0


def list_parts(manifest: Path) -> list[Part]:
    """List the parts in the order of the report."""
    file = str(manifest)
    # Scorer patch takes as long as fifty training steps a batch; engines and masks measure its speed.
    affordable = ("tgm cached", "tgm student", "tgm dense", "mgm")
    # Tests mostly wait for a compiler or for DALI's workers.
    at_once = ("-n", "4", "--dist", "loadfile") if find_spec("xdist") else ()
    first, second, third = (_Third(number) for number in (1, 2, 3))
    return [
        first("decode inputs", 0.5, "Can the videos be re-encoded?",
              "bench.decode", file, "--workers", "16", "--prepare"),
        first("tests", 2.25, "Do the tests that need a GPU pass?",
              "pytest", "-v", "--tb=short", "-m", "gpu", "--continue-on-collection-errors", *at_once,
              *find_gpu_tests()),
        first("decode", 2.25, "Which codecs does NVDEC decode through DALI, how fast, and how busy are its engines?",
              "bench.decode", file, "--rounds", "2", "--workers", "16", "--tables", "turns", "codec",
              reports="decode.*"),
        first("loader", 1.75, "How many clips per second does the loader deliver, beside a VideoMAE-style one?",
              "bench.loader", file, "--rounds", "1", reports="loader.*"),
        second("attention", 1.25, "Which attention is the fastest at our shapes?",
               "bench.attention", "--rounds", "3", reports="attention"),
        second("step", 1.5, "How long does a step take, and how much of the arithmetic does it use?",
               "bench.step", "--rounds", "2", reports="step"),
        second("modes", 2.5, "How much faster do compilation, CUDA graphs and a bfloat16 residual make the step?",
               "bench.step", "--rounds", "2", "--modes", "graph", "compiled", "compiled graph", "half residual",
               "compiled half residual", reports="step_modes"),
        second("kernels", 0.75, "How close does each kernel come to memory bandwidth?",
               "bench.kernels", "--rounds", "3", reports="kernels"),
        second("tuning", 0.75, "Which launch is the fastest for each kernel?",
               "bench.kernel_tuning", "--rounds", "2", reports="kernel_tuning"),
        third("maps", 0.5, "Can score maps and motion vectors be made?", "bench.masks", file, "--prepare"),
        third("engines", 1.25, "How many clips per second does each scorer reach on each engine?",
              "bench.engines", file, "--rounds", "2", reports="engines"),
        third("masks", 0.75, "What does each mask cost?",
              "bench.masks", file, "--rounds", "2", "--seconds", "0.1", "--batch", "32", reports="masks"),
        third("overlap", 1.0, "How much of a scorer's time does the step hide?",
              "bench.overlap", file, "--rounds", "2", "--strategies", *affordable, reports="overlap"),
        third("train", 2.5, "What does TGM cost beside MGM, end to end, and how close is training to the step alone?",
              "bench.train", file, "--rounds", "2", "--seconds", "4",
              "--strategies", "tgm cached", "tgm student", "mgm", reports="train"),
        third("roofline", 0.5, "How close does each stage come to its limit, and which one binds?",
              "bench.roofline", file, "--no-picture", reports="roofline.*"),
    ]  # fmt: skip


class _Third:
    """Makes the parts of one third."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, name: str, minutes: float, question: str, *command: str, reports: str = "") -> Part:
        return Part(name, question, (sys.executable, "-m", *command), minutes, reports, self.number)


def find_gpu_tests() -> list[str]:
    """List the test files with tests that need a GPU, so that pytest need not import the others."""
    folder = ROOT / "tests"
    files = [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in files]


def choose_parts(parts: list[Part], only: tuple[str, ...], third: int | None) -> list[Part]:
    """Return the parts that were asked for; all without a choice. Raises ValueError where there are none such."""
    known = [part.name for part in parts]
    if unknown := set(only) - set(known):
        raise ValueError(f"unknown parts in --only: {', '.join(sorted(unknown))}; use any of: {', '.join(known)}")
    if not (chosen := [part for part in parts if (not only or part.name in only) and third in (None, part.third)]):
        raise ValueError(f"third {third} has none of the parts in --only: {', '.join(only)}; leave out one of the two")
    return chosen


def describe_plan(parts: list[Part], minutes: float) -> str:
    """Say what would run, and for how long at most."""
    lines = [f"{part.third}  {part.name:14} {part.minutes:5.2f} min  {' '.join(part.command[1:])}" for part in parts]
    whole = sum(part.minutes for part in parts)
    return "\n".join([*lines, f"{len(parts)} parts, {whole:g} min; at most {minutes:g} with making the videos"])
