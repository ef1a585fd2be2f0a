"""The picture of masks shows the frames, the scores and, in black, exactly what each strategy masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import tgmae.pictures.masks
from dali_pipelines.types import ClipBatch, ClipRequest, CropBox
from tests.support.videos import clip_batch, make_video
from tgmae.config.masks import MaskConfig, MaskKind
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.masks.noise_scorer import NoiseScorer
from tgmae.pictures.masks import draw_masks

CONFIG = InputConfig(
    model=ModelConfig(image_size=32, patch_size=8, num_frames=6), mask=MaskConfig(ratio=0.5, frames_per_tubelet=1)
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    videos = [make_video(path=f"{n}.mp4", captions=("a cat", r"$5 & \frac of [b] _it_")) for n in range(3)]
    write_manifest(tmp_path / "manifest.parquet", videos, tmp_path)
    return read_manifest(tmp_path / "manifest.parquet")


def clips(count: int) -> ClipBatch:
    """Make clips of bright noise, in which only blacked-out patches are black."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(100, 256, (count, 6, 32, 32, 3), dtype=torch.uint8, generator=generator)
    crop = CropBox(x=0, y=0, width=1, height=1)
    requests = tuple(
        ClipRequest(row=n % 3, epoch=0, position=n, frames=(0,) * 6, crop=crop, flip=False, caption=n % 2, mask_seed=n)
        for n in range(count)
    )
    return clip_batch(frames, requests)


def scores(batch: ClipBatch) -> dict[MaskKind, torch.Tensor]:
    """Make scores for tgm, at random, and for the two strategies that need no text."""
    found: dict[MaskKind, torch.Tensor] = {
        "tgm": torch.randn(len(batch.requests), 3, 16, generator=torch.Generator().manual_seed(1))
    }
    for kind in ("random", "tube"):
        found[kind] = NoiseScorer(kind, 3, 16, torch.device("cpu"))(batch)
    return found


def black_patches(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which of the 16 patches of a picture are black. No patch may be black in part."""
    dark = (picture < 50).reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, -1)
    assert (dark.all(1) == dark.any(1)).all()
    return dark.all(1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_the_png_is_as_large_as_its_clips_need(manifest: Manifest, tmp_path: Path, count: int) -> None:
    """Two clips stand side by side, with six images each: 1.35 inches per image, 3.3 per line, at 100 dpi."""
    path = tmp_path / "new" / "masks.png"
    draw_masks(path, CONFIG, manifest, clips(count), scores(clips(count)))
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == (810 if count == 1 else 1620)
        assert picture.height > 330 * -(-count // 2)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (pixels == 25).all(-1).mean() > 0.01  # some patches are masked
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.slow
def test_black_is_what_is_masked(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare every image, of the first and last slot, with a sort: frame, scores and the four masks."""
    shown: list[tuple[NDArray[Any], dict[str, float]]] = []
    monkeypatch.setattr(
        tgmae.pictures.masks, "_show", lambda _, picture, title, **limits: shown.append((picture, limits))
    )
    batch = clips(2)
    values = scores(batch)["tgm"]
    draw_masks(tmp_path / "masks.png", CONFIG, manifest, batch, scores(batch))
    assert len(shown) == 2 * 2 * 6
    for number in range(4):
        clip, slot = divmod(number, 2)
        slot = (0, 2)[slot]
        frame, heat, top, bottom, random, tube = (picture for picture, _ in shown[6 * number : 6 * number + 6])
        original = batch.frames[clip, 2 * slot].numpy()
        np.testing.assert_array_equal(frame, original)
        np.testing.assert_array_equal(heat, values[clip, slot].view(4, 4).numpy())
        # One scale of colours for all clips.
        limits = shown[6 * number + 1][1]
        assert limits == {"vmin": float(values.min()), "vmax": float(values.max())}
        order = np.argsort(-values[clip, slot].numpy())
        assert set(np.flatnonzero(black_patches(top))) == set(order[:8])
        assert set(np.flatnonzero(black_patches(bottom))) == set(order[8:])
        draws = np.random.default_rng(batch.requests[clip].mask_seed).random((3, 16), np.float32)
        assert set(np.flatnonzero(black_patches(random))) == set(np.argsort(-draws[slot])[:8])
        assert set(np.flatnonzero(black_patches(tube))) == set(np.argsort(-draws[0])[:8])
        visible = np.kron(~black_patches(top).reshape(4, 4), np.ones((8, 8), bool))
        np.testing.assert_array_equal(top[visible], original[visible])


def test_the_masks_ratio_is_the_configs(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[NDArray[Any]] = []
    monkeypatch.setattr(tgmae.pictures.masks, "_show", lambda _, picture, title, **__: shown.append(picture))
    config = replace(CONFIG, mask=MaskConfig(ratio=0.75, frames_per_tubelet=1, order="bottom"))
    draw_masks(tmp_path / "masks.png", config, manifest, clips(1), scores(clips(1)))
    assert [int(black_patches(picture).sum()) for picture in shown[2:6]] == [12] * 4


@pytest.mark.slow
def test_motion_stands_beside_text(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are drawn for tgm and mgm only, and every image of a clip has its title."""
    shown: list[str] = []
    monkeypatch.setattr(tgmae.pictures.masks, "_show", lambda _, picture, title, **__: shown.append(title))
    values = torch.rand(1, 3, 16)
    kinds: dict[MaskKind, torch.Tensor] = dict.fromkeys(("tgm", "mgm", "mgm_box", "mgmae", "random", "tube"), values)
    draw_masks(tmp_path / "masks.png", CONFIG, manifest, clips(1), kinds)
    line = ["frame", "similarity", "tgm, top", "tgm, bottom", "motion", "mgm", "mgm_box", "mgmae", "random", "tube"]
    assert shown == line * 2
    with Image.open(tmp_path / "masks.png") as picture:
        assert picture.width == 1350
