"""Maps of segments: they begin at the segment's first frame, and are otherwise those of the whole file.

Dimensions: F scored frames, C captions, Y X cells, S slots, N patches per slot.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tgmae.masks.maps.build_motion as motion_module
from dali_pipelines.types import Caption, ClipRequest, CropBox, Video
from engines.config import CLIPConfig, TowerSpec
from tests.support.segments import cut_segments
from tests.support.videos import clip_batch
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.cached_scorer import COMMAND, CachedScorer, crop_weights
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.maps.build_scores import build_scores
from tgmae.masks.maps.store import MapFolder
from tgmae.masks.motion_field import COMMAND as MOTION_COMMAND
from tgmae.masks.motion_field import CodecMotion, MotionField
from tgmae.masks.motion_scorer import MotionScorer

CPU = torch.device("cpu")
CELLS, PATCH, EVERY = 6, 16, 2
MODEL = ModelConfig(image_size=CELLS * PATCH, num_frames=8)
# By row of the manifest below: file, and segment. `EVERY` divides the starts 8, 10 and 36, not 11.
ROWS = [(0, None), (0, (8, 30)), (0, (10, 31)), (0, (11, 31)), (1, None), (1, (36, 40)), (1, (0, 1))]
WHOLE, FROM_8, FROM_10, FROM_11 = range(4)


@pytest.fixture(scope="module")
def manifest(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Every row has two captions, so that a wrong number of a caption shows."""
    files = read_manifest(shapes)
    files = files.with_captions([[*row, Caption("a blue star spinning", "test")] for row in files.captions()])
    assert {files[row].num_frames for row in range(2)} == {40}
    return cut_segments(files, tmp_path_factory.mktemp("segments") / "manifest.parquet", ROWS)


def build(manifest: Manifest, folder: Path, cache_dir: Path, every: int = EVERY, num_workers: int = 0) -> Path:
    result = build_scores(
        manifest, folder, CLIPConfig(model="shapes", cache_dir=cache_dir), TowerSpec(kind="patch"), cells=CELLS,
        patch_size=PATCH, every=every, device=CPU, num_workers=num_workers,
    )  # fmt: skip
    assert (result.num_videos, result.skipped) == (len(manifest), [])
    return folder


