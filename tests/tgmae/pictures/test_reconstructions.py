"""Reconstructions put each token back where it came from.

Dimensions: B clips, T frames, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dali_pipelines.types import ClipBatch, ClipRequest, CropBox
from kernels.masked_mse import normalised_targets
from tests.support.videos import make_video
from tgmae.config.model import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.pictures.figures import HIDDEN, Page, fit, text_width, wrap
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
    drawn = reconstruct(config, frames, masks, targets)
    assert drawn.filled.dtype == torch.float32
    torch.testing.assert_close(drawn.filled, frames.float() / 255, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.prediction, drawn.target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_visible_patches_are_untouched_and_hidden_ones_marked(config: ModelConfig) -> None:
    frames, masks = random_case(config, seed=2)
    prediction = torch.randn(*masks.masked.shape, config.values_per_token, generator=torch.Generator().manual_seed(3))
    drawn = reconstruct(config, frames, masks, prediction)
    marks, original = masked_pixels(config, masks), frames.float() / 255
    patches = drawn.hidden.repeat_interleave(config.tubelet_size, 1)
    patches = patches.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)
    assert torch.equal(patches, marks)
    assert torch.equal(drawn.filled[~marks], original[~marks])
    assert (drawn.filled[marks] - original[marks]).abs().mean() > 0.1
    for images in (drawn.filled, drawn.prediction, drawn.target):
        assert images.min() >= 0
        assert images.max() <= 1
    assert (drawn.prediction[~marks] == 1).all()
    assert (drawn.target[~marks] == 1).all()


def test_a_prediction_alone_knows_nothing_of_the_clip() -> None:
    """It is drawn around mid-grey, with the same contrast for every patch, dark and bright."""
    config = CONFIGS[0]
    frames, masks = random_case(config, seed=4)
    others, _ = random_case(config, seed=5)
    prediction = torch.randn(*masks.masked.shape, config.values_per_token, generator=torch.Generator().manual_seed(3))
    drawn = [reconstruct(config, clips, masks, prediction) for clips in (frames, others // 4)]
    assert torch.equal(drawn[0].prediction, drawn[1].prediction)
    marks = masked_pixels(config, masks)
    assert drawn[0].prediction[marks].mean() == pytest.approx(0.5, abs=0.01)
    assert drawn[0].prediction[marks].std() == pytest.approx(0.2, abs=0.01)


def test_predicting_zero_gives_each_cubes_mean() -> None:
    config = CONFIGS[0]
    frames, masks = random_case(config, seed=4)
    zero = torch.zeros(*masks.masked.shape, config.values_per_token)
    drawn = reconstruct(config, frames, masks, zero)
    token = int(masks.masked[0, 0])
    slot, row, column = token // 16, token // 4 % 4, token % 4
    cube = (0, slice(2 * slot, 2 * slot + 2), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
    mean = (frames[cube].float() / 255).mean((0, 1, 2))
    torch.testing.assert_close(drawn.filled[cube], mean.expand(2, 8, 8, 3), rtol=0, atol=1e-6)
    assert (drawn.prediction[cube] == 0.5).all()


def test_bfloat16_predictions_are_shown() -> None:
    config = CONFIGS[0]
    frames, masks = random_case(config, seed=5)
    targets = normalised_targets(frames, masks.masked, config.patch_size, config.tubelet_size, torch.float32)
    drawn = reconstruct(config, frames, masks, targets.bfloat16())
    torch.testing.assert_close(drawn.filled, frames.float() / 255, rtol=0, atol=0.01)


def batch_of(frames: Tensor, **about: Any) -> ClipBatch:
    crop = CropBox(x=0, y=0, width=1, height=1)
    request = ClipRequest(row=0, epoch=0, position=0, frames=(0,), crop=crop, flip=False, caption=0, mask_seed=0)
    videos = (make_video(**about),) * len(frames)
    return ClipBatch(frames=frames, requests=(request,) * len(frames), videos=videos)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_draw_reconstructions_writes_a_picture(tmp_path: Path, batch: int) -> None:
    config = CONFIGS[0]
    frames, masks = random_case(config, seed=6, batch=batch)
    frames[0] = torch.tensor([250, 10, 20], dtype=torch.uint8)
    prediction = torch.zeros(*masks.masked.shape, config.values_per_token, requires_grad=True)
    path = tmp_path / "pictures" / "step.png"
    draw_reconstructions(path, config, batch_of(frames), masks, prediction, "title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width < 1650
        pixels = np.asarray(picture.convert("RGB"))
    for colour in ((250, 10, 20), (int(HIDDEN[1:3], 16),) * 3):  # of the clip, and of hidden patches
        assert (np.abs(pixels.astype(int) - colour).max(-1) <= 1).sum() > 1000


@pytest.mark.filterwarnings("error")
def test_a_line_break_in_a_caption_is_a_space() -> None:
    assert wrap("a man\ngets up", 5, 9) == ["a man gets up"]
    assert fit("new\nline.mp4", 5, 9) == "new line.mp4"


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_words_fit_their_clip_in_any_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caption is broken into two lines, the file's name stands below it, and a missing letter is no warning."""
    config, written = CONFIGS[0], list[tuple[float, str, float]]()
    write = Page.write

    def note(page: Page, left: float, top: float, text: str, size: float = 8, *_: Any, **style: Any) -> None:
        written.extend((left, line, size) for line in text.split("\n"))
        write(page, left, top, text, size, *_, **style)

    monkeypatch.setattr(Page, "write", note)
    frames, masks = random_case(config, seed=6, batch=1)
    prediction = torch.zeros(*masks.masked.shape, config.values_per_token)
    for caption in ("椅子から立ち上がる男の人" * 10, "a man gets up from a chair " * 10):
        batch = batch_of(frames, path=f"{'日本語' * 30}.mp4", captions=(caption,))
        written.clear()
        draw_reconstructions(tmp_path / "step.png", config, batch, masks, prediction, "title")
        assert any(line.startswith(f"“{caption[:9]}") for _, line, _ in written)
        assert any(line.endswith(" …") for _, line, _ in written)
        assert any("…" in line and line.endswith("語.mp4") for _, line, _ in written)
        with Image.open(tmp_path / "step.png") as picture:
            width = picture.width / 100
        assert all(left + text_width(line, size) < width for left, line, size in written)
