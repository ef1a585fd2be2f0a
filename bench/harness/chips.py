"""Upper limits of GPUs, from data sheets, and of NVDEC.

NVIDIA's data sheets of H200, H100, A100, L40S, L4 and A10 give dense bfloat16 on tensor cores, the memory's size and
bandwidth, float32 without tensor cores, the number of NVDEC engines, and PCIe (one direction: half the figure for
both).

NVDEC's frame rate is not in data sheets. Published for one engine of an H200 NVL: 1,002 H.264 frames/s of 1600×900. All
of Hopper's chips are taken to have seven engines as fast. Other chips and codecs have no figure, so their limit stays
open. Other sizes are scaled by pixels, which flatters small frames: the fixed cost of a frame is not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FULL_HD = 1920 * 1080  # pixels


@dataclass(frozen=True)
class Chip:
    """Upper limits of one GPU; TB and GB are powers of ten."""

    name: str
    tensor_tflops: float  # dense bfloat16
    memory_tb_s: float
    float32_tflops: float
    nvdec_engines: int
    pcie_gb_s: float
    memory_gb: int
    h264_frames_s: float | None = None  # of 1920×1080, all engines


_HOPPER = 7 * 1002 * (1600 * 900) / FULL_HD
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("H200", 989, 4.8, 67, 7, 64, 141, _HOPPER),
        Chip("H200 NVL", 835, 4.8, 60, 7, 64, 141, _HOPPER),
        Chip("H100", 989, 3.35, 67, 7, 64, 80, _HOPPER),
        Chip("H100 NVL", 835, 3.9, 60, 7, 64, 94, _HOPPER),
        Chip("H100 PCIe", 756, 2.0, 51, 7, 64, 80, _HOPPER),
        Chip("A100", 312, 2.039, 19.5, 5, 32, 80),  # 80 GB, SXM
        Chip("A100 PCIe", 312, 1.935, 19.5, 5, 32, 80),
        Chip("A100 40GB", 312, 1.555, 19.5, 5, 32, 40),
        Chip("A100 PCIe 40GB", 312, 1.555, 19.5, 5, 32, 40),
        Chip("L40S", 362, 0.864, 91.6, 3, 32, 48),
        Chip("L4", 121, 0.3, 30.3, 4, 32, 24),
        Chip("A10", 125, 0.6, 31.2, 2, 32, 24),
    )
}


def short_name(name: str) -> str:
    """Turn a chip's name, or a GPU's name from torch, into part of a file name: h200-nvl, h100, rtx-4090.

    Drops the maker, and the memory and socket that A100 and H100 usually have.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    return "-".join(word for word in words if not re.fullmatch(r"(nvidia|geforce|tesla|sxm\d?|hbm\d\w?|80gb)?", word))


def find_chip(name: str) -> Chip:
    """Find a chip by its own name or by a GPU's name from torch. Raises ValueError if it is unknown."""
    for chip in CHIPS.values():
        if short_name(chip.name) == short_name(name):
            return chip
    raise ValueError(f"no figures for GPU {name!r}; known GPUs: {', '.join(CHIPS)}")
