"""Validation: the same clips in every run, the right mean, and training that does not notice it."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from dali_pipelines.pyav_pipeline import PyavPipeline
from engines.config import CLIPConfig
from tests.support.runs import losses, state, tiny, validation_losses
from tgmae.captions.embeddings import CaptionEmbeddings
from tgmae.config.masks import MaskConfig
from tgmae.config.run import TrainConfig
from tgmae.config.training import ValidationConfig
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.data.sampling import FixedClips, ends_period
from tgmae.masks.maps.build_scores import build_scores
from tgmae.masks.select import select_masks
from tgmae.model.videomae import VideoMAE
from tgmae.telemetry.metrics import read_metrics
from tgmae.train import train
from tgmae.training.validation.held_out import bind_with_held_out

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgmae.train._draw", lambda *_: None)


def validating(manifest: Path, run_dir: Path, **changes: object) -> TrainConfig:
    """Ten tiny steps with validations of two clips after steps 8 and 10: every epoch (5 steps) would be too often."""
    return tiny(manifest, run_dir, validation=ValidationConfig(clips=2), **changes)


@pytest.mark.slow
def test_training_does_not_notice_it_and_resuming_repeats_it(shapes: Path, tmp_path: Path) -> None:
    """Bit for bit the same weights, optimiser and losses as without; interrupted and resumed, the same validations."""
    train(tiny(shapes, tmp_path / "without"))
    whole = validating(shapes, tmp_path / "whole")
    train(whole)
    parts = replace(whole, run_dir=tmp_path / "parts")
    train(replace(parts, max_steps=6))
    train(parts)
    expected = state(tmp_path / "without")
    for name in ("whole", "parts"):
        found = state(tmp_path / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert losses(tmp_path / name) == losses(tmp_path / "without")
    validated = validation_losses(tmp_path / "whole")
    assert list(validated) == [8, 10]
    assert validation_losses(tmp_path / "parts").items() >= validated.items()
    assert list(validation_losses(tmp_path / "parts")) == [6, 8, 10]  # 6 was the last step of the first part
    assert all(0 < line["validation_share"] < 1 for line in read_metrics(tmp_path / "whole") if len(line) == 4)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["pyav", "dali"])
def test_broken_held_out_videos_are_left_out(
    shapes: Path, tmp_path: Path, pipeline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of four is gone: named, counted, and the loss is the mean over the others, one by one; then all are gone."""
    manifest = read_manifest(shapes)
    for row in range(len(manifest)):
        target = tmp_path / manifest[row].path
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(manifest.file(row))
    config = tiny(shapes, tmp_path / "run", pipeline=pipeline, max_steps=1, validation=ValidationConfig())
    config = replace(config, data=replace(config.data, root=tmp_path))
    scorer, held_out, note = bind_with_held_out(config, manifest, manifest.select_split("train"), CPU)
    assert held_out is not None
    assert (note, len(held_out.requests)) == ("", 4)
    gone, *readable = held_out.requests
    (tmp_path / held_out.manifest[gone.row].path).unlink()
    train(config)
    said = capsys.readouterr().out
    assert f"skipped {held_out.manifest[gone.row].path}: " in said
    assert "validating on 3 of 4 held-out clips; the others could not be read" in said

    model = VideoMAE(config.model)
    model.load_state_dict({name: state(tmp_path / "run")[f"mae.{name}"] for name in model.state_dict()})
    pyav = PyavPipeline(held_out.manifest, FixedClips(tuple(readable), 1), config.model.image_size)
    each = []
    for clips in (pyav.next_batch() for _ in readable):
        loss = model(clips.frames, select_masks(config.mask, config.model, scorer(clips))).loss
        each.append(loss.item())
    expected = pytest.approx(sum(each) / 3, rel=1e-6 if pipeline == "pyav" else 1e-2)
    assert validation_losses(tmp_path / "run") == {1: expected}
    assert read_metrics(tmp_path / "run")[-1]["skipped_videos"] == 0  # those are videos that are trained on

    if pipeline == "pyav":
        for request in readable:
            (tmp_path / held_out.manifest[request.row].path).unlink()
        assert train(replace(config, run_dir=tmp_path / "none")).step == 1
        said = capsys.readouterr().out
        assert "held-out clips are missing: none of the videos of 16 batches could be read" in said
        assert "validating on 0 of 4 held-out clips" in said
        assert validation_losses(tmp_path / "none") == {}


def note_of(config: TrainConfig, videos: Manifest) -> str:
    _, held_out, note = bind_with_held_out(config, videos, videos.select_split(config.data.split), CPU)
    assert held_out is None
    return note


