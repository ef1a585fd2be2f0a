"""Correct the colours of frames that DALI decoded. It takes all YUV for BT.601, whatever the video is tagged as."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BT601 = 0.299, 0.114
# Weights of red and blue in luma (ITU-T H.273, table 4), by FFmpeg's AVColorSpace: BT.709, SMPTE 240M and BT.2020.
# Without a tag FFmpeg assumes BT.601 too.
_WEIGHTS = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


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
