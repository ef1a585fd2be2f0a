"""Map a crop of the upright frame to the coded frame, and turn the result upright again.

Cameras store frames sideways or mirrored and note beside them how to turn them. No decoder here turns them back. The
crop is therefore mapped to the coded frame, cut and resized there, and the small result is turned: at most one
transposition, then flips.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from dali_pipelines.types import CropBox, Video


@dataclass(frozen=True, slots=True)
class Orientation:
    """Transpose rows and columns first, then flip. This covers every rotation by 90 degrees, with or without a flip."""

    transpose: bool
    flip_vertical: bool
    flip_horizontal: bool


# Clockwise rotation → (transpose, flip top to bottom, flip left to right).
_ROTATIONS = {0: (False, False, False), 90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}


def read_rotation(frame: VideoFrame) -> tuple[int, bool]:
    """Return the clockwise degrees that turn a coded frame upright, and whether it must then be flipped left to right.

    They come from the display matrix, which maps a point (x, y) to (a·x + c·y, b·x + d·y), y pointing down (FFmpeg's
    libavutil/display.h). Its determinant is negative where it mirrors; PyAV's `frame.rotation` does not say so.
    """
    try:
        found: Any = frame.side_data.get("DISPLAYMATRIX")  # PyAV's stubs call it a string
    except ValueError:  # PyAV 18 knows not all kinds of data that a frame may carry, such as Exif
        return -frame.rotation % 360, False
    a, b, _, c, d = struct.unpack_from("=5i", found) if found is not None else (1, 0, 0, 0, 1)
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:  # frames would have no area
        return 0, False
    mirrored = a * d < b * c
    return round(math.degrees(math.atan2(b / down, (-a if mirrored else a) / across))) % 360, mirrored


def orientation(video: Video, flip: bool) -> Orientation:
    """Return how a coded clip is turned upright and, where the request says so, flipped left to right."""
    transpose, vertical, horizontal = _ROTATIONS[video.rotation]
    return Orientation(transpose, vertical, horizontal != (flip != video.mirrored))


def turn_upright(frame: NDArray[Any], video: Video) -> NDArray[Any]:
    """Turn a coded frame [H, W, …] upright; the result is a view."""
    upright = np.rot90(frame, -video.rotation // 90)
    return upright[:, ::-1] if video.mirrored else upright


def coded_crop(video: Video, crop: CropBox) -> CropBox:
    """Return the same rectangle in the coded frame. Raises ValueError where the crop leaves the frame."""
    x, y, width, height = crop.x, crop.y, crop.width, crop.height
    right, below = video.width - x - width, video.height - y - height
    if min(x, y, right, below) < 0 or min(width, height) < 1:
        raise ValueError(f"{crop} does not lie within the {video.width}×{video.height} frames of {video.path}")
    if video.mirrored:
        x, right = right, x
    match video.rotation:
        case 90:
            return CropBox(x=y, y=right, width=height, height=width)
        case 180:
            return CropBox(x=right, y=below, width=width, height=height)
        case 270:
            return CropBox(x=below, y=x, width=height, height=width)
        case _:
            return CropBox(x=x, y=y, width=width, height=height)
