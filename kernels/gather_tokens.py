"""Cut tokens out of uint8 frames and normalise their pixels for the patch embedding.

A token is a cube of `tubelet` frames × `patch` × `patch` pixels. Its P = tubelet · patch² · 3 values are ordered
(frame, row, column, channel), which is the memory order of the frames and of VideoMAE's targets.

    frames   uint8 [B, T, H, W, 3]      any strides over clips, frames and rows (such as frames[:, ::2]); never copied
    index    integer [B, K]             token numbers, or None for every token in order
    tokens   [B, K, P]                  B clips, T frames, H W pixels, K chosen tokens, P values per token

Kernel: one program per token. The token is tubelet · patch runs of 3 · patch consecutive bytes in the frames, and one
run in the output. Neighbouring lanes take neighbouring values, so with patch 16 (48-byte runs) a lane loads 16 bytes at
once.

Bytes moved: P in and 2·P out in bfloat16. 64 clips of 16×224×224 with 632 visible tokens move 62 MB in and 124 MB out,
39 µs at an H200's 4.8 TB/s. Roofline: the code compiled for the H200 spends 15 instructions per value, 31 µs at 30·10¹²
instructions a second (132 SMs × 128 lanes × 1.75 GHz). The kernel is memory-bound by a small margin.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from einops import rearrange
from torch import Tensor

from kernels.launch import Launch, block_of_values

# ImageNet statistics of values in 0 … 1, with which VideoMAE normalises its input.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Channels = tuple[float, float, float]


def token_grid(frames: Tensor, index: Tensor | None, patch: int, tubelet: int) -> tuple[int, int, int]:
    """Return how many (slots, rows, columns) of tokens a clip has, from shapes and strides alone.

    Raises ValueError if the frames cannot be cut into whole tokens, or if `index` does not match the frames.
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
    """Return the raw values of the chosen tokens, uint8 [B, K, P], in plain torch. Raises as `token_grid` does."""
    _, rows, columns = token_grid(frames, index, patch, tubelet)
    # s slots, h w rows and columns of the grid; t p q frame, row and column inside the cube.
    if index is None:
        return rearrange(frames, "b (s t) (h p) (w q) c -> b (s h w) (t p q c)", t=tubelet, p=patch, q=patch)
    # Only the chosen cubes are copied: this rearrangement is a view of the frames.
    cubes = rearrange(frames, "b (s t) (h p) (w q) c -> b s h w t p q c", t=tubelet, p=patch, q=patch)
    token = index.long()
    clip = torch.arange(len(frames), device=frames.device)[:, None]
    chosen = cubes[clip, token // (rows * columns), token // columns % rows, token % columns]
    return chosen.flatten(2)


def gather_tokens_reference(
    frames: Tensor, index: Tensor | None, patch: int, tubelet: int, dtype: torch.dtype, mean: Channels, std: Channels
) -> Tensor:
    """Compute `gather_tokens` in plain torch; in float64 if `dtype` is float64, otherwise in float32."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    cubes = gather_cubes(frames, index, patch, tubelet).to(compute)
    pixels = cubes.view(*cubes.shape[:-1], -1, 3).div_(255)
    for channel in range(3):  # Python numbers: tensors of constants would have to be copied to the device
        pixels[..., channel].sub_(mean[channel]).div_(std[channel])
    return pixels.flatten(-2).to(dtype)


# ---- the kernel -----------------------------------------------------------------------------------------------------
#
# Triton inlines the next four functions into the kernels here and in masked_mse.py. Offsets count values, which are
# bytes in the frames. Names in capitals are compile-time constants; divisions by them become multiplications.


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
    """Return the offset of a token's first value in its clip.

    Divisions are in 32 bits, which is far cheaper. Products are in 64 bits, because a batch may exceed 2 GiB.
    """
    slot, row, column = token // (ROWS * COLUMNS), token // COLUMNS % ROWS, token % COLUMNS
    return slot.to(tl.int64) * TUBELET * stride_t + row.to(tl.int64) * PATCH * stride_h + column * (PATCH * 3)


@triton.jit  # type: ignore[untyped-decorator]
def value_offset(value: tl.tensor, stride_t: tl.tensor, stride_h: tl.tensor, PATCH: tl.constexpr) -> tl.tensor:
    """Return the offset of a token's values, numbered 0 … P-1, from its first value."""
    frame, line, byte = value // (PATCH * PATCH * 3), value // (PATCH * 3) % PATCH, value % (PATCH * 3)
    return frame.to(tl.int64) * stride_t + line.to(tl.int64) * stride_h + byte


@triton.jit  # type: ignore[untyped-decorator]
def value_tile(start: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the numbers and channels of the values start … start + BLOCK - 1, each int32 [BLOCK / 16, 16].

    `start` is a multiple of BLOCK. Each lane holds a row of 16 values. Because 16 = 1 modulo 3, a lane's channels
    follow from the lane number: one division per lane instead of 16, and only three patterns for the compiler to
    choose from.
    """
    lane, place = (start // 16 + tl.arange(0, BLOCK // 16))[:, None], tl.arange(0, 16)[None, :]
    channel = lane % 3 + place % 3
    return lane * 16 + place, tl.where(channel >= 3, channel - 3, channel)


@triton.jit  # type: ignore[untyped-decorator]
def by_channel(channel: tl.tensor, red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    """Select, for each value, the scalar that belongs to its channel."""
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


# One program writes one token: program number = clip · count + position of the token in the output.
@triton.jit  # type: ignore[untyped-decorator]
def _gather_tokens(
    frames: tl.tensor,  # uint8 [B, T, H, W, 3]
    index: tl.tensor,  # integer [B, count], or None
    tokens: tl.tensor,  # out: [B, count, P], contiguous
    count: tl.tensor,  # tokens per clip
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
    BLOCK: tl.constexpr,  # values per round of the loop
) -> None:
    VALUES: tl.constexpr = TUBELET * PATCH * PATCH * 3

    # Which token this program writes. Without an index, it is the token at that position.
    program = tl.program_id(0)
    clip, number = (program // count).to(tl.int64), program % count
    token = number
    if index is not None:
        token = tl.load(index + clip * index_stride_b + number.to(tl.int64) * index_stride_k).to(tl.int32)

    # Where the token starts in the frames and in the output.
    source = frames + clip * stride_b + cube_start(token, stride_t, stride_h, ROWS, COLUMNS, PATCH, TUBELET)
    target = tokens + program.to(tl.int64) * VALUES

    # Walk over the token's values in output order, BLOCK at a time. The last round may be partial.
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
    """Compute `gather_tokens` with the kernel, in float32.

    launch   block: values per round, at least 16

    Token numbers are not checked: they must lie in 0 … tokens - 1.
    """
    slots, rows, columns = token_grid(frames, index, patch, tubelet)
    batch, count = len(frames), slots * rows * columns if index is None else index.shape[1]
    values = tubelet * patch**2 * 3
    tokens = torch.empty(batch, count, values, dtype=dtype, device=frames.device)
    launch = launch or block_of_values(values)
    assert launch.block >= 16
    # (level / 255 - mean) / std as one multiply-add. The constants are rounded to float32 once, from float64.
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
    """Cut out the chosen tokens and normalise them: (value / 255 - mean) / std per channel → `dtype` [B, K, P].

    frames   uint8 [B, T, H, W, 3]
    index    int32 [B, K], or None for all T/tubelet · H/patch · W/patch tokens; not checked on CUDA
    patch    pixels
    tubelet  frames; 1 cuts single frames into patches
    mean     per channel, of values in 0 … 1
    std      likewise

    Uses the kernel on CUDA and the reference on a CPU. float64 uses the reference on every device.
    Raises ValueError if T is not a multiple of tubelet, if H or W is not a multiple of patch, and for frames or an
    index of another shape.
    """
    on_kernel = frames.is_cuda and dtype != torch.float64
    gather = gather_tokens_kernel if on_kernel else gather_tokens_reference
    return gather(frames, index, patch, tubelet, dtype, mean, std)
