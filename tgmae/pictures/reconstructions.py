"""Pictures of reconstructions, drawn during training.

Dimensions: B clips, T frames, H W pixels, S slots, h w rows and columns of patches, M masked tokens; a token's P values
are (t p q c): frame, row, column, channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from dali_pipelines.types import ClipBatch
from kernels.gather_tokens import gather_cubes
from kernels.masked_mse import cube_statistics
from tgmae.config.model import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.pictures.figures import Page, name_clip, wrap

_MOST_CLIPS, _MOMENTS = 3, 4
_CONTRAST = 0.2  # brightness of one predicted deviation, where predictions are drawn around mid-grey
_TILES = {1: 1.9, 2: 1.5, 3: 1.1}  # inches of a frame by number of clips
_GAP, _BETWEEN, _MARGIN, _LABELS = 0.06, 0.25, 0.2, 1.36  # inches between frames, between clips, around, and of labels

_ROWS = (
    ("original", ""),
    ("visible", "what the encoder sees; hidden patches are hatched grey"),
    ("target", "hidden patches, each less its mean, over its deviation"),
    ("prediction", "what the network says about them, alone"),
    ("reconstruction", "prediction with each hidden patch's true mean and contrast"),
)
_NOTE = (
    "The network predicts what each hidden patch looks like apart from its mean colour and contrast; compare the "
    "prediction with the target. The reconstruction borrows both from the original, so even an untrained network's "
    "shows the right colours."
)


@dataclass(frozen=True)
class Reconstruction:
    """What can be drawn of a prediction.

    hidden      bool [B, S, h, w], the patches that the encoder does not see
    target      float32 [B, T, H, W, 3] in 0 … 1: hidden patches as the loss compares them, normalised, around mid-grey
    prediction  the same of what was predicted
    filled      the clips, with the predictions, moved to the true mean and deviation, in the hidden patches

    In `target` and `prediction`, visible patches are white.
    """

    hidden: Tensor
    target: Tensor
    prediction: Tensor
    filled: Tensor


def reconstruct(config: ModelConfig, frames: Tensor, masks: TokenMasks, prediction: Tensor) -> Reconstruction:
    """Put predictions in their places.

    frames      uint8 [B, T, H, W, 3]
    prediction  [B, M, P], of normalised cubes

    `filled` shows a cube with the mean and deviation of the true one, as VideoMAE's own pictures do.
    """
    cubes = gather_cubes(frames, None, config.patch_size, config.tubelet_size).float() / 255  # [B, tokens, P]
    place = masks.masked.long()[..., None].expand(-1, -1, cubes.shape[-1])  # [B, M, P]
    mean, deviation = cube_statistics(cubes.gather(1, place))  # [B, M, 1, 3]
    pixels = rearrange(cubes.gather(1, place), "b m (v c) -> b m v c", c=3)
    predicted = rearrange(prediction.float(), "b m (v c) -> b m v c", c=3)

    def put(values: Tensor, into: Tensor) -> Tensor:
        return _to_frames(config, into.scatter(1, place, values.clamp(0, 1).flatten(2)))

    white = torch.ones_like(cubes)
    hidden = torch.zeros(cubes.shape[:2], dtype=torch.bool, device=cubes.device).scatter(1, masks.masked.long(), True)
    side = config.image_size // config.patch_size
    return Reconstruction(
        hidden=rearrange(hidden, "b (s h w) -> b s h w", h=side, w=side),
        target=put(0.5 + _CONTRAST * (pixels - mean) / deviation, white),
        prediction=put(0.5 + _CONTRAST * predicted, white),
        filled=put(predicted * deviation + mean, cubes),
    )


def _to_frames(config: ModelConfig, cubes: Tensor) -> Tensor:
    """Join the cubes of all tokens [B, tokens, P] to frames [B, T, H, W, 3]: the inverse of `gather_cubes`."""
    side = config.image_size // config.patch_size
    return rearrange(
        cubes,
        "b (s h w) (t p q c) -> b (s t) (h p) (w q) c",
        h=side, w=side, t=config.tubelet_size, p=config.patch_size, q=config.patch_size,
    )  # fmt: skip


def draw_reconstructions(
    path: Path, config: ModelConfig, batch: ClipBatch, masks: TokenMasks, prediction: Tensor, title: str
) -> None:
    """Write a PNG of the first three clips of a batch side by side, four frames each, in the rows of `_ROWS`.

    prediction  [B, M, P], of normalised cubes
    """
    clips = min(_MOST_CLIPS, len(batch.videos))
    shown = torch.linspace(0, config.num_frames - 1, _MOMENTS).long().tolist()
    masks = TokenMasks(visible=masks.visible[:clips], masked=masks.masked[:clips])
    drawn = reconstruct(config, batch.frames[:clips], masks, prediction.detach()[:clips])
    original = batch.frames[:clips].cpu().numpy()
    rows = [original, original, *(part.cpu().numpy() for part in (drawn.target, drawn.prediction, drawn.filled))]
    hidden = drawn.hidden.cpu().numpy()

    tile = _TILES[clips]
    across = _MOMENTS * (tile + _GAP) - _GAP
    width = 2 * _MARGIN + _LABELS + clips * across + (clips - 1) * _BETWEEN
    note = wrap(_NOTE, width - 2 * _MARGIN, 9)
    captions = zip(batch.videos[:clips], batch.captions()[:clips], strict=True)
    names = [name_clip(video, caption, across) for video, caption in captions]
    head = 0.5 + 0.17 * max(len(lines) for lines, _ in names)
    first = head + 0.45
    bottom = first + len(rows) * (tile + _GAP)
    page = Page(width, bottom + 0.1 + 0.18 * len(note) + _MARGIN)

    page.write(_MARGIN, _MARGIN, title, 11)
    for line, (label, meaning) in enumerate(_ROWS):
        top = first + line * (tile + _GAP)
        page.write(_MARGIN, top, label, 10, weight="bold")
        page.write(_MARGIN, top + 0.2, "\n".join(wrap(meaning, _LABELS - 0.15, 8)) if meaning else "", 8, faint=True)
    for clip, (words, name) in enumerate(names):
        left = _MARGIN + _LABELS + clip * (across + _BETWEEN)
        page.write(left, 0.5, "\n".join(words), 9)
        page.write(left, head, name, 8, faint=True)
        for moment, frame in enumerate(shown):
            x = left + moment * (tile + _GAP)
            page.write(x, first - 0.18, f"frame {frame}", 8)
            for line, images in enumerate(rows):
                covered = hidden[clip, frame // config.tubelet_size] if line == 1 else None
                page.show(x, first + line * (tile + _GAP), tile, tile, images[clip, frame], covered)
    page.write(_MARGIN, bottom + 0.1, "\n".join(note), 9)
    page.save(path)
