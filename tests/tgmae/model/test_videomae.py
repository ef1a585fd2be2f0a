"""The model learns, and predicts from visible tokens only: what parity and golden curves do not show by themselves."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.topk_mask import topk_mask
from tgmae.config.model import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE, sinusoid_table

SMALL = ModelConfig(
    image_size=32, num_frames=4, patch_size=8, width=48, depth=2, num_heads=3,
    decoder_width=48, decoder_depth=1, decoder_num_heads=3,
)  # fmt: skip


def batch(clips: int) -> tuple[torch.Tensor, TokenMasks]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(clips, 3, 4, 6, 6, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (4, 32, 32), mode="trilinear")
    scores = torch.rand(clips, SMALL.num_slots, SMALL.patches_per_slot, generator=generator)
    visible, masked = topk_mask(scores, 12)
    return smooth.permute(0, 2, 3, 4, 1).to(torch.uint8).contiguous(), TokenMasks(visible=visible, masked=masked)


@pytest.mark.slow
def test_memorises_a_batch() -> None:
    """Within 150 steps on two clips the loss falls from about 1 to well below a half."""
    torch.manual_seed(0)
    model = VideoMAE(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    frames, masks = batch(2)
    first = model(frames, masks)[0].item()
    for _ in range(150):
        loss = model(frames, masks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 0.9
    assert loss.item() < 0.3


def test_prediction_depends_on_visible_tokens_only() -> None:
    """Changing masked pixels changes no prediction; changing a visible pixel does."""
    torch.manual_seed(0)
    model = VideoMAE(SMALL)
    frames, masks = batch(1)
    before = model(frames, masks)[1]
    patch = int(masks.masked[0, 0])
    slot, place = divmod(patch, SMALL.patches_per_slot)
    row, column = divmod(place, 4)
    changed = frames.clone()
    changed[0, 2 * slot : 2 * slot + 2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 37
    assert torch.equal(model(changed, masks)[1], before)
    slot, place = divmod(int(masks.visible[0, 0]), SMALL.patches_per_slot)
    row, column = divmod(place, 4)
    changed = frames.clone()
    changed[0, 2 * slot, 8 * row, 8 * column] += 37
    assert not torch.equal(model(changed, masks)[1], before)


def test_wrong_frames_name_both_shapes() -> None:
    frames, masks = batch(1)
    with pytest.raises(ValueError, match=r"expected uint8 frames \[B, 4, 32, 32, 3\], got torch.uint8 \[1, 3, 32"):
        VideoMAE(SMALL)(frames[:, :3], masks)
    with pytest.raises(ValueError, match=r"got torch.float32"):
        VideoMAE(SMALL)(frames.float(), masks)


def test_positions_are_the_published_formula() -> None:
    """sin(p / 10000^(2i/D)) in even channels, cos in odd ones, for a few entries by hand."""
    table = sinusoid_table(300, 48)
    for position, channel in ((0, 0), (0, 1), (7, 10), (7, 11), (299, 46), (299, 47)):
        angle = torch.tensor(position / 10000 ** (2 * (channel // 2) / 48), dtype=torch.float64)
        expected = angle.sin() if channel % 2 == 0 else angle.cos()
        assert table[position, channel].item() == pytest.approx(expected.item(), abs=1e-7)


def test_initial_weights_are_videomaes() -> None:
    """Every parameter is uniform within a bound, constant, or (mask token) a normal cut off at one deviation."""
    config = ModelConfig(
        image_size=32, num_frames=4, width=96, depth=2, num_heads=2,
        decoder_width=64, decoder_depth=1, decoder_num_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, parameter in VideoMAE(config).named_parameters():
        values = parameter.detach().double()
        if name == "mask_token":
            assert values.abs().max() <= 0.02
            inside, density = math.erf(1 / math.sqrt(2)), math.exp(-0.5) / math.sqrt(2 * math.pi)
            assert values.std().item() == pytest.approx(0.02 * math.sqrt(1 - 2 * density / inside), rel=0.2)
        elif name.startswith("patch_embed") or name == "to_decoder.weight":
            inputs = 1536 if name.startswith("patch_embed") else 96
            check_uniform(values, 1 / math.sqrt(inputs))  # torch's default, of the bias too
        elif "norm" in name:
            assert values.unique().tolist() == [1.0 if name.endswith("weight") else 0.0], name
        elif name.endswith("bias"):
            assert not values.any(), name
        else:
            check_uniform(values, math.sqrt(6 / sum(values.shape)))  # Xavier; queries, keys and values as one matrix


def check_uniform(values: torch.Tensor, bound: float) -> None:
    assert 0.95 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01 if values.dim() > 1 else 0.1)
