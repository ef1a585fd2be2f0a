"""Limits follow from costs and chips, and measured figures are found beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench.roofline as roofline
from bench.costs.clip_costs import Stage
from bench.harness.chips import CHIPS, FULL_HD
from bench.harness.figures import load_reports
from bench.harness.tables import Row, Table
from tests.support.reports import write_tables

# ---- limits ---------------------------------------------------------------------------------------------------------


def test_limits_are_bytes_and_operations_by_the_chips() -> None:
    h200, a100 = CHIPS["H200"], CHIPS["A100"]
    memory = Stage("", "SMs", 4.8e6, 1.0)
    assert roofline.seconds(memory, h200) == pytest.approx(1e-6)
    assert roofline.seconds(Stage("", "SMs", 1.0, 989e6, "tensor cores"), h200) == pytest.approx(1e-6)
    assert roofline.seconds(Stage("", "SMs", 1.0, 67e6), h200) == pytest.approx(1e-6)
    assert roofline.seconds(Stage("", "PCIe", 64e3), h200) == pytest.approx(1e-6)
    assert roofline.seconds(Stage("", "NVDEC", 1.0, pixels=1600 * 900), h200) == pytest.approx(1 / 7014)
    assert roofline.seconds(Stage("", "NVDEC", 1.0, pixels=FULL_HD), a100) is None


def test_the_busiest_resource_binds() -> None:
    chip = CHIPS["H200"]
    loading = [Stage("decode", "NVDEC", 0, pixels=FULL_HD), Stage("to RGB", "SMs", 4.8e6)]
    step = [Stage("matrix products", "SMs", 0, 989e6, "tensor cores"), Stage("other operators", "SMs", 2 * 4.8e6)]
    scorers = {name: Stage(f"scores, {name}", "SMs", 0) for name in ("cached", "student", "dense")}
    scorers["patch"] = Stage("scores, patch", "SMs", 4.8e9)
    table = roofline.binding_table(loading, scorers, step, chip, 1e5, {"tgm patch": 7.0}, "")
    rows = {row.name: row for row in table.rows}
    assert rows["step alone"].values == pytest.approx([1e6 / 3])
    assert rows["step alone"].facts["binds"] == "SMs: other operators"
    assert rows["tgm cached"].facts["binds"] == "NVDEC: decode"
    assert rows["tgm cached"].values == pytest.approx([chip.h264_frames_s])
    assert rows["tgm patch"].facts["binds"] == "SMs: scores, patch"
    assert rows["tgm patch"].values == pytest.approx([1e6 / 1004])
    assert (rows["tgm patch"].facts["reached"], rows["tgm cached"].facts["reached"]) == (7.0, "not run")


# ---- measured figures ------------------------------------------------------------------------------------------------


def test_measured_figures_are_found(tmp_path: Path) -> None:
    write_tables(tmp_path, "step.h200", Table("ViT-B, 16×224², by batch size", "TFLOP/s", [
        Row("γ 0.6, sdpa, batch 64", [400.0], {"clips/s": 800.0}),
        Row("γ 0.6, xformers, batch 64, compiled", [420.0], {"clips/s": 850.0}),
        Row("γ 0.6, sdpa, batch 128", [500.0], {"clips/s": 999.0}),
    ]))  # fmt: skip
    kernel = Row("64 clips 16×224², γ 0.6: kernel", [1.0], {"µs": 64.0})
    write_tables(tmp_path, "kernels.h200", Table("gather_tokens", "GB/s", [kernel]))
    write_tables(
        tmp_path,
        "decode.shapes.h200",
        Table("By codec", "clips/s", [Row("h264: DALI GPU", [3.0, 5.0, 4.0])]),
        Table(
            "By pipelines and threads: DALI on NVDEC, h264-256-gop12",
            "clips/s",
            [Row("2 pipelines × 4 threads", [6.0]), Row("2 pipelines × 4 threads, vp9", [9.0])],
        ),
    )
    write_tables(tmp_path, "train.h200", Table("training, own ratios", "clips/s", [Row("tgm cached, γ 0.6", [700.0])]))
    write_tables(
        tmp_path, "step.cpu", Table("ViT-B", "TFLOP/s", [Row("γ 0.6, sdpa, batch 64", [1.0], {"clips/s": 1e6})])
    )
    (tmp_path / "masks.h200.json").write_text("{ half")
    reports = load_reports(tmp_path, "h200")
    assert set(reports) == {"step", "kernels", "decode.shapes", "train"}
    assert roofline.find_reached(reports, 0.6, 64) == {
        "decode": 6.0, "step alone": 850.0, "gather": pytest.approx(1e6), "tgm cached": 700.0,
    }  # fmt: skip
    assert roofline.find_reached({}, 0.6, 64) == {}


# ---- the command and its picture ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_roofline_runs_through(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    roofline.run(roofline.Options(shapes, gpu="L40S", ratio=0.75))
    name = f"roofline.{shapes.parent.name}.l40s"
    report = json.loads((tmp_path / f"{name}.json").read_text())
    stages, binding, predicted = report["tables"]
    assert report["counted"] is True
    assert "decode" not in {row["name"] for row in stages["rows"]}  # its frames/s are not known
    assert "No limit of decoding" in stages["note"]
    assert [row["name"] for row in binding["rows"]][:2] == ["step alone", "tgm cached"]
    assert {row["reached"] for table in (stages, binding) for row in table["rows"]} == {"not run"}
    assert len(predicted["rows"]) == 9
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
