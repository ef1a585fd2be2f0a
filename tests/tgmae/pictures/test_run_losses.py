"""The losses of several runs in one picture: which runs, which lines, which words."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from tgmae.cli import viz
from tgmae.config.loss import LossConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.saved import write_config
from tgmae.pictures import run_losses
from tgmae.pictures.run_losses import draw_run_losses, smooth
from tgmae.presets import PRESETS
from tgmae.telemetry.metrics import MetricsWriter

OBSERVED, OPTIMISED = LossConfig(observe_contrastive=True), LossConfig(contrastive=1.0)
TUBE, TGM = MaskConfig(kind="tube", ratio=0.9), MaskConfig(frames_per_tubelet=1)


def make_run(
    run_dir: Path, loss: LossConfig, mask: MaskConfig = TGM, steps: Iterable[int] = range(10, 210, 10), seed: int = 0
) -> Path:
    """Write what a run leaves of which both losses fall by a hundredth a step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(replace(PRESETS["demo"], run_dir=run_dir, loss=loss, mask=mask, seed=seed), run_dir / "config.json")
    steps = list(steps)
    with closing(MetricsWriter(run_dir, steps[0] - 1, tensorboard=False)) as writer:
        for step in steps:
            parts = {"reconstruction_loss": 5 - step / 100 + seed, "contrastive_loss": 3 - step / 100 + seed}
            total = parts["reconstruction_loss"] + loss.contrastive * parts["contrastive_loss"]
            writer.write(step, {"loss": total} | (parts if loss.contrasts else {}))
            writer.write(step, {"validation_loss": 9.0})  # a line of its own, without the others
    return run_dir


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in place of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr(run_losses, "save_figure", lambda figure, *_, **__: figures.append(figure))
    return figures


def curves(figure: Figure, panel: int, faint: bool = False) -> list[tuple[str, str, float]]:
    """Return colour, style and last step of the lines of a panel, without the one that marks chance."""
    return [
        (to_hex(line.get_color()), line.get_linestyle(), float(np.asarray(line.get_xdata())[-1]))
        for line in figure.axes[panel].lines
        if len(np.asarray(line.get_xdata())) > 2 and (line.get_alpha() is not None) == faint
    ]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts() if text.get_text()]