def test_a_run_without_held_out_videos_says_so(shapes: Path, tmp_path: Path) -> None:
    config, videos = validating(shapes, tmp_path), read_manifest(shapes)
    train_only = videos.select_split("train")
    assert note_of(config, train_only).startswith("no validation: no video has split 'val', only 'train'; a CSV gives ")
    everything = replace(config, data=replace(config.data, split=""))
    assert note_of(everything, videos) == "no validation: --data.split (all) trains on split val too"
    several = [replace(video, split={"val": "val,train3"}.get(video.split, video.split)) for video in videos.rows()]
    third = replace(config, data=replace(config.data, split="train3"))
    shared = "no validation: 4 videos of split val are in --data.split train3 too"
    assert note_of(third, Manifest.of(several, videos.root)) == shared
    long = replace(config, data=replace(config.data, stride=10))
    assert "no validation: a clip spans 71 frames" in note_of(long, videos)
    assert note_of(replace(config, validation=ValidationConfig(every=0)), train_only) == ""


@pytest.mark.slow
def test_held_out_videos_that_cannot_be_masked(shapes: Path, tmp_path: Path, cache_dir: Path) -> None:
    """Without captions, and without score maps: the videos that are trained on have both."""
    config, videos = validating(shapes, tmp_path / "run"), read_manifest(shapes)
    clip = CLIPConfig(model="shapes", cache_dir=cache_dir)
    by_text = replace(
        config, model=replace(config.model, image_size=64, patch_size=16), mask=MaskConfig(frames_per_tubelet=1),
        clip=clip,
    )  # fmt: skip
    rows = [videos[row] for row in range(len(videos))]
    bare = [replace(video, captions=() if video.split == "val" else video.captions) for video in rows]
    write_manifest(tmp_path / "bare.parquet", bare, shapes.parent)
    note = note_of(by_text, read_manifest(tmp_path / "bare.parquet"))
    assert note.startswith("no validation: 4 of 4 videos have no caption, such as videos/")

    folder = tmp_path / "maps"
    build_scores(
        videos.select_split("train"), folder, clip, by_text.mask, cells=4, patch_size=16, every=20, device=CPU,
        num_workers=0,
    )  # fmt: skip
    note = note_of(replace(by_text, mask=MaskConfig(scorer="cached", scores=folder)), videos)
    assert f"no validation: {folder} has no maps, or maps of other videos or captions, for 4 of 24 videos" in note
    assert note.endswith(f"; add them with: tgmae-data scores MANIFEST --out {folder} --data.split val")


def test_embeddings_of_the_captions_do_not_depend_on_held_out_ones(shapes: Path, tmp_path: Path) -> None:
    """Rounding depends on what is encoded together: the cache shows that those of training come first, as alone."""
    from engines.clip_model import load_clip

    videos = read_manifest(shapes)
    clip = load_clip(CLIPConfig(model="shapes"))
    training, held_out = videos.select_split("train"), videos.select_split("val")
    alone = CaptionEmbeddings(training, clip, tmp_path / "alone", CPU)
    both = CaptionEmbeddings(training, clip, tmp_path / "both", CPU, held_out)
    texts = [caption.text for captions in training.captions() for caption in captions]
    assert torch.equal(alone.of(texts), both.of(texts))
    encoded = [
        pq.read_table(next(folder.glob("*.parquet"))).column("caption").to_pylist()
        for folder in (tmp_path / "alone", tmp_path / "both")
    ]
    assert encoded[1][: len(encoded[0])] == encoded[0]
    assert len(encoded[1]) > len(encoded[0])
    more = [caption.text for captions in held_out.captions() for caption in captions]
    itself = CaptionEmbeddings(held_out, clip, tmp_path / "held_out", CPU)
    torch.testing.assert_close(both.of(more), itself.of(more), rtol=0, atol=1e-6)


def test_the_clips_are_the_same_for_every_seed(shapes: Path, tmp_path: Path) -> None:
    """And however many are asked for; each is of another video."""
    config, videos = validating(shapes, tmp_path), read_manifest(shapes)
    training = videos.select_split("train")
    _, two, _ = bind_with_held_out(config, videos, training, CPU)
    other = replace(config, seed=5, batch_size=20, device_batch_size=20, validation=ValidationConfig(every=3))
    _, all_of_them, _ = bind_with_held_out(other, videos, training, CPU)
    assert two is not None
    assert all_of_them is not None
    assert two.requests == all_of_them.requests[:2]
    assert sorted(request.row for request in all_of_them.requests) == [0, 1, 2, 3]
    assert (two.period, all_of_them.period) == (32, 64)  # 16 for each of the two; of the four, which is above 3 × 20


@pytest.mark.parametrize(("batch_size", "period"), [(4, 20), (7, 20), (16, 163), (40, 20), (4, 2.5)])
def test_every_period_ends_with_the_first_step_beyond_it(batch_size: int, period: float) -> None:
    ends = [step for step in range(1, 200) if ends_period(step, batch_size, period)]
    expected = {math.ceil(Fraction(period) * number / batch_size) for number in range(1, 2000)}
    assert ends == sorted(step for step in expected if step < 200)
