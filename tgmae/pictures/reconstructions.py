"""Pictures: reconstructions during training, the loss curve, a contact sheet of a data set."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from kernels.gather_tokens import gather_cubes
from kernels.masked_mse import cube_statistics
from tgmae.model.config import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.pictures.figures import save_figure, shorten

_GREY = 0.5  # of masked patches


def reconstruct(config: ModelConfig, frames: Tensor, masks: TokenMasks, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Masked clips and reconstructions, both float32 [B, T, H, W, 3] in 0 … 1.

    A prediction is of normalised cubes; it is shown with the true cube's mean and deviation, as VideoMAE's own pictures
    are. frames uint8 [B, T, H, W, 3], prediction [B, M, P].
    """
    every = torch.arange(config.num_tokens, dtype=torch.int32, device=frames.device).expand(len(frames), -1)
    cubes = gather_cubes(frames, every, config.patch_size, config.tubelet_size).float() / 255
    mean, deviation = cube_statistics(cubes)
    index = masks.masked.long()[..., None]
    mean, deviation = (x.squeeze(-2).gather(1, index.expand(-1, -1, 3))[..., None, :] for x in (mean, deviation))
    pixels = (prediction.float().view(*prediction.shape[:2], -1, 3) * deviation + mean).flatten(-2)
    place = index.expand(-1, -1, cubes.shape[-1])
    masked = cubes.scatter(1, place, torch.full_like(pixels, _GREY))
    filled = cubes.scatter(1, place, pixels.clamp(0, 1))
    return _to_frames(config, masked), _to_frames(config, filled)


def _to_frames(config: ModelConfig, cubes: Tensor) -> Tensor:
    """[B, tokens, P] → [B, T, H, W, 3]."""
    side, patch = config.image_size // config.patch_size, config.patch_size
    split = cubes.view(len(cubes), config.num_slots, side, side, config.tubelet_size, patch, patch, 3)
    ordered = split.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return ordered.reshape(len(cubes), config.num_frames, config.image_size, config.image_size, 3)


def draw_reconstructions(
    path: Path, config: ModelConfig, frames: Tensor, masks: TokenMasks, prediction: Tensor, names: list[str], title: str
) -> None:
    """PNG of up to three clips side by side, four frames each: original, what the encoder saw, reconstruction."""
    clips, moments = min(3, len(frames)), 4
    masks = TokenMasks(visible=masks.visible[:clips], masked=masks.masked[:clips])
    frames, prediction = frames[:clips], prediction.detach()[:clips]
    masked, filled = reconstruct(config, frames, masks, prediction)
    shown = torch.linspace(0, config.num_frames - 1, moments).long().tolist()
    figure, axes = plt.subplots(
        3, moments * clips, figsize=(1.5 * moments * clips, 5), layout="constrained", squeeze=False
    )
    rows = (("original", frames.float() / 255), ("visible", masked), ("reconstruction", filled))
    for line, (label, pictures) in enumerate(rows):
        axes[line, 0].set_ylabel(label, fontsize=9)
        for column in range(moments * clips):
            clip, moment = divmod(column, moments)
            axis = axes[line, column]
            axis.imshow(pictures[clip, shown[moment]].cpu().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if line == 0:
                name = f"{shorten(names[clip])}\n" if moment == 0 else "\n"
                axis.set_title(f"{name}frame {shown[moment]}", fontsize=9, loc="left", parse_math=False)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=90)
