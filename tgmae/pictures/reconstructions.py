"""Pictures of reconstructions, drawn during training.

Dimensions: B clips, T frames, H W pixels, M masked tokens; a token's P values are (t p q c): frame, row, column,
channel.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from torch import Tensor

from kernels.gather_tokens import gather_cubes
from kernels.masked_mse import cube_statistics
from tgmae.config.model import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.pictures.figures import hide_ticks, save_figure, shorten

_GREY = 0.5  # shown in place of masked patches


def reconstruct(config: ModelConfig, frames: Tensor, masks: TokenMasks, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the masked clips and the reconstructions, both float32 [B, T, H, W, 3] in 0 … 1.

    frames      uint8 [B, T, H, W, 3]
    prediction  [B, M, P], of normalised cubes

    A predicted cube is shown with the mean and deviation of the true cube, as in VideoMAE's own pictures.
    """
    cubes = gather_cubes(frames, None, config.patch_size, config.tubelet_size).float() / 255  # [B, tokens, P]
    mean, deviation = cube_statistics(cubes)  # [B, tokens, 1, 3]
    index = masks.masked.long()[..., None]
    mean, deviation = (x.squeeze(-2).gather(1, index.expand(-1, -1, 3))[..., None, :] for x in (mean, deviation))
    pixels = rearrange(prediction.float(), "b m (v c) -> b m v c", c=3) * deviation + mean
    pixels = rearrange(pixels, "b m v c -> b m (v c)")

    # Put grey, or the prediction, in the place of the masked cubes.
    place = index.expand(-1, -1, cubes.shape[-1])
    masked = cubes.scatter(1, place, torch.full_like(pixels, _GREY))
    filled = cubes.scatter(1, place, pixels.clamp(0, 1))
    return _to_frames(config, masked), _to_frames(config, filled)


def _to_frames(config: ModelConfig, cubes: Tensor) -> Tensor:
    """Join the cubes of all tokens [B, tokens, P] to frames [B, T, H, W, 3]: the inverse of `gather_cubes`."""
    side = config.image_size // config.patch_size
    return rearrange(
        cubes,
        "b (s h w) (t p q c) -> b (s t) (h p) (w q) c",
        h=side, w=side, t=config.tubelet_size, p=config.patch_size, q=config.patch_size,
    )  # fmt: skip


def draw_reconstructions(
    path: Path, config: ModelConfig, frames: Tensor, masks: TokenMasks, prediction: Tensor, names: list[str], title: str
) -> None:
    """Write a PNG of up to three clips side by side, four frames each.

    The rows are the original, what the encoder saw, and the reconstruction. Shapes are those of `reconstruct`; `names`
    holds one title per clip.
    """
    clips, moments = min(3, len(frames)), 4
    masks = TokenMasks(visible=masks.visible[:clips], masked=masks.masked[:clips])
    frames, prediction = frames[:clips], prediction.detach()[:clips]
    masked, filled = reconstruct(config, frames, masks, prediction)
    shown = torch.linspace(0, config.num_frames - 1, moments).long().tolist()
    figure, axes = plt.subplots(
        3, moments * clips, figsize=(1.5 * moments * clips, 5), layout="constrained", squeeze=False
    )
    rows = (("original", frames.float() / 255), ("visible", masked), ("reconstruction", filled))
    for line, (label, videos) in enumerate(rows):
        axes[line, 0].set_ylabel(label, fontsize=9)
        for column in range(moments * clips):
            clip, moment = divmod(column, moments)
            axis = axes[line, column]
            axis.imshow(videos[clip, shown[moment]].cpu().numpy(), interpolation="nearest")
            hide_ticks(axis)
            if line == 0:
                name = f"{shorten(names[clip])}\n" if moment == 0 else "\n"
                axis.set_title(f"{name}frame {shown[moment]}", fontsize=9, loc="left", parse_math=False)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=90)
