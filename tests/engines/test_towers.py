"""Towers against CLIP itself, and against plain implementations written here from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from PIL import Image
from torch import Tensor, nn

from engines.config import LastBlock
from engines.towers.clip_towers import (
    FrameTower,
    PatchTower,
    StudentTower,
    Tower,
    resize_matrix,
    resize_positions,
)
from tests.support.clip_models import randomize, small_clip, vit_b_32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The paper's scorer


def embed_naively(model: nn.Module, patches: Tensor, patch_size: int) -> Tensor:
    """Follow section 3.3 to the letter: resize every patch to CLIP's input, run all of CLIP, take the class token."""
    images = patches.view(-1, patch_size, patch_size, 3).permute(0, 3, 1, 2)
    size = model.visual.image_size
    resized = F.interpolate(images, size, mode="bicubic", antialias=True)
    return model.encode_image(resized, normalize=True)  # type: ignore[operator]


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize(
    ("vision", "patch_size"),
    [
        ({}, 16),
        ({}, 8),
        ({"image_size": 30, "patch_size": 10, "width": 24, "layers": 1, "head_width": 12}, 7),
        ({"image_size": (24, 36), "patch_size": 12}, 5),
        ({"ls_init_value": 0.3}, 6),
    ],
)
def test_patch_tower_is_clip_on_enlarged_patches(vision: dict[str, object], patch_size: int, quick_gelu: bool) -> None:
    model = small_clip(1, quick_gelu, **vision)
    patches = draw(9, patch_size**2 * 3)
    tower = PatchTower(model.visual, patch_size)
    torch.testing.assert_close(tower(patches), embed_naively(model, patches, patch_size), atol=2e-6, rtol=0)
    assert tower.name == f"patch{patch_size}"
    assert tower.input_shape == (patch_size**2 * 3,)


@pytest.mark.slow
def test_patch_tower_is_vit_b_32_on_enlarged_patches() -> None:
    model = vit_b_32()
    patches = draw(6, 16 * 16 * 3)
    tower = PatchTower(model.visual, 16)
    torch.testing.assert_close(tower(patches), embed_naively(model, patches, 16), atol=1e-5, rtol=0)


def test_activation_and_heads_matter() -> None:
    """Weights do not distinguish these models, so a tower could pick the wrong function without noticing."""
    model = small_clip(1, quick_gelu=True)
    patches = draw(4, 8 * 8 * 3)
    ours = PatchTower(model.visual, 8)(patches)
    for other in (small_clip(1, quick_gelu=False), small_clip(1, quick_gelu=True, head_width=16)):
        other.load_state_dict(model.state_dict())
        assert (PatchTower(other.visual, 8)(patches) - ours).abs().max() > 1e-3


def test_a_tower_is_a_copy() -> None:
    """An engine may convert and move a tower, while CLIP still has to encode captions."""
    model = small_clip(1)
    for tower in (PatchTower(model.visual, 8), FrameTower(model.visual, 32, 32, 8, "sclip")):
        tower.half()
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert {weight.dtype for weight in tower.parameters()} == {torch.float16}


# The dense variants


