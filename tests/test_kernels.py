"""The token operations against brute force in numpy, and their gradients.

Dimensions: B clips, S slots, N patches a slot, T frames, H W pixels, K chosen tokens, P values a token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.gather_tokens import MEAN, STD, gather_cubes, gather_tokens
from kernels.masked_mse import cube_statistics, masked_mse, normalised_targets
from kernels.topk_mask import topk_mask

INF, NAN = float("inf"), float("nan")

# [B, T, H, W], patch, tubelet: one pixel, the smallest grid, odd sizes, H ≠ W, powers of two ± 1, production.
GEOMETRIES = [
    ((1, 1, 1, 1), 1, 1),
    ((1, 2, 4, 4), 2, 2),
    ((2, 3, 9, 6), 3, 3),
    ((2, 6, 7, 14), 7, 2),
    ((3, 4, 15, 10), 5, 1),
    ((1, 2, 34, 17), 17, 2),
    ((1, 16, 224, 224), 16, 2),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_frames(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator(seed))


def num_tokens(shape: tuple[int, ...], patch: int, tubelet: int) -> int:
    return shape[1] // tubelet * (shape[2] // patch) * (shape[3] // patch)


def random_index(shape: tuple[int, ...], patch: int, tubelet: int, seed: int = 0) -> Tensor:
    """A different ascending third (at least one) of the tokens of each clip, int32 [B, K]."""
    total = num_tokens(shape, patch, tubelet)
    count = min(max(total // 3, 1), 40)
    noise = torch.rand(shape[0], total, generator=generator(seed))
    return noise.argsort(1)[:, :count].sort(1).values.to(torch.int32)


# ---- topk_mask ------------------------------------------------------------------------------------------------------


def brute_force(scores: NDArray[np.float64], k: int) -> tuple[list[list[int]], list[list[int]]]:
    """(visible, masked): each patch's rank is the number of patches that go before it."""

    def before(slot: NDArray[np.float64], i: int, j: int) -> bool:
        a, b = slot[i], slot[j]
        if np.isnan(a) != np.isnan(b):
            return bool(np.isnan(a))
        if (np.isnan(a) and np.isnan(b)) or a == b:
            return i < j
        return bool(a > b)

    visible, masked = [], []
    for clip in scores:
        clip_visible, clip_masked = [], []
        for number, slot in enumerate(clip):
            for i in range(len(slot)):
                rank = sum(before(slot, j, i) for j in range(len(slot)))
                (clip_masked if rank < k else clip_visible).append(number * len(slot) + i)
        visible.append(clip_visible)
        masked.append(clip_masked)
    return visible, masked


