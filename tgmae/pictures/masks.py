"""A picture of masks: some clips with the frame, the score of each patch, and what each strategy masks.

Dimensions: B clips, S slots, N patches per slot, H W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import repeat
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.types import ClipBatch
from tgmae.config.masks import MaskKind
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest
from tgmae.masks.select import select_masks
from tgmae.pictures.figures import hide_ticks, save_figure, shorten

_BLOCKS = 2  # clips side by side
_WITH_SCORES: dict[MaskKind, str] = {"tgm": "similarity", "mgm": "motion"}  # the scores worth looking at, not noise


def draw_masks(
    path: Path, config: InputConfig, manifest: Manifest, clips: ClipBatch, scores: Mapping[MaskKind, Tensor]
) -> None:
    """Write a PNG with the first and the last slot of every clip of a batch.

    scores  float32 [B, S, N], on the CPU, for each strategy to draw
    """
    model = config.model
    count = len(clips.requests)
    slots = (0, model.num_slots - 1)
    across = 1 if count <= _BLOCKS else _BLOCKS
    lines = -(-count // across)
    # The frame, then for each strategy its scores (of some) and its mask; tgm shows top-k and bottom-k masks.
    num_columns = 1 + sum(2 if kind in _WITH_SCORES else 1 for kind in scores) + ("tgm" in scores)
    width = 1.35 * num_columns * across
    heading = textwrap.wrap(_describe(config, scores), int(14 * width))
    figure = plt.figure(figsize=(width, 3.3 * lines + 0.3 + 0.2 * len(heading)), layout="constrained")
    figure.suptitle("\n".join(heading), fontsize=10)
    blocks = np.ravel(figure.subfigures(lines, across, squeeze=False))
    for clip, request in enumerate(clips.requests):
        video = manifest[request.row]
        block = blocks[clip]
        caption = f"“{shorten(video.captions[request.caption].text)}”   " if video.captions else ""
        block.suptitle(caption + shorten(video.name), fontsize=8, parse_math=False)
        axes = block.subplots(len(slots), num_columns, squeeze=False)
        for line, slot in enumerate(slots):
            frame = clips.frames[clip, slot * model.tubelet_size].cpu().numpy()
            cells = iter(axes[line])
            _show(next(cells), frame, "frame")
            axes[line, 0].set_ylabel(f"slot {slot}", fontsize=7)
            for kind, values in scores.items():
                if kind in _WITH_SCORES:
                    grid = values[clip, slot].view(-1, model.image_size // model.patch_size).numpy()
                    # One scale for all clips, so that their brightness can be compared.
                    low, high = float(values.min()), float(values.max())
                    _show(next(cells), grid, _WITH_SCORES[kind], vmin=low, vmax=high)
                for order in ("top", "bottom") if kind == "tgm" else ("top",):
                    masked = _masked(config, values, order)[clip, slot]
                    title = f"{kind}, {order}" if kind == "tgm" else kind
                    _show(next(cells), _black_out(frame, masked, model.patch_size), title)
        for axis in axes[1:].flat:
            axis.set_title("")
    save_figure(figure, path, dpi=100)


def _describe(config: InputConfig, scores: Mapping[MaskKind, Tensor]) -> str:
    mask, words = config.mask, f"mask ratio {config.mask.ratio}; first and last slot (tubelet); black: masked"
    if "tgm" in scores:
        scored = "both frames" if mask.frames_per_tubelet > 1 else "one frame"
        words = f"scorer {mask.scorer}, CLIP {config.clip.model}, {scored} of each tubelet; {words}"
    bright = [meaning for kind, meaning in (("tgm", "similar to the caption"), ("mgm", "moving")) if kind in scores]
    return words + f"; bright: {' or '.join(bright)}, on one scale for all clips" * bool(bright)


def _masked(config: InputConfig, scores: Tensor, order: str) -> Tensor:
    """Return which patches are masked, bool [B, S, N]."""
    masks = select_masks(replace(config.mask, order=order), config.model, scores)  # type: ignore[arg-type]
    masked = torch.zeros(len(scores), config.model.num_tokens, dtype=torch.bool)
    return masked.scatter(1, masks.masked.long(), True).view(scores.shape)


def _black_out(frame: NDArray[np.uint8], masked: Tensor, patch_size: int) -> NDArray[np.uint8]:
    """Darken the masked patches, bool [N], of a frame uint8 [H, W, 3] until they are nearly black."""
    side = frame.shape[0] // patch_size
    pixels = repeat(masked.numpy(), "(h w) -> (h p) (w q) 1", w=side, p=patch_size, q=patch_size)
    return np.where(pixels, np.uint8(25), frame)


def _show(axis: Axes, image: NDArray[Any], title: str, **limits: float) -> None:
    axis.imshow(image, interpolation="nearest", **limits)  # type: ignore[arg-type]
    axis.set_title(title, fontsize=7)
    hide_ticks(axis)
