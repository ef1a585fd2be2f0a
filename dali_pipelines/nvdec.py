"""Engines and limits of NVDEC, the video decoder of NVIDIA's GPUs, by codec, as the driver reports them.

Worker processes import this module, so it does without torch. Only the main process asks the driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvcuvid.so.1"  # comes with the driver
# The codecs that fn.decoders.video decodes on a GPU: FFmpeg's names, and their numbers in cudaVideoCodec (cuviddec.h).
# DALI 2.4 assumes that every frame NVDEC decodes is shown, and numbers frames by the packets' time stamps. That is
# wrong for AV1, whose packets hold frames that are not shown, and for MPEG-4 in AVI, which packs two frames into a
# packet and stores no time stamps. DALI refuses MJPEG.
CODECS = {"h264": 4, "hevc": 8, "vp8": 9, "vp9": 10}
_YUV420 = 1  # cudaVideoChromaFormat


class NoNvdec(Exception):
    """NVDEC cannot be used. The message says why and what to do about it."""


class DecodeCaps(ctypes.Structure):
    """CUVIDDECODECAPS of cuviddec.h. The first three fields are the question, the others the answer."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("is_supported", ctypes.c_ubyte),
        ("num_engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("has_histogram", ctypes.c_ubyte),
        ("counter_bit_depth", ctypes.c_ubyte),
        ("max_histogram_bins", ctypes.c_ushort),
        ("reserved3", ctypes.c_uint * 10),
    )


# cuvidGetDecoderCaps: fills in the structure, returns a CUresult.
GetCaps = Callable[[Any], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecLimits:
    """NVDEC's limits for one codec at 8 bits per sample, 4:2:0, in pixels of the coded frame."""

    engines: int
    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int  # of 16×16 pixels, per frame

    def fit(self, width: int, height: int) -> bool:
        """Return whether frames of this size can be decoded.

        Odd sizes cannot, although NVDEC would. DALI 2.4 allocates frames of the displayed size, but its colour kernel
        stores blocks of 2×2 pixels: an odd width would run into the next row, and an odd height past the frame.
        """
        macroblocks = -(-width // 16) * -(-height // 16)
        return (
            width % 2 == height % 2 == 0
            and self.min_width <= width <= self.max_width
            and self.min_height <= height <= self.max_height
            and macroblocks <= self.max_macroblocks
        )


def load_library() -> GetCaps:
    """Load cuvidGetDecoderCaps from the driver's library. Raises NoNvdec where there is none."""
    try:
        get_caps: GetCaps = ctypes.CDLL(LIBRARY).cuvidGetDecoderCaps
    except (OSError, AttributeError) as error:
        raise NoNvdec(
            f"the driver's video library is missing ({error}); a container needs the driver capability video "
            "(NVIDIA_DRIVER_CAPABILITIES=compute,utility,video)"
        ) from error
    return get_caps


def read_limits(get_caps: GetCaps) -> dict[str, CodecLimits]:
    """Ask what the device of the calling thread's current CUDA context decodes, by FFmpeg's codec name.

    Raises NoNvdec where it decodes nothing.
    """
    limits, errors = {}, set()
    for name, number in CODECS.items():
        caps = DecodeCaps(codec=number, chroma=_YUV420)
        if error := get_caps(ctypes.byref(caps)):
            errors.add(error)  # a driver may know fewer codecs than this table
        elif caps.is_supported:
            limits[name] = CodecLimits(
                engines=max(caps.num_engines, 1), min_width=caps.min_width, min_height=caps.min_height,
                max_width=caps.max_width, max_height=caps.max_height, max_macroblocks=caps.max_macroblocks,
            )  # fmt: skip
    if not limits:
        said = f"CUDA error {', '.join(map(str, sorted(errors)))}" if errors else "no codec is supported"
        raise NoNvdec(f"NVDEC decodes nothing on this device ({said})")
    return limits
