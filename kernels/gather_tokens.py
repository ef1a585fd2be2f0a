"""uint8 frames + token numbers → pixel values of those tokens, normalised for the patch embedding.

A token is a cube of `tubelet` frames × `patch` × `patch` pixels; its P = tubelet · patch² · 3 values stand in the order
(frame, row, column, channel), which is the order in memory of the frames and of VideoMAE's targets.

    frames   uint8 [B, T, H, W, 3]      any strides over clips, frames and rows (such as frames[:, ::2]); never copied
    index    integer [B, K]             or None: every token in order
    tokens   [B, K, P]                  B clips, T frames, H W pixels, K chosen tokens, P values a token

Kernel: one program a token. Its lanes follow the P values, which are tubelet · patch runs of 3 · patch bytes of the
frames and one run of the output, so that neighbouring lanes touch neighbouring addresses: with patch 16 (48-byte runs)
a lane loads 16 bytes at once. Moves P bytes in and, in bfloat16, 2·P out: for 64 clips of 16×224×224 with 632 visible
tokens 62 MB in and 124 MB out, 39 µs at an H200's 4.8 TB/s. Compiled for it, a value costs 15 instructions, 31 µs at
30·10¹² a second (132 SMs × 128 lanes × 1.75 GHz): memory-bound by a small margin.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kernels.launch import Launch, block_of_values

# ImageNet statistics, with which VideoMAE normalises its input (of values in 0 … 1).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Channels = tuple[float, float, float]


def token_grid(frames: Tensor, index: Tensor | None, patch: int, tubelet: int) -> tuple[int, int, int]:
    """How many (slots, rows, columns) of tokens a clip has; looks at shapes and strides only.

    Raises ValueError where frames cannot be cut into tokens without a rest, or index and frames do not fit together.
    """
    if frames.dim() != 5 or frames.shape[4] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"expected uint8 frames [B, T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    batch, num_frames, height, width, _ = frames.shape
    if num_frames % tubelet or height % patch or width % patch:
        raise ValueError(
            f"expected frames [B, T, H, W, 3] with T a multiple of tubelet {tubelet} and H and W of patch {patch}, "
            f"got {list(frames.shape)}"
        )
    if frames.stride(4) != 1 or (width > 1 and frames.stride(3) != 3):
        raise ValueError(f"expected frames with contiguous rows of pixels, got strides {list(frames.stride())}")
    if index is not None and (index.dim() != 2 or index.shape[0] != batch):
        raise ValueError(f"expected token numbers [{batch}, K] for {batch} clips, got {list(index.shape)}")
    return num_frames // tubelet, height // patch, width // patch


def gather_cubes(frames: Tensor, index: Tensor | None, patch: int, tubelet: int) -> Tensor:
    """The raw values of the chosen tokens, in plain torch: uint8 [B, K, P]. Raises as `token_grid` does."""
    slots, rows, columns = token_grid(frames, index, patch, tubelet)
    split = frames.view(len(frames), slots, tubelet, rows, patch, columns, patch, 3)
    cubes = split.permute(0, 1, 3, 5, 2, 4, 6, 7)  # [B, slots, rows, columns, tubelet, patch, patch, 3], still a view
    if index is None:
        return cubes.reshape(len(frames), slots * rows * columns, -1)
    token = index.long()
    clip = torch.arange(len(frames), device=frames.device)[:, None]
    chosen = cubes[clip, token // (rows * columns), token // columns % rows, token % columns]
    return chosen.flatten(2)


def gather_tokens_reference(
    frames: Tensor, index: Tensor | None, patch: int, tubelet: int, dtype: torch.dtype, mean: Channels, std: Channels
) -> Tensor:
    """`gather_tokens` in plain torch. Computes in float64 for float64, else in float32."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    cubes = gather_cubes(frames, index, patch, tubelet).to(compute)
    pixels = cubes.view(*cubes.shape[:-1], -1, 3).div_(255)
    for channel in range(3):  # numbers, not tensors of constants: those would have to be copied to the device
        pixels[..., channel].sub_(mean[channel]).div_(std[channel])
    return pixels.flatten(-2).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def cube_start(
    token: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
    TUBELET: tl.constexpr,
) -> tl.tensor:
    """Where a token's first value lies in its clip. Divides in 32 bits, which is far cheaper, and multiplies in 64."""
    slot, row, column = token // (ROWS * COLUMNS), token // COLUMNS % ROWS, token % COLUMNS
    return slot.to(tl.int64) * TUBELET * stride_t + row.to(tl.int64) * PATCH * stride_h + column * (PATCH * 3)


