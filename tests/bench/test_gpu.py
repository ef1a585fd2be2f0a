"""The parts of the GPU report keep to the time they have, and an interruption leaves what is done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import find_gpu_tests, list_parts
from bench.gpu_report.parts import GRACE_S, LEAST_S, Outcome, Part
from bench.harness.environment import device_name


def part(name: str, share: float = 1.0) -> Part:
    return Part(name, f"Does {name} work?", (), share)


def test_the_parts_share_the_time() -> None:
    parts = list_parts(Path("m.parquet"), 0.0)
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert [part.name for part in parts] == [
        "tests",
        "decode",
        "attention",
        "step",
        "kernels",
        "tuning",
        "engines",
        "masks",
        "overlap",
        "loader",
        "train",
        "modes",
        "roofline",
    ]


def test_gpu_tests_are_those_with_the_mark() -> None:
    files = find_gpu_tests()
    assert {
        "tests/dali_pipelines/test_pipelines.py",
        "tests/tgmae/model/test_attention.py",
        "tests/kernels/test_topk_mask.py",
    } <= set(files)
    assert "tests/tgmae/test_config.py" not in files
    assert set(files) < set(list_parts(Path("m.parquet"), 0.0)[0].command)


@pytest.mark.slow
def test_a_missing_optional_package_stops_no_part(tmp_path: Path) -> None:
    """No part imports a package that only some tests, pictures (matplotlib) or curves (TensorBoard) need."""
    for name in ("rich", "matplotlib", "tensorboard", "sklearn", "scipy", "transformers", "decord", "torchcodec"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')\n")
    modules = {part.command[2] for part in list_parts(Path("m.parquet"), 0.0)} - {"pytest"}
    code = "import tests.conftest, " + ", ".join(sorted(modules))
    path = os.pathsep.join([str(tmp_path), str(gpu.ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def run_in_simulated_time(
    spent_s: dict[str, float], monkeypatch: pytest.MonkeyPatch, preparing_s: float = 0.0
) -> tuple[dict[str, float], float]:
    """Run parts a, b, c with shares .5, .3, .2 of five minutes; return each one's limit, and the seconds of all."""
    clock, limits = [1000.0], dict[str, float]()
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(gpu, "list_parts", lambda *_: [part("a", 0.5), part("b", 0.3), part("c", 0.2)])

    def prepare(manifest: Path) -> Path:
        clock[0] += preparing_s
        return manifest

    def run(part: Part, folder: Path, limit_s: float) -> Outcome:
        limits[part.name] = limit_s
        clock[0] += min(spent_s[part.name], limit_s + GRACE_S)
        return Outcome(part, "ok", spent_s[part.name], "", {})

    monkeypatch.setattr(gpu, "provide_videos", prepare)
    monkeypatch.setattr(gpu, "run_part", run)
    assert gpu.run(gpu.Options(Path("mine.parquet"), minutes=5))
    return limits, clock[0] - 1000


@pytest.mark.usefixtures("results")
def test_time_that_is_left_goes_to_later_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, _ = run_in_simulated_time({"a": 10.0, "b": 200.0, "c": 1.0}, monkeypatch)
    assert limits == pytest.approx({"a": 150 - GRACE_S, "b": 290 * 0.6 - GRACE_S, "c": 290 * 0.4 - GRACE_S})


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("preparing_s", [0.0, 100.0])
def test_parts_that_hang_keep_to_the_whole(monkeypatch: pytest.MonkeyPatch, preparing_s: float) -> None:
    limits, seconds = run_in_simulated_time(dict.fromkeys("abc", 1e6), monkeypatch, preparing_s)
    assert seconds <= 300 + 1e-6
    assert min(limits.values()) > 30
    assert limits["a"] > limits["b"] > limits["c"]


@pytest.mark.usefixtures("results")
def test_a_part_that_comes_late_still_has_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, _ = run_in_simulated_time(dict.fromkeys("abc", 1.0), monkeypatch, preparing_s=400)
    assert set(limits.values()) == {LEAST_S}


def test_an_interruption_leaves_what_is_done(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(part: Part, folder: Path, limit_s: float) -> Outcome:
        if part.name == "b":
            raise KeyboardInterrupt
        return Outcome(part, "ok", 1.0, "of the first part", {})

    monkeypatch.setattr(gpu, "list_parts", lambda *_: [part("a"), part("b")])
    monkeypatch.setattr(gpu, "run_part", run)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(gpu.Options(Path("mine.parquet")))
    assert "of the first part" in (results / f"gpu.{device_name(None)}.md").read_text()


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match="unknown parts in --only: nonsense; use any of: tests, decode"):
        gpu.run(gpu.Options(only=("nonsense",)))
