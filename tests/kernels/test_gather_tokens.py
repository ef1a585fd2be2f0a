"""Tokens from frames: the reference against slices in numpy, the kernel against both.

Dimensions: B clips, T frames, H W pixels, K chosen tokens, P values per token.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.gather_tokens import MEAN, STD, gather_cubes, gather_tokens, gather_tokens_kernel, gather_tokens_reference
from kernels.launch import Launch
from tests.support.cubes import (
    DEVICE,
    GEOMETRIES,
    assert_as_good,
    cut_batch,
    generator,
    num_tokens,
    random_frames,
    random_index,
)

# CLIP's statistics, as an example that differs from ImageNet's.
OTHER_MEAN, OTHER_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = [gather_tokens_reference, gather_tokens_kernel]


def normalise(
    cubes: NDArray[np.uint8], mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> NDArray[np.float64]:
    pixels = cubes.astype(np.float64).reshape(*cubes.shape[:2], -1, 3)
    return ((pixels / 255 - np.array(mean)) / np.array(std)).reshape(cubes.shape)


def every_token(shape: tuple[int, ...], patch: int, tubelet: int) -> Tensor:
    return torch.arange(num_tokens(shape, patch, tubelet), dtype=torch.int32).expand(shape[0], -1)


def check_kernel(
    frames: Tensor,
    index: Tensor | None,
    patch: int,
    tubelet: int,
    dtype: torch.dtype,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
) -> None:
    """Check the kernel against numpy, as strictly as the reference; frames and index on DEVICE."""
    got = gather_tokens_kernel(frames, index, patch, tubelet, dtype, mean, std)
    host_frames, host_index = frames.cpu(), None if index is None else index.cpu()
    reference = gather_tokens_reference(host_frames, host_index, patch, tubelet, dtype, mean, std)
    chosen = every_token(tuple(frames.shape[:4]), patch, tubelet) if host_index is None else host_index
    assert got.dtype == dtype
    assert_as_good(got, reference, normalise(cut_batch(host_frames, chosen, patch, tubelet), mean, std))


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "patch", "tubelet"), GEOMETRIES)
def test_cubes_equal_slices(shape: tuple[int, ...], patch: int, tubelet: int) -> None:
    frames, index = random_frames(shape), random_index(shape, patch, tubelet)
    cubes = gather_cubes(frames, index, patch, tubelet)
    assert cubes.dtype == torch.uint8
    assert np.array_equal(cubes.numpy(), cut_batch(frames, index, patch, tubelet))
    every = gather_cubes(frames, None, patch, tubelet)
    assert np.array_equal(every.numpy(), cut_batch(frames, every_token(shape, patch, tubelet), patch, tubelet))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "patch", "tubelet"), GEOMETRIES[:-1])
def test_tokens_equal_slices(shape: tuple[int, ...], patch: int, tubelet: int, dtype: torch.dtype) -> None:
    frames, index = random_frames(shape), random_index(shape, patch, tubelet)
    tokens = gather_tokens(frames, index, patch, tubelet, dtype)
    expected = normalise(cut_batch(frames, index, patch, tubelet))
    assert tokens.dtype == dtype
    # Values reach 2.64. Allow half a unit in the last place of the stored value, and the rounding of three operations.
    error = np.abs(tokens.double().numpy() - expected).max()
    assert error < 2.64 * 2 * torch.finfo(dtype).eps


def test_statistics_are_imagenets() -> None:
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_cubes_keep_the_order_they_are_asked_for() -> None:
    frames = random_frames((1, 2, 8, 8))
    cubes = gather_cubes(frames, torch.tensor([[3, 0, 3]], dtype=torch.int32), 4, 2)
    straight = gather_cubes(frames, torch.arange(4, dtype=torch.int32)[None], 4, 2)
    assert torch.equal(cubes, straight[:, [3, 0, 3]])


# ---- both paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("shape", "patch", "tubelet"),
    [((1, 3, 8, 8), 4, 2), ((1, 2, 9, 8), 4, 2), ((1, 2, 8, 10), 4, 2), ((2, 16, 224, 225), 16, 2)],
)
def test_frames_with_a_rest_are_refused(path: Callable[..., Tensor], shape: Any, patch: int, tubelet: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of tubelet {tubelet} and H and W of patch {patch}") as caught:
        path(random_frames(shape), None, patch, tubelet, torch.float32, MEAN, STD)
    assert str([*shape, 3]) in str(caught.value)


@pytest.mark.parametrize("path", PATHS)
def test_other_tensors_are_refused(path: Callable[..., Tensor]) -> None:
    frames = random_frames((2, 2, 8, 8))
    index = torch.zeros(2, 1, dtype=torch.int32)
    wrong = [
        (frames[0], index, r"uint8 frames \[B, T, H, W, 3\]"),
        (frames.float(), index, "got torch.float32"),
        (torch.cat([frames, frames[..., :1]], -1), index, r"got torch.uint8 \[2, 2, 8, 8, 4\]"),
        (frames.transpose(2, 3), index, "contiguous rows"),
        (frames.flip(-1).movedim(-1, 2).contiguous().movedim(2, -1), index, "contiguous rows"),
        (frames, index[:1], r"token numbers \[2, K\] for 2 clips, got \[1, 1\]"),
        (frames, index[0], r"token numbers \[2, K\] for 2 clips, got \[1\]"),
    ]
    for other, numbers, message in wrong:
        with pytest.raises(ValueError, match=message):
            path(other.to(DEVICE), numbers.to(DEVICE), 4, 2, torch.float32, MEAN, STD)


class LargestTensor(TorchDispatchMode):
    """Record the bytes of the largest tensor made inside the block, except for views of `source`."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        self.source, self.nbytes = source.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self.source:
            self.nbytes = max(self.nbytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("step", [1, 2])
def test_frames_are_not_copied(path: Callable[..., Tensor], step: int) -> None:
    frames = random_frames((2, 32, 64, 64)).to(DEVICE)[:, ::step]
    index = torch.tensor([[3, 9], [0, 1]], dtype=torch.int32, device=DEVICE)
    with LargestTensor(frames) as largest:
        path(frames, index, 8, 2, torch.float32, MEAN, STD)
    # Room for the tokens in float32, and for token numbers as int64.
    assert 0 < largest.nbytes <= 2 * 2 * 384 * 4


# ---- the kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "patch", "tubelet"), GEOMETRIES)
def test_kernel_equals_slices(shape: tuple[int, ...], patch: int, tubelet: int, dtype: torch.dtype) -> None:
    frames, index = random_frames(shape), random_index(shape, patch, tubelet)
    check_kernel(frames.to(DEVICE), index.to(DEVICE), patch, tubelet, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "patch", "tubelet"), GEOMETRIES[:-1])
