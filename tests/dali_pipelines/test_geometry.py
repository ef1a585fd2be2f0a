"""A crop moved to the coded picture, cut there, and turned back is the crop of the upright picture."""

import shutil
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from dali_pipelines.types import CropBox
from dali_pipelines.video.geometry import Orientation, coded_crop, orientation, read_rotation, turn_upright
from tests.support.videos import make_video, write_numbered

ROTATIONS = (0, 90, 180, 270)


def coded_picture(upright: NDArray[np.int64], rotation: int, mirrored: bool) -> NDArray[np.int64]:
    """The picture as stored: mirrored, then turned anticlockwise, so that `rotation` degrees clockwise turn it back."""
    return np.rot90(upright[:, ::-1] if mirrored else upright, rotation // 90)


def turn(picture: NDArray[np.int64], how: Orientation) -> NDArray[np.int64]:
    picture = picture.T if how.transpose else picture
    picture = picture[::-1] if how.flip_vertical else picture
    return picture[:, ::-1] if how.flip_horizontal else picture


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_turned_crop_is_the_upright_crop(rotation: int, mirrored: bool, flip: bool) -> None:
    """For every crop of a small picture of odd and even sides, so that no off-by-one hides."""
    width, height = 7, 4
    video = make_video(width=width, height=height, rotation=rotation, mirrored=mirrored)
    upright = np.arange(width * height).reshape(height, width)
    coded = coded_picture(upright, rotation, mirrored)
    for w in range(1, width + 1):
        for h in range(1, height + 1):
            for x in range(width - w + 1):
                for y in range(height - h + 1):
                    box = coded_crop(video, CropBox(x=x, y=y, width=w, height=h))
                    cut = coded[box.y : box.y + box.height, box.x : box.x + box.width]
                    expected = upright[y : y + h, x : x + w]
                    np.testing.assert_array_equal(
                        turn(cut, orientation(video, flip)), np.fliplr(expected) if flip else expected
                    )


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_orientation_is_a_clockwise_turn(rotation: int) -> None:
    coded = np.arange(15).reshape(3, 5)
    video = make_video(rotation=rotation)
    np.testing.assert_array_equal(turn(coded, orientation(video, False)), np.rot90(coded, -rotation // 90))


def test_the_eight_orientations_differ() -> None:
    assert len({orientation(make_video(rotation=r), flip) for r in ROTATIONS for flip in (False, True)}) == 8
    videos = [make_video(rotation=r, mirrored=mirrored) for r in ROTATIONS for mirrored in (False, True)]
    assert len({orientation(video, False) for video in videos}) == 8


# a, b, c and d of the display matrix: all that keep pictures upright or on their sides, and some that also stretch
MATRICES = [(1, 0, 0, 1), (-1, 0, 0, -1), (0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0),
            (0, -1, -1, 0), (-2, 0, 0, 1), (0, 1, 3, 0)]  # fmt: skip


def write_matrix(file: Path, a: float, b: float, c: float, d: float) -> None:
    """Change the matrix in a movie's track header (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(file.read_bytes())
    place = content.find(b"tkhd") + 4 + 40
    fixed = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    content[place : place + 36] = struct.pack(">9i", *fixed, 1 << 30)
    file.write_bytes(content)


@pytest.mark.parametrize("matrix", MATRICES)
def test_frames_are_turned_as_ffmpeg_turns_them(tmp_path: Path, matrix: tuple[float, float, float, float]) -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg command")
    file = write_numbered(tmp_path / "a.mp4", num_frames=1, width=96, height=64)
    write_matrix(file, *matrix)
    with av.open(str(file)) as container:
        frame = next(container.decode(video=0))
    rotation, mirrored = read_rotation(frame)
    found = turn_upright(frame.to_ndarray(format="gray"), make_video(rotation=rotation, mirrored=mirrored))
    command = ["ffmpeg", "-v", "error", "-i", str(file), "-pix_fmt", "gray", "-f", "rawvideo", "-"]
    expected = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8)
    assert found.shape == ((96, 64) if matrix[0] == 0 else (64, 96))
    assert np.abs(found.astype(int) - expected.reshape(found.shape)).mean() < 1


@pytest.mark.parametrize(("matrix", "expected"), [((0.866, 0.5, -0.5, 0.866), (30, False)), ((0, 0, 0, 0), (0, False))])
def test_other_matrices(tmp_path: Path, matrix: tuple[float, float, float, float], expected: tuple[int, bool]) -> None:
    """Angles are told, so that indexing can leave such videos out. A matrix without an area says nothing."""
    file = write_numbered(tmp_path / "a.mp4", num_frames=1)
    write_matrix(file, *matrix)
    with av.open(str(file)) as container:
        assert read_rotation(next(container.decode(video=0))) == expected


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("box", [(-1, 0, 3, 3), (0, -1, 3, 3), (5, 0, 3, 3), (0, 2, 3, 3), (0, 0, 0, 3), (0, 0, 3, 0)])
def test_crop_outside_the_picture(rotation: int, box: tuple[int, int, int, int]) -> None:
    x, y, width, height = box
    with pytest.raises(ValueError, match=r"does not lie within the 7×4 frames of walk/a\.mp4"):
        coded_crop(make_video(width=7, height=4, rotation=rotation), CropBox(x=x, y=y, width=width, height=height))
