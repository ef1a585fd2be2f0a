"""How videos are re-encoded for training: the encoders with their options, and the settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Coder:
    """One encoder of FFmpeg's, and how it is asked for frequent keyframes and no B frames.

    quality  default constant rate factor; worst is the largest that the encoder accepts
    options  FFmpeg options, in which {gop} and {quality} stand for the numbers
    """

    encoder: str
    suffix: str
    container: str
    quality: int
    worst: int
    options: dict[str, str]


# Presets: the fastest beyond which smaller files cost more than they save (docs/log.md).
CODERS = {
    "h264": Coder(
        encoder="libx264", suffix=".mp4", container="mp4", quality=23, worst=51,
        # fastdecode (no CABAC, no deblocking) halves the time to decode. The macroblock tree gives other bits from run
        # to run, and weighted prediction may list the frame before twice.
        options={
            "preset": "veryfast", "tune": "fastdecode", "crf": "{quality}", "g": "{gop}", "keyint_min": "{gop}",
            "sc_threshold": "0", "bf": "0", "refs": "1", "weightp": "0", "mbtree": "0", "flags": "+cgop",
        },
    ),
    "hevc": Coder(
        encoder="libx265", suffix=".mp4", container="mp4", quality=25, worst=51,
        options={
            "preset": "superfast", "crf": "{quality}",
            "x265-params": "log-level=none:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=0:b-adapt=0:"
            "ref=1:weightp=0:cutree=0:info=0:pools=none:frame-threads=1:wpp=0",
        },
    ),
    "vp9": Coder(
        encoder="libvpx-vp9", suffix=".webm", container="webm", quality=33, worst=63,
        # Without look-ahead and alternate references no frame is coded that is not shown. FFmpeg has no option against
        # the golden frame: blocks may still be predicted from it.
        options={
            "deadline": "realtime", "cpu-used": "8", "crf": "{quality}", "b": "0", "g": "{gop}", "keyint_min": "{gop}",
            "auto-alt-ref": "0", "lag-in-frames": "0",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """How videos are re-encoded. Raises ValueError for values that are impossible."""

    # Height or width in pixels, whichever is less; even. Larger videos shrink to it, smaller ones keep their size (but
    # see --align); None keeps every size.
    short_side: int | None = 256
    grow: bool = False  # Enlarge smaller videos to --short-side as well, so that all have the same.
    # Round height and width to a multiple of this many pixels; even. H.264 codes blocks of 16, and DALI may find its
    # NVDEC sessions again only where size and coded size are the same. A side changes by at most 8 pixels, 3 % of 256.
    # 2 leaves sizes as they are.
    align: int = 16
    codec: Literal["h264", "hevc", "vp9"] = "h264"  # h264 and hevc go into .mp4 files, vp9 into .webm.
    # Frames per second to keep, evenly spaced: the nearest frames, none twice. Default: keep all frames.
    fps: float | None = None
    stride: int = 1  # Keep every stride-th frame; not together with --fps.
    gop: int = 12  # Frames from one keyframe to the next.
    # Constant rate factor: a lower one means better quality and larger files. Default: 23 for h264, 25 for hevc and 33
    # for vp9.
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.codec not in CODERS:
            raise ValueError(f"--codec must be one of {', '.join(CODERS)}, got {self.codec}")
        if self.short_side is not None and (self.short_side < 16 or self.short_side % 2):
            raise ValueError(f"--short-side must be even and at least 16 pixels, got {self.short_side}")
        if self.align < 2 or self.align % 2:
            raise ValueError(f"--align must be even and at least 2 pixels, got {self.align}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"--fps must be above 0, got {self.fps}")
        if self.stride < 1 or self.gop < 1:
            raise ValueError(f"--stride and --gop must be at least 1, got {self.stride} and {self.gop}")
        if self.fps is not None and self.stride != 1:
            raise ValueError(f"--fps and --stride exclude each other, got {self.fps} and {self.stride}")
        worst = CODERS[self.codec].worst
        if self.quality is not None and not 0 <= self.quality <= worst:
            raise ValueError(f"--quality must lie between 0 and {worst} for --codec {self.codec}, got {self.quality}")
