"""Costs of a clip are counted right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bench.costs.clip_costs import (
    OPTIMISER_BYTES,
    clip_bytes,
    count_parameters,
    loading_stages,
    scorer_stages,
    step_stages,
    survey,
)
from bench.costs.traffic import _Counter, count_traffic
from tgmae.config.model import ModelConfig
from tgmae.data.manifest import read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.presets import PRESETS

SSV2, VIT_B = PRESETS["ssv2"], ModelConfig()
VISIBLE, MASKED = 8 * 79, 8 * 117  # tokens at γ .6


def test_a_clip_is_what_it_is() -> None:
    assert clip_bytes(VIT_B) == 16 * 224 * 224 * 3 == 2_408_448
    assert VIT_B.num_tokens == VISIBLE + MASKED == 1568


def parameters_by_hand(width: int, depth: int) -> int:
    """Count the parameters of blocks: attention with two biases, MLP, two norms."""
    attention = 4 * width * width + 3 * width
    mlp = 2 * width * 4 * width + 4 * width + width
    return depth * (attention + mlp + 4 * width)


@pytest.mark.slow
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
        y += torch.ones((), dtype=torch.bfloat16).expand(5, 3)  # reads one number
    assert counter.others.total() == 2 + 2 * (15 + 1 + 15)


def products_by_hand(batch: int) -> float:
    """Count the operands of forward and backward, in bfloat16.

    x, W and y of a product appear in it and in both its gradients. Attention reads q, k, v and writes its output; its
    backward reads these four and the output's gradient and writes three gradients.
    """

    def linear(rows: int, inputs: int, outputs: int) -> float:
        return 3 * (rows * inputs + inputs * outputs / batch + rows * outputs)

    def block(rows: int, width: int, last: int | None = None) -> float:
        """Count one block; `last` is the number of tokens that have a query and go through the MLP, by default all."""
        asking = rows if last is None else last
        layers = (width, width), (width, 4 * width), (4 * width, width)
        mixing = linear(rows, width, 3 * width)
        if last is not None:
            mixing = linear(asking, width, width) + linear(rows, width, 2 * width)
        attention = 6 * asking * width + 6 * rows * width
        return mixing + sum(linear(asking, *layer) for layer in layers) + attention

    encoder, decoder = 12 * block(VISIBLE, 768), 3 * block(1568, 384) + block(1568, 384, MASKED)
    whole = encoder + decoder + linear(VISIBLE, 768, 384) + linear(MASKED, 384, 1536)
    embedding = 2 * (VISIBLE * 1536 + VISIBLE * 768 + 1536 * 768 / batch)  # frames need no gradient
    return 2 * (whole + embedding)


def test_traffic_of_the_network() -> None:
    for batch in (1, 64):
        assert count_traffic(VIT_B, 0.6, batch).products == pytest.approx(products_by_hand(batch), rel=0.02)
    # A lower bound: residual stream, norms, GELU and the casts between float32 and bfloat16, forward and backward.
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


@pytest.mark.slow
def test_scorers_cost_what_results_say() -> None:
    """The figures are those of docs/results.md: GFLOP a clip at production size."""
    stages = scorer_stages(VIT_B, 64, 2)
    gflop = {name: stage.operations / 1e9 for name, stage in stages.items()}
    assert gflop == pytest.approx({"cached": 0, "student": 14.8, "dense": 552, "patch": 25_272}, rel=0.005)
    assert stages["cached"].moved == 4 * 1568