def softmax_attention(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Return the attention weights [L, L] of one head."""
    logits = q @ k.T / math.sqrt(q.shape[1]) + bias
    weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    return weights / weights.sum(dim=1, keepdim=True)


def neighbourhood(rows: int, columns: int) -> Tensor:
    """Return NACLIP's Gaussian (deviation 5 tokens) around each patch; 0 for the class token."""
    bias = torch.zeros(rows * columns + 1, rows * columns + 1)
    for a in range(rows * columns):
        for b in range(rows * columns):
            squared = (a // columns - b // columns) ** 2 + (a % columns - b % columns) ** 2
            bias[1 + a, 1 + b] = math.exp(-squared / (2 * 5.0**2))
    return bias


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_frame_tower(model: nn.Module, frame: Tensor, patch_size: int, kind: str) -> Tensor:
    """Embed one frame [3, H, W] → [G, E], head by head; all blocks but the last are open_clip's own."""
    visual = model.visual
    rows, columns = frame.shape[1] // patch_size, frame.shape[2] // patch_size
    side = visual.conv1.kernel_size[0]
    resized = F.interpolate(frame[None], (rows * side, columns * side), mode="bicubic", antialias=True)
    tokens = visual.conv1(resized)[0].flatten(1).T
    x = torch.cat([visual.class_embedding[None], tokens]) + resize_positions(visual, rows, columns)
    x = visual.ln_pre(x)[None]
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    x = x[0]
    normed, attention = last.ln_1(x), last.attn
    q, k, v = (normed @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=1)
    width = q.shape[1] // attention.num_heads
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        qh, kh, vh = q[:, part], k[:, part], v[:, part]
        if kind == "maskclip":
            heads.append(vh)
        elif kind == "sclip":
            heads.append((softmax_attention(qh, qh) + softmax_attention(kh, kh)) @ vh)
        elif kind == "clearclip":
            heads.append(softmax_attention(qh, qh) @ vh)
        else:
            heads.append(softmax_attention(kh, kh, neighbourhood(rows, columns)) @ vh)
    mixed = torch.cat(heads, dim=1) @ attention.out_proj.weight.T + attention.out_proj.bias
    if kind in ("maskclip", "sclip"):
        x = x + last.ls_1(mixed)
        x = x + last.ls_2(last.mlp(last.ln_2(x)))
    else:
        x = mixed
    x = visual.ln_post(x[1:]) @ visual.proj
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.slow
@pytest.mark.parametrize("vision", [{}, {"layers": 1, "ls_init_value": 0.3}])
@pytest.mark.parametrize(("height", "width", "patch_size"), [(32, 32, 8), (48, 80, 16), (21, 14, 7)])
@pytest.mark.parametrize("kind", ["maskclip", "sclip", "clearclip", "naclip"])
def test_frame_tower_equals_the_papers(
    kind: LastBlock, height: int, width: int, patch_size: int, vision: dict[str, object]
) -> None:
    model = small_clip(2, **vision)
    frames = draw(2, 3, height, width, seed=3)
    tower = FrameTower(model.visual, height, width, patch_size, kind)
    assert tower.input_shape == (3, height, width)
    expected = torch.stack([plain_frame_tower(model, frame, patch_size, kind) for frame in frames])
    torch.testing.assert_close(tower(frames), expected, atol=3e-6, rtol=0)


def test_the_variants_differ() -> None:
    model, frames = small_clip(2), draw(1, 3, 32, 32)
    kinds: tuple[LastBlock, ...] = ("maskclip", "sclip", "clearclip", "naclip")
    outputs = [FrameTower(model.visual, 32, 32, 8, kind)(frames) for kind in kinds]
    for number, one in enumerate(outputs):
        for other in outputs[:number]:
            assert (one - other).abs().max() > 1e-3


def test_tokens_are_in_reading_order() -> None:
    """In a maskclip tower without earlier attention, a change in one patch shows at that patch only."""
    model = small_clip(2, layers=1)
    tower = FrameTower(model.visual, 24, 32, 8, "maskclip")
    frame = torch.zeros(1, 3, 24, 32)
    changed = frame.clone()
    changed[:, :, 8:16, 24:32] = 1.0  # row 1, column 3 of 3 × 4
    moved = (tower(changed) - tower(frame)).abs().amax(-1)[0]
    assert moved.argmax() == 7
    assert set(moved.nonzero().flatten().tolist()) == {7}  # CLIP's patches are as large: nothing is resized


# Resizing


@pytest.mark.parametrize(("size", "target"), [(16, 224), (7, 30), (224, 448), (48, 24), (5, 5)])
def test_resize_matrix_is_torchs_resize(size: int, target: int) -> None:
    image = draw(3, size, size + 2).double()
    expected = F.interpolate(image[None], (target, target), mode="bicubic", antialias=True)[0]
    ours = resize_matrix(size, target) @ image @ resize_matrix(size + 2, target).T
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("size", "target"), [(16, 224), (100, 40)])
def test_resize_matrix_is_pils_resize(size: int, target: int) -> None:
    """open_clip prepares images with PIL, which rounds to bytes and clips after each axis."""
    image = np.random.default_rng(0).integers(60, 196, (size, size), np.uint8)
    theirs = np.asarray(Image.fromarray(image).resize((target, target), Image.Resampling.BICUBIC)).astype(float)
    matrix = resize_matrix(size, target)
    ours = (matrix @ torch.from_numpy(image).double() @ matrix.T).clamp(0, 255).numpy()
    assert np.abs(ours - theirs).max() <= 1.5
    assert abs((ours - theirs).mean()) < 0.02


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (14, 14), (3, 5)])
def test_positions_are_resized_as_open_clip_does(rows: int, columns: int) -> None:
    model = small_clip(4)
    other = small_clip(5, image_size=(rows * 8, columns * 8))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    resize_pos_embed(state, other)
    ours = resize_positions(model.visual, rows, columns)
    torch.testing.assert_close(ours, state["visual.positional_embedding"], atol=1e-6, rtol=0)


# Half precision and the student


def test_half_precision_keeps_unit_length() -> None:
    model = small_clip(6)
    towers: list[Tower] = [PatchTower(model.visual, 8), StudentTower(8, 32, 16)]
    for tower in towers:
        randomize(tower)
        patches = draw(16, 192)
        exact = tower(patches)
        half = tower.half()(patches.half())
        assert half.dtype == torch.float16
        assert (half.float().norm(dim=-1) - 1).abs().max() < 2e-3
        assert (half.float() - exact).abs().max() < 2e-2


def test_embeddings_of_large_activations_stay_finite_in_half_precision() -> None:
    """From 256 on, squares of the projection's values overflow float16."""
    tower = StudentTower(4, 8, 16)
    tower.layers[-1].bias.data.fill_(400.0)
    half = tower.half()(torch.zeros(2, 48, dtype=torch.float16))
    torch.testing.assert_close(half, torch.full((2, 16), 0.25, dtype=torch.float16))


def test_student_is_a_perceptron_of_unit_vectors() -> None:
    tower = StudentTower(8, 32, 16)
    patches = draw(5, 192)
    first, second, third = (tower.layers[place] for place in (0, 2, 4))
    hidden = F.gelu(second(F.gelu(first(patches))))
    expected = third(hidden) / third(hidden).norm(dim=1, keepdim=True)
    torch.testing.assert_close(tower(patches), expected)
