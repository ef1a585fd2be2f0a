"""The benchmark of the training step runs through, and its figures are consistent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import step
from tests.support.cubes import DEVICE
from tests.support.reports import read_report


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
