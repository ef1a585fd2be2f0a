"""Top-k masks: the reference against brute force, the kernel against the reference, bit for bit.

Dimensions: B clips, S slots, N patches per slot.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.launch import Launch
from kernels.topk_mask import topk_mask, topk_mask_kernel, topk_mask_reference
from tests.support.cubes import DEVICE, generator

INF, NAN = float("inf"), float("nan")
SPECIAL = (0.0, -0.0, NAN, -INF, 1.0, -0.0, INF, -NAN, 0.0, -1.0, INF, NAN)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# N: the smallest, primes, powers of two ± 1.
SHAPES = [(1, 1, 2), (2, 1, 3), (1, 2, 7), (2, 3, 16), (3, 2, 17), (1, 4, 63), (2, 1, 64), (1, 2, 129), (1, 2, 197)]


def brute_force(scores: NDArray[np.float64], k: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return (visible, masked). The rank of a patch is the number of patches that go before it."""

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


def check_reference(scores: Tensor, k: int) -> None:
    visible, masked = topk_mask(scores, k)
    assert visible.dtype == masked.dtype == torch.int32
    assert (visible.tolist(), masked.tolist()) == brute_force(scores.double().numpy(), k)


def check_kernel(scores: Tensor, k: int) -> None:
    expected = topk_mask_reference(scores, k)
    got = topk_mask_kernel(scores.to(DEVICE), k)
    for kernel, reference in zip(got, expected, strict=True):
        assert kernel.dtype == torch.int32
        assert torch.equal(kernel.cpu(), reference)


def some_k(patches: int) -> set[int]:
    return {1, (patches + 1) // 2, patches - 1}


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[:6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reference_equals_brute_force(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    scores = torch.randn(shape, generator=generator(1)).to(dtype)
    for k in some_k(shape[2]):
        check_reference(scores, k)


@pytest.mark.slow
def test_reference_at_the_production_shape() -> None:
    check_reference(torch.rand(1, 8, 196, generator=generator(2)), 117)


@pytest.mark.parametrize("k", range(1, 12))
def test_ties_go_to_the_lower_patch(k: int) -> None:
    few = torch.randint(0, 3, (4, 3, 12), generator=generator(3)).float()
    check_reference(few, k)
    visible, masked = topk_mask(torch.zeros(1, 2, 12), k)
    assert masked[0].tolist() == [*range(k), *range(12, 12 + k)]
    assert visible[0].tolist() == [*range(k, 12), *range(12 + k, 24)]


def special_scores() -> Tensor:
    """Return NaN of either sign, inf and zeros of either sign in 14 orders, float32 [2, 7, 12]."""
    values = torch.tensor(SPECIAL)
    order = torch.stack([values[torch.randperm(12, generator=generator(seed))] for seed in range(12)])
    return torch.stack([values, values.flip(0), *order]).view(2, 7, 12)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(1, 12))
def test_special_values_rank_as_said(k: int) -> None:
    """The order is NaN of either sign, inf, numbers with -0.0 equal to 0.0, -inf."""
    check_reference(special_scores(), k)
    check_kernel(special_scores()[:, k % 7 :: 4], k)


def test_signed_zeros_are_equal() -> None:
    for zeros in ([-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0]):
        scores = torch.tensor([[zeros]])
        assert topk_mask(scores, 2)[1].tolist() == [[0, 1]]
        assert topk_mask_kernel(scores.to(DEVICE), 2)[1].tolist() == [[0, 1]]


def test_float64_is_not_rounded() -> None:
    """In float32 these scores would be ties."""
    scores = torch.tensor([[[1.0, 1 + 2**-40, 1 + 2**-30]]], dtype=torch.float64, device=DEVICE)
    assert topk_mask(scores, 1)[1].tolist() == [[2]]


@pytest.mark.parametrize("k", [-1, 0, 5, 6])
def test_k_that_leaves_nothing_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"1 to 4 masked patches of 5, got {k}"):
        topk_mask(torch.zeros(1, 1, 5), k)


@pytest.mark.parametrize(
    "scores", [torch.zeros(2, 5), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, dtype=torch.int64)]
)
def test_other_shapes_are_refused(scores: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected floating scores \[B, S, N\]") as caught:
        topk_mask(scores, 1)
    assert str(list(scores.shape)) in str(caught.value)
    assert str(scores.dtype) in str(caught.value)


# ---- the kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    scores = torch.randn(shape, generator=generator(1)).to(dtype)
    for k in some_k(shape[2]):
        check_kernel(scores, k)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_at_the_production_shape(dtype: torch.dtype) -> None:
    check_kernel(torch.rand(1, 8, 196, generator=generator(2)).to(dtype), 117)


@pytest.mark.parametrize("k", [1, 940, 1567])
def test_kernel_ranks_a_whole_clip(k: int) -> None:
    check_kernel(torch.randn(1, 1, 1568, generator=generator(3)), k)


@pytest.mark.parametrize("launch", [Launch(256, 2), Launch(256, 8), Launch(512, 1), Launch(1024, 4)])
def test_how_the_kernel_is_launched_changes_nothing(launch: Launch) -> None:
    ties = torch.randint(0, 40, (2, 2, 196), generator=generator(6)).float()
    expected = topk_mask_reference(ties, 117)
    for got, reference in zip(topk_mask_kernel(ties.to(DEVICE), 117, launch), expected, strict=True):
        assert torch.equal(got.cpu(), reference)


def test_a_block_that_holds_too_little_is_refused() -> None:
    with pytest.raises(AssertionError):
        topk_mask_kernel(torch.zeros(1, 1, 196, device=DEVICE), 117, Launch(128, 1))


def any_bits(shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw float32 from random bits: every exponent, subnormals, both zeros, infinities and NaN of all kinds."""
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator(seed)).to(torch.int32)
    rare = torch.tensor([0, -(2**31), 1, -(2**31) + 1, 0x7F800000, -0x800000, 0x7FC00000, -1, 0x7F800001])
    pick = torch.randint(0, len(rare), shape, generator=generator(seed + 1))
    chosen = torch.rand(shape, generator=generator(seed + 2)) < 0.4
    return torch.where(chosen, rare.to(torch.int32)[pick], bits).view(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_kernel_orders_any_bits(seed: int) -> None:
    """Property: for any scores the kernel's lists equal the reference's, and those equal brute force's."""
    patches = int(torch.randint(2, 40, (), generator=generator(seed)))
    scores = any_bits((1, 4, patches), seed)
    k = int(torch.randint(1, patches, (), generator=generator(seed + 100)))
    check_reference(scores, k)
    check_kernel(scores, k)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_breaks_ties_as_the_reference(seed: int, dtype: torch.dtype) -> None:
    patches = int(torch.randint(2, 300, (), generator=generator(seed)))
    scores = torch.randint(-1, 2, (2, 2, patches), generator=generator(seed + 50)).to(dtype) * 0.1
    k = int(torch.randint(1, patches, (), generator=generator(seed + 100)))
    check_kernel(scores, k)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -3.5, INF, -INF, NAN])
