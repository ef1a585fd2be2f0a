"""From a crop of the upright picture to the coded picture, and back to an upright, flipped clip.

Cameras store pictures turned and note the rotation beside them; no decoder here turns them back. So a crop is moved to
the coded picture, cut and resized there, and the small result is turned: one transposition at most, then flips.
"""

from __future__ import annotations

from dataclasses import dataclass

from dali_pipelines.types import CropBox, Video


@dataclass(frozen=True, slots=True)
class Orientation:
    """Transpose rows and columns first, then flip. Covers every rotation by 90 degrees combined with a flip."""

    transpose: bool
    flip_vertical: bool
    flip_horizontal: bool


# Clockwise rotation → (transpose, flip top to bottom, flip left to right).
_ROTATIONS = {0: (False, False, False), 90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}


def orientation(video: Video, flip: bool) -> Orientation:
    """How a coded clip is turned upright and, where the request says so, mirrored."""
    transpose, vertical, horizontal = _ROTATIONS[video.rotation]
    return Orientation(transpose, vertical, horizontal != flip)


def coded_crop(video: Video, crop: CropBox) -> CropBox:
    """The same rectangle in the coded picture. Raises ValueError where the crop leaves the picture."""
    x, y, width, height = crop.x, crop.y, crop.width, crop.height
    right, below = video.width - x - width, video.height - y - height
    if min(x, y, right, below) < 0 or min(width, height) < 1:
        raise ValueError(f"{crop} does not lie in the {video.width}×{video.height} picture of {video.path}")
    match video.rotation:
        case 90:
            return CropBox(x=y, y=right, width=height, height=width)
        case 180:
            return CropBox(x=right, y=below, width=width, height=height)
        case 270:
            return CropBox(x=below, y=x, width=height, height=width)
        case _:
            return crop