def test_kernel_gathers_every_token(shape: tuple[int, ...], patch: int, tubelet: int, dtype: torch.dtype) -> None:
    check_kernel(random_frames(shape).to(DEVICE), None, patch, tubelet, dtype)


def test_kernel_takes_other_statistics() -> None:
    """Each channel uses its own."""
    frames = random_frames((1, 1, 32, 16)).to(DEVICE)
    check_kernel(frames, None, 16, 1, torch.float32, OTHER_MEAN, OTHER_STD)
    same = gather_tokens_kernel(frames, None, 16, 1, torch.float32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert not torch.allclose(same, gather_tokens_kernel(frames, None, 16, 1, torch.float32, MEAN, STD))


@pytest.mark.slow
@pytest.mark.parametrize("tubelet", [1, 2])
def test_kernel_reads_views(tubelet: int) -> None:
    """Read every other frame, single frames of a batch, a crop, and clips that share frames."""
    whole = random_frames((2, 8, 16, 24)).to(DEVICE)
    for frames in (
        whole[:, ::2],
        whole[:, 1::3][:, :2],
        whole[:, :, 8:, 8:],
        whole[::2],
        whole[:1].expand(2, *[-1] * 4),
    ):
        check_kernel(frames, None, 8, tubelet, torch.float32)
    check_kernel(whole[:, 3][:, None], None, 8, 1, torch.float32)


def test_kernel_reads_any_integers() -> None:
    frames = random_frames((2, 2, 16, 16)).to(DEVICE)
    for dtype in (torch.int32, torch.int64, torch.uint8):
        index = torch.tensor([[3, 0, 3], [1, 2, 0]], dtype=dtype, device=DEVICE)
        check_kernel(frames, index, 8, 2, torch.float32)
        check_kernel(frames, index[:, ::2], 8, 2, torch.float32)
        check_kernel(frames, index[:1].expand(2, -1), 8, 2, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kernel_equals_slices_for_any_geometry(seed: int) -> None:
    """Property: random sizes, tokens in random order with repeats."""
    rng = np.random.default_rng(seed)
    patch, tubelet = int(rng.integers(1, 20)), int(rng.integers(1, 4))
    slots, rows, columns = (int(x) for x in rng.integers(1, 5, 3))
    shape = (int(rng.integers(1, 4)), slots * tubelet, rows * patch, columns * patch)
    index = torch.from_numpy(rng.integers(0, slots * rows * columns, (shape[0], 5), np.int32))
    check_kernel(random_frames(shape, seed).to(DEVICE), index.to(DEVICE), patch, tubelet, DTYPES[seed % 3])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is only reserved")
def test_kernel_reaches_beyond_two_gigabytes() -> None:
    """The third clip starts 2.4 GB after the first; a 32-bit offset would land in the zeros before it."""
    step, lead = 1_200_000_000, 2_200_000_000
    memory = torch.frombuffer(mmap.mmap(-1, lead + 2 * step + 1000), dtype=torch.uint8)  # pages exist once touched
    frames = memory[lead:].as_strided((3, 2, 2, 2, 3), (step, 12, 6, 3, 1))
    frames.copy_(random_frames((3, 2, 2, 2), 1).clamp(min=1))
    got = gather_tokens_kernel(frames, None, 2, 2, torch.float32, MEAN, STD)
    assert torch.equal(got, gather_tokens_kernel(frames.contiguous(), None, 2, 2, torch.float32, MEAN, STD))


@pytest.mark.slow
@pytest.mark.parametrize("launch", [Launch(16, 1), Launch(512, 1), Launch(1024, 8), Launch(4096, 2)])
@pytest.mark.parametrize(("shape", "patch", "tubelet"), [GEOMETRIES[3], GEOMETRIES[-1]])
def test_how_the_kernel_is_launched_changes_nothing(
    shape: tuple[int, ...], patch: int, tubelet: int, launch: Launch
) -> None:
    frames, index = random_frames(shape).to(DEVICE), random_index(shape, patch, tubelet)[:, :3].to(DEVICE)
    arguments = (frames, index, patch, tubelet, torch.bfloat16, MEAN, STD)
    assert torch.equal(gather_tokens_kernel(*arguments, launch), gather_tokens_kernel(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cuda_equals_reference(dtype: torch.dtype) -> None:
    frames = random_frames((16, 16, 224, 224), 2)
    index = torch.rand(16, 1568, generator=generator(3)).argsort(1)[:, :632].sort(1).values.to(torch.int32)
    on_cuda = frames.cuda()
    for source, device_source, chosen, tubelet in (
        (frames, on_cuda, index, 2),
        (frames[:, ::2], on_cuda[:, ::2], None, 1),
    ):
        exact = gather_tokens_reference(source, chosen, 16, tubelet, torch.float64, MEAN, STD)
        reference = gather_tokens(source, chosen, 16, tubelet, dtype)
        got = gather_tokens(device_source, None if chosen is None else chosen.cuda(), 16, tubelet, dtype)
        assert got.is_cuda
        if dtype == torch.float64:  # the reference again, but CUDA may multiply by a reciprocal
            torch.testing.assert_close(got.cpu(), reference, rtol=0, atol=1e-14)
            continue
        assert_as_good(got, reference, exact.numpy())
        # A GPU rounds where the interpreter truncates. None of the 3 × 256 values is close enough to a tie to differ.
        assert dtype == torch.float32 or torch.equal(got.cpu(), reference)
