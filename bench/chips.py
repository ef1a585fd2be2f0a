"""What GPUs can do at most, from data sheets, and what NVDEC does.

Tensor cores: dense bfloat16, from `bench.step.PEAKS`. From NVIDIA's data sheets of H200, H100, A100 and L40S: memory
bandwidth, float32 without tensor cores, number of NVDEC engines, PCIe (one direction, half of what they say for both).
Frames/s of NVDEC are not in data sheets. For Hopper some 4,480 H.264 frames/s of 1920×1080 over seven engines are
derived from public figures (640 an engine); for other chips and codecs none is at hand, so their limit is left open.
Smaller frames are scaled by pixels, which flatters small ones: what a frame costs beside its pixels is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.step import PEAKS

FULL_HD = 1920 * 1080  # pixels


@dataclass(frozen=True)
class Chip:
    """Upper limits; TB and GB are powers of ten."""

    name: str
    memory_tb_s: float
    float32_tflops: float
    nvdec_engines: int
    pcie_gb_s: float
    h264_frames_s: float | None = None  # of 1920×1080, all engines

    @property
    def tensor_tflops(self) -> float:
        return PEAKS[self.name]


_HOPPER = 7 * 640.0
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("H200", 4.8, 67, 7, 64, _HOPPER),
        Chip("H200 NVL", 4.8, 60, 7, 64, _HOPPER),
        Chip("H100", 3.35, 67, 7, 64, _HOPPER),
        Chip("H100 NVL", 3.9, 60, 7, 64, _HOPPER),
        Chip("H100 PCIe", 2.0, 51, 7, 64, _HOPPER),
        Chip("A100", 2.039, 19.5, 5, 32),  # 80 GB, SXM
        Chip("L40S", 0.864, 91.6, 3, 32),
    )
}


def find_chip(name: str) -> Chip:
    """By its own name, or a GPU's name as torch gives it. Raises ValueError for one that is not known."""
    words = set(name.replace("-", " ").upper().split())
    fitting = [chip for chip in CHIPS.values() if set(chip.name.upper().split()) <= words]
    if not fitting:
        raise ValueError(f"no figures for a GPU {name!r} (there are: {', '.join(CHIPS)})")
    return max(fitting, key=lambda chip: len(chip.name))
