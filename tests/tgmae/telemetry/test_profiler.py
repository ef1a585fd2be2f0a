"""Profiles of a run show the stages under their names, in torch's profiler and as NVTX ranges for nsys."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nvtx
import pytest
import torch

from tests.tgmae.test_train import tiny
from tgmae.config.run import TrainConfig
from tgmae.telemetry.profiler import WARM_UP, StepProfiler
from tgmae.train import train

CPU = torch.device("cpu")
IN_THE_STEP = ("wait", "forward", "gather", "backward", "optimizer")
IN_THE_LOADER = ("load", "decode", "augment", "score", "mask")


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> TrainConfig:
    return replace(tiny(shapes, tmp_path / "run"), pipeline="pyav", max_steps=WARM_UP + 3, profile=2)


def names(trace: Path) -> dict[int, Counter[str]]:
    """Count how often each named range occurs, by thread."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    found: dict[int, Counter[str]] = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["tid"], Counter())[event["name"]] += 1
    return found


@pytest.mark.slow
def test_a_trace_has_every_stage(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    folder = config.run_dir / "profile"
    by_thread = names(folder / "trace.json.gz")
    [step] = [found for found in by_thread.values() if "forward" in found]
    [loader] = [found for found in by_thread.values() if "score" in found]
    assert step is not loader
    for name in IN_THE_STEP:
        assert step[name] == 2 * (config.batch_size // config.device_batch_size if name != "optimizer" else 1)
    assert all(loader[name] for name in IN_THE_LOADER)
    assert "forward" in (folder / "operators.txt").read_text()
    assert f"profile of 2 steps: {folder / 'trace.json.gz'}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_stages_are_nvtx_ranges(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    @contextmanager
    def annotate(name: str, domain: str) -> Any:
        assert domain == "tgmae"
        seen[name] += 1
        yield

    monkeypatch.setattr(nvtx, "annotate", annotate)
    train(replace(config, profile=0, max_steps=2))
    assert all(seen[name] for name in (*IN_THE_STEP, *IN_THE_LOADER))


def test_nsys_has_the_gpu_to_itself(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    profiler = StepProfiler(config.run_dir / "profile", 2, CPU)
    for _ in range(WARM_UP + 2):
        profiler.step()
    profiler.close()
    assert profiler.note == "profiled 2 steps for nsys"
    assert not (config.run_dir / "profile").exists()


def test_a_run_that_ends_before_its_window(tmp_path: Path) -> None:
    for steps, said in (
        (WARM_UP - 2, "nothing profiled: the run ended within the 10 warm-up"),
        (WARM_UP + 1, "profile of 1 "),
    ):
        profiler = StepProfiler(tmp_path / str(steps), 5, CPU)
        for _ in range(steps):
            profiler.step()
        profiler.close()
        assert profiler.note.startswith(said)
        assert (tmp_path / str(steps) / "trace.json.gz").exists() == (steps > WARM_UP)


def test_no_profile_costs_nothing(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "profile", 0, CPU)
    for _ in range(WARM_UP + 2):
        profiler.step()
    profiler.close()
    assert profiler.note == ""
    assert not list(tmp_path.iterdir())


def test_decode_workers_do_without_torch() -> None:
    text = "import sys, dali_pipelines.video.decode\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", text], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.gpu
def test_the_cuda_window_opens_and_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    calls: list[str] = []
    runtime = type("Runtime", (), {
        "cudaProfilerStart": lambda _: calls.append("start"), "cudaProfilerStop": lambda _: calls.append("stop"),
    })()  # fmt: skip
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    profiler = StepProfiler(tmp_path, 3, torch.device("cuda"))
    at = {}
    for step in range(1, WARM_UP + 6):
        profiler.step()
        at.setdefault(tuple(calls), step)
    assert at == {(): 1, ("start",): WARM_UP, ("start", "stop"): WARM_UP + 3}
