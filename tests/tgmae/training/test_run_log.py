"""What a run says at its start and while it trains."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tqdm import tqdm

from engines.config import CLIPConfig
from tests.support.runs import losses, tiny, validation_losses
from tgmae.config.masks import MaskConfig
from tgmae.config.run import TrainConfig
from tgmae.config.training import LogConfig, ValidationConfig
from tgmae.presets import PRESETS
from tgmae.telemetry.metrics import read_metrics
from tgmae.train import train
from tgmae.training.run_log import advise_scorer


def test_scorer_patch_with_a_large_clip_is_advised_against() -> None:
    ssv2 = replace(PRESETS["ssv2"], mask=MaskConfig(scorer="patch"))
    advice = advise_scorer(ssv2)
    assert advice.startswith("scorer patch costs 25 TFLOP a clip, the training step half a TFLOP: ")
    assert "tgmae-data scores" in advice
    assert "tgmae-engine distill" in advice
    for other in (
        replace(ssv2, clip=CLIPConfig(model="ViT-L-14")),
        replace(ssv2, model=replace(ssv2.model, image_size=112)),
        replace(ssv2, mask=MaskConfig(scorer="patch", frames_per_tubelet=1)),
        replace(ssv2, mask=MaskConfig(scorer="patch", ratio=0.75)),
    ):  # nothing was counted for these
        assert "TFLOP" not in advise_scorer(other)
        assert "tgmae-data scores" in advise_scorer(other)
    for cheap in (
        PRESETS["demo"],
        replace(ssv2, mask=MaskConfig(scorer="dense")),
        replace(ssv2, mask=MaskConfig(kind="tube")),
    ):
        assert advise_scorer(cheap) == ""


# What a run says while it trains


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgmae.train._draw", lambda *_: None)


def talking(shapes: Path, run_dir: Path) -> TrainConfig:
    """Ten tiny steps in two epochs, of 20 clips each, with a report every three steps and a validation at the end."""
    return tiny(
        shapes, run_dir, epochs=2, max_steps=None, log=LogConfig(metrics_every=3, tensorboard=False),
        validation=ValidationConfig(clips=2, every=2),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pictures")
def test_without_a_terminal_reports_are_lines(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgmae.training.run_log._EPOCHS_S", 0)
    train(talking(shapes, tmp_path))
    said = capsys.readouterr()
    assert "\r" not in said.out + said.err
    lines = [line for line in said.out.splitlines() if line.startswith(("step ", "epoch"))]
    starts = ["step 3/10", "epoch 1 of 2", "step 6/10", "step 9/10", "step 10/10", "epoch 2 of 2", "step 10 of 10"]
    assert [re.split("[,:]", line)[0] for line in lines] == starts

    reports = [line for line in read_metrics(tmp_path) if "loss" in line]
    for line, report in zip((lines[place] for place in (0, 2, 3, 4)), reports, strict=True):
        left_s = (10 - report["step"]) * report["step_ms"] / 1000  # at the speed since the last report
        figures = f"loss {report['loss']:.3f}, {report['clips_per_s']:.1f} clips/s, waiting {report['wait_share']:.0%}"
        assert f"epoch {report['epoch']:.1f}/2, {figures}" in line
        assert line.endswith(f", {tqdm.format_interval(left_s)} left")
    # An epoch's loss is the mean over its steps: the second begins after step 5, the first after none.
    steps = losses(train_each_step(shapes, tmp_path / "each"))
    assert lines[1].startswith(f"epoch 1 of 2: loss {sum(steps[:5]) / 5:.3f}, ")
    assert lines[5].startswith(f"epoch 2 of 2: loss {sum(steps[5:]) / 5:.3f}, ")
    validated = f"validation {validation_losses(tmp_path)[10]:.3f}"
    assert all((validated in line) == (place >= 4) for place, line in enumerate(lines))
    assert "% validating" in lines[-1]


def train_each_step(shapes: Path, run_dir: Path) -> Path:
    """Train the same ten steps with a report for each."""
    config = talking(shapes, run_dir)
    train(replace(config, log=replace(config.log, metrics_every=1, progress=False)))
    return run_dir


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pictures")
def test_on_a_terminal_a_bar_shows_the_epoch(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs that end soon after one another share a line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(talking(shapes, tmp_path))
    said = capsys.readouterr()
    assert re.search(r"\| 10/10 \[\d\d:\d\d<00:00\]\n", said.err)
    figures = re.findall(r"epoch [^\x1b\r\n]*", said.err)
    assert re.fullmatch(r"epoch 2\.0/2, loss .*, validation \d\.\d{3}", figures[-1])
    assert max(map(len, figures)) < 80
    lines = [line for line in said.out.splitlines() if line.startswith(("step ", "epoch"))]
    assert [re.split("[,:]", line)[0] for line in lines] == ["epochs 1 to 2 of 2", "step 10 of 10"]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pictures")
def test_no_progress_is_silent_until_the_end(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgmae.training.run_log._EPOCHS_S", 0)
    train_each_step(shapes, tmp_path)
    said = capsys.readouterr()
    assert said.err == ""
    assert [line for line in said.out.splitlines() if line.startswith(("step ", "epoch"))] == [
        said.out.splitlines()[-1]
    ]
