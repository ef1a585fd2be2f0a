"""Windows that training would draw from the videos of a manifest, for measuring decoders."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from bench.workloads.window import Window
from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import ClipSampler

NUM_FRAMES, STRIDE = 16, 2


@dataclass(frozen=True)
class Variant:
    """Videos of one kind, and the windows that are decoded from them."""

    name: str
    windows: list[Window]
    codecs: frozenset[str]
    kib: float  # mean size of a video

    @property
    def frames_a_clip(self) -> float:
        """Mean number of frames that a decoder goes through for a window."""
        return statistics.mean(window.frames_passed for window in self.windows)


def make_variant(name: str, manifest: Manifest, num_windows: int) -> Variant:
    """Take the windows of the first clips that training would draw."""
    sampler = ClipSampler(
        manifest=manifest, data=DataConfig(stride=STRIDE), num_frames=NUM_FRAMES, batch_size=num_windows, seed=0
    )
    windows = [Window(manifest.file(r.row), manifest[r.row], r.frames) for r in sampler(0)]
    columns = {column: manifest.table.column(column).to_pylist() for column in ("codec", "num_bytes")}
    return Variant(name, windows, frozenset(columns["codec"]), statistics.mean(columns["num_bytes"]) / 1024)
