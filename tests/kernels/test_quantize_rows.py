"""Rows quantised to e4m3: the reference against the format's definition, the Triton kernel against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.quantize_rows import E4M3, quantize_rows, quantize_rows_kernel, quantize_rows_reference


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def e4m3_grid() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return e4m3's finite values ≥ 0, from the format's definition (exponent bias 7, 3 bits of mantissa)."""
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array([m / 8 * 2.0**-6 for m in range(8)] + normal[:-1])  # the last pattern is NaN


# ---- the reference --------------------------------------------------------------------------------------------------


def test_rows_are_rounded_to_the_nearest_number_of_the_format() -> None:
    x = draw(40, 96) * torch.logspace(-6, 6, 40)[:, None]
    values, scale = quantize_rows_reference(x)
    assert (values.dtype, scale.dtype, tuple(scale.shape)) == (E4M3, torch.float32, (40, 1))
    grid = e4m3_grid()
    assert grid.max() == 448
    wanted = (x.double() / scale.double()).numpy()
    nearest = np.abs(np.abs(wanted)[..., None] - grid).min(-1)
    ours = np.abs(values.double().numpy() - wanted)
    assert (ours <= nearest * (1 + 1e-5) + 1e-4).all()
    assert (values.float().abs().amax(1) == 448).all()


def test_rows_of_zeros_and_of_nan() -> None:
    x = torch.zeros(3, 16)
    x[1, 4], x[2] = float("nan"), 5.0
    values, scale = quantize_rows_reference(x)
    assert (values[0].float() == 0).all()
    assert values[1].float().isnan().any()
    torch.testing.assert_close(values[2].float() * scale[2], x[2])


def test_a_cpu_uses_the_reference() -> None:
    x = 4 * draw(5, 48)
    for silu in (False, True):
        values, scale = quantize_rows(x, silu)
        expected, expected_scale = quantize_rows_reference(x, silu)
        assert torch.equal(values.float(), expected.float())
        assert torch.equal(scale, expected_scale)


# ---- the kernel -----------------------------------------------------------------------------------------------------
#
# Triton's interpreter loses a carry when it rounds to e4m3, so there it gets numbers that need no rounding.


def exact_rows(rows: int, width: int) -> Tensor:
    """Return numbers of the format, the largest among them, times one power of two per row."""
    grid = torch.from_numpy(e4m3_grid()).float()
    draw = torch.Generator().manual_seed(rows * width)
    x = grid[torch.randint(len(grid), (rows, width), generator=draw)]
    x *= torch.randint(0, 2, (rows, width), generator=draw) * 2 - 1
    x[:, width // 2] = 448
    return x * 2.0 ** torch.randint(-6, 6, (rows, 1), generator=draw)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (16, 96), (37, 208), (5, 1040), (3, 4224)])
def test_the_kernel_equals_the_reference(rows: int, width: int) -> None:
    x = exact_rows(rows, width)
    strided = torch.full((rows, 2, width), float("nan"))
    strided[:, 0] = x
    for given in (x, strided[:, 0]):
        values, scale = quantize_rows_kernel(given)
        padded = -(-rows // 16) * 16
        assert (tuple(values.shape), tuple(scale.shape)) == ((padded, width), (padded, 1))
        expected, expected_scale = quantize_rows_reference(x)
        torch.testing.assert_close(values[:rows].float(), expected.float(), rtol=0, atol=0)
        torch.testing.assert_close(scale[:rows], expected_scale, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_kernel_applies_silu() -> None:
    x = 4 * draw(21, 208)
    values, scale = quantize_rows_kernel(x, silu=True)
    y = (x * torch.sigmoid(x)).double()
    torch.testing.assert_close(scale[:21].double(), y.abs().amax(1, keepdim=True) / 448, rtol=1e-6, atol=0)
    expected, _ = quantize_rows_reference(x, silu=True)
    carries = torch.frexp(y / scale[:21]).mantissa.abs() >= 31 / 32  # 1.9375 and more round to 2
    assert carries.float().mean() < 0.1
    torch.testing.assert_close(values[:21].float()[~carries], expected.float()[~carries], rtol=0, atol=2**-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_kernel_on_zeros() -> None:
    values, scale = quantize_rows_kernel(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert (values[:2].float() == 0).all()
    assert (scale[:2] > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (37, 208), (1000, 768), (777, 3072), (64, 6656)])
def test_the_kernel_on_a_gpu(rows: int, width: int, dtype: torch.dtype, silu: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    x = draw(rows, width).to("cuda", dtype)
    values, scale = quantize_rows_kernel(x, silu)
    expected, expected_scale = quantize_rows_reference(x, silu)
    torch.testing.assert_close(scale[:rows], expected_scale, rtol=1e-5, atol=0)
    # Division may differ in the last bit, so a value halfway between two numbers of the format may go either way.
    differs = (values[:rows].float() != expected.float()).float().mean()
    assert differs < 1e-3
    torch.testing.assert_close(values[:rows].float(), expected.float(), rtol=2**-3, atol=2**-9)
    x[0, 3] = float("nan")
    assert quantize_rows_kernel(x)[0][0].float().isnan().any()
