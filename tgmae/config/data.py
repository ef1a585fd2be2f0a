"""Which videos are trained on, and how clips are cut from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dali_pipelines.config import DecodeConfig

DEMO_MANIFEST = Path("data/shapes/manifest.parquet")  # made by the first `tgmae-train`


@dataclass(frozen=True, kw_only=True)
class DataConfig(DecodeConfig):
    """Which videos are trained on, how clips are cut from them, and how they are decoded."""

    manifest: Path = DEMO_MANIFEST  # Parquet file made by `tgmae-data index`.
    root: Path | None = None  # Folder of the videos, where it is not the one that the manifest names.
    split: str = "train"  # Split of the manifest to use; "" uses every row.
    # How the frames of a clip are chosen.
    #   dense    frames --data.stride apart, from a random start
    #   uniform  one random frame from each of equally long segments of the video (TSN)
    sampling: Literal["dense", "uniform"] = "dense"
    stride: int = 4  # Video frames from one clip frame to the next, for dense sampling.
    # Sides that the random crop may have, as shares of the video's short side. With 1.0 alone only its position is
    # random.
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: bool = False  # Flip half of the clips horizontally.
    captions: Literal["random", "first"] = "random"  # Caption of a clip: a random one of those kept, or the first.
    # Stop when more than this share of the videos is unreadable (one unreadable video is always tolerated).
    max_skipped: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"--data.stride must be at least 1, got {self.stride}")
        if not self.crop_scales or not all(0 < scale <= 1 for scale in self.crop_scales):
            raise ValueError(f"--data.crop-scales must lie in (0, 1], got {self.crop_scales}")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"--data.max-skipped must lie between 0 and 1, got {self.max_skipped}")
