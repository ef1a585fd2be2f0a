"""The benchmark of the training step runs through, and its figures are consistent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import step
from bench.workloads.contrastive_step import OFF, ROLES, ContrastiveStep
from tests.support.cubes import DEVICE
from tests.support.reports import read_report, rows_of


@pytest.mark.skipif(DEVICE.type == "cuda", reason="has a GPU")
def test_modes_need_a_gpu(results: Path) -> None:
    with pytest.raises(ValueError, match="--modes needs a CUDA device"):
        step.run(step.Options(modes=("graph", "compiled")))
    assert not results.exists()


@pytest.mark.slow
def test_step_runs_through(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.PRESETS, "demo", replace(step.PRESETS["demo"], batch_size=2, device_batch_size=2))
    step.run(step.Options(rounds=1, steps=1, ratios=(0.9, 0.6), large=False))
    report = read_report(results, "step")
    (table,) = report["tables"]
    *rows, matmul = table["rows"]
    assert len(rows) == 2
    assert table["limit"] == matmul["median"] > 0
    for row in rows:
        assert row["median"] == pytest.approx(row["clips/s"] * row["GFLOP a clip"] / 1000)
        assert row["ms a step"] == pytest.approx(2 / row["clips/s"] * 1000)
        shares = [float(row[stage].rstrip("%")) for stage in ("forward", "backward", "optimizer")]
        assert 20 < sum(shares) <= 102  # the rest: the gradient's norm; rounded to whole percents


@pytest.mark.slow
def test_the_contrastive_loss_is_measured_in_every_role(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = step.PRESETS["demo"]
    small = replace(demo.model, width=24, depth=1, num_heads=2, decoder_width=24, decoder_depth=1, decoder_num_heads=2)
    monkeypatch.setitem(step.PRESETS, "demo", replace(demo, model=small, batch_size=4, device_batch_size=4))
    step.run(step.Options(rounds=2, steps=1, contrast=True))
    report = read_report(results, "step_contrast")
    once, twice = (rows_of(table) for table in report["tables"])
    assert list(once) == ["off", "observed", "optimised", "the term alone"]
    assert list(twice) == ["off", "observed", "optimised", "optimised over the whole step"]
    assert once["the term alone"]["CPU ms"] < once["optimised"]["CPU ms"]
    for rows in (once, twice):
        for row in rows.values():
            assert len(row["values"]) == 2
            assert row["ratio"]["to"] == "off"
            assert row["CPU ms"] > 0
        assert rows["off"]["CPU × off"] == "1.000 (1.000 to 1.000)"
    assert len(report["headline"]) == 6


def test_roles_of_the_contrastive_loss_train_what_they_say() -> None:
    """The head learns in every role but off; the encoder's gradients change only where the loss is optimised."""
    demo = step.PRESETS["demo"]
    small = replace(demo.model, width=24, depth=1, num_heads=2, decoder_width=24, decoder_depth=1, decoder_num_heads=2)
    preset = replace(demo, model=small, batch_size=4, device_batch_size=4)
    weights = {}
    for role, loss in ROLES.items():
        timed = ContrastiveStep(preset, loss, 2, DEVICE)
        assert [len(inputs.frames) for inputs in timed.passes] == [2, 2]
        before = timed.training.model.head and timed.training.model.head.last.weight.clone()
        timed.run(1)
        head = timed.training.model.head
        assert (head is None) == (role == OFF)
        assert head is None or not torch.equal(before, head.last.weight)
        weights[role] = timed.training.model.mae.patch_embed.weight
    assert not torch.equal(weights["optimised"], weights["observed"])
    assert not torch.equal(weights["optimised"], weights["optimised over the whole step"])
