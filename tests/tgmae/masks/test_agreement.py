"""Agreement, rank correlation and cost, against sets, scipy and a count by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from engines.clip_model import load_clip
from engines.config import CLIPConfig
from tests.support.videos import write_numbered
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import read_manifest
from tgmae.masks.agreement import compare_scorers, count_gflop, load_clips, mask_agreement, rank_correlation, variants

CPU = torch.device("cpu")


def scores(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def config(cache_dir: Path) -> InputConfig:
    return InputConfig(
        device="cpu",
        data=DataConfig(stride=2, repeat=3),
        model=ModelConfig(image_size=64, num_frames=4),
        clip=CLIPConfig(model="shapes", cache_dir=cache_dir),
    )


@pytest.mark.parametrize("k", [1, 7, 12])
def test_mask_agreement_counts_common_patches(k: int) -> None:
    ours, theirs = scores(0, 3, 2, 13), scores(1, 3, 2, 13)
    got = mask_agreement(ours, theirs, k)
    for clip in range(3):
        for slot in range(2):
            a, b = (set(np.argsort(-x[clip, slot].numpy())[:k].tolist()) for x in (ours, theirs))
            assert float(got[clip, slot]) == pytest.approx(len(a & b) / k)
    assert (mask_agreement(ours, 3 * ours + 1, k) == 1).all()


def test_rank_correlation_is_spearmans() -> None:
    ours, theirs = scores(2, 3, 2, 50), scores(3, 3, 2, 50)
    theirs = theirs + 0.7 * ours
    got = rank_correlation(ours, theirs)
    for clip in range(3):
        for slot in range(2):
            expected = spearmanr(ours[clip, slot].numpy(), theirs[clip, slot].numpy()).statistic
            assert float(got[clip, slot]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(rank_correlation(ours, ours.exp()), torch.ones(3, 2))
    torch.testing.assert_close(rank_correlation(ours, -ours), -torch.ones(3, 2))


def test_videos_that_cannot_be_read_are_named_once(
    config: InputConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of another clip stands in the place of each."""
    for name in "ab":
        write_numbered(tmp_path / f"{name}.mp4", num_frames=16)
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    (tmp_path / "b.mp4").write_bytes(b"broken since")
    batches = load_clips(config, read_manifest(tmp_path / "m.parquet"), 4, 2, CPU)
    assert [video.path for clips in batches for video in clips.skipped] == ["b.mp4", "b.mp4"]
    assert capsys.readouterr().out.count("skipped b.mp4: ") == 1


@pytest.mark.parametrize("count", [1, 2])
def test_gflop_of_patch_is_the_count_by_hand(config: InputConfig, count: int) -> None:
    """Two a multiply-add, matrix products only; the last block's queries and MLP for the class token alone."""
    clip = load_clip(config.clip)
    visual = clip.visual
    width, embed = visual.proj.shape
    tokens = visual.positional_embedding.shape[0]
    hidden = visual.transformer.resblocks[0].mlp[0].out_features
    embedding = (16 * 16 * 3) * (tokens - 1) * width
    block = tokens * (3 * width * width + width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    last = 2 * tokens * width * width + (2 * width * width + 2 * width * hidden) + 2 * tokens * width
    per_patch = 2 * (embedding + (len(visual.transformer.resblocks) - 1) * block + last + width * embed)
    mask = MaskConfig(frames_per_tubelet=count)  # type: ignore[arg-type]
    expected = per_patch * 16 * (2 * count) / 1e9  # patches of a frame, frames of a clip
    assert count_gflop(clip, config.model, mask) == pytest.approx(expected, rel=1e-6)


def test_gflop_of_the_others(config: InputConfig, tmp_path: Path) -> None:
    """cached costs nothing; dense far less than patch; twice the frames cost twice as much."""
    clip = load_clip(config.clip)
    dense, patch, cached = (
        count_gflop(clip, config.model, MaskConfig(scorer=name, scores=tmp_path))  # type: ignore[arg-type]
        for name in ("dense", "patch", "cached")
    )
    one = count_gflop(clip, config.model, MaskConfig(scorer="dense", frames_per_tubelet=1))
    assert cached == 0
    assert 0 < dense < patch / 5
    assert dense == pytest.approx(2 * one)


def test_variants_name_what_can_be_compared(config: InputConfig, tmp_path: Path) -> None:
    dense = [f"dense, {name}" for name in ("maskclip", "sclip", "clearclip", "naclip")]
    assert list(variants(config)) == ["patch", "patch, first frame", *dense]
    mask = MaskConfig(
        kind="tube", order="bottom", frames_per_tubelet=1, student=tmp_path / "s", scores=tmp_path, scorer="dense"
    )
    found = variants(replace(config, mask=mask))
    assert list(found) == ["patch", *dense, "student", "cached"]
    assert {(variant.kind, variant.order) for variant in found.values()} == {("tgm", "top")}


def test_clips_are_whole_batches_of_the_first_ones(config: InputConfig, shapes: Path) -> None:
    """Each video once, though training would repeat it."""
    manifest = read_manifest(shapes)
    batches = load_clips(config, manifest, 7, 3, CPU)
    assert [tuple(clips.frames.shape) for clips in batches] == [(3, 4, 64, 64, 3)] * 3
    assert len({request.row for clips in batches for request in clips.requests}) == 9


@pytest.mark.slow
def test_report_of_every_scorer(config: InputConfig, shapes: Path) -> None:
    manifest = read_manifest(shapes)
    batches = load_clips(config, manifest, 4, 2, CPU)
    reports, found = compare_scorers(config, manifest, batches, CPU)
    assert [report.name for report in reports] == list(variants(config))
    assert {tuple(x.shape) for x in found.values()} == {(4, 2, 16)}
    by_name = {report.name: report for report in reports}
    same = by_name["patch"]
    assert (same.agreement, same.agreement_p5) == (1, 1)
    assert same.rank_correlation == pytest.approx(1)
    for report in reports:
        shares = []
        for ours, theirs in zip(found[report.name].flatten(0, 1), found["patch"].flatten(0, 1), strict=True):
            shares.append(len(set(ours.topk(9).indices.tolist()) & set(theirs.topk(9).indices.tolist())) / 9)
        assert report.agreement == pytest.approx(np.mean(shares), abs=1e-6)
        assert report.agreement_p5 == pytest.approx(np.quantile(shares, 0.05), abs=1e-6)
        assert len(report.clips_per_s) == 3
        assert min(report.clips_per_s) > 0
        assert report.gflop_per_clip > 0