@triton.jit  # type: ignore[untyped-decorator]
def value_offset(value: tl.tensor, stride_t: tl.tensor, stride_h: tl.tensor, PATCH: tl.constexpr) -> tl.tensor:
    """Where a token's value number 0 … P-1 lies, seen from the token's first."""
    frame, line, byte = value // (PATCH * PATCH * 3), value // (PATCH * 3) % PATCH, value % (PATCH * 3)
    return frame.to(tl.int64) * stride_t + line.to(tl.int64) * stride_h + byte


@triton.jit  # type: ignore[untyped-decorator]
def value_tile(start: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Numbers and channels of the values start … start + BLOCK - 1, each [BLOCK / 16, 16]; start a multiple of BLOCK.

    A lane holds a row. As 16 = 1 modulo 3, its channels follow from its own number: one division a lane instead of 16,
    and only three different constants for the compiler to choose among.
    """
    lane, place = (start // 16 + tl.arange(0, BLOCK // 16))[:, None], tl.arange(0, 16)[None, :]
    channel = lane % 3 + place % 3
    return lane * 16 + place, tl.where(channel >= 3, channel - 3, channel)


@triton.jit  # type: ignore[untyped-decorator]
def by_channel(channel: tl.tensor, red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    """The one of three scalars that belongs to each value's channel."""
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit  # type: ignore[untyped-decorator]
def _gather_tokens(
    frames: tl.tensor,
    index: tl.tensor,
    tokens: tl.tensor,
    count: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    index_stride_b: tl.tensor,
    index_stride_k: tl.tensor,
    scale_red: tl.tensor,
    scale_green: tl.tensor,
    scale_blue: tl.tensor,
    shift_red: tl.tensor,
    shift_green: tl.tensor,
    shift_blue: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
    TUBELET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = TUBELET * PATCH * PATCH * 3
    program = tl.program_id(0)
    clip, number = (program // count).to(tl.int64), program % count
    token = number
    if index is not None:
        token = tl.load(index + clip * index_stride_b + number.to(tl.int64) * index_stride_k).to(tl.int32)
    source = frames + clip * stride_b + cube_start(token, stride_t, stride_h, ROWS, COLUMNS, PATCH, TUBELET)
    target = tokens + program.to(tl.int64) * VALUES
    for start in range(0, VALUES, BLOCK):
        value, channel = value_tile(start, BLOCK)
        inside = value < VALUES
        level = tl.load(source + value_offset(value, stride_t, stride_h, PATCH), mask=inside, other=0).to(tl.float32)
        scale = by_channel(channel, scale_red, scale_green, scale_blue)
        shift = by_channel(channel, shift_red, shift_green, shift_blue)
        tl.store(target + value, (level * scale + shift).to(tokens.dtype.element_ty), mask=inside)


def gather_tokens_kernel(
    frames: Tensor,
    index: Tensor | None,
    patch: int,
    tubelet: int,
    dtype: torch.dtype,
    mean: Channels,
    std: Channels,
    launch: Launch | None = None,
) -> Tensor:
    """`gather_tokens` by the kernel, in float32. Token numbers are not checked: they must lie in 0 … tokens - 1.

    launch: of at least 16 values a round.
    """
    slots, rows, columns = token_grid(frames, index, patch, tubelet)
    batch, count = len(frames), slots * rows * columns if index is None else index.shape[1]
    values = tubelet * patch**2 * 3
    tokens = torch.empty(batch, count, values, dtype=dtype, device=frames.device)
    launch = launch or block_of_values(values)
    assert launch.block >= 16
    # One multiplication and addition a value instead of two divisions; the constants are rounded once, from float64.
    scale = [1 / (255 * deviation) for deviation in std]
    shift = [-average / deviation for average, deviation in zip(mean, std, strict=True)]
    index_strides = (0, 0) if index is None else index.stride()
    _gather_tokens[(batch * count,)](
        frames,
        index,
        tokens,
        count,
        *frames.stride()[:3],
        *index_strides,
        *scale,
        *shift,
        ROWS=rows,
        COLUMNS=columns,
        PATCH=patch,
        TUBELET=tubelet,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return tokens


def gather_tokens(
    frames: Tensor,
    index: Tensor | None,
    patch: int,
    tubelet: int,
    dtype: torch.dtype,
    mean: Channels = MEAN,
    std: Channels = STD,
) -> Tensor:
    """The chosen tokens, normalised: (value / 255 - mean) / std for each channel → `dtype` [B, K, P].

    frames uint8 [B, T, H, W, 3]; index int32 [B, K], or None for all T/tubelet · H/patch · W/patch tokens; tubelet 1
    cuts single frames into patches. float64 takes the reference on every device. On CUDA token numbers are not checked.
    Raises ValueError where T is no multiple of tubelet, or H or W none of patch, and for other frames or index shapes.
    """
    on_kernel = frames.is_cuda and dtype != torch.float64
    gather = gather_tokens_kernel if on_kernel else gather_tokens_reference
    return gather(frames, index, patch, tubelet, dtype, mean, std)
