"""A picture of masks: for some clips the frame, the score of each patch, and what each strategy masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from tgmae.config import InputConfig
from tgmae.manifest import Manifest
from tgmae.masking import NoiseScorer, plan_masks
from tgmae.types import ClipBatch
from tgmae.visualize import shorten

_BLOCKS = 2  # clips side by side


def draw_masks(path: Path, config: InputConfig, manifest: Manifest, clips: ClipBatch, scores: Tensor) -> None:
    """PNG of every clip of a batch, first and last slot.

    scores  float32 [B, S, N], likeness to each clip's caption
    """
    model, mask = config.model, config.mask
    count = len(clips.requests)
    masks = {"tgm, top": _masked(config, scores, "top"), "tgm, bottom": _masked(config, scores, "bottom")}
    for kind in ("random", "tube"):
        noise = NoiseScorer(kind, model.num_slots, model.patches_per_slot, torch.device("cpu"))
        masks[kind] = _masked(config, noise(clips), "top")
    titles = ["frame", "score", *masks]
    moments = (0, model.num_slots - 1)
    lines = -(-count // _BLOCKS)
    figure = plt.figure(figsize=(1.35 * len(titles) * _BLOCKS, 3.3 * lines + 0.5), layout="constrained")
    figure.suptitle(
        f"scorer {mask.scorer}, CLIP {config.clip.model}, ratio {mask.ratio}, "
        f"{mask.frames_per_tubelet} frames a tubelet; first and last slot (tubelet in "
        "time); bright: like the caption, one scale for all clips; black: masked",
        fontsize=10,
    )
    low, high = float(scores.min()), float(scores.max())  # of all clips: brightness can be compared
    blocks = np.ravel(figure.subfigures(lines, _BLOCKS, squeeze=False))
    for place in range(count):
        request = clips.requests[place]
        video = manifest[request.row]
        block = blocks[place]
        block.suptitle(
            f"“{shorten(video.captions[request.caption])}”   {shorten(video.path)}   "
            f"scores {scores[place].min():.3f} to {scores[place].max():.3f}",
            fontsize=8,
            parse_math=False,
        )
        axes = block.subplots(len(moments), len(titles), squeeze=False)
        for line, slot in enumerate(moments):
            frame = clips.frames[place, slot * model.tubelet_size].cpu().numpy()
            _show(axes[line, 0], frame)
            grid = scores[place, slot].view(-1, model.image_size // model.patch_size)
            _show(axes[line, 1], grid.numpy(), vmin=low, vmax=high)
            for column, hidden in enumerate(masks.values(), start=2):
                _show(axes[line, column], _black_out(frame, hidden[place, slot], model.patch_size))
            axes[line, 0].set_ylabel(f"slot {slot}", fontsize=7)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _masked(config: InputConfig, scores: Tensor, order: str) -> Tensor:
    """Which patches are masked, bool [B, S, N]."""
    plan = plan_masks(replace(config.mask, order=order), config.model, scores)  # type: ignore[arg-type]
    hidden = torch.zeros(len(scores), config.model.num_tokens, dtype=torch.bool)
    return hidden.scatter(1, plan.masked.long(), True).view(scores.shape)


def _black_out(frame: np.ndarray, hidden: Tensor, patch_size: int) -> np.ndarray:
    """The frame uint8 [H, W, 3] with its masked patches [N] nearly black."""
    side = frame.shape[0] // patch_size
    pixels = np.kron(hidden.view(side, side).numpy(), np.ones((patch_size, patch_size), bool))
    return np.where(pixels[..., None], np.uint8(25), frame)


def _show(axis: Axes, picture: np.ndarray, **limits: float) -> None:
    axis.imshow(picture, interpolation="nearest", **limits)  # type: ignore[arg-type]
    axis.set_xticks([])
    axis.set_yticks([])
