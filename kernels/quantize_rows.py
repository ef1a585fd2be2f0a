"""Quantise the rows of a matrix to FP8 (e4m3), each row with its own scale, optionally after SiLU.

    x       floating [M, K]      M rows, K values per row
    values  e4m3 [M, K]          x · 448 / largest, rounded; largest is the row's largest magnitude, 448 that of e4m3
    scale   float32 [M, 1]       largest / 448, so that values · scale is x to 4 significant bits

NaN stays NaN, and rows of zeros stay zero.

Kernel: one program per 4096 values, that is several whole rows or one long row. The rows stay in registers between the
search for the maximum and the rounding, so each value is read once and written once.

Bytes moved: 2·K in (bfloat16), K + 4 out per row; written in torch operations it would be about 17 per value instead of
3. A pass of CLIP ViT-B/32 has 3528 patches × 50 tokens: K = 768 moves 407 MB, 85 µs at an H200's 4.8 TB/s, and K = 3072
1.6 GB, 339 µs. Roofline, at 30·10¹² instructions a second: the code compiled for the H200 has at most 17 instructions
per value at K = 768, 77 µs, so it is memory-bound by a small margin. With SiLU it has 32 per value at K = 3072, 570 µs,
and is bound by instructions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest finite number of e4m3
_SMALLEST = 1e-12  # lower bound of a row's largest magnitude: rows of zeros are divided by it
_VALUES_PER_PROGRAM = 4096


def quantize_rows_reference(x: Tensor, silu: bool = False) -> tuple[Tensor, Tensor]:
    """Compute `quantize_rows` in plain torch, in float32, on any device, without padding M."""
    x = F.silu(x.float()) if silu else x.float()
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(_SMALLEST)
    return (x * (LARGEST / largest)).to(E4M3), largest / LARGEST


# One program quantises ROWS whole rows, each padded to COLUMNS values.
@triton.jit  # type: ignore[untyped-decorator]
def _quantize_rows(
    rows: tl.tensor,  # floating [num_rows, width]
    values: tl.tensor,  # out: e4m3 [at least num_rows, width], contiguous
    scale: tl.tensor,  # out: float32 [at least num_rows, 1]
    num_rows: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,  # between rows of the input
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,  # rows per program, a power of two
    COLUMNS: tl.constexpr,  # at least `width`, a power of two
) -> None:
    # Load the program's rows, [ROWS, COLUMNS]. Padding is 0 and so never a row's largest magnitude.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows)[:, None] & (column < width)
    place = row.to(tl.int64)[:, None]
    x = tl.load(rows + place * stride + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        x = x * tl.sigmoid(x)

    # Scale each row so that its largest magnitude becomes the largest number of the format. The maximum may miss a NaN,
    # but the NaN itself stays in its place, and so reaches the products of its row.
    most = tl.maximum(tl.max(tl.abs(x), axis=1), SMALLEST)
    x = x * tl.div_rn(LARGEST, most)[:, None]
    tl.store(values + place * width + column, x.to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, tl.div_rn(most, LARGEST), mask=row < num_rows)


def quantize_rows_kernel(x: Tensor, silu: bool = False) -> tuple[Tensor, Tensor]:
    """Compute `quantize_rows` with the kernel, M rounded up to a multiple of 16."""
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


def quantize_rows(x: Tensor, silu: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise rows to e4m3 [M, K] and scales float32 [M, 1], whose product is x, or SiLU of x, to 4 significant bits.

    x      floating [M, K]
    silu   apply SiLU first

    Uses the kernel on CUDA and the reference on a CPU. On CUDA the result is laid out for `torch._scaled_mm`: M is
    rounded up to a multiple of 16. The rows beyond the input's are uninitialised; the caller cuts off their products.
    """
    return quantize_rows_kernel(x, silu) if x.is_cuda else quantize_rows_reference(x, silu)


def reserve(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate quantised rows, M rounded up to a multiple of 16: e4m3 [M, K], float32 [M, 1], both uninitialised."""
    padded = -(-num_rows // 16) * 16
    values = torch.empty(padded, width, dtype=E4M3, device=device)
    return values, torch.empty(padded_scales(padded), 1, device=device)[:padded]


def padded_scales(rows: int) -> int:
    """Return how many scales to allocate for `rows` rows: torch's kernel reads whole tiles of 256 (pytorch #133334)."""
    return -(-rows // 256) * 256
