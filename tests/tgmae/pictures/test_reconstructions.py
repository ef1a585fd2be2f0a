"""Reconstructions put each token back where it came from.

Dimensions: B clips, T frames, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kernels.masked_mse import normalised_targets
from tgmae.config.model import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.pictures.reconstructions import draw_reconstructions, reconstruct

CONFIGS = [
    ModelConfig(image_size=32, num_frames=4, patch_size=8, tubelet_size=2),
    ModelConfig(image_size=21, num_frames=3, patch_size=7, tubelet_size=3),
    ModelConfig(image_size=32, num_frames=2, patch_size=16, tubelet_size=1),
]


def random_case(config: ModelConfig, seed: int, batch: int = 2) -> tuple[Tensor, TokenMasks]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    order = torch.rand(batch, config.num_tokens, generator=generator).argsort(1).to(torch.int32)
    count = config.num_tokens * 2 // 3
    return frames, TokenMasks(visible=order[:, count:].sort(1).values, masked=order[:, :count].sort(1).values)


def masked_pixels(config: ModelConfig, masks: TokenMasks) -> Tensor:
    """Return whether each pixel is masked, bool [B, T, H, W], written out token by token."""
    side, size, patch = config.image_size // config.patch_size, config.image_size, config.patch_size
    marks = torch.zeros(len(masks.masked), config.num_frames, size, size, dtype=torch.bool)
    for clip, tokens in enumerate(masks.masked.tolist()):
        for token in tokens:
            slot, row, column = token // side**2, token // side % side, token % side
            t, y, x = slot * config.tubelet_size, row * patch, column * patch
            marks[clip, t : t + config.tubelet_size, y : y + patch, x : x + patch] = True
    return marks


@pytest.mark.parametrize("config", CONFIGS)
def test_true_targets_give_the_original(config: ModelConfig) -> None:
    frames, masks = random_case(config, seed=1)
    frames[:, :, :7, :7] = 90  # a cube without variance
    targets = normalised_targets(frames, masks.masked, config.patch_size, config.tubelet_size, torch.float32)
    _, filled = reconstruct(config, frames, masks, targets)
    assert filled.dtype == torch.float32
    torch.testing.assert_close(filled, frames.float() / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_visible_patches_are_untouched_and_masked_ones_grey(config: ModelConfig) -> None:
    frames, masks = random_case(config, seed=2)
    prediction = torch.randn(*masks.masked.shape, config.values_per_token, generator=torch.Generator().manual_seed(3))
    masked, filled = reconstruct(config, frames, masks, prediction)
    marks, original = masked_pixels(config, masks), frames.float() / 255
    for picture in (masked, filled):
        assert torch.equal(picture[~marks], original[~marks])
        assert picture.min() >= 0
        assert picture.max() <= 1
    assert (masked[marks] == 0.5).all()
    assert (filled[marks] - original[marks]).abs().mean() > 0.1


def test_predicting_zero_gives_each_cubes_mean() -> None:
    config = CONFIGS[0]
    frames, masks = random_case(config, seed=4)
    zero = torch.zeros(*masks.masked.shape, config.values_per_token)
    _, filled = reconstruct(config, frames, masks, zero)
    token = int(masks.masked[0, 0])
    slot, row, column = token // 16, token // 4 % 4, token % 4
    cube = (0, slice(2 * slot, 2 * slot + 2), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
    mean = (frames[cube].float() / 255).mean((0, 1, 2))
    torch.testing.assert_close(filled[cube], mean.expand(2, 8, 8, 3), rtol=0, atol=1e-6)


def test_bfloat16_predictions_are_shown() -> None:
    config = CONFIGS[0]
    frames, masks = random_case(config, seed=5)
    targets = normalised_targets(frames, masks.masked, config.patch_size, config.tubelet_size, torch.float32)
    _, filled = reconstruct(config, frames, masks, targets.bfloat16())
    torch.testing.assert_close(filled, frames.float() / 255, rtol=0, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5])
def test_draw_reconstructions_writes_a_picture(tmp_path: Path, batch: int) -> None:
    config = CONFIGS[0]
    frames, masks = random_case(config, seed=6, batch=batch)
    frames[0] = torch.tensor([250, 10, 20], dtype=torch.uint8)
    prediction = torch.zeros(*masks.masked.shape, config.values_per_token, requires_grad=True)
    path = tmp_path / "pictures" / "step.png"
    draw_reconstructions(path, config, frames, masks, prediction, [f"clip {i}" for i in range(batch)], "title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    for colour in ((250, 10, 20), (128, 128, 128)):  # of the clip, and the grey of masked patches (rounded up)
        assert (np.abs(pixels.astype(int) - colour).max(-1) <= 1).sum() > 1000


@pytest.mark.filterwarnings("error")
def test_a_name_in_letters_that_the_font_lacks_is_no_warning(tmp_path: Path) -> None:
    config = CONFIGS[0]
    frames, masks = random_case(config, seed=6, batch=1)
    prediction = torch.zeros(*masks.masked.shape, config.values_per_token)
    draw_reconstructions(tmp_path / "step.png", config, frames, masks, prediction, ["日本語.mp4"], "title")
