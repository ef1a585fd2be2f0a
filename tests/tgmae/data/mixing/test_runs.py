"""Training on two data sets: resumed it is the same, and each of them is described, counted, validated and watched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.data_sets import split_shapes
from tests.support.runs import command, losses, run_here, state, tiny
from tgmae.config.run import TrainConfig
from tgmae.config.training import ValidationConfig
from tgmae.data.mixing.joined import data_sets, open_data_sets
from tgmae.telemetry.metrics import read_metrics
from tgmae.train import train
from tgmae.training.validation.held_out import HeldOut, bind_with_held_out

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifests(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return split_shapes(shapes, tmp_path_factory.mktemp("sets"))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgmae.train._draw", lambda *_: None)


def mixing(manifests: tuple[Path, ...], run_dir: Path, **changes: object) -> TrainConfig:
    config = tiny(manifests[0], run_dir, validation=ValidationConfig(clips=2), **changes)
    return replace(config, data=replace(config.data, manifest=manifests, weights=(1.0, 3.0)))


@pytest.mark.slow
def test_interrupted_and_resumed_it_is_the_same(
    manifests: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = mixing(manifests, tmp_path / "whole")
    train(whole)
    said = capsys.readouterr().out
    assert "data      20 videos of 2 data sets; clips 8×32²" in said
    assert f"a: 14 videos from {manifests[0]}, 25.0% of the clips, each video 0.36 times an epoch" in said
    assert f"b: 6 videos from {manifests[1]}, 75.0% of the clips, each video 2.50 times an epoch\n" in said
    assert "held out  4 clips from 4 videos of split val (2 of a, 2 of b), every 16 steps" in said

    parts = replace(whole, run_dir=tmp_path / "parts")
    train(replace(parts, max_steps=6))
    with pytest.raises(ValueError, match=r"cannot resume .*: data\.weights from \[1\.0, 3\.0\] to \[1\.0, 2\.0\]"):
        train(replace(parts, data=replace(parts.data, weights=(1.0, 2.0))))
    with pytest.raises(ValueError, match=r"cannot resume .* in data sets of 14, 6 to .* in data sets of 6, 14"):
        train(replace(parts, data=replace(parts.data, manifest=manifests[::-1])))
    train(parts)
    expected, found = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    for line in (line for line in read_metrics(tmp_path / "whole") if "loss" in line):
        clips = [line["epoch/a"] * 14, line["epoch/b"] * 6]
        assert sum(clips) == pytest.approx(4 * line["step"])
        assert (line["skipped_videos/a"], line["skipped_videos/b"]) == (0, 0)
    [last] = [line for line in read_metrics(tmp_path / "whole") if "validation_loss" in line]
    assert last["validation_loss"] == pytest.approx((last["validation_loss/a"] + last["validation_loss/b"]) / 2)
    assert last["validation_loss/a"] != last["validation_loss/b"]
    assert (tmp_path / "whole" / "loss.png").exists()


@pytest.mark.slow
def test_from_the_command_line_with_dali(
    manifests: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips come from both folders. Two of the six videos of one data set are gone, which ends the run."""
    folder = tmp_path / "b"
    data = open_data_sets(replace(mixing(manifests, tmp_path).data, weights=None)).select_split("train")
    paths = [data[row].path for row in range(14, 20)]
    for path in paths[:4]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(manifests[1].parent / path)
    flags = ["--data.manifest", *map(str, manifests), "--data.weights", "1", "1", "--max-steps", "10"]
    typed = command(manifests[0], tmp_path / "run", *flags, "--data.root", str(data.file(0).removesuffix(data[0].path)))
    with pytest.raises(SystemExit) as ended:
        run_here([*typed, str(folder), "--log.no-progress"])
    message = str(ended.value)
    assert "b: 2 of 6 videos could not be read (33.3%, more than --data.max-skipped 5.0%)" in message
    assert all(path in message for path in paths[4:])
    assert all(path not in message for path in paths[:4])


def held_out_of(config: TrainConfig) -> tuple[HeldOut, str]:
    videos = open_data_sets(config.data)
    _, held_out, note = bind_with_held_out(config, videos, videos.select_split("train"), CPU)
    assert held_out is not None
    return held_out, note


def test_each_data_set_is_validated_on_the_clips_that_it_has_in_a_run_of_its_own(
    manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    both, note = held_out_of(mixing(manifests, tmp_path))
    assert (both.names, note) == (("a", "b"), "")
    for one in data_sets(both.manifest):
        alone, _ = held_out_of(tiny(manifests[one.number], tmp_path, validation=ValidationConfig(clips=2)))
        own = [request for request in both.requests if one.rows_of([request.row])]
        assert tuple(replace(request, row=request.row - one.first) for request in own) == alone.requests
        for request in own:
            assert both.manifest.file(request.row) == alone.manifest.file(request.row - one.first)


def test_a_data_set_without_held_out_videos_is_named(manifests: tuple[Path, Path], tmp_path: Path) -> None:
    from tgmae.data.manifest import read_manifest, write_manifest

    source = read_manifest(manifests[1])
    write_manifest(tmp_path / "c.parquet", list(source.select_split("train").rows()), source.root)
    held_out, note = held_out_of(mixing((manifests[0], tmp_path / "c.parquet"), tmp_path))
    assert note.startswith("held out: c: no clips, no video has split 'val', only 'train'")
    assert [len(one) for one in data_sets(held_out.manifest)] == [2, 0]
    assert len(held_out.requests) == 2
