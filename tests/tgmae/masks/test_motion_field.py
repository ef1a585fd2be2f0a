"""Motion fields: composed over the stride, cropped, flipped and turned as the frames are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dali_pipelines.types import ClipBatch, ClipRequest, CropBox, Video
from dali_pipelines.video.geometry import turn_upright
from dali_pipelines.video.motion import BLOCK, UNIT
from tests.dali_pipelines.test_motion import CASES, FRAMES, HEIGHT, SIDE, WIDTH, corner, write_moving
from tests.support.videos import clip_batch, make_video
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.maps.store import digest_videos
from tgmae.masks.maps.writer import write_maps
from tgmae.masks.motion_field import (
    COMMAND,
    MOTION_KEY,
    CodecMotion,
    MotionField,
    compose,
    first_centre,
    frame_steps,
    leave_out_motionless,
    sample_cells,  # fmt: skip
)

CPU = torch.device("cpu")


def request(
    row: int, frames: Sequence[int], crop: CropBox, flip: bool = False, mask_seed: int = 0
) -> ClipRequest:  # fmt: skip
    return ClipRequest(
        row=row, epoch=0, position=0, frames=tuple(frames), crop=crop, flip=flip, caption=0, mask_seed=mask_seed
    )


def batch(manifest: Manifest | Sequence[Video], *requests: ClipRequest) -> ClipBatch:
    """Frames that nobody reads."""
    frames = torch.zeros(len(requests), len(requests[0].frames), 1, 1, 3, dtype=torch.uint8)
    return clip_batch(frames, requests, manifest)


def folder_of(tmp_path: Path, videos: Sequence[Video], motion: Sequence[NDArray[np.int8] | str]) -> Manifest:
    """A manifest of videos without files, and tmp_path/motion with their motion as given."""
    write_manifest(tmp_path / "manifest.parquet", videos, tmp_path)
    manifest = read_manifest(tmp_path / "manifest.parquet")

    def compute(rows: list[int]) -> Iterator[NDArray[np.int8] | str]:
        yield from (motion[row] for row in rows)

    write_maps(manifest, digest_videos(manifest), tmp_path / "motion", MOTION_KEY, COMMAND, compute)
    return manifest


def bilinear(field: NDArray[np.float64], x: float, y: float) -> NDArray[np.float64]:
    """One vector of a field [2, Y, X], the border going on: by the book, in float64."""
    y, x = (min(max(place, 0.0), size - 1.0) for place, size in zip((y, x), field.shape[1:], strict=True))
    top, left = int(y), int(x)
    below, right = min(top + 1, field.shape[1] - 1), min(left + 1, field.shape[2] - 1)
    upper = field[:, top, left] * (1 - x + left) + field[:, top, right] * (x - left)
    lower = field[:, below, left] * (1 - x + left) + field[:, below, right] * (x - left)
    value: NDArray[np.float64] = upper * (1 - y + top) + lower * (y - top)
    return value


def test_cells_are_sampled_bilinearly() -> None:
    generator = np.random.default_rng(0)
    cells = generator.normal(size=(3, 2, 5, 7))
    places = generator.uniform(-2, 9, (3, 40, 2))
    found = sample_cells(torch.from_numpy(cells), torch.from_numpy(places))
    expected = [[bilinear(field, *place) for place in row] for field, row in zip(cells, places, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (1, 5)])
def test_composing_follows_every_cell_back(shape: tuple[int, int]) -> None:
    """Against a plain loop in float64; frames have different numbers of steps."""
    generator = np.random.default_rng(1)
    motion = generator.normal(size=(2, 3, 4, 2, *shape))
    steps = np.array([[4, 1, 3], [2, 4, 4]])
    expected = np.zeros((2, 3, 2, *shape))
    for b, t, y, x in np.ndindex(2, 3, *shape):
        place = np.array([x, y], float)
        for step in range(steps[b, t]):
            place = place - bilinear(motion[b, t, step], *place)
        expected[b, t, :, y, x] = [x, y] - place
    found = compose(torch.from_numpy(motion), torch.from_numpy(steps))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_a_known_motion_adds_up_over_the_stride(case: str, tmp_path: Path) -> None:
    """(3, -2) pixels a frame are (12, -8) from clip frame to clip frame at stride 4, B frames or not."""
    encoder, _, options = CASES[case]
    write_moving(tmp_path / "a.mp4", encoder, options)
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    manifest = read_manifest(tmp_path / "manifest.parquet")
    assert build_motion(manifest, tmp_path / "motion", 0).num_videos == 1
    frames = range(20, FRAMES, 4)
    whole = CropBox(x=0, y=0, width=WIDTH, height=HEIGHT)
    field = CodecMotion(tmp_path / "motion", manifest, CPU)(batch(manifest, request(0, frames, whole)))
    assert field.steps.tolist() == [[4.0] * len(frames)]
    for number, frame in enumerate(frames):
        x, y = corner(frame)
        inside = torch.tensor([[[x + dx, y + dy] for dx in (24, 32, 40) for dy in (24, 32, 40)]], dtype=torch.float32)
        vectors = field.at(number, inside)[0, 0].numpy()
        np.testing.assert_allclose(np.median(vectors, axis=0), [12, -8], atol=1)
        assert np.abs(vectors - [12, -8]).max() < 6
    far = torch.tensor([[[WIDTH - 10.0, HEIGHT - 10.0]]])
    assert field.at(2, far).abs().max() < 1
    assert SIDE == 64


def ramp(rows: int, columns: int, frames: int = 40) -> NDArray[np.int8]:
    """Motion that grows by a unit a column to the right and two a row down: bilinear reading of it is exact."""
    y, x = np.mgrid[:rows, :columns]
    return np.broadcast_to(np.stack([x, 2 * y]).astype(np.int8), (frames, 2, rows, columns)).copy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_points_lie_where_the_crop_is(rotation: int, flip: bool, tmp_path: Path) -> None:
    """100×150 pixels make 7×10 cells; where the codec's padding comes to lie depends on the rotation."""
    width, height = 100, 150
    video = make_video(width=width, height=height, rotation=rotation)
    over_x, over_y = 12, 10
    left = over_x if rotation in (90, 180) else 0
    top = over_y if rotation in (180, 270) else 0
    assert first_centre(video) == (8 - left, 8 - top)
    manifest = folder_of(tmp_path, [video], [ramp(10, 7)])
    crop = CropBox(x=30, y=40, width=50, height=80)
    field = CodecMotion(tmp_path / "motion", manifest, CPU)(batch(manifest, request(0, range(4), crop, flip)))
    points = field.points(5)
    assert points.shape == (1, 25, 2)
    found = field.at(slice(None), points)
    assert found.shape == (1, 4, 25, 2)
    for place in range(25):
        x = 30 + 50 * ((4 - place % 5 if flip else place % 5) + 0.5) / 5
        y = 40 + 80 * (place // 5 + 0.5) / 5
        np.testing.assert_allclose(points[0, place], [x, y])
        cell_x, cell_y = (x + left - 8) / BLOCK, (y + top - 8) / BLOCK
        np.testing.assert_allclose(found[0, :, place], np.tile([cell_x * UNIT, 2 * cell_y * UNIT], (4, 1)), atol=1e-5)


def test_turned_grids_and_cells_agree() -> None:
    """The cell of a pixel in the coded picture is the cell of that pixel in the upright one."""
    coded_width, coded_height = 150, 100
    for rotation, mirrored in itertools.product((0, 90, 180, 270), (False, True)):
        upright = (coded_height, coded_width) if rotation % 180 else (coded_width, coded_height)
        video = make_video(width=upright[0], height=upright[1], rotation=rotation, mirrored=mirrored)
        pixels = np.arange(coded_width * coded_height).reshape(coded_height, coded_width)
        cells = np.arange(-(-coded_height // BLOCK) * -(-coded_width // BLOCK)).reshape(-(-coded_height // BLOCK), -1)
        turned_pixels, turned_cells = (turn_upright(x, video) for x in (pixels, cells))
        x0, y0 = first_centre(video)
        for y, x in ((0, 0), (37, 61), (upright[1] - 1, upright[0] - 1), (5, upright[0] - 3)):
            cell = turned_cells[round((y + 0.5 - y0) / BLOCK), round((x + 0.5 - x0) / BLOCK)]
            coded_y, coded_x = divmod(int(turned_pixels[y, x]), coded_width)
            assert cell == cells[coded_y // BLOCK, coded_x // BLOCK]


def test_steps_between_frames() -> None:
    crop = CropBox(x=0, y=0, width=1, height=1)
    assert frame_steps(request(0, (3, 7, 11, 15), crop)).tolist() == [4, 4, 4, 4]
    assert frame_steps(request(0, (0, 4, 8, 8, 8), crop)).tolist() == [4, 4, 4, 4, 4]  # a short video's last frame
    assert frame_steps(request(0, (0, 1, 40, 45), crop)).tolist() == [1, 1, 16, 5]  # no further than 16 back
    assert frame_steps(request(0, (5, 5), crop)).tolist() == [1, 1]
    assert frame_steps(request(0, (5,), crop)).tolist() == [1]


def test_frames_before_the_first_are_the_first(tmp_path: Path) -> None:
    motion = np.zeros((40, 2, 2, 2), np.int8)
    motion[:, 0] = np.arange(40)[:, None, None]
    manifest = folder_of(tmp_path, [make_video(width=32, height=32)], [motion])
    crop = CropBox(x=0, y=0, width=32, height=32)
    field = CodecMotion(tmp_path / "motion", manifest, CPU)(batch(manifest, request(0, (1, 5), crop)))
    # Back from frame 1: the motion of 1, 0, 0, 0; from 5: of 5, 4, 3, 2. Even over the picture, so plain sums.
    np.testing.assert_allclose(field.vectors[0, :, 0, 0, 0], [1 * UNIT, 14 * UNIT])


def test_a_batch_of_several_sizes_is_its_clips(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sizes = [(160, 120), (64, 200), (333, 90)]
    motion = [
        generator.integers(-40, 40, (40, 2, -(-height // BLOCK), -(-width // BLOCK))).astype(np.int8)
        for width, height in sizes
    ]
    videos = [make_video(path=f"{n}.mp4", width=w, height=h) for n, (w, h) in enumerate(sizes)]
    manifest = folder_of(tmp_path, videos, motion)
    source = CodecMotion(tmp_path / "motion", manifest, CPU)
    requests = [
        request(row, range(2, 30, 3 + row), CropBox(x=3, y=5, width=60, height=80), flip=row == 1)
        for row in range(3)
    ]  # fmt: skip
    requests = [request(r.row, r.frames[:6], r.crop, r.flip) for r in requests]
    together = source(batch(manifest, *requests))
    points = together.points(7)
    for number, one in enumerate(requests):
        alone = source(batch(manifest, one))
        np.testing.assert_allclose(alone.points(7)[0], points[number])
        found = (field.at(slice(None), field.points(7)) for field in (alone, together))
        first, second = found
        assert torch.equal(first[0], second[number])


@pytest.mark.parametrize("shape", [(39, 2, 8, 10), (41, 2, 8, 10), (40, 1, 8, 10), (40, 2, 10, 8), (40, 160)])
def test_motion_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    manifest = folder_of(tmp_path, [make_video()], [np.zeros(shape, np.int8)])
    with pytest.raises(ValueError, match=r"another shape .* such as walk/a\.mp4 \[.*\] \(not \[40, 2, 8, 10\]\)"):
        CodecMotion(tmp_path / "motion", manifest, CPU)


def test_videos_without_motion(tmp_path: Path) -> None:
    crop = CropBox(x=0, y=0, width=32, height=32)
    broken = [make_video(path="a.mp4"), make_video(path="b.mp4")]
    manifest = folder_of(tmp_path, broken, [ramp(8, 10), "truncated"])
    source = CodecMotion(tmp_path / "motion", manifest, CPU)
    assert source.note.startswith("1 video had no motion when")
    assert "b.mp4; their masks are random" in source.note
    assert not source(batch(manifest, request(1, range(4), crop))).vectors.any()

    (tmp_path / "vp9").mkdir()
    silent = [make_video(path="a.mp4"), make_video(path="b.webm", codec="vp9")]
    manifest = folder_of(tmp_path / "vp9", silent, [ramp(8, 10), "vp9 videos carry no motion vectors"])
    with pytest.raises(
        ValueError, match=r"1 of 2 videos has no .*b\.webm \(vp9\); leave them out with --mask\.no-motion exclude, or "
    ):
        CodecMotion(tmp_path / "vp9" / "motion", manifest, CPU)
    rest, note = leave_out_motionless(manifest)
    assert note == "1 video without motion vectors is left out"
    assert CodecMotion(tmp_path / "vp9" / "motion", rest, CPU).note == ""
    assert leave_out_motionless(rest)[1] == ""
    with pytest.raises(ValueError, match=r"none of 1 video has motion vectors \(h264 and mpeg4 do\)"):
        leave_out_motionless(Manifest.of(silent[1:], tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no maps in .*; make them with: tgmae-data motion MANIFEST"):
        CodecMotion(tmp_path / "nothing", manifest, CPU)
    others = [make_video(path="c.mp4")]
    write_manifest(tmp_path / "others.parquet", others, tmp_path)
    with pytest.raises(ValueError, match=r"for 1 of 1 videos, such as c\.mp4; add them with: tgmae-data motion"):
        CodecMotion(tmp_path / "motion", read_manifest(tmp_path / "others.parquet"), CPU)


def test_a_field_is_what_it_says() -> None:
    field = MotionField(
        vectors=torch.ones(1, 2, 2, 3, 3), steps=torch.ones(1, 2), moves=torch.ones(1, 2, dtype=torch.bool),
        grids=torch.tensor([[3.0, 3.0]]),
        origin=torch.tensor([[4.0, 4.0]]), cell=8,
        crops=torch.tensor([[0.0, 0.0, 24.0, 24.0]]), flips=torch.tensor([False]),
    )  # fmt: skip
    np.testing.assert_array_equal(field.points(3)[0, :4], [[4, 4], [12, 4], [20, 4], [4, 12]])
    assert field.at(1, field.points(3)).shape == (1, 1, 9, 2)
