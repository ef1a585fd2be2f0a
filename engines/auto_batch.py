"""How many patches or frames go through a tower at once.

On a CPU a pass is small, so that its data stay in the cache. On CUDA its size has two limits:

* Large enough to keep the chip busy. A matrix product is cut into tiles of 128 × 256 outputs, and every multiprocessor
  computes one tile at a time. The last round of tiles leaves some multiprocessors idle. With `_ROUNDS` full rounds in
  the narrowest product of a block, that is at most 1/32 of its time, and less in the other products, which are three
  and four times as wide. Larger passes would only use more memory.
* Small enough to leave memory for training: what a pass holds at its widest point stays within 1/16 of the GPU's.

For CLIP ViT-B/32 on an H200 (132 multiprocessors) that is 3528 patches, 18 frames of 224²; for ViT-L/14 it is 392.

On CUDA the frames of a batch, where their number is known, are split into passes of equal size: a CUDA graph is
recorded for one size, and neither a pass that is larger than the batch nor a small remainder would replay it.
"""

from __future__ import annotations

import math
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
    """The properties of a GPU that the size of a pass depends on."""

    memory_bytes: int
    multiprocessors: int


def read_chip(device: torch.device) -> Chip:
    """Ask CUDA for the properties of a device."""
    found = torch.cuda.get_device_properties(device)
    return Chip(memory_bytes=found.total_memory, multiprocessors=found.multi_processor_count)


def fill_chip(tower: Tower, itemsize: int, chip: Chip) -> int:
    """Return how many patches or frames fill the chip, at least 1; itemsize: bytes of a number inside the tower."""
    enough = -(-_ROUNDS * chip.multiprocessors * _TILE // (tower.width * tower.tokens))
    fitting = chip.memory_bytes // _MEMORY_SHARE // (tower.peak_values * itemsize)
    return max(1, min(enough, fitting))


def inputs_per_pass(
    tower: Tower,
    config: CLIPConfig,
    patches_per_frame: int,
    itemsize: int,
    device: torch.device,
    frames_per_batch: int | None = None,
) -> int:
    """Return how many inputs an engine takes at once: patches, or frames for a frame tower.

    --clip.batch counts patches; a frame tower takes as many frames as have that many patches, at least one. A patch
    tower takes whole frames if at least one fits. Without --clip.batch the size follows from the device.

    frames_per_batch   how many frames will be scored at once, where that is known
    """
    is_frames = isinstance(tower, FrameTower)
    if config.batch is None and device.type == "cuda":
        filling = fill_chip(tower, itemsize, read_chip(device))
        frames, patches = (filling, 0) if is_frames else (filling // patches_per_frame, filling)
        if frames_per_batch and frames:
            passes = math.ceil(frames_per_batch / frames)
            frames = math.ceil(frames_per_batch / passes)
    else:
        patches = config.batch or _CPU_PATCHES
        frames = patches // patches_per_frame
    if is_frames:
        return max(1, frames)
    return frames * patches_per_frame or patches