def test_kernel_of_equal_scores_takes_the_first(value: float) -> None:
    masked = topk_mask_kernel(torch.full((1, 1, 9), value, device=DEVICE), 4)[1]
    assert masked.tolist() == [[0, 1, 2, 3]]


def tube(noise: Tensor) -> Tensor:
    return noise[:, :1].expand(-1, 3, -1)  # slots share memory, as tube masks do


def swapped(noise: Tensor) -> Tensor:
    return noise.transpose(1, 2)


def stepped(noise: Tensor) -> Tensor:
    return noise[::2, 1::2, ::3]


def rotated(noise: Tensor) -> Tensor:
    return noise.permute(2, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("view", [tube, swapped, stepped, rotated])
def test_views_are_read_where_they_lie(view: Callable[[Tensor], Tensor]) -> None:
    noise = torch.rand(3, 4, 7, generator=generator(4))
    scores = view(noise)
    assert not scores.is_contiguous()
    check_reference(scores, 2)
    expected = topk_mask_reference(scores, 2)
    for got, reference in zip(topk_mask_kernel(view(noise.to(DEVICE)), 2), expected, strict=True):
        assert torch.equal(got.cpu(), reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cuda_equals_reference(dtype: torch.dtype) -> None:
    noise = torch.rand(16, 8, 196, generator=generator(5))
    ties = torch.randint(0, 9, (16, 8, 196), generator=generator(7)).float()
    long = torch.randn(16, 1, 1568, generator=generator(8))
    for scores in (noise, ties, long, any_bits((16, 8, 196), 9), any_bits((16, 1, 1568), 10)):
        cast = scores.to(dtype)
        k = int(scores.shape[2] * 0.6)
        for got, expected in zip(topk_mask(cast.cuda(), k), topk_mask_reference(cast, k), strict=True):
            assert got.is_cuda
            assert torch.equal(got.cpu(), expected)