def check_topk(scores: Tensor, k: int) -> None:
    visible, masked = topk_mask(scores, k)
    assert visible.dtype == masked.dtype == torch.int32
    assert (visible.tolist(), masked.tolist()) == brute_force(scores.double().numpy(), k)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 3), (1, 2, 7), (3, 4, 16), (2, 3, 17), (1, 8, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_topk_equals_brute_force(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    scores = torch.randn(shape, generator=generator(1)).to(dtype)
    for k in {1, shape[2] // 2, shape[2] - 1}:
        check_topk(scores, k)


def test_topk_of_the_production_shape() -> None:
    check_topk(torch.rand(1, 8, 196, generator=generator(2)), 117)


@pytest.mark.parametrize("k", range(1, 12))
def test_topk_gives_ties_to_the_lower_patch(k: int) -> None:
    few = torch.randint(0, 3, (4, 3, 12), generator=generator(3)).float()
    check_topk(few, k)
    visible, masked = topk_mask(torch.zeros(1, 2, 12), k)
    assert masked[0].tolist() == [*range(k), *range(12, 12 + k)]
    assert visible[0].tolist() == [*range(k, 12), *range(12 + k, 24)]


@pytest.mark.parametrize("k", range(1, 12))
def test_topk_ranks_special_values(k: int) -> None:
    """NaN of either sign, then inf, numbers with -0.0 equal to 0.0, then -inf."""
    values = torch.tensor([0.0, -0.0, NAN, -INF, 1.0, -0.0, INF, -NAN, 0.0, -1.0, INF, NAN])
    order = torch.stack([values[torch.randperm(12, generator=generator(seed))] for seed in range(12)])
    check_topk(torch.stack([values, values.flip(0), *order]).view(2, 7, 12), k)


def test_topk_of_signed_zeros() -> None:
    for zeros in ([-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0]):
        assert topk_mask(torch.tensor([[zeros]]), 2)[1].tolist() == [[0, 1]]


def test_topk_takes_views() -> None:
    """Scores that share memory between slots, as tube masks do."""
    one = torch.rand(2, 1, 9, generator=generator(4))
    expanded = one.expand(-1, 3, -1)
    assert torch.equal(topk_mask(expanded, 4)[1], topk_mask(expanded.contiguous(), 4)[1])
    check_topk(expanded, 4)


@pytest.mark.parametrize("k", [-1, 0, 5, 6])
def test_topk_refuses_k_that_leaves_nothing(k: int) -> None:
    with pytest.raises(ValueError, match=rf"1 to 4 masked patches of 5, got {k}"):
        topk_mask(torch.zeros(1, 1, 5), k)


@pytest.mark.parametrize(
    "scores", [torch.zeros(2, 5), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, dtype=torch.int64)]
)
def test_topk_refuses_other_shapes(scores: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected floating scores \[B, S, N\]") as caught:
        topk_mask(scores, 1)
    assert str(list(scores.shape)) in str(caught.value)
    assert str(scores.dtype) in str(caught.value)


# ---- gather_tokens --------------------------------------------------------------------------------------------------


def cut(frames: NDArray[np.uint8], index: NDArray[np.int32], patch: int, tubelet: int) -> NDArray[np.uint8]:
    """One slice a token: [T, H, W, 3], [K] → [K, P]."""
    rows, columns = frames.shape[1] // patch, frames.shape[2] // patch
    cubes = []
    for token in index.tolist():
        slot, row, column = token // (rows * columns), token // columns % rows, token % columns
        cube = frames[
            slot * tubelet : (slot + 1) * tubelet,
            row * patch : (row + 1) * patch,
            column * patch : (column + 1) * patch,
        ]
        cubes.append(cube.reshape(-1))
    return np.stack(cubes)


def cut_batch(frames: Tensor, index: Tensor, patch: int, tubelet: int) -> NDArray[np.uint8]:
    pairs = zip(frames.numpy(), index.numpy(), strict=True)
    return np.stack([cut(clip, chosen, patch, tubelet) for clip, chosen in pairs])


@pytest.mark.parametrize(("shape", "patch", "tubelet"), GEOMETRIES)
def test_gather_cubes_equals_slices(shape: tuple[int, ...], patch: int, tubelet: int) -> None:
    frames, index = random_frames(shape), random_index(shape, patch, tubelet)
    cubes = gather_cubes(frames, index, patch, tubelet)
    assert cubes.dtype == torch.uint8
    assert np.array_equal(cubes.numpy(), cut_batch(frames, index, patch, tubelet))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "patch", "tubelet"), GEOMETRIES[:-1])
def test_gather_tokens_equals_slices(shape: tuple[int, ...], patch: int, tubelet: int, dtype: torch.dtype) -> None:
    frames, index = random_frames(shape), random_index(shape, patch, tubelet)
    tokens = gather_tokens(frames, index, patch, tubelet, dtype)
    cubes = cut_batch(frames, index, patch, tubelet).astype(np.float64)
    pixels = cubes.reshape(*cubes.shape[:2], -1, 3)
    expected = ((pixels / 255 - np.array(MEAN)) / np.array(STD)).reshape(cubes.shape)
    assert tokens.dtype == dtype
    # Values reach 2.64; half a unit in the last place of what is stored, and the rounding of the three operations.
    error = np.abs(tokens.double().numpy() - expected).max()
    assert error < 2.64 * 2 * torch.finfo(dtype).eps


def test_statistics_are_imagenets() -> None:
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_gather_keeps_the_order_it_is_asked_for() -> None:
    frames = random_frames((1, 2, 8, 8))
    cubes = gather_cubes(frames, torch.tensor([[3, 0, 3]], dtype=torch.int32), 4, 2)
    straight = gather_cubes(frames, torch.arange(4, dtype=torch.int32)[None], 4, 2)
    assert torch.equal(cubes, straight[:, [3, 0, 3]])


# ---- masked_mse -----------------------------------------------------------------------------------------------------


def reference_targets(frames: Tensor, masked: Tensor, patch: int, tubelet: int) -> NDArray[np.float64]:
    """docs/recipes.md: per cube and channel, unbiased variance, 1e-6 added to the deviation."""
    cubes = cut_batch(frames, masked, patch, tubelet).astype(np.float64) / 255
    pixels = cubes.reshape(*cubes.shape[:2], -1, 3)
    normalised = (pixels - pixels.mean(2, keepdims=True)) / (pixels.std(2, ddof=1, keepdims=True) + 1e-6)
    return np.asarray(normalised.reshape(cubes.shape))


@pytest.mark.parametrize(("shape", "patch", "tubelet"), GEOMETRIES[1:])
def test_masked_mse_equals_numpy(shape: tuple[int, ...], patch: int, tubelet: int) -> None:
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)
    targets = reference_targets(frames, masked, patch, tubelet)
    prediction = torch.randn(targets.shape, dtype=torch.float64, generator=generator(5))
    expected = np.mean((prediction.numpy() - targets) ** 2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        loss = masked_mse(prediction.to(dtype), frames, masked, patch, tubelet)
        assert (loss.dtype, loss.dim()) == (dtype, 0)
        assert loss.item() == pytest.approx(expected, rel=tolerance)
    got = normalised_targets(frames, masked, patch, tubelet, torch.float64)
    assert np.abs(got.numpy() - targets).max() < 1e-10


def test_masked_mse_of_bfloat16_is_computed_in_float32() -> None:
    shape, patch, tubelet = GEOMETRIES[3]
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)
    targets = reference_targets(frames, masked, patch, tubelet)
    prediction = torch.randn(targets.shape, generator=generator(6)).bfloat16()
    loss = masked_mse(prediction, frames, masked, patch, tubelet)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(np.mean((prediction.double().numpy() - targets) ** 2), rel=1e-5)