@pytest.fixture(scope="module")
def scores(manifest: Manifest, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(manifest, tmp_path_factory.mktemp("scores") / "scores", cache_dir)


def config(maps: Path, cache_dir: Path, model: str = "shapes", frames_per_tubelet: int = 2) -> InputConfig:
    mask = MaskConfig(scorer="cached", scores=maps, frames_per_tubelet=frames_per_tubelet)  # type: ignore[arg-type]
    return InputConfig(model=MODEL, mask=mask, clip=CLIPConfig(model=model, cache_dir=cache_dir))


def request(row: int, frames: tuple[int, ...], caption: int = 0) -> ClipRequest:
    crop = CropBox(x=20, y=8, width=112, height=96)
    return ClipRequest(
        row=row, epoch=0, position=row, frames=frames, crop=crop, flip=True, caption=caption, mask_seed=7
    )  # fmt: skip


# Score maps


def test_score_maps_of_a_segment_begin_at_its_start(
    manifest: Manifest, scores: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Against maps of every frame of the whole files; float16 keeps 11 bits."""
    whole = manifest.table.take([0, 4])
    each = MapFolder(build(Manifest(whole, manifest.root), tmp_path / "each", cache_dir, every=1), COMMAND)
    stored = MapFolder(scores, COMMAND)
    for row in range(len(manifest)):
        video = manifest[row]
        expected = each.read(video.path)[video.start : video.end : EVERY]
        found = stored.read(video.name)
        assert found.shape == expected.shape == (len(range(video.start, video.end, EVERY)), 2, 6, 8)
        np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-4)
    shifted = each.read(manifest[FROM_11].path)[10:30:EVERY]
    assert np.abs(stored.read(manifest[FROM_11].name) - shifted).max() > 1e-2  # a shift by a frame shows


@pytest.mark.parametrize("row", [FROM_8, FROM_10])
@pytest.mark.parametrize("frames_per_tubelet", [1, 2])
def test_a_clip_scores_the_same_as_in_the_whole_file(
    manifest: Manifest, scores: Path, cache_dir: Path, row: int, frames_per_tubelet: int
) -> None:
    """Also for odd frames, which lie between two maps: those of both rows decide alike."""
    scorer = CachedScorer(config(scores, cache_dir, frames_per_tubelet=frames_per_tubelet), manifest, CPU)
    for frames in (
        (10, 12, 14, 16, 18, 20, 22, 24),
        (10, 11, 13, 15, 18, 21, 25, 28),
        (11, 13, 15, 17, 19, 21, 23, 25),
    ):
        for caption in (0, 1):
            requests = [request(place, frames, caption) for place in (row, WHOLE)]
            clips = clip_batch(torch.zeros(2, 8, 1, 1, 3, dtype=torch.uint8), requests, manifest)
            segment, whole = scorer(clips)
            torch.testing.assert_close(segment, whole, rtol=2**-10, atol=1e-4)
    other = request(row, (8, 8, 8, 8, 8, 8, 8, 8) if row == FROM_8 else (28,) * 8)
    assert np.abs(scorer.score(manifest[row], other) - segment.numpy()).max() > 1e-2


def test_odd_starts_take_the_nearest_of_their_own_maps(manifest: Manifest, scores: Path, cache_dir: Path) -> None:
    scorer = CachedScorer(config(scores, cache_dir), manifest, CPU)
    video = manifest[FROM_11]
    stored = MapFolder(scores, COMMAND).read(video.name).astype(np.float32)  # of frames 11, 13, …, 29
    frames = (11, 11, 13, 15, 21, 23, 29, 30)  # the last frame has no map of its own
    wanted = request(FROM_11, frames)
    places = np.array([[0, 0], [1, 2], [5, 6], [9, 9]])
    means = stored[places, 0].mean(1)
    down, across = crop_weights(video, wanted.crop, wanted.flip, means.shape[1:], CELLS)
    np.testing.assert_allclose(
        scorer.score(video, wanted), (down @ means @ across.T).reshape(4, -1), rtol=1e-5, atol=1e-6
    )


def test_short_segments_are_scored(manifest: Manifest, scores: Path, cache_dir: Path) -> None:
    """One frame, or the last four, repeated: no place lies outside the maps."""
    scorer = CachedScorer(config(scores, cache_dir), manifest, CPU)
    for row, frames in ((5, (36, 37, 38, 39, 39, 39, 39, 39)), (6, (0,) * 8)):
        found = scorer.score(manifest[row], request(row, frames))
        assert found.shape == (4, 36)
        assert np.isfinite(found).all()
        expected = scorer.score(manifest[4], request(4, tuple(min(frame, 38) for frame in frames)))
        np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-4)


def test_maps_of_other_segments_are_refused(
    manifest: Manifest, scores: Path, shapes: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """A segment that was moved by a frame has another name, and no maps; adding it keeps the others'."""
    copied = Path(shutil.copytree(scores, tmp_path / "scores"))
    files = Manifest(manifest.table.take([0]), manifest.root)
    moved = cut_segments(files, tmp_path / "moved.parquet", [(0, (9, 30)), (0, (8, 30))])
    with pytest.raises(ValueError, match=rf"1 of 2 videos, such as {moved[0].path}#9-30; add them with: tgmae-data"):
        CachedScorer(config(copied, cache_dir), moved, CPU)
    clip = CLIPConfig(model="shapes", cache_dir=cache_dir)
    result = build_scores(
        moved, copied, clip, TowerSpec(kind="patch"), cells=CELLS, patch_size=PATCH, every=EVERY, device=CPU,
        num_workers=0,
    )  # fmt: skip
    assert (result.num_videos, result.num_reused) == (1, 1)
    for wanted in (moved, manifest):
        assert CachedScorer(config(copied, cache_dir), wanted, CPU).note == ""


# Motion


@pytest.fixture(scope="module")
def motion(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion") / "motion"
    result = build_motion(manifest, folder, num_workers=0)
    assert (result.num_videos, result.skipped) == (len(manifest), [])
    return folder


def test_motion_maps_are_parts_of_the_files(manifest: Manifest, motion: Path) -> None:
    stored = MapFolder(motion, MOTION_COMMAND)
    for row in range(len(manifest)):
        video = manifest[row]
        np.testing.assert_array_equal(stored.read(video.name), stored.read(video.path)[video.start : video.end])
    assert not np.array_equal(stored.read(manifest[FROM_11].name), stored.read(manifest[WHOLE].path)[10:30])


def test_a_file_is_read_once_for_its_segments(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def read_motion(file: str, video: Video) -> NDArray[np.int8]:
        read.append(file)
        return real(file, video)

    real = motion_module.read_motion
    monkeypatch.setattr(motion_module, "read_motion", read_motion)
    motion_module._read_whole.cache_clear()
    build_motion(manifest, tmp_path / "motion", num_workers=0)
    first, second = manifest.file(0), manifest.file(4)
    assert read == [first, first, second, second]  # the whole file, then its segments


def fields(motion: Path, manifest: Manifest, *requests: ClipRequest) -> MotionField:
    frames = torch.zeros(len(requests), len(requests[0].frames), 1, 1, 3, dtype=torch.uint8)
    clips = clip_batch(frames, requests, manifest)
    return CodecMotion(motion, manifest, CPU)(clips)


def test_a_clip_moves_as_in_the_whole_file(manifest: Manifest, motion: Path) -> None:
    """Where all that it looks back on lies in the segment."""
    frames = (15, 17, 19, 22, 24, 26, 27, 29)
    field = fields(motion, manifest, *(request(row, frames) for row in (WHOLE, FROM_8, FROM_10, FROM_11)))
    for row in (1, 2, 3):
        torch.testing.assert_close(field.vectors[row], field.vectors[0], rtol=0, atol=0)
    assert field.vectors.abs().max() > 1
    other = fields(motion, manifest, request(FROM_11, tuple(frame - 1 for frame in frames)))
    assert (other.vectors[0] - field.vectors[0]).abs().max() > 0.5


def test_the_first_frame_looks_back_to_the_segments_start_at_most(manifest: Manifest, motion: Path) -> None:
    """Motion before the segment is taken to be that of its first frame, not of its last ones or of another's."""
    stored = MapFolder(motion, MOTION_COMMAND)
    source = CodecMotion(motion, manifest, CPU)
    video = manifest[FROM_11]
    window = source._window(video, request(FROM_11, (11, 14, 17, 20)), 4)
    maps = stored.read(video.path)
    np.testing.assert_array_equal(window[0], maps[[11, 11, 11, 11]])
    np.testing.assert_array_equal(window[1], maps[[14, 13, 12, 11]])
    np.testing.assert_array_equal(window[3], maps[[20, 19, 18, 17]])


@pytest.mark.parametrize("kind", ["mgm", "mgm_box", "mgmae"])
def test_motion_scores_of_segments(manifest: Manifest, motion: Path, kind: str) -> None:
    mask = MaskConfig(kind=kind, motion=motion)  # type: ignore[arg-type]
    scorer = MotionScorer(InputConfig(model=MODEL, mask=mask), manifest, CPU)
    frames = (15, 17, 19, 21, 23, 25, 27, 29)
    requests = [*(request(row, frames) for row in (WHOLE, FROM_8, FROM_11)), request(6, (0,) * 8)]
    found = scorer(clip_batch(torch.zeros(4, 8, 1, 1, 3, dtype=torch.uint8), requests, manifest))
    assert (found.shape, found.dtype) == ((4, 4, 36), torch.float32)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


def test_unreadable_segments_are_named(manifest: Manifest, tmp_path: Path) -> None:
    """Their file is gone: the other file's segments have motion, and theirs are random."""
    files = tmp_path / "files"
    for row in (0, 4):
        target = files / manifest[row].path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(manifest.file(row), target)
    copied = Manifest(manifest.table, files)
    (files / manifest[4].path).unlink()
    result = build_motion(copied, tmp_path / "motion", num_workers=0)
    lost = [manifest[row].name for row in (4, 5, 6)]
    assert [video.path for video in result.skipped] == lost
    source = CodecMotion(tmp_path / "motion", copied, CPU)
    assert source.note.startswith("3 videos had no motion when ")
    assert all(name in source.note for name in lost)
    found = fields(tmp_path / "motion", copied, request(5, (36, 37, 38, 39)), request(1, (8, 10, 12, 14)))
    assert (found.vectors[0] == 0).all()
    assert found.vectors[1].abs().max() > 1
