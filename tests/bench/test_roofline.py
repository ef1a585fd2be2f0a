"""What a clip costs is counted right, limits follow from it, and what was measured is found beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from torch import nn

import bench.roofline as roofline
from bench.costs.clip_costs import (
    OPTIMISER_BYTES,
    Stage,
    clip_bytes,
    count_parameters,
    loading_stages,
    scorer_stages,
    step_stages,
    survey,
)
from bench.costs.traffic import _Counter, count_traffic
from bench.harness.chips import CHIPS, FULL_HD, find_chip, short_name
from bench.harness.figures import best, find_rows, load_reports, values
from bench.harness.report import Row, Table
from bench.pictures.roofline import Point, draw_roofline
from tgmae.data.manifest import read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.model.config import ModelConfig
from tgmae.presets import PRESETS

SSV2, VIT_B = PRESETS["ssv2"], ModelConfig()
VISIBLE, MASKED = 8 * 79, 8 * 117  # tokens at γ .6


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_a_clip_is_what_it_is() -> None:
    assert clip_bytes(VIT_B) == 16 * 224 * 224 * 3 == 2_408_448
    assert VIT_B.num_tokens == VISIBLE + MASKED == 1568


def parameters_by_hand(width: int, depth: int) -> int:
    """Of blocks: attention with two biases, MLP, two norms."""
    attention = 4 * width * width + 3 * width
    mlp = 2 * width * 4 * width + 4 * width + width
    return depth * (attention + mlp + 4 * width)


def test_parameters_and_what_the_optimiser_moves() -> None:
    encoder = 1536 * 768 + 768 + parameters_by_hand(768, 12) + 2 * 768
    decoder = 768 * 384 + 384 + parameters_by_hand(384, 4) + 2 * 384 + 384 * 1536 + 1536
    assert count_parameters(VIT_B) == encoder + decoder
    assert OPTIMISER_BYTES == 40
    for batch in (1, 64):
        optimiser = step_stages(SSV2, 0.6, batch)[-1]
        assert optimiser.moved == pytest.approx(40 * (encoder + decoder) / batch)


def test_stages_of_the_step() -> None:
    stages = {stage.name: stage for stage in step_stages(SSV2, 0.6, 64)}
    assert stages["top-k"].moved == 1568 * 8
    assert stages["gather"].moved == VISIBLE * (4 + 1536 + 2 * 1536)
    assert stages["matrix products"].operations / 1e9 == pytest.approx(477, abs=0.5)
    assert stages["loss"].moved == MASKED * (4 + 1536 + 2 * 1536 + 24 + 4)
    assert stages["loss, backward"].moved == MASKED * (4 + 1536 + 2 * 1536 + 24 + 2 * 1536)


def test_traffic_of_single_operators() -> None:
    x, weight = torch.zeros(5, 7, dtype=torch.bfloat16), torch.zeros(7, 3, dtype=torch.bfloat16)
    with _Counter() as counter:
        x.t().view(7, 5)[:2].expand(2, 5)
    assert (counter.products, counter.others, counter.values) == (0, {}, 0)
    with _Counter() as counter:
        y = x @ weight
    assert (counter.products, counter.others) == (2 * (35 + 21 + 15), {})
    with _Counter() as counter:
        nn.functional.gelu(y).float()
    assert (counter.products, counter.others) == (0, {"gelu": (2 + 2) * 15, "to_copy": (2 + 4) * 15})
    assert counter.values == 30
    with _Counter() as counter:
        y += torch.ones((), dtype=torch.bfloat16).expand(5, 3)  # one number read
    assert counter.others.total() == 2 + 2 * (15 + 1 + 15)


def products_by_hand(batch: int) -> float:
    """Operands of forward and backward, in bfloat16: x, W and y of a product appear in it and in both its gradients.

    Attention reads q, k, v and writes its output; backward reads these four and the output's gradient and writes three.
    """

    def linear(rows: int, inputs: int, outputs: int) -> float:
        return 3 * (rows * inputs + inputs * outputs / batch + rows * outputs)

    def block(rows: int, width: int, last: int | None = None) -> float:
        """`last`: so many tokens alone ask, and go through the MLP."""
        asking = rows if last is None else last
        layers = (width, width), (width, 4 * width), (4 * width, width)
        mixing = linear(rows, width, 3 * width)
        if last is not None:
            mixing = linear(asking, width, width) + linear(rows, width, 2 * width)
        attention = 6 * asking * width + 6 * rows * width
        return mixing + sum(linear(asking, *layer) for layer in layers) + attention

    encoder, decoder = 12 * block(VISIBLE, 768), 3 * block(1568, 384) + block(1568, 384, MASKED)
    whole = encoder + decoder + linear(VISIBLE, 768, 384) + linear(MASKED, 384, 1536)
    embedding = 2 * (VISIBLE * 1536 + VISIBLE * 768 + 1536 * 768 / batch)  # frames want no gradient
    return 2 * (whole + embedding)


def test_traffic_of_the_network() -> None:
    for batch in (1, 64):
        assert count_traffic(VIT_B, 0.6, batch).products == pytest.approx(products_by_hand(batch), rel=0.02)
    # At least: residual stream, norms, GELU and the casts between float32 and bfloat16, forward and backward.
    blocks = 12 * VISIBLE * 768 + 4 * 1568 * 384
    traffic = count_traffic(VIT_B, 0.6, 64)
    assert 60 * blocks < traffic.others < 300 * blocks
    assert sum(traffic.by_operator.values()) == traffic.others
    # GELU reads one and writes one, backward reads two and writes one, 4 × the width, bfloat16.
    inside = 4 * (12 * VISIBLE * 768 + (3 * 1568 + MASKED) * 384)
    assert traffic.by_operator["gelu"] + traffic.by_operator["gelu_backward"] == pytest.approx(5 * 2 * inside, rel=1e-6)
    assert count_traffic(VIT_B, 0.9, 64).others < traffic.others


def test_what_videos_ask_of_a_decoder(shapes: Path) -> None:
    manifest = read_manifest(shapes)
    footage = survey(manifest, SSV2)
    plan = ClipSampler(manifest=manifest, data=SSV2.data, num_frames=16, batch_size=len(manifest), seed=0)
    passed = []
    for request in plan(0):
        keys = manifest[request.row].keyframes
        passed.append(request.frames[-1] - max(key for key in keys if key <= request.frames[0]) + 1)
    assert footage.clips == len(manifest)
    assert footage.frames_passed == pytest.approx(sum(passed) / len(passed))
    assert footage.pixels == 160 * 120
    assert footage.pixels_passed == pytest.approx(footage.frames_passed * 160 * 120)
    assert footage.file_bytes == pytest.approx(sum(Path(manifest.file(r)).stat().st_size for r in range(24)) / 24)
    assert 0.4 * 120**2 < footage.crop_pixels <= 120**2
    stages = {stage.name: stage for stage in loading_stages(footage, VIT_B)}
    assert stages["to RGB"].moved == 16 * 160 * 120 * 4.5
    assert stages["crop and resize"].moved == pytest.approx(16 * 3 * footage.crop_pixels + 2_408_448)


def test_scorers_cost_what_results_say() -> None:
    """docs/results.md: GFLOP a clip at production size."""
    stages = scorer_stages(VIT_B, 64, 2)
    gflop = {name: stage.operations / 1e9 for name, stage in stages.items()}
    assert gflop == pytest.approx({"cached": 0, "student": 14.8, "dense": 552, "patch": 25_272}, rel=0.005)
    assert stages["cached"].moved == 4 * 1568


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_limits_are_bytes_and_operations_by_the_chips() -> None:
    h200, a100 = CHIPS["H200"], CHIPS["A100"]
    memory = Stage("", "SMs", 4.8e6, 1.0)
    assert roofline.seconds(memory, h200) == pytest.approx(1e-6)
    assert roofline.seconds(Stage("", "SMs", 1.0, 989e6, "tensor cores"), h200) == pytest.approx(1e-6)
    assert roofline.seconds(Stage("", "SMs", 1.0, 67e6), h200) == pytest.approx(1e-6)
    assert roofline.seconds(Stage("", "PCIe", 64e3), h200) == pytest.approx(1e-6)
    assert roofline.seconds(Stage("", "NVDEC", 1.0, pixels=FULL_HD), h200) == pytest.approx(1 / 4480)
    assert roofline.seconds(Stage("", "NVDEC", 1.0, pixels=FULL_HD), a100) is None


def test_chips_are_found_by_torchs_names() -> None:
    for name, chip in {
        "NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "h200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB", "NVIDIA L40S": "L40S",
        "NVIDIA H100 NVL": "H100 NVL", "NVIDIA H200 NVL": "H200 NVL", "NVIDIA A10": "A10",
    }.items():  # fmt: skip
        assert find_chip(name).name == chip
    for unknown in ("Tesla T4", "NVIDIA GH200 480GB", "NVIDIA A10G", "NVIDIA H100 MIG 1g.10gb", "NVIDIA B200"):
        with pytest.raises(ValueError, match=rf"no figures for a GPU '{unknown}' \(there are: H200, H200 NVL, "):
            find_chip(unknown)


def test_names_of_gpus_as_files_have_them() -> None:
    for name, short in {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 NVL": "h100-nvl",
        "NVIDIA H200": "h200", "NVIDIA H200 NVL": "h200-nvl", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA L40S": "l40s",
        "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA GeForce RTX 4090": "rtx-4090", "Tesla T4": "t4",
        "Tesla V100-SXM2-16GB": "v100-16gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb": "h100-mig-1g-10gb",
    }.items():  # fmt: skip
        assert short_name(name) == short
    assert len({short_name(name) for name in CHIPS}) == len(CHIPS)
    assert [find_chip(short_name(name)) for name in CHIPS] == list(CHIPS.values())


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
    assert rows["tgm cached"].values == pytest.approx([4480])
    assert rows["tgm patch"].facts["binds"] == "SMs: scores, patch"
    assert rows["tgm patch"].values == pytest.approx([1e6 / 1004])
    assert (rows["tgm patch"].facts["reached"], rows["tgm cached"].facts["reached"]) == (7.0, "not run")


# ---- what was measured ----------------------------------------------------------------------------------------------


def write(folder: Path, name: str, *tables: Table) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"headline": {}, "tables": [one.to_dict() for one in tables]}))


def test_measured_figures_are_found(tmp_path: Path) -> None:
    write(tmp_path, "step.h200", Table("ViT-B, 16×224², by batch size", "TFLOP/s", [
        Row("γ 0.6, sdpa, batch 64", [400.0], {"clips/s": 800.0}),
        Row("γ 0.6, xformers, batch 64, compiled", [420.0], {"clips/s": 850.0}),
        Row("γ 0.6, sdpa, batch 128", [500.0], {"clips/s": 999.0}),
    ]))  # fmt: skip
    kernel = Row("64 clips 16×224², γ 0.6: kernel", [1.0], {"µs": 64.0})
    write(tmp_path, "kernels.h200", Table("gather_tokens", "GB/s", [kernel]))
    write(
        tmp_path,
        "decode.shapes.h200",
        Table("By codec", "clips/s", [Row("h264: DALI GPU", [3.0, 5.0, 4.0])]),
        Table(
            "By pipelines and threads: DALI on NVDEC, h264-256-gop12",
            "clips/s",
            [Row("2 pipelines × 4 threads", [6.0]), Row("2 pipelines × 4 threads, vp9", [9.0])],
        ),
    )
    write(tmp_path, "train.h200", Table("training, own ratios", "clips/s", [Row("tgm cached, γ 0.6", [700.0])]))
    write(tmp_path, "step.cpu", Table("ViT-B", "TFLOP/s", [Row("γ 0.6, sdpa, batch 64", [1.0], {"clips/s": 1e6})]))
    (tmp_path / "masks.h200.json").write_text("{ half")
    reports = load_reports(tmp_path, "h200")
    assert set(reports) == {"step", "kernels", "decode.shapes", "train"}
    assert roofline.find_reached(reports, 0.6, 64) == {
        "decode": 6.0, "step alone": 850.0, "gather": pytest.approx(1e6), "tgm cached": 700.0,
    }  # fmt: skip
    assert roofline.find_reached({}, 0.6, 64) == {}


def test_missing_figures_are_none(tmp_path: Path) -> None:
    write(tmp_path, "x.h200-nvl", Table("T", "ms", [Row("r", [1.0], {"text": "yes"})]))
    reports = load_reports(tmp_path, "h200-nvl")
    assert load_reports(tmp_path, "h200") == {}
    assert values(find_rows(reports, "x", "T", "r"), "text") == []
    assert best(find_rows(reports, "x", "T", "nothing")) is None
    assert best(find_rows({"y": {"headline": {}}}, "y", "", "")) is None


# ---- the command and its picture ------------------------------------------------------------------------------------


def test_roofline_runs_through(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    roofline.run(roofline.Options(shapes, gpu="L40S", ratio=0.75))
    name = f"roofline.{shapes.parent.name}.l40s"
    report = json.loads((tmp_path / f"{name}.json").read_text())
    stages, binding = report["tables"]
    assert report["counted"] is True
    assert "decode" not in {row["name"] for row in stages["rows"]}  # no frames/s are known
    assert "no limit of decoding" in stages["note"]
    assert [row["name"] for row in binding["rows"]][:2] == ["step alone", "tgm cached"]
    assert {row["reached"] for table in report["tables"] for row in table["rows"]} == {"not run"}
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_labels_keep_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("bench.pictures.roofline.plt.close", figures.append)
    crowd = [Point(f"a stage called {number}", 2 + number / 10, 9 + number / 2, number or None) for number in range(8)]
    top = [Point(f"at the top {number}", 10.0 ** (3 + number), 900) for number in range(3)]
    draw_roofline([*crowd, *top], 4.8, {"tensor cores": 989, "float32": 67}, tmp_path / "x.png", "title")
    (axis,) = figures[0].axes
    canvas: Any = figures[0].canvas
    canvas.draw()
    texts = [text for text in axis.texts if isinstance(text, Annotation)]
    # Of the letters alone: an annotation's own extent includes its line.
    boxes = [super(Annotation, text).get_window_extent(canvas.get_renderer()) for text in texts]
    assert len(boxes) == 11
    for number, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figures[0].bbox.width
        assert 0 <= box.y0 < box.y1 <= figures[0].bbox.height
        for other in boxes[:number]:
            across, down = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 0.5 or down <= 0.25 * (box.y1 - box.y0)
