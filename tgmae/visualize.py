"""Pictures: reconstructions during training, the loss curve, a contact sheet of a data set."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.decode import DecodeError, decode_frames
from kernels.gather_tokens import gather_cubes
from kernels.masked_mse import cube_statistics
from tgmae.config import ModelConfig
from tgmae.manifest import Manifest
from tgmae.metrics import read_metrics
from tgmae.types import MaskPlan

_GREY = 0.5  # of masked patches


def reconstruct(config: ModelConfig, frames: Tensor, plan: MaskPlan, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Masked clips and reconstructions, both float32 [B, T, H, W, 3] in 0 … 1.

    A prediction is of normalised cubes; it is shown with the true cube's mean and deviation, as VideoMAE's own pictures
    are. frames uint8 [B, T, H, W, 3], prediction [B, M, P].
    """
    every = torch.arange(config.num_tokens, dtype=torch.int32, device=frames.device).expand(len(frames), -1)
    cubes = gather_cubes(frames, every, config.patch_size, config.tubelet_size).float() / 255
    mean, deviation = cube_statistics(cubes)
    index = plan.masked.long()[..., None]
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
    path: Path, config: ModelConfig, frames: Tensor, plan: MaskPlan, prediction: Tensor, names: list[str], title: str
) -> None:
    """PNG of up to three clips side by side, four frames each: original, what the encoder saw, reconstruction."""
    clips, moments = min(3, len(frames)), 4
    plan = MaskPlan(visible=plan.visible[:clips], masked=plan.masked[:clips])
    frames, prediction = frames[:clips], prediction.detach()[:clips]
    masked, filled = reconstruct(config, frames, plan, prediction)
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
    _save(figure, path, dpi=90)


def draw_loss(run_dir: Path) -> Path | None:
    """PNG of the run's loss and the share of time each stage takes, from its metrics; None where there are none yet."""
    lines = read_metrics(run_dir)
    if not lines:
        return None
    steps = [line["step"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained")
    top.plot(steps, [line["loss"] for line in lines], color="tab:blue", label="loss on masked tokens")
    top.axhline(1.0, color="tab:grey", linestyle="--", linewidth=1, label="predicting zero")
    top.set_ylabel("MSE of normalised pixels")
    top.legend(frameon=False)
    for name in (name for name in lines[-1] if name.endswith("_share")):
        label = "waiting for input" if name == "wait_share" else name.removesuffix("_share")
        style = {"color": "black", "linewidth": 2} if name == "wait_share" else {"linewidth": 1}
        bottom.plot(steps, [100 * line.get(name, np.nan) for line in lines], label=label, **style)
    bottom.set_ylabel("% of the time")
    bottom.set_ylim(0, 105)
    bottom.set_xlabel("optimiser step; load, score and mask run beside the step")
    bottom.legend(frameon=False, fontsize=7, ncols=4)
    path = run_dir / "loss.png"
    _save(figure, path, dpi=110)
    return path


def draw_contact_sheet(manifest: Manifest, path: Path, count: int, seed: int) -> int:
    """PNG of the middle frames of up to `count` videos drawn at random; returns how many could be read."""
    if count < 1:
        raise ValueError(f"expected at least one video on the sheet, got {count}")
    rows = sorted(np.random.default_rng(seed).permutation(len(manifest))[:count].tolist())
    pictures: list[tuple[NDArray[np.uint8], str]] = []
    for row in rows:
        video = manifest[row]
        try:
            [(_, frame)] = decode_frames(manifest.file(row), video, [video.num_frames // 2], seek=True)
        except DecodeError as error:
            pictures.append((np.zeros((9, 16, 3), np.uint8), f"{shorten(video.path)}\n{shorten(str(error))}"))
            continue
        picture = np.rot90(frame.to_ndarray(format="rgb24"), -video.rotation // 90).astype(np.uint8)
        name = f"{video.label}: {Path(video.path).name}" if video.label else video.path
        words = shorten(video.captions[0] if video.captions else name)
        pictures.append((picture, f"{words}\n{video.width}×{video.height} {video.codec}, {video.num_frames} frames"))
    columns = min(6, len(pictures))
    lines = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 2.4 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (picture, title) in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=7, parse_math=False)
    _save(figure, path, dpi=90)
    return len(pictures)


def shorten(text: str) -> str:
    """A title that stays within its picture."""
    return text if len(text) <= 42 else f"{text[:20]} … {text[-19:]}"


def _save(figure: Figure, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
