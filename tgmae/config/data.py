"""Which videos are trained on, and how clips are cut from them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dali_pipelines.config import DecodeConfig
from tgmae.config.paths import Paths, list_paths, simplify_paths

DEMO_MANIFEST = Path("data/shapes/manifest.parquet")  # made by the first `tgmae-train`


@dataclass(frozen=True, kw_only=True)
class DataConfig(DecodeConfig):
    """Which videos are trained on, how clips are cut from them, and how they are decoded."""

    manifest: Paths = DEMO_MANIFEST  # Parquet files made by `tgmae-data index`, one for each data set.
    weights: tuple[float, ...] | None = None  # Share of the clips from each data set; else that of its videos.
    root: Paths | None = None  # Folders of the videos, where they are not those that the manifests name.
    split: str = "train"  # Split of each manifest to use; "" uses every row.
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
    # Stop when more than this share of a data set is unreadable (one unreadable video is always tolerated).
    max_skipped: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("manifest", "root"):
            object.__setattr__(self, name, simplify_paths(getattr(self, name), f"--data.{name}"))
        self._check_data_sets()
        if self.stride < 1:
            raise ValueError(f"--data.stride must be at least 1, got {self.stride}")
        if not self.crop_scales or not all(0 < scale <= 1 for scale in self.crop_scales):
            raise ValueError(f"--data.crop-scales must lie in (0, 1], got {self.crop_scales}")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"--data.max-skipped must lie between 0 and 1, got {self.max_skipped}")

    @property
    def manifests(self) -> tuple[Path, ...]:
        """The manifest of each data set."""
        return list_paths(self.manifest)

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folder of each data set, where given; else empty."""
        return list_paths(self.root)

    def _check_data_sets(self) -> None:
        manifests, roots, weights = self.manifests, self.roots, self.weights
        [(path, times), *_] = Counter(map(Path.resolve, manifests)).most_common(1)
        if times > 1:
            raise ValueError(f"--data.manifest names {path} {times} times; a larger share of it: --data.weights")
        if roots and len(roots) != len(manifests):
            raise ValueError(
                f"--data.root must name one folder for each manifest, got {len(roots)} for {len(manifests)}"
            )
        if weights is None:
            return
        if len(manifests) == 1:
            raise ValueError("--data.weights needs several manifests, got one; leave it out or add --data.manifest")
        if len(weights) != len(manifests):
            raise ValueError(
                f"--data.weights must have one number for each manifest, got {len(weights)} for {len(manifests)}"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"--data.weights must be above 0, got {' '.join(f'{weight:g}' for weight in weights)}; leave out the "
                "manifest of a data set that is not wanted"
            )
