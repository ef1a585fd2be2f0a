"""Predictions follow from counted work and published speeds."""

from __future__ import annotations

import pytest
import torch

from bench.costs.clip_costs import Stage
from bench.costs.memory import loading_bytes
from bench.costs.prediction import Attention, attention_us, list_attention, prediction_table
from bench.harness.chips import CHIPS
from bench.workloads.kernel_operations import Size
from tgmae.config.model import ModelConfig

MODEL, H200 = ModelConfig(), CHIPS["H200"]
SIZE = Size("", MODEL, 64, 0.6, torch.bfloat16)


def test_attention_is_that_of_the_blocks() -> None:
    """12 blocks on 632 visible tokens, 3 on all 1,568, one from 936 masked ones to all."""
    assert sum(part.gflop for part in list_attention(SIZE)) == pytest.approx(
        4e-9 * (12 * 632**2 * 768 + 3 * 1568**2 * 384 + 936 * 1568 * 384)
    )


def test_attention_takes_the_published_time() -> None:
    """At a published length it is that figure, and between two of them between; backward is two and a half forwards."""

    def tflops(length: int, chip: str = "H200") -> float:
        part = Attention(1, length, length, 768)
        return 3.5e3 * part.gflop / attention_us([part], "FlashAttention 2", CHIPS[chip])

    assert tflops(1024) == pytest.approx(3.5 / (1 / 306 + 2.5 / 238))
    assert tflops(512) < tflops(632) < tflops(1024) < tflops(1568) < tflops(2048) == pytest.approx(tflops(8192))
    assert tflops(1024, "A100") == pytest.approx(tflops(1024) * 312 / 989)


def test_a_step_is_the_sum_of_its_parts() -> None:
    stages = [
        Stage("matrix products", "SMs", 0.0, 477e9, "tensor cores"),
        Stage("other operators", "SMs", 1.6e9),
        Stage("optimiser", "SMs", 60e6),
    ]
    rows = prediction_table(stages, 1.2e9, SIZE, H200, "").rows
    assert [row.name for row in rows][::3] == [
        "eager, FlashAttention 2", "compiled, FlashAttention 2", "compiled, bf16 residual, FlashAttention 2",
    ]  # fmt: skip
    for row in rows:
        times = [
            float(row.facts[f"{name} µs"]) for name in ("linear layers", "attention", "other operators", "the rest")
        ]
        assert row.facts["step µs"] == pytest.approx(sum(times)) == pytest.approx(1e6 / row.values[0])
    assert float(rows[0].facts["other operators µs"]) == pytest.approx(1.6e9 / (0.7 * 4.8e6))


def test_a_pipeline_holds_eight_frames_a_decoder() -> None:
    """1.4 GB in 64 decoders at 720p; the windows of 16 frames are twice that, in each of four pipelines."""
    with_video, without = (loading_bytes(MODEL, 64, pixels) for pixels in (1280 * 720, 0))
    assert (with_video - without) / 4 == pytest.approx(3 * 1.4156e9, rel=1e-3)