@pytest.mark.parametrize(("shape", "patch", "tubelet"), GEOMETRIES[1:4])
def test_masked_mse_gradient(shape: tuple[int, ...], patch: int, tubelet: int) -> None:
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)[:, :2]
    values = tubelet * patch**2 * 3
    prediction = torch.randn(*masked.shape, values, dtype=torch.float64, generator=generator(7), requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: masked_mse(p, frames, masked, patch, tubelet), prediction)


def test_predicting_zero_costs_about_one() -> None:
    shape, patch, tubelet = GEOMETRIES[-1]
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)
    loss = masked_mse(torch.zeros(*masked.shape, tubelet * patch**2 * 3), frames, masked, patch, tubelet)
    assert loss.item() == pytest.approx(1 - 1 / (tubelet * patch**2), rel=1e-4)  # unbiased: (n - 1) / n


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_constant_cubes_give_finite_values(value: int) -> None:
    frames = torch.full((1, 2, 32, 32, 3), value, dtype=torch.uint8)
    masked = torch.tensor([[0, 2, 3]], dtype=torch.int32)
    targets = normalised_targets(frames, masked, 16, 2, torch.float32)
    assert targets.isfinite().all()
    assert targets.abs().max() < 1  # flat: what remains is rounding over 1e-6
    prediction = torch.zeros(targets.shape, requires_grad=True)
    loss = masked_mse(prediction, frames, masked, 16, 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_cube_statistics_are_by_channel() -> None:
    cubes = torch.tensor([[0.0, 0.5, 1.0, 1.0, 0.5, 0.0]], dtype=torch.float64)  # two pixels
    mean, deviation = cube_statistics(cubes)
    assert mean.tolist() == [[[0.5, 0.5, 0.5]]]
    assert deviation[0, 0].tolist() == pytest.approx([0.5**0.5 + 1e-6, 1e-6, 0.5**0.5 + 1e-6], rel=1e-12)


def test_masked_mse_refuses_another_shape() -> None:
    frames, masked = random_frames((1, 2, 4, 4)), torch.tensor([[0, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected a prediction \[1, 2, 24\], got \[1, 3, 24\]"):
        masked_mse(torch.zeros(1, 3, 24), frames, masked, 2, 2)
