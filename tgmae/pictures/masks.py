"""A picture of masks: some clips with the frame, the score of each patch, and what each strategy masks.

Dimensions: B clips, S slots, N patches per slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch
from tgmae.config.masks import MaskKind
from tgmae.config.run import InputConfig
from tgmae.masks.select import select_masks
from tgmae.pictures.figures import Page, name_clip, wrap

_TILE, _GAP, _MARGIN, _LABEL = 1.1, 0.07, 0.2, 0.68  # inches of an image, between images, around, and of "first slot"
_LINE, _BETWEEN, _MOST = 0.18, 0.25, 16.5  # of a line of text, between clips, and across the page at most


@dataclass(frozen=True)
class _Measure:
    """Scores that are worth looking at, unlike noise."""

    name: str
    unit: str
    colours: str  # a colour map of matplotlib's


_SCORES: dict[MaskKind, _Measure] = {
    "tgm": _Measure("similarity", "cosine of patch and caption", "viridis"),
    "mgm": _Measure("motion", "pixels of the video, from a frame to the next", "magma"),
}


@dataclass(frozen=True)
class _Column:
    """One image per slot: the frame, the scores of a strategy, or the frame without what it masks."""

    title: str
    scored: MaskKind | None = None
    hidden: Tensor | None = None  # bool [B, S, N]


def draw_masks(path: Path, config: InputConfig, clips: ClipBatch, scores: Mapping[MaskKind, Tensor]) -> None:
    """Write a PNG with the first and the last slot of every clip of a batch.

    scores  float32 [B, S, N], on the CPU, for each strategy to draw
    """
    model, columns = config.model, list(_columns(config, scores))
    side, slots = model.image_size // model.patch_size, {"first slot": 0, "last slot": model.num_slots - 1}
    block = _LABEL + len(columns) * (_TILE + _GAP)
    captions = zip(clips.videos, clips.captions(), strict=True)
    names = [name_clip(video, caption, block - _LABEL - _GAP) for video, caption in captions]
    head = _LINE * (max(len(words) for words, _ in names) + 2) + 0.08  # above the images of a clip
    tall = head + len(slots) * (_TILE + _GAP) + _BETWEEN
    across = 2 if len(clips.videos) > 1 and 2 * block < _MOST else 1
    width = 2 * _MARGIN + across * block + (across - 1) * _BETWEEN
    heading = wrap(_describe(config, scores), width - 2 * _MARGIN, 9)
    legends = [kind for kind in _SCORES if kind in scores]
    first = _MARGIN + _LINE * len(heading) + 0.1 + 0.24 * (1 + len(legends)) + 0.2
    page = Page(width, first + tall * -(-len(clips.videos) // across))

    # What is drawn how. One scale for all clips, so that their colours can be compared.
    page.write(_MARGIN, _MARGIN, "\n".join(heading), 9)
    top = _MARGIN + _LINE * len(heading) + 0.1
    page.show_hidden(_MARGIN, top, 0.4, 0.16)
    page.write(_MARGIN + 0.46, top, "hidden from the encoder")
    for kind in legends:
        top += 0.24
        low, high, measure = float(scores[kind].min()), float(scores[kind].max()), _SCORES[kind]
        page.show_scale(_MARGIN, top, low, high, measure.colours, f"{measure.name}: {measure.unit}")

    for clip, (words, name) in enumerate(names):
        left, top = _MARGIN + clip % across * (block + _BETWEEN), first + clip // across * tall
        page.write(left + _LABEL, top, "\n".join(words), 9)
        page.write(left + _LABEL, top + head - 2 * _LINE - 0.06, name, 8, faint=True)
        for column, content in enumerate(columns):
            page.write(left + _LABEL + column * (_TILE + _GAP), top + head - _LINE, content.title, 8)
        for line, (label, slot) in enumerate(slots.items()):
            y = top + head + line * (_TILE + _GAP)
            page.write(left, y, label, 8)
            frame = clips.frames[clip, slot * model.tubelet_size].cpu().numpy()
            for column, content in enumerate(columns):
                x = left + _LABEL + column * (_TILE + _GAP)
                if content.scored:
                    values = scores[content.scored]
                    grid, colours = values[clip, slot].view(side, side).numpy(), _SCORES[content.scored].colours
                    low, high = float(values.min()), float(values.max())
                    page.show(x, y, _TILE, _TILE, grid, cmap=colours, interpolation="nearest", vmin=low, vmax=high)
                else:
                    hidden = None if content.hidden is None else content.hidden[clip, slot].view(side, side).numpy()
                    page.show(x, y, _TILE, _TILE, frame, hidden)
    page.save(path)


def _columns(config: InputConfig, scores: Mapping[MaskKind, Tensor]) -> Iterator[_Column]:
    """Yield the columns: the frame, then for each strategy its scores (of some) and masks (of tgm, both orders)."""
    yield _Column("frame")
    for kind, values in scores.items():
        if kind in _SCORES:
            yield _Column(_SCORES[kind].name, scored=kind)
        for order in ("top", "bottom") if kind == "tgm" else ("top",):
            hidden = _hidden(config, values, order)
            yield _Column(f"{kind}, {order}" if kind == "tgm" else kind, hidden=hidden)


def _describe(config: InputConfig, scores: Mapping[MaskKind, Tensor]) -> str:
    mask = config.mask
    words = f"mask ratio {mask.ratio}; a slot is the {config.model.tubelet_size} frames of a tubelet, masked alike"
    if "tgm" in scores:
        scored = "both frames" if mask.frames_per_tubelet > 1 else "one frame"
        words = f"scorer {mask.scorer}, CLIP {config.clip.model}, {scored} of each tubelet; {words}"
    return words


def _hidden(config: InputConfig, scores: Tensor, order: str) -> Tensor:
    """Return which patches are masked, bool [B, S, N]."""
    masks = select_masks(replace(config.mask, order=order), config.model, scores)  # type: ignore[arg-type]
    masked = torch.zeros(len(scores), config.model.num_tokens, dtype=torch.bool)
    return masked.scatter(1, masks.masked.long(), True).view(scores.shape)
