"""The picture of masks shows the frames, the scores and, in hatched grey, exactly what each strategy masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dali_pipelines.types import ClipBatch, ClipRequest, CropBox
from tests.support.videos import make_video
from tgmae.config.masks import MaskConfig, MaskKind
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.masks.noise_scorer import NoiseScorer
from tgmae.pictures.figures import HIDDEN, Page
from tgmae.pictures.masks import draw_masks

CONFIG = InputConfig(
    model=ModelConfig(image_size=32, patch_size=8, num_frames=6), mask=MaskConfig(ratio=0.5, frames_per_tubelet=1)
)


@dataclass(frozen=True)
class Shown:
    """An image on a page, and which of its patches are hidden."""

    image: NDArray[Any]
    hidden: NDArray[np.bool_] | None
    scale: dict[str, Any]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """Images of clips as they are put on a page; the legend is left out."""
    found: list[Shown] = []
    show = Page.show

    def note(
        page: Page, left: float, top: float, width: float, height: float, image: Any, hidden: Any = None, **scale: Any
    ) -> None:
        show(page, left, top, width, height, image, hidden, **scale)
        if width == height:
            found.append(Shown(image, hidden, scale))

    monkeypatch.setattr(Page, "show", note)
    return found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(Page, "write", lambda page, left, top, text, *_, **__: found.append(text))
    return found


def clips(count: int, caption: str = "a cat") -> ClipBatch:
    """Make clips of bright noise."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(100, 256, (count, 6, 32, 32, 3), dtype=torch.uint8, generator=generator)
    crop = CropBox(x=0, y=0, width=1, height=1)
    requests = tuple(
        ClipRequest(row=n, epoch=0, position=n, frames=(0,) * 6, crop=crop, flip=False, caption=0, mask_seed=n)
        for n in range(count)
    )
    videos = tuple(make_video(path=f"{n}.mp4", captions=(caption,)) for n in range(count))
    return ClipBatch(frames=frames, requests=requests, videos=videos)


def scores(batch: ClipBatch) -> dict[MaskKind, torch.Tensor]:
    """Make scores for tgm, at random, and for the two strategies that need no text."""
    found: dict[MaskKind, torch.Tensor] = {
        "tgm": torch.randn(len(batch.requests), 3, 16, generator=torch.Generator().manual_seed(1))
    }
    for kind in ("random", "tube"):
        found[kind] = NoiseScorer(kind, 3, 16, torch.device("cpu"))(batch)
    return found


def hidden(image: Shown) -> set[int]:
    assert image.hidden is not None
    return set(np.flatnonzero(image.hidden))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_png_is_grey_where_patches_are_hidden(tmp_path: Path, count: int) -> None:
    """Two clips stand side by side, and the picture fits a screen."""
    path = tmp_path / "new" / "masks.png"
    draw_masks(path, CONFIG, clips(count), scores(clips(count)))
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width < 1650
        assert picture.height < (500 if count < 3 else 800)
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels == int(HIDDEN[1:3], 16)).all(-1).mean() > 0.02
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.slow
def test_what_is_hidden_is_what_is_masked(tmp_path: Path, shown: list[Shown]) -> None:
    """Compare every image, of the first and last slot, with a sort: frame, scores and the four masks."""
    batch = clips(2)
    values = scores(batch)["tgm"]
    draw_masks(tmp_path / "masks.png", CONFIG, batch, scores(batch))
    assert len(shown) == 2 * 2 * 6
    for number in range(4):
        clip, slot = divmod(number, 2)
        slot = (0, 2)[slot]
        frame, heat, top, bottom, random, tube = shown[6 * number : 6 * number + 6]
        original = batch.frames[clip, 2 * slot].numpy()
        for image in (frame, top, bottom, random, tube):
            np.testing.assert_array_equal(image.image, original)
        assert frame.hidden is None
        np.testing.assert_array_equal(heat.image, values[clip, slot].view(4, 4).numpy())
        # One scale of colours for all clips.
        assert (heat.scale["vmin"], heat.scale["vmax"]) == (float(values.min()), float(values.max()))
        order = np.argsort(-values[clip, slot].numpy())
        assert hidden(top) == set(order[:8])
        assert hidden(bottom) == set(order[8:])
        draws = np.random.default_rng(batch.requests[clip].mask_seed).random((3, 16), np.float32)
        assert hidden(random) == set(np.argsort(-draws[slot])[:8])
        assert hidden(tube) == set(np.argsort(-draws[0])[:8])


def test_the_masks_ratio_is_the_configs(tmp_path: Path, shown: list[Shown]) -> None:
    config = replace(CONFIG, mask=MaskConfig(ratio=0.75, frames_per_tubelet=1, order="bottom"))
    draw_masks(tmp_path / "masks.png", config, clips(1), scores(clips(1)))
    assert [len(hidden(image)) for image in shown[2:6]] == [12] * 4


@pytest.mark.slow
def test_scores_have_colour_bars_with_units(tmp_path: Path, written: list[str]) -> None:
    """Scores are drawn for tgm and mgm only, and every column of a clip has its title."""
    values = torch.linspace(-0.25, 3, 48).view(1, 3, 16)
    kinds: dict[MaskKind, torch.Tensor] = dict.fromkeys(("tgm", "mgm", "mgm_box", "mgmae", "random", "tube"), values)
    draw_masks(tmp_path / "masks.png", CONFIG, clips(1, r"$5 & \frac of [b] _it_"), kinds)
    titles = ["frame", "similarity", "tgm, top", "tgm, bottom", "motion", "mgm", "mgm_box", "mgmae", "random", "tube"]
    assert [text for text in written if text in titles] == titles
    assert written.count("−0.25") == 2
    assert [text for text in written if text.startswith("3.00")] == [
        "3.00  similarity: cosine of patch and caption",
        "3.00  motion: pixels of the video, from a frame to the next",
    ]
    assert r"“$5 & \frac of [b] _it_”" in written
    assert "0.mp4" in written
