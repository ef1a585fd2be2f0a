"""Coverage of patches by objects, against drawn pixels and decoded clips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from dali_pipelines.pyav_pipeline import read_clip
from dali_pipelines.types import ClipRequest, CropBox
from tgmae.data.manifest import read_manifest
from tgmae.shapes.scenes import (
    COLORS,
    HEIGHT,
    NUM_FRAMES,
    WIDTH,
    MovingShape,
    make_shapes,
    regenerate_objects,
    render_clip,
)
from tgmae.shapes.truth import object_coverage, read_objects

SIZE, PATCH, TUBELET = 96, 16, 2
GRID = SIZE // PATCH


def make_request(
    crop: CropBox | None = None, flip: bool = False, frames: tuple[int, ...] = (3, 7, 11, 15)
) -> ClipRequest:
    whole = CropBox(x=20, y=0, width=HEIGHT, height=HEIGHT)
    return ClipRequest(row=0, epoch=0, position=0, frames=frames, crop=crop or whole, flip=flip, caption=0, mask_seed=0)


def count_coloured(clip: NDArray[np.uint8], color: str) -> NDArray[np.float64]:
    """Return the share of each patch of a clip [T, H, W, 3] that has an object's hue, [S, N]."""
    pixels, wanted = clip.astype(np.float64), np.array(COLORS[color], np.float64)
    cosine = pixels @ wanted / (np.linalg.norm(pixels, axis=-1) * np.linalg.norm(wanted) + 1e-9)
    patches = (cosine > 0.985).reshape(-1, GRID, PATCH, GRID, PATCH).mean(axis=(2, 4)).reshape(-1, GRID**2)
    slots: NDArray[np.float64] = patches.reshape(-1, TUBELET, GRID**2).mean(axis=1)
    return slots


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make eight clips of two objects."""
    folder = tmp_path_factory.mktemp("truth")
    make_shapes(folder, count=8, seed=5, codec="h264", num_objects=2, num_workers=2)
    return folder


# Objects


@pytest.mark.slow
def test_objects_are_those_of_the_clips(made: Path) -> None:
    objects = read_objects(made)
    manifest = read_manifest(made / "manifest.parquet")
    boxes = {(row["path"], row["caption"]): row["boxes"] for row in pq.read_table(made / "boxes.parquet").to_pylist()}
    assert sorted(objects) == sorted(manifest[row].path for row in range(len(manifest)))
    for row in range(len(manifest)):
        path = manifest[row].path
        assert manifest[row].texts == tuple(obj.caption for obj in objects[path])
        for number, obj in enumerate(objects[path]):
            assert boxes[path, number] == [list(obj.box(frame)) for frame in range(NUM_FRAMES)]


@pytest.mark.slow
def test_objects_are_the_same_with_and_without_frames(made: Path) -> None:
    for index in (0, 9):
        _, drawn = render_clip(np.random.default_rng((5, index)), 2)
        for obj, again in zip(drawn, regenerate_objects(5, index, 2), strict=True):
            assert obj.caption == again.caption
            assert obj.texture == again.texture
            np.testing.assert_array_equal(obj.corners(17), again.corners(17))


def test_a_folder_that_names_no_seed(made: Path, tmp_path: Path) -> None:
    table = pq.read_table(made / "boxes.parquet")
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "boxes.parquet")
    with pytest.raises(ValueError, match="does not say which seed its clips were drawn from"):
        read_objects(tmp_path)


# Coverage


def test_coverage_is_the_area_of_the_outline() -> None:
    [obj] = regenerate_objects(0, 1, 1)
    whole = make_request(CropBox(x=0, y=0, width=WIDTH, height=HEIGHT))
    coverage = object_coverage(obj, whole, SIZE, PATCH, TUBELET, 1)
    for slot, frame in enumerate((3, 11)):
        x, y = obj.corners(frame).T
        area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 / (WIDTH * HEIGHT)
        assert coverage[slot].mean() == pytest.approx(area, rel=0.06)  # the drawn polygon includes its outline


def test_every_patch_agrees_with_the_decoded_pixels(made: Path) -> None:
    """Check crops of all places and shapes, flipped or not, on files that went through the encoder."""
    manifest, objects_of = read_manifest(made / "manifest.parquet"), read_objects(made)
    crops = [CropBox(x=0, y=0, width=105, height=120), CropBox(x=70, y=41, width=90, height=79), None]
    compared = 0
    for row in range(len(manifest)):
        video = manifest[row]
        for flip in (False, True):
            request = make_request(crops[row % 3], flip)
            clip = read_clip(manifest.file(row), video, request, SIZE).numpy()
            objects = objects_of[video.path]
            for number, obj in enumerate(objects):
                if obj.color in ("white", "pink"):  # near the hue of some backgrounds
                    continue
                coverage = object_coverage(obj, request, SIZE, PATCH, TUBELET, on_top=objects[number + 1 :])
                assert coverage.dtype == np.float32
                assert coverage.shape == (2, GRID**2)
                found = count_coloured(clip, obj.color)
                assert np.abs(found - coverage).mean() < 0.03, (video.path, obj.caption)
                assert np.abs(found - coverage).max() < 0.35, (video.path, obj.caption)
                compared += int((coverage > 0.5).sum())
    assert compared > 50


def test_flip_mirrors_the_columns() -> None:
    [obj] = regenerate_objects(0, 1, 1)
    plain = object_coverage(obj, make_request(), SIZE, PATCH, TUBELET).reshape(-1, GRID, GRID)
    flipped = object_coverage(obj, make_request(flip=True), SIZE, PATCH, TUBELET).reshape(-1, GRID, GRID)
    np.testing.assert_allclose(flipped, plain[:, :, ::-1], atol=1e-6)
    assert np.abs(flipped - plain).max() > 0.5


def test_the_mean_is_over_the_requested_frames() -> None:
    [obj] = regenerate_objects(0, 3, 1)
    request = make_request(frames=(0, 20, 30, 39))
    halves = [object_coverage(obj, replace(request, frames=frames), SIZE, PATCH, 1) for frames in ((0, 30), (20, 39))]
    np.testing.assert_array_equal(object_coverage(obj, request, SIZE, PATCH, TUBELET, 1), halves[0])
    both = object_coverage(obj, request, SIZE, PATCH, TUBELET)
    np.testing.assert_allclose(both, (halves[0] + halves[1]) / 2, atol=1e-6)
    np.testing.assert_array_equal(both, object_coverage(obj, request, SIZE, PATCH, TUBELET, 2))
    assert np.abs(halves[0] - halves[1]).max() > 0.2


def test_the_part_behind_another_object_does_not_count() -> None:
    below, above = find_overlap()
    request = make_request(frames=(20,))
    crop = replace(request, crop=CropBox(x=0, y=0, width=WIDTH, height=HEIGHT))
    whole = object_coverage(below, crop, SIZE, PATCH, 1)
    seen = object_coverage(below, crop, SIZE, PATCH, 1, on_top=[above])
    hiding = object_coverage(above, crop, SIZE, PATCH, 1)
    assert (seen <= whole + 1e-6).all()
    assert (seen + hiding < 1.001).all()
    assert seen.sum() < 0.9 * whole.sum()
    np.testing.assert_array_equal(seen[hiding == 0], whole[hiding == 0])


def find_overlap() -> tuple[MovingShape, MovingShape]:
    for index in range(100):
        below, above = regenerate_objects(3, index, 2)
        if np.hypot(below.x[20] - above.x[20], below.y[20] - above.y[20]) < 15:
            return below, above
    raise AssertionError


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((SIZE, PATCH, 3), "got 4 frames in tubelets of 3 and 96 pixels in patches of 16"),
        ((90, PATCH, 2), "got 4 frames in tubelets of 2 and 90 pixels in patches of 16"),
        ((SIZE, PATCH, 2, 3), "expected 1 to 2 frames of each tubelet, got 3"),
        ((SIZE, PATCH, 2, 0), "expected 1 to 2 frames of each tubelet, got 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, ...], message: str) -> None:
    [obj] = regenerate_objects(0, 0, 1)
    with pytest.raises(ValueError, match=message):
        object_coverage(obj, make_request(), *sizes)  # type: ignore[misc]


def test_results_are_plain_memory() -> None:
    """The array outlives the tensors it was computed with."""
    [obj] = regenerate_objects(0, 0, 1)
    coverage = object_coverage(obj, make_request(), SIZE, PATCH, TUBELET)
    assert torch.from_numpy(coverage).is_contiguous()
    assert 0 <= coverage.min() <= coverage.max() <= 1.0001
