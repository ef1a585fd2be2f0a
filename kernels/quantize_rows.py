"""Rows of numbers quantised to e4m3, each with a scale of its own.

Dimensions: M rows, K values of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
_SMALLEST = 1e-12  # a row's largest value, for rows of zeros
_VALUES_PER_PROGRAM = 4096


def quantize_rows_reference(x: Tensor, silu: bool = False) -> tuple[Tensor, Tensor]:
    """[M, K] → e4m3 [M, K] and float32 [M, 1], whose product is x, or SiLU of x, to 4 significant bits.

    NaN stays NaN.
    """
    x = F.silu(x.float()) if silu else x.float()
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(_SMALLEST)
    return (x * (LARGEST / largest)).to(E4M3), largest / LARGEST


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_rows(
    rows: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows)[:, None] & (column < width)
    place = row.to(tl.int64)[:, None]
    x = tl.load(rows + place * stride + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        x = x * tl.sigmoid(x)
    most = tl.maximum(tl.max(tl.abs(x), axis=1), SMALLEST)
    # A NaN may be lost in the maximum, but stays one where it stands, and so in the row's products.
    x = x * tl.div_rn(LARGEST, most)[:, None]
    tl.store(values + place * width + column, x.to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, tl.div_rn(most, LARGEST), mask=row < num_rows)


def quantize_rows_kernel(x: Tensor, silu: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_rows_reference` in one pass, with what `torch._scaled_mm` asks for: M rounded up to a multiple of 16.

    The rows behind the last hold what lay there; whoever multiplies them cuts their products off.
    """
    num_rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    values, scale = reserve(num_rows, width, x.device)
    columns = triton.next_power_of_2(width)
    rows = max(1, _VALUES_PER_PROGRAM // columns)
    grid = (triton.cdiv(num_rows, rows),)
    _quantize_rows[grid](
        x, values, scale, num_rows, width, x.stride(0), LARGEST, _SMALLEST, silu, ROWS=rows, COLUMNS=columns,
        num_warps=4,
    )  # fmt: skip
    return values, scale


def reserve(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for quantised rows, their number rounded up to a multiple of 16: e4m3 [M, K], float32 [M, 1]."""
    padded = -(-num_rows // 16) * 16
    values = torch.empty(padded, width, dtype=E4M3, device=device)
    return values, torch.empty(padded_scales(padded), 1, device=device)[:padded]


def padded_scales(rows: int) -> int:
    """Rows to reserve for scales: torch's own kernel reads those of whole tiles (pytorch issue 133334)."""
    return -(-rows // 256) * 256
