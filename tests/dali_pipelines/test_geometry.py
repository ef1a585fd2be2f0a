"""A crop moved to the coded picture, cut there, and turned back is the crop of the upright picture."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dali_pipelines.types import CropBox
from dali_pipelines.video.geometry import Orientation, coded_crop, orientation
from tests.support.videos import make_video

ROTATIONS = (0, 90, 180, 270)


def coded_picture(upright: NDArray[np.int64], rotation: int) -> NDArray[np.int64]:
    """The picture as stored: turned anticlockwise, so that `rotation` degrees clockwise turn it upright."""
    return np.rot90(upright, rotation // 90)


def turn(picture: NDArray[np.int64], how: Orientation) -> NDArray[np.int64]:
    picture = picture.T if how.transpose else picture
    picture = picture[::-1] if how.flip_vertical else picture
    return picture[:, ::-1] if how.flip_horizontal else picture


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_turned_crop_is_the_upright_crop(rotation: int, flip: bool) -> None:
    """For every crop of a small picture of odd and even sides, so that no off-by-one hides."""
    width, height = 7, 4
    video = make_video(width=width, height=height, rotation=rotation)
    upright = np.arange(width * height).reshape(height, width)
    coded = coded_picture(upright, rotation)
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


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("box", [(-1, 0, 3, 3), (0, -1, 3, 3), (5, 0, 3, 3), (0, 2, 3, 3), (0, 0, 0, 3), (0, 0, 3, 0)])
def test_crop_outside_the_picture(rotation: int, box: tuple[int, int, int, int]) -> None:
    x, y, width, height = box
    with pytest.raises(ValueError, match=r"does not lie within the 7×4 frames of walk/a\.mp4"):
        coded_crop(make_video(width=7, height=4, rotation=rotation), CropBox(x=x, y=y, width=width, height=height))
