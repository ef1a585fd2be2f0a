"""A picture of masks: for some clips the frame, the score of each patch, and what each strategy masks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from dali_pipelines.types import ClipBatch
from tgmae.config import InputConfig
from tgmae.data.manifest import Manifest
from tgmae.masks.config import MaskKind
from tgmae.masks.select import select_masks
from tgmae.pictures.figures import shorten

_BLOCKS = 2  # clips side by side
_WITH_SCORES: dict[MaskKind, str] = {"tgm": "likeness", "mgm": "motion"}  # whose scores are worth looking at


def draw_masks(
    path: Path, config: InputConfig, manifest: Manifest, clips: ClipBatch, scores: Mapping[MaskKind, Tensor]
) -> None:
    """PNG of every clip of a batch, first and last slot.

    scores  float32 [B, S, N] of each strategy that is to be drawn
    """
    model = config.model
    count = len(clips.requests)
    moments = (0, model.num_slots - 1)
    across = 1 if count <= _BLOCKS else _BLOCKS
    lines = -(-count // across)
    num_columns = 1 + sum(2 if kind in _WITH_SCORES else 1 for kind in scores) + ("tgm" in scores)
    width = 1.35 * num_columns * across
    heading = textwrap.wrap(_describe(config, scores), int(14 * width))
    figure = plt.figure(figsize=(width, 3.3 * lines + 0.3 + 0.2 * len(heading)), layout="constrained")
    figure.suptitle("\n".join(heading), fontsize=10)
    blocks = np.ravel(figure.subfigures(lines, across, squeeze=False))
    for place in range(count):
        request = clips.requests[place]
        video = manifest[request.row]
        block = blocks[place]
        caption = f"“{shorten(video.captions[request.caption].text)}”   " if video.captions else ""
        block.suptitle(caption + shorten(video.path), fontsize=8, parse_math=False)
        axes = block.subplots(len(moments), num_columns, squeeze=False)
        for line, slot in enumerate(moments):
            frame = clips.frames[place, slot * model.tubelet_size].cpu().numpy()
            cells = iter(axes[line])
            _show(next(cells), frame, "frame")
            axes[line, 0].set_ylabel(f"slot {slot}", fontsize=7)
            for kind, values in scores.items():
                if kind in _WITH_SCORES:
                    grid = values[place, slot].view(-1, model.image_size // model.patch_size).numpy()
                    low, high = float(values.min()), float(values.max())  # of all clips: brightness can be compared
                    _show(next(cells), grid, _WITH_SCORES[kind], vmin=low, vmax=high)
                for order in ("top", "bottom") if kind == "tgm" else ("top",):
                    hidden = _masked(config, values, order)[place, slot]
                    title = f"{kind}, {order}" if kind == "tgm" else kind
                    _show(next(cells), _black_out(frame, hidden, model.patch_size), title)
        for axis in axes[1:].flat:
            axis.set_title("")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _describe(config: InputConfig, scores: Mapping[MaskKind, Tensor]) -> str:
    mask, words = config.mask, f"ratio {config.mask.ratio}; first and last slot (tubelet in time); black: masked"
    if "tgm" in scores:
        scored = "both frames" if mask.frames_per_tubelet > 1 else "one frame"
        words = f"scorer {mask.scorer}, CLIP {config.clip.model}, {scored} of each tubelet; {words}"
    high = [meaning for kind, meaning in (("tgm", "like the caption"), ("mgm", "moving")) if kind in scores]
    return words + f"; bright: {' or '.join(high)}, one scale for all clips" * bool(high)


def _masked(config: InputConfig, scores: Tensor, order: str) -> Tensor:
    """Which patches are masked, bool [B, S, N]."""
    masks = select_masks(replace(config.mask, order=order), config.model, scores)  # type: ignore[arg-type]
    hidden = torch.zeros(len(scores), config.model.num_tokens, dtype=torch.bool)
    return hidden.scatter(1, masks.masked.long(), True).view(scores.shape)


def _black_out(frame: np.ndarray, hidden: Tensor, patch_size: int) -> np.ndarray:
    """The frame uint8 [H, W, 3] with its masked patches [N] nearly black."""
    side = frame.shape[0] // patch_size
    pixels = np.kron(hidden.view(side, side).numpy(), np.ones((patch_size, patch_size), bool))
    return np.where(pixels[..., None], np.uint8(25), frame)


def _show(axis: Axes, picture: np.ndarray, title: str, **limits: float) -> None:
    axis.imshow(picture, interpolation="nearest", **limits)  # type: ignore[arg-type]
    axis.set_title(title, fontsize=7)
    axis.set_xticks([])
    axis.set_yticks([])
