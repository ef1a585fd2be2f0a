"""The parts of the GPU report keep to the time they have, and an interruption leaves what is done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu_report.parts import GRACE_S, LEAST_S, Outcome, Part, allot
from bench.gpu_report.plan import ROOT, THIRD_MINUTES, choose_parts, find_gpu_tests, list_parts
from bench.harness.environment import device_name


def part(name: str, minutes: float = 1.0) -> Part:
    return Part(name, f"Does {name} work?", (), minutes)


def test_the_parts_share_the_time() -> None:
    """Twenty minutes, in thirds that leave a minute of eight to the demo's videos. No part gets less than half one."""
    parts = list_parts(Path("m.parquet"))
    assert sum(part.minutes for part in parts) == pytest.approx(20)
    for third in (1, 2, 3):
        own = choose_parts(parts, (), third)  # type: ignore[arg-type]
        assert sum(part.minutes for part in own) <= THIRD_MINUTES - 1
        assert allot(own, 60 * THIRD_MINUTES) >= 60 * own[0].minutes
    assert all(allot([one, *parts], 60 * 20) > 20 for one in parts)
    assert len({part.name for part in parts}) == len(parts) == 15
    assert [part.third for part in parts] == sorted(part.third for part in parts)


def test_whatever_is_measured_is_made_before() -> None:
    names = [part.name for part in list_parts(Path("m.parquet"))]
    assert names.index("decode inputs") < names.index("tests")
    assert names.index("maps") < min(names.index(name) for name in ("engines", "masks", "overlap", "train"))


def test_the_plan_can_be_read_without_running_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(gpu.Options(Path("mine.parquet"), third=2, dry=True))
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said[:-1]] == ["attention", "step", "modes", "kernels", "tuning"]
    assert said[-1] == "5 parts, 6.75 min; at most 8 with making the videos"


def test_gpu_tests_are_those_with_the_mark() -> None:
    files = find_gpu_tests()
    assert {
        "tests/dali_pipelines/test_pipelines.py",
        "tests/tgmae/model/test_attention.py",
        "tests/kernels/test_topk_mask.py",
    } <= set(files)
    assert "tests/tgmae/test_config.py" not in files
    assert set(files) < set(list_parts(Path("m.parquet"))[1].command)


@pytest.mark.slow
def test_a_missing_optional_package_stops_no_part(tmp_path: Path) -> None:
    """No part imports a package that only some tests, pictures (matplotlib) or curves (TensorBoard) need."""
    for name in ("rich", "matplotlib", "tensorboard", "sklearn", "scipy", "transformers", "decord", "torchcodec"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')\n")
    modules = {part.command[2] for part in list_parts(Path("m.parquet"))} - {"pytest"}
    code = "import tests.conftest, " + ", ".join(sorted(modules))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def run_in_simulated_time(
    spent_s: dict[str, float], monkeypatch: pytest.MonkeyPatch, preparing_s: float = 0.0
) -> tuple[dict[str, float], float]:
    """Run parts a, b, c of 2.5, 1.5 and 1 minutes in five; return each one's limit, and the seconds of all."""
    clock, limits = [1000.0], dict[str, float]()
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(gpu, "list_parts", lambda *_: [part("a", 2.5), part("b", 1.5), part("c", 1.0)])

    def prepare(manifest: Path) -> Path:
        clock[0] += preparing_s
        return manifest

    def run(part: Part, folder: Path, limit_s: float, environment: object) -> Outcome:
        limits[part.name] = limit_s
        clock[0] += min(spent_s[part.name], limit_s + GRACE_S)
        return Outcome(part, "ok", spent_s[part.name], "", {})

    monkeypatch.setattr(gpu, "provide_videos", prepare)
    monkeypatch.setattr(gpu, "run_part", run)
    assert gpu.run(gpu.Options(Path("mine.parquet")))
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


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts a and b, which only note that they ran."""
    ran: list[str] = []

    def run(part: Part, folder: Path, limit_s: float, environment: object) -> Outcome:
        ran.append(part.name)
        if len(ran) > 1 and part.name == "b":
            raise KeyboardInterrupt
        return Outcome(part, "ok", 1.0, f"said by {part.name}, run {len(ran)}", {})

    monkeypatch.setattr(gpu, "list_parts", lambda *_: [part("a"), part("b")])
    monkeypatch.setattr(gpu, "run_part", run)
    return ran


def test_an_interruption_leaves_what_is_done(results: Path, runs: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        gpu.run(gpu.Options(Path("mine.parquet")))
    text = (results / f"gpu.{device_name(None)}.md").read_text()
    assert "said by a, run 1" in text
    assert "Parts that have not run: b." in text


def test_parts_that_run_alone_are_merged(results: Path, runs: list[str]) -> None:
    """In the order of the report; what is run again takes the place of what was there."""
    for name in ("b", "a", "a"):
        assert gpu.run(gpu.Options(Path("mine.parquet"), only=(name,), device="cpu"))
    text = (results / "gpu.cpu.md").read_text()
    assert text.index("said by a, run 3") < text.index("said by b, run 1")
    assert "run 2" not in text
    assert "have not run" not in text


def test_a_rehearsal_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), os.environ.get('TGMAE_REQUIRE_GPU'))"
    one = Part("a", "", (sys.executable, "-c", code), 1.0)
    monkeypatch.setattr(gpu, "list_parts", lambda *_: [one])
    monkeypatch.delenv("TGMAE_REQUIRE_GPU", raising=False)
    assert gpu.run(gpu.Options(Path("mine.parquet"), device="cpu"))
    assert "'' None" in (results / "gpu.cpu.md").read_text()


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match="unknown parts in --only: nonsense; use any of: decode inputs, tests"):
        gpu.run(gpu.Options(only=("nonsense",)))
    with pytest.raises(ValueError, match="third 2 has none of the parts in --only: decode; leave out"):
        gpu.run(gpu.Options(only=("decode",), third=2))
