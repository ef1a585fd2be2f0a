"""Properties of every mask: disjoint, complete, sorted, the exact ratio in each slot, decided by the request alone.

Dimensions: B clips, S slots, N patches a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_pipelines.types import ClipBatch, ClipRequest, CropBox
from engines.config import CLIPConfig
from tests.support.videos import clip_batch
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.noise_scorer import NoiseScorer
from tgmae.masks.scorer import make_scorer
from tgmae.masks.select import select_masks
from tgmae.model.token_masks import TokenMasks

CPU = torch.device("cpu")
KINDS = ("random", "tube")

# Image, patch, frames, tubelet, ratio: production, the demo, one slot, odd sides, two patches a slot short of four.
GEOMETRIES = [
    (224, 16, 16, 2, 0.9),
    (96, 16, 16, 2, 0.75),
    (80, 16, 2, 2, 0.6),
    (56, 8, 3, 1, 0.55),
    (32, 16, 8, 4, 0.5),
]
SEEDS = (0, 1, 2**63 - 1, 12345)


def request(seed: int, position: int = 0) -> ClipRequest:
    crop = CropBox(x=0, y=0, width=8, height=8)
    return ClipRequest(row=0, epoch=0, position=position, frames=(0,), crop=crop, flip=False, caption=0, mask_seed=seed)


def geometry(image: int, patch: int, frames: int, tubelet: int) -> ModelConfig:
    return ModelConfig(image_size=image, patch_size=patch, num_frames=frames, tubelet_size=tubelet)


def batch(seeds: Sequence[int]) -> ClipBatch:
    """Clips of one grey pixel: noise looks at nothing but the requests."""
    frames = torch.zeros(len(seeds), 1, 1, 1, 3, dtype=torch.uint8)
    return clip_batch(frames, [request(seed, i) for i, seed in enumerate(seeds)])


def noise(kind: str, model: ModelConfig, seeds: Sequence[int]) -> torch.Tensor:
    scorer = NoiseScorer(kind, model.num_slots, model.patches_per_slot, CPU)  # type: ignore[arg-type]
    return scorer(batch(seeds))


def plan(kind: str, model: ModelConfig, ratio: float, seeds: Sequence[int] = SEEDS, order: str = "top") -> TokenMasks:
    config = MaskConfig(kind=kind, ratio=ratio, order=order)  # type: ignore[arg-type]
    return select_masks(config, model, noise(kind, model, seeds))


def slots(model: ModelConfig, masked: torch.Tensor) -> torch.Tensor:
    """Token numbers [B, M] → whether each patch is masked, bool [B, S, N]."""
    flat = torch.zeros(len(masked), model.num_tokens, dtype=torch.bool)
    return flat.scatter(1, masked.long(), True).view(-1, model.num_slots, model.patches_per_slot)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_every_token_comes_once_in_order(kind: str, case: tuple[int, int, int, int, float]) -> None:
    model = geometry(*case[:4])
    got = plan(kind, model, case[4])
    for index in (got.visible, got.masked):
        assert index.dtype == torch.int32
        assert index.shape[0] == len(SEEDS)
        assert (index.diff(dim=1) > 0).all()
    both = torch.cat([got.visible, got.masked], dim=1).sort(dim=1).values
    assert (both == torch.arange(model.num_tokens)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_every_slot_has_the_ratio_exactly(kind: str, case: tuple[int, int, int, int, float]) -> None:
    model, ratio = geometry(*case[:4]), case[4]
    counts = slots(model, plan(kind, model, ratio).masked).sum(-1)
    assert counts.shape == (len(SEEDS), model.num_slots)
    assert (counts == int(ratio * model.patches_per_slot + 1e-9)).all()


@pytest.mark.parametrize("case", GEOMETRIES)
def test_tube_is_the_same_in_all_slots(case: tuple[int, int, int, int, float]) -> None:
    model = geometry(*case[:4])
    masked = slots(model, plan("tube", model, case[4]).masked)
    assert (masked == masked[:, :1]).all()


@pytest.mark.parametrize("case", [case for case in GEOMETRIES if case[2] > case[3]])
def test_random_draws_slots_independently(case: tuple[int, int, int, int, float]) -> None:
    model = geometry(*case[:4])
    masked = slots(model, plan("random", model, case[4], tuple(range(8))).masked)
    assert (masked != masked[:, :1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_mask(kind: str) -> None:
    model = geometry(96, 16, 16, 2)
    first, again = plan(kind, model, 0.75, (5, 6)), plan(kind, model, 0.75, (5, 6))
    assert torch.equal(first.masked, again.masked)
    assert torch.equal(first.visible, again.visible)
    assert not torch.equal(first.masked[0], first.masked[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_does_not_depend_on_its_place_in_the_batch(kind: str) -> None:
    model = geometry(96, 16, 16, 2)
    alone = plan(kind, model, 0.75, (42,)).masked[0]
    for seeds in ((42, 1, 2), (1, 42), (1, 2, 3, 42)):
        assert torch.equal(plan(kind, model, 0.75, seeds).masked[seeds.index(42)], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_global_generators_neither_decide_nor_move(kind: str) -> None:
    model = geometry(96, 16, 16, 2)
    torch.manual_seed(0)
    first, state = plan(kind, model, 0.75), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(plan(kind, model, 0.75).masked, first.masked)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_patch_is_masked_equally_often(kind: str) -> None:
    """The share over many clips is the ratio within five standard errors, for each token."""
    model, ratio, count = geometry(32, 8, 4, 2), 0.75, 2000
    share = slots(model, plan(kind, model, ratio, tuple(range(count))).masked).float().mean(0)
    assert (share - ratio).abs().max() < 5 * (ratio * (1 - ratio) / count) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_uniform_noise_of_the_asked_shape(kind: str) -> None:
    scores = noise(kind, geometry(80, 8, 8, 2), range(50))
    assert (scores.dtype, tuple(scores.shape)) == (torch.float32, (50, 4, 100))
    assert scores.min() >= 0
    assert scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_top_masks_the_highest_and_bottom_the_lowest(kind: str, case: tuple[int, int, int, int, float]) -> None:
    """Against numpy's stable sort, slot by slot; the same number is masked either way."""
    model, ratio = geometry(*case[:4]), case[4]
    scores = noise(kind, model, SEEDS).double().numpy()
    k = int(ratio * model.patches_per_slot + 1e-9)
    for order, sign in (("top", -1), ("bottom", 1)):
        hidden = slots(model, plan(kind, model, ratio, order=order).masked).numpy()
        expected = np.zeros_like(hidden)
        np.put_along_axis(expected, np.argsort(sign * scores, axis=-1, kind="stable")[..., :k], True, axis=-1)
        np.testing.assert_array_equal(hidden, expected)


def test_equal_scores_are_masked_from_the_first_patch_on_in_both_orders() -> None:
    model = geometry(32, 8, 4, 2)
    for order in ("top", "bottom"):
        got = select_masks(MaskConfig(ratio=0.5, order=order), model, torch.zeros(1, 2, 16))  # type: ignore[arg-type]
        assert got.masked.tolist() == [[*range(8), *range(16, 24)]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_masks_without_text_need_neither_captions_nor_clip(kind: str, shapes: Path) -> None:
    """make_scorer for them reads no CLIP: a model that does not exist is never looked for."""
    table = read_manifest(shapes).table.drop_columns(["captions"])
    mask = MaskConfig(kind=kind, ratio=0.5)  # type: ignore[arg-type]
    model = geometry(32, 8, 4, 2)
    config = InputConfig(model=model, mask=mask, clip=CLIPConfig(model="nowhere"))
    scorer = make_scorer(config, Manifest(table, shapes.parent), CPU)
    assert scorer.note == ""
    assert torch.equal(scorer(batch(SEEDS)), noise(kind, model, SEEDS))
