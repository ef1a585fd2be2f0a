"""How many patches or frames go through a tower at once.

On a CPU few, so that what a pass touches stays in the cache. On CUDA as many as keep the chip busy and no more:

* Enough. A matrix product is cut into tiles of 128 × 256 outputs, of which every multiprocessor computes one at a time;
  the last round of tiles leaves some of them idle. With `_ROUNDS` full rounds in the narrowest product of a block that
  is at most 1/32 of its time, and less in the others, which are three and four times as wide. More would only take
  memory.
* Not too much. What a pass holds at its widest point stays within 1/16 of the GPU's memory, which training needs.

CLIP ViT-B/32 on an H200 (132 multiprocessors) then takes 3528 patches, 18 frames of 224², ViT-L/14 392.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.config import CLIPConfig
from engines.towers.clip_towers import FrameTower, Tower

_CPU_PATCHES = 512
_TILE = 128 * 256
_ROUNDS = 32
_MEMORY_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What of a GPU matters here."""

    memory_bytes: int
    multiprocessors: int


def read_chip(device: torch.device) -> Chip:
    """What CUDA says of it."""
    found = torch.cuda.get_device_properties(device)
    return Chip(memory_bytes=found.total_memory, multiprocessors=found.multi_processor_count)


def fill_chip(tower: Tower, itemsize: int, chip: Chip) -> int:
    """Patches or frames that fill the chip; itemsize: bytes of a number inside the tower. At least 1."""
    enough = -(-_ROUNDS * chip.multiprocessors * _TILE // (tower.width * tower.tokens))
    fitting = chip.memory_bytes // _MEMORY_SHARE // (tower.peak_values * itemsize)
    return max(1, min(enough, fitting))


def inputs_per_pass(
    tower: Tower, config: CLIPConfig, patches_per_frame: int, itemsize: int, device: torch.device
) -> int:
    """Patches, or for a frame tower frames, that an engine takes at once: clip.batch, or what is right for the device.

    clip.batch counts patches; of frames so many are taken as have that many patches. Whole frames where one fits.
    """
    is_frames = isinstance(tower, FrameTower)
    if config.batch is None and device.type == "cuda":
        filling = fill_chip(tower, itemsize, read_chip(device))
        if is_frames:
            return filling
        patches = filling
    else:
        patches = config.batch or _CPU_PATCHES
    frames = patches // patches_per_frame
    if is_frames:
        return max(1, frames)
    return frames * patches_per_frame or patches
