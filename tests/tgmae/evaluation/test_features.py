"""Frozen features: of which clip of a video, equal to transformers', and what becomes of videos that cannot be read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import VideoMAEModel

from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import CropBox, Video
from tests.tgmae.model.networks import SMALL, our_model, pixel_values
from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.sampling import FixedClips
from tgmae.evaluation.features import centre_clip, centre_frames, extract_features, load_network, pool_tokens
from tgmae.model.huggingface import export_hf

CPU = torch.device("cpu")
DATA = DataConfig(stride=8, num_workers=1)


@pytest.fixture(scope="module")
def manifest(shapes: Path) -> Manifest:
    return read_manifest(shapes)


def video_of(length: int, start: int = 0) -> Video:
    return Video(
        path="a.mp4", num_frames=100, fps=25, width=160, height=120, codec="h264", pixel_format="yuv420p", rotation=0,
        num_bytes=1, mtime_ns=1, keyframes=(0,), keyframe_pts=(0,), label="", captions=(), split="",
        segment=(start, start + length),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("length", "start", "frames"),
    [
        (40, 0, (7, 15, 23, 31)),  # a clip spans 25 frames, so 15 are left: 7 before it, 8 behind
        (41, 10, (18, 26, 34, 42)),
        (25, 0, (0, 8, 16, 24)),
        (20, 5, (5, 13, 21, 21)),  # too short: the last frame that the stride reaches comes again
    ],
)
def test_dense_sampling_takes_the_middle(length: int, start: int, frames: tuple[int, ...]) -> None:
    assert centre_frames(video_of(length, start), DATA, 4) == frames


@pytest.mark.parametrize(
    ("length", "frames"), [(40, (4, 14, 24, 34)), (4, (0, 1, 2, 3)), (9, (0, 2, 4, 7)), (3, (0, 1, 2, 2))]
)
def test_uniform_sampling_takes_the_middle_of_each_part(length: int, frames: tuple[int, ...]) -> None:
    assert centre_frames(video_of(length), replace(DATA, sampling="uniform"), 4) == frames


def test_the_crop_is_the_central_square() -> None:
    request = centre_clip(video_of(40), 3, DATA, 4)
    assert request.crop == CropBox(x=20, y=0, width=120, height=120)
    assert (request.row, request.flip) == (3, False)


def test_features_are_those_of_transformers(manifest: Manifest, tmp_path: Path) -> None:
    """An export, loaded by transformers and given the same clips, has the same mean over its tokens."""
    network = our_model(SMALL, seed=0)
    export_hf(network, tmp_path / "hf")
    found = extract_features(network, manifest, DATA, SMALL, CPU, pipeline="pyav", batch_size=7)
    assert found.rows.tolist() == list(range(24))
    assert (found.vectors.shape, found.vectors.dtype) == ((24, SMALL.width), np.float32)
    requests = tuple(centre_clip(manifest[row], row, DATA, SMALL.num_frames) for row in range(24))
    clips = PyavPipeline(manifest, FixedClips(requests, 24), SMALL.image_size).next_batch()
    theirs = VideoMAEModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        expected = theirs(pixel_values(clips.frames, torch.float32)).last_hidden_state.mean(1).numpy()
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5 * np.abs(expected).max())

    loaded = load_network(str(tmp_path / "hf"), SMALL, CPU)
    pooled = pool_tokens(loaded, clips.frames)
    assert not pooled.requires_grad
    np.testing.assert_allclose(pooled, found.vectors, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_dali_gives_the_same_clips(manifest: Manifest) -> None:
    first, second = (
        extract_features(mean_frame, manifest, DATA, SMALL, CPU, pipeline=kind, batch_size=10).vectors
        for kind in ("pyav", "dali")
    )
    assert np.abs(first - second).mean() < 3  # levels of 255; between clips of other videos it is ten times that
    assert np.abs(first - np.roll(second, 1, axis=0)).mean() > 10


def mean_frame(frames: Tensor) -> Tensor:
    return frames.float().mean(1).flatten(1)


@pytest.fixture
def remove(shapes: Path, tmp_path: Path) -> Callable[[list[int]], Manifest]:
    """Copy the clips, delete some of them, and return the manifest, in which they still are."""

    def do(rows: list[int]) -> Manifest:
        shutil.copytree(shapes.parent, tmp_path / "shapes")
        manifest = read_manifest(tmp_path / "shapes" / "manifest.parquet")
        for row in rows:
            Path(manifest.file(row)).unlink()
        return manifest

    return do


def test_videos_that_cannot_be_read_are_left_out_and_named(
    manifest: Manifest, remove: Callable[[list[int]], Manifest]
) -> None:
    whole = extract_features(mean_frame, manifest, DATA, SMALL, CPU, pipeline="pyav", batch_size=10)
    damaged = remove([0, 9, 10, 23])
    found = extract_features(mean_frame, damaged, DATA, SMALL, CPU, pipeline="pyav", batch_size=10)
    kept = [row for row in range(24) if row not in (0, 9, 10, 23)]
    assert found.rows.tolist() == kept
    np.testing.assert_array_equal(found.vectors, whole.vectors[kept])
    assert [video.path for video in found.skipped] == [manifest[row].path for row in (0, 9, 10, 23)]
    assert whole.skipped == ()


def test_nothing_to_read_is_an_error(remove: Callable[[list[int]], Manifest]) -> None:
    with pytest.raises(ValueError, match=r"none of the videos of .* could be read"):
        extract_features(mean_frame, remove(list(range(24))), DATA, SMALL, CPU, pipeline="pyav")