def test_figure_4(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [
        make_run(tmp_path / f"{mask.kind}-{loss.contrastive}", loss, mask)
        for mask in (TUBE, TGM)
        for loss in (OPTIMISED, OBSERVED)
    ]
    assert draw_run_losses(runs, tmp_path / "out.png") == []
    blue, orange = map(str.lower, run_losses._COLOURS[:2])
    for panel in range(2):
        expected = [(blue, "-", 200.0), (blue, "--", 200.0), (orange, "-", 200.0), (orange, "--", 200.0)]
        assert curves(drawn[0], panel) == expected
        assert len(curves(drawn[0], panel, faint=True)) == 4
    assert sorted(legend(drawn[0])) == sorted(
        ["tube, γ 0.9", "tgm, γ 0.6", "contrastive loss optimised", "contrastive loss only observed"]
    )
    assert "chance among 16 clips" in {text.get_text() for text in drawn[0].axes[0].texts}
    for panel, start in enumerate((3, 5)):  # which loss is in which panel
        line = drawn[0].axes[panel].lines[-2]
        np.testing.assert_allclose(line.get_ydata(), start - np.asarray(line.get_xdata()) / 100)


def test_seeds_are_a_mean_within_a_range(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make_run(tmp_path / str(seed), OBSERVED, seed=seed) for seed in (0, 1)]
    steps = sorted([*range(10, 210, 10), 57])  # it was stopped after step 57, and resumed
    runs.append(make_run(tmp_path / "5", OBSERVED, seed=5, steps=steps))
    draw_run_losses(runs, tmp_path / "out.png")
    assert len(curves(drawn[0], 0)) == 1
    assert legend(drawn[0]) == ["all runs (3 seeds)", "contrastive loss only observed"]
    mean = next(line for line in drawn[0].axes[0].lines if len(np.asarray(line.get_xdata())) > 2)
    assert len(np.asarray(mean.get_xdata())) == 20
    np.testing.assert_allclose(mean.get_ydata(), 3 + 2 - np.asarray(mean.get_xdata()) / 100, atol=0.01)
    [band] = drawn[0].axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((3 - 2, 3 - 0.1 + 5))


def test_runs_of_different_lengths_end_where_they_end(tmp_path: Path, drawn: list[Figure]) -> None:
    long = make_run(tmp_path / "long", OBSERVED)
    short = make_run(tmp_path / "short", OBSERVED, steps=range(10, 60, 10), seed=1)
    draw_run_losses([long, short], tmp_path / "out.png")
    assert [last for _, _, last in curves(drawn[0], 0)] == [200.0, 50.0]  # not averaged: the steps differ


def test_one_report_is_a_point(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_run_losses([make_run(tmp_path / "run", OBSERVED, steps=[10])], tmp_path / "out.png")
    assert drawn[0].axes[0].lines[0].get_marker() == "o"


def test_a_resumed_run_is_drawn_once(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", OBSERVED)
    make_run(tmp_path / "resumed", OBSERVED, steps=range(10, 160, 10))
    resumed = make_run(tmp_path / "resumed", OBSERVED, steps=range(110, 210, 10))  # from the checkpoint of step 109
    for name in ("contrastive", "reconstruction"):
        np.testing.assert_array_equal(
            getattr(run_losses.read_losses(whole), name), getattr(run_losses.read_losses(resumed), name)
        )


def test_runs_without_a_contrastive_loss_are_named_and_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    with_it, without = make_run(tmp_path / "with", OPTIMISED), make_run(tmp_path / "without", LossConfig())
    [note] = draw_run_losses([with_it, without], tmp_path / "out.png")
    assert note.startswith(f"no contrastive loss of {without}: ")
    assert "--loss.observe-contrastive" in note
    assert [len(curves(drawn[0], panel)) for panel in range(2)] == [1, 2]
    assert "no contrastive loss" in legend(drawn[0])
    np.testing.assert_allclose(  # its only loss is the reconstruction
        run_losses.read_losses(without).reconstruction, run_losses.read_losses(with_it).reconstruction
    )
    [note] = draw_run_losses([without], tmp_path / "out.png")
    assert len(drawn[1].axes) == 1
    assert drawn[1].axes[0].get_title(loc="left").startswith("reconstruction loss")


def test_contrastive_learning_alone_has_no_reconstruction(tmp_path: Path, drawn: list[Figure]) -> None:
    alone = make_run(tmp_path / "alone", LossConfig(contrastive=1.0, reconstruction=0))
    [note] = draw_run_losses([alone], tmp_path / "out.png")
    assert note == f"no reconstruction loss of {alone}: trained with the contrastive loss alone"
    assert [axes.get_title(loc="left")[:11] for axes in drawn[0].axes] == ["contrastive"]


def test_a_weighted_reconstruction_is_drawn_without_its_weight(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LossConfig(reconstruction=4.0), steps=[10])
    assert run_losses.read_losses(run).reconstruction.tolist() == [[10, 4.9 / 4]]


def test_weights_of_the_contrastive_loss_are_told_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make_run(tmp_path / str(weight), LossConfig(contrastive=weight)) for weight in (0.5, 1.0)]
    draw_run_losses(runs, tmp_path / "out.png")
    assert {"contrastive 0.5", "contrastive 1.0"} < set(legend(drawn[0]))


@pytest.mark.parametrize("window", [0, 35, 1000])
def test_smoothing_is_a_mean_that_keeps_straight_lines(window: float) -> None:
    steps = np.arange(10.0, 310, 10)
    line = np.stack([steps, 4 - steps / 50], axis=1)
    np.testing.assert_allclose(smooth(line, window), line, atol=1e-12)
    noise = np.stack([steps, np.random.default_rng(0).normal(size=30)], axis=1)
    half = int(window // 20)  # points on each side
    for place, value in enumerate(smooth(noise, window)[:, 1]):
        near = min(half, place, 29 - place)
        assert value == pytest.approx(noise[place - near : place + near + 1, 1].mean())


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", OBSERVED)
    empty, silent = tmp_path / "empty", make_run(tmp_path / "silent", OBSERVED)
    empty.mkdir()
    (silent / "metrics.jsonl").write_text("")
    for wrong, words in (
        ([run, tmp_path / "missing"], r"no folder .*missing; expected the folder of a run"),
        ([run, empty], r"empty is not the folder of a run: it has no config\.json"),
        ([run, silent], r"silent has no losses yet: there are none in its metrics\.jsonl"),
        ([run, run.parent / "." / "run"], "is given twice"),
    ):
        with pytest.raises(ValueError, match=words):
            draw_run_losses(wrong, tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"--smooth must lie in \[0, 1\), got 1"):
        draw_run_losses([run], tmp_path / "out.png", 1)
    assert not (tmp_path / "out.png").exists()


def test_the_command_writes_a_picture_beside_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = make_run(tmp_path / "a", OPTIMISED), make_run(tmp_path / "b", LossConfig())
    viz.Losses(runs).run()
    note, said = capsys.readouterr().out.splitlines()
    assert str(runs[1]) in note
    assert said == f"losses of 2 runs: {tmp_path / 'losses.png'}"
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.width > 1000
    with pytest.raises(ValueError, match="no run was given"):
        viz.Losses(()).run()
