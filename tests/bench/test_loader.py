"""The plain loader and ours do the same work, and the benchmark of loaders runs through."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import loader
from bench.rivals.videomae_loader import MEAN, STD, Decoder, VideoMAEDataset, make_videomae_loader
from dali_pipelines.dali_pipeline import DaliPipeline
from tests.support.reports import read_report
from tests.support.videos import read_number, write_numbered
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import read_manifest
from tgmae.data.sampling import ClipSampler

BATCH = loader.CUDA_BATCH if torch.cuda.is_available() else loader.BATCH
MODEL, MASK = ModelConfig(image_size=96, num_frames=8), MaskConfig(kind="tube", ratio=0.75)
DECODERS: list[Decoder] = ["PyAV", "decord"]


def needs(decoder: Decoder) -> None:
    if decoder == "decord" and importlib.util.find_spec("decord") is None:
        pytest.skip("decord is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_both_loaders_deliver_the_same_clips(shapes: Path, decoder: Decoder) -> None:
    """Frames and crops are the same; only the order of resizing and conversion to RGB differs."""
    needs(decoder)
    manifest = read_manifest(shapes)
    data = DataConfig(manifest=shapes, split="", stride=2)
    sampler = ClipSampler(manifest=manifest, data=data, num_frames=8, batch_size=4, seed=1)
    dataset = VideoMAEDataset(decoder, manifest, sampler(0), MODEL, MASK)
    theirs, masked = next(make_videomae_loader(dataset, 4, num_workers=0, pin_memory=False))
    pipeline = DaliPipeline(manifest, sampler, data, MODEL.image_size)
    try:
        ours = pipeline.next_batch().frames
    finally:
        pipeline.close()
    assert theirs.dtype == torch.float32
    assert theirs.shape == (4, 3, 8, 96, 96)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    levels = (255 * (theirs * std + mean)).permute(0, 2, 3, 4, 1)
    assert levels.shape == ours.shape
    for clip, other in zip(levels, ours.float(), strict=True):
        assert (clip - other).abs().mean() < 3
    assert (levels - ours.roll(1, 0)).abs().mean() > 10  # another clip would be noticed
    # Every slot masks the same ⌊.75 · 36⌋ patches.
    slots = masked.view(4, 4, 36)
    assert (slots == slots[:, :1]).all()
    assert (slots.sum(2) == 27).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_plain_loader_decodes_the_frames_asked_for(tmp_path: Path, decoder: Decoder) -> None:
    """Windows lie in the middle, and one at the end of a video too short for it, whose last frame repeats."""
    needs(decoder)
    write_numbered(tmp_path / "long.mp4", num_frames=40, g="12", bf="2")
    write_numbered(tmp_path / "short.mp4", num_frames=9)
    index_folder(tmp_path, tmp_path / "manifest.parquet", min_frames=2)
    manifest = read_manifest(tmp_path / "manifest.parquet")
    data = DataConfig(stride=2, crop_scales=(1.0,))
    requests = ClipSampler(manifest=manifest, data=data, num_frames=8, batch_size=6, seed=0)(0)
    dataset = VideoMAEDataset(decoder, manifest, requests, MODEL, MASK)
    for place, request in enumerate(requests):
        clip = dataset[place][0].permute(1, 2, 3, 0) * torch.tensor(STD) + torch.tensor(MEAN)
        frames = [frame.permute(2, 0, 1)[None] for frame in clip]
        # The crop is a square of the short side. It is put back where it was cut; the rest stays grey.
        numbers = []
        for frame in frames:
            whole = np.full((120, 160, 3), 255 * 0.25, np.uint8)
            size = (request.crop.height, request.crop.width)
            cut = torch.nn.functional.interpolate(frame, size)[0].permute(1, 2, 0)
            x, y = request.crop.x, request.crop.y
            whole[y : y + size[0], x : x + size[1]] = (255 * cut).clamp(0, 255).round().numpy().astype(np.uint8)
            numbers.append(read_number(whole))
        seen = [bit for bit in range(8) if request.crop.x <= 20 * bit and 20 * bit + 20 <= request.crop.x + 120]
        for number, expected in zip(numbers, request.frames, strict=True):
            assert [number >> bit & 1 for bit in seen] == [expected >> bit & 1 for bit in seen]


@pytest.mark.slow
def test_a_small_run(shapes: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "find_decoders", lambda: ["PyAV"])
    loader.run(loader.Options(shapes, clips=BATCH, tgm_clips=8, rounds=1, workers=1, image_size=64))
    report = read_report(results, "loader.*")
    loaders, masks, *stages = report["tables"]
    assert [row["name"] for row in loaders["rows"]] == ["VideoMAE, PyAV", "pyav", "dali"]
    assert [row["name"] for row in masks["rows"]] == ["dali, tube", "dali, no masks", "dali, random", "dali, tgm"]
    assert all(row["median"] > 0 and row["ms of CPU a clip"] > 0 for row in loaders["rows"] + masks["rows"])
    titles = [] if torch.cuda.is_available() else ["stages of VideoMAE, PyAV", "stages of dali"]
    assert [table["title"] for table in stages] == titles
    for table in stages:
        *parts, together, whole = (row["median"] for row in table["rows"])
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(together)
        assert whole > 0
        assert [row["name"] for row in table["rows"]][:1] == ["decode"]
    ratio = loaders["rows"][-1]["ratio"]["median"]
    assert report["headline"]["dali / VideoMAE, PyAV"] == pytest.approx(ratio, abs=0.01)


def test_clips_come_in_whole_batches(shapes: Path) -> None:
    with pytest.raises(ValueError, match=rf"--clips must be a multiple of {BATCH}, got 12"):
        loader.run(loader.Options(shapes, clips=12))


def test_a_turn_ends_by_batches_or_by_time(shapes: Path) -> None:
    """Batches that were ready before do not count."""
    bench = loader.Bench(loader.Options(shapes, workers=1))
    for num_batches, seconds, counted in ((1, 0.0, 1), (7, 0.0, 4), (7, 60.0, 7)):
        taken: list[int] = []
        assert bench.rate("some", lambda taken=taken: taken.append(0), 8, num_batches, 5, seconds, 4) > 0  # type: ignore[misc]
        assert len(taken) == 5 + counted
    every, ours = (
        [r for batch in range(sampler.num_batches) for r in sampler(batch)]
        for sampler in (bench.sampler, bench.dali_sampler)
    )
    assert every == ours
