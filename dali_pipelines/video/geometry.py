"""Map a crop of the upright frame to the coded frame, and turn the result upright again.

Cameras store frames sideways and note the rotation beside them. No decoder here turns them back. The crop is therefore
mapped to the coded frame, cut and resized there, and the small result is turned: at most one transposition, then flips.
"""

from __future__ import annotations

from dataclasses import dataclass

from dali_pipelines.types import CropBox, Video


@dataclass(frozen=True, slots=True)
class Orientation:
    """Transpose rows and columns first, then flip. This covers every rotation by 90 degrees, with or without a flip."""

    transpose: bool
    flip_vertical: bool
    flip_horizontal: bool


# Clockwise rotation → (transpose, flip top to bottom, flip left to right).
_ROTATIONS = {0: (False, False, False), 90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}


def orientation(video: Video, flip: bool) -> Orientation:
    """Return how a coded clip is turned upright and, where the request says so, mirrored."""
    transpose, vertical, horizontal = _ROTATIONS[video.rotation]
    return Orientation(transpose, vertical, horizontal != flip)


def coded_crop(video: Video, crop: CropBox) -> CropBox:
    """Return the same rectangle in the coded frame. Raises ValueError where the crop leaves the frame."""
    x, y, width, height = crop.x, crop.y, crop.width, crop.height
    right, below = video.width - x - width, video.height - y - height
    if min(x, y, right, below) < 0 or min(width, height) < 1:
        raise ValueError(f"{crop} does not lie within the {video.width}×{video.height} frames of {video.path}")
    match video.rotation:
        case 90:
            return CropBox(x=y, y=right, width=height, height=width)
        case 180:
            return CropBox(x=right, y=below, width=width, height=height)
        case 270:
            return CropBox(x=below, y=x, width=height, height=width)
        case _:
            return crop
