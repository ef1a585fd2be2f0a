"""The benchmark of engines runs through at its smallest size, and its figures are consistent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import engines
from bench.engines import Case, Options, Setting, speed_table
from bench.workloads.inputs import make_random_student
from engines.clip_model import load_clip
from engines.config import CLIPConfig
from tests.support.reports import read_report, rows_of
from tgmae.presets import PRESETS


@pytest.mark.slow
def test_it_runs_through(shapes: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr(engines, "PASS_SIZES", (1024,))
    engines.run(Options(shapes, rounds=1, seconds=0, clips=16))
    *speed, agreement = read_report(results, "engines")["tables"]
    assert [table["title"].split(",")[0] for table in speed][:3] == list(engines.SCORERS)
    for table in speed:
        for row in table["rows"]:
            assert row["TFLOP/s"] == pytest.approx(row["median"] * row["GFLOP a clip"] / 1000)
            assert row["of limit"] == pytest.approx(row["median"] / table["limit"])
            assert row["open s"] > 0
    first = rows_of(speed[0])
    assert {"torch fp16"} <= set(first) if torch.cuda.is_available() else {"torch fp32"} <= set(first)
    found = rows_of(agreement)
    for scorer in ("patch", "dense"):
        fp16, bf16 = (found[f"{scorer}, torch {precision}"] for precision in ("fp16", "bf16"))
        assert 1 >= fp16["median"] > 0.98
        assert 1 >= fp16["5th percentile"] > 0.9
        assert 0 < fp16["largest difference"] < bf16["largest difference"] < 0.05
        assert fp16["rank corr."] > 0.999
        if not torch.cuda.is_available():
            fp8 = found[f"{scorer}, torch fp8"]
            assert 0.58 < fp8["median"] < bf16["median"]
    assert "student, torch fp16" not in found


def test_a_missing_student_is_named_before_anything_is_written(shapes: Path, results: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no student at"):
        engines.run(Options(shapes, student=results / "student.safetensors"))
    assert not results.exists()


@pytest.mark.slow
def test_a_scorer_that_no_engine_runs_leaves_the_others(
    shapes: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engines, "Opened", fail)
    monkeypatch.setattr(engines, "plan_cases", lambda device: [Case()])
    monkeypatch.setattr(engines, "PRECISIONS", ("fp16",))
    engines.run(Options(shapes, rounds=1, seconds=0, clips=16))
    report = read_report(results, "engines")
    assert [len(table["rows"]) for table in report["tables"][:3]] == [0, 0, 0]
    assert list(report["headline"]) == ["agreement, patch, torch fp16", "agreement, dense, torch fp16"]


def test_what_does_not_run_is_named(tmp_path: Path) -> None:
    demo, device = PRESETS["demo"], torch.device("cpu")
    setting = Setting(load_clip(CLIPConfig(model="shapes")), demo.model, 1, tmp_path, device)
    make_random_student(setting.student, setting.clip, setting.model.patch_size)
    cases = [Case(precision="fp32"), Case(engine="tensorrt"), Case(precision="fp8"), Case(engine="tensorrt_rtx")]
    table = speed_table("a title", cases, "student", setting, Options(rounds=1, seconds=0))
    assert [row.name for row in table.rows] == ["torch fp32"]
    _, *left_out = table.note.splitlines()
    assert [line.split(" (")[0] for line in left_out] == [f"left out: {case.name}" for case in cases[1:]]
    assert "runs on CUDA only" in left_out[0]
    assert "student16-1024" in left_out[1]


def test_names_of_cases() -> None:
    assert Case().name == "torch fp16"
    assert Case(batch=1024, graph=False).name == "1024 patches a pass, torch fp16, no graph"
    with pytest.raises(ValueError, match=r"--clip\.engine torch"):
        Case(engine="onnxruntime", precision="fp8").config(Path())
