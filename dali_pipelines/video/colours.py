"""Colours as the tags of a video say, from DALI and from FFmpeg.

DALI takes all YUV for BT.601, so that its colours are corrected. FFmpeg's converter refuses tags that it has no formula
for; frames then count as untagged, as they did in FFmpeg before 7.1 and do in most players.
"""

from __future__ import annotations

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

_BT601 = 0.299, 0.114
# Weights of red and blue in luma (ITU-T H.273, table 4), by FFmpeg's AVColorSpace: BT.709, SMPTE 240M, and BT.2020 with
# non-constant and with constant luminance. Without a tag FFmpeg assumes BT.601 too.
_WEIGHTS = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
# What swscale 9 converts, by FFmpeg's AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic; 2 is untagged.
_SPACES = {0, 1, 2, 4, 5, 6, 7, 9}
_PRIMARIES = {1, 2, *range(4, 13), 22}
_TRANSFERS = {1, 2, *range(4, 9), *range(11, 19)}
_UNTAGGED, _BT2020, _BT2020_CONSTANT = 2, 9, 10
# swscale's names of the matrices other than BT.601, by AVColorSpace.
SWSCALE_MATRICES = {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020"}


def use_known_tags(frame: VideoFrame) -> None:
    """Replace the tags that FFmpeg refuses: BT.2020 with constant luminance by the non-constant one, others by none."""
    if frame.colorspace not in _SPACES:
        frame.colorspace = _BT2020 if frame.colorspace == _BT2020_CONSTANT else _UNTAGGED
    if frame.color_primaries not in _PRIMARIES:
        frame.color_primaries = _UNTAGGED
    if frame.color_trc not in _TRANSFERS:
        frame.color_trc = _UNTAGGED


def colour_matrix(space: int) -> NDArray[np.float32] | None:
    """Return the matrix that turns DALI's RGB into the RGB that the tag means, or None where DALI is right.

    space   FFmpeg's AVColorSpace

    The matrix is float32 [3, 3], for columns of red, green and blue.
    """
    if space not in _WEIGHTS:
        return None
    matrix = _to_rgb(*_WEIGHTS[space]) @ np.linalg.inv(_to_rgb(*_BT601))
    return matrix.astype(np.float32)


def _to_rgb(red: float, blue: float) -> NDArray[np.float64]:
    """Return the matrix from luma and the differences of blue and red to RGB (H.273, equations 38 to 40)."""
    green = 1 - red - blue
    from_blue, from_red = 2 * (1 - blue), 2 * (1 - red)
    return np.array([[1, 0, from_red], [1, -from_blue * blue / green, -from_red * red / green], [1, from_blue, 0]])
