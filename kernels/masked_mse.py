"""Reconstruction loss on masked tokens, with targets normalised per cube straight from the uint8 frames.

    prediction  [B, M, P]                B clips, M masked tokens, P = tubelet · patch² · 3 values per token
    frames      uint8 [B, T, H, W, 3]    any strides over clips, frames and rows
    masked      integer [B, M]           token numbers
    loss        float32 scalar           mean over B · M · P squared errors

The target of a value is (value - mean) / (deviation + 1e-6). Values are in 0 … 1; mean and unbiased deviation are those
of the value's cube and channel. Targets are never written to memory: forward keeps a mean and a reciprocal deviation
per token and channel (24 bytes per token), from which backward computes the targets again. There are no atomic
operations, so the result is the same every time.

Kernels: one program per token. In forward each lane takes pixels with their three channels, so that a sum over lanes is
a sum over one channel; the three loads of a warp share cache lines. In backward each lane takes 16 values, so that the
gradient is written in whole 16-byte pieces.

Bytes moved and roofline, for 64 clips of 16×224×224 with 936 masked tokens in bfloat16, at an H200's 4.8 TB/s and
30·10¹² instructions a second (instructions counted in the code compiled for it):
    forward   reads P + 2·P bytes per token: 276 MB, 58 µs; at most 23 instructions per value, 70 µs
    backward  reads P + 2·P and writes 2·P bytes per token: 460 MB, 96 µs; 19 instructions per value, 58 µs
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gather_tokens import by_channel, cube_start, gather_cubes, token_grid, value_offset, value_tile
from kernels.launch import Launch, block_of_values, whole_block


def cube_statistics(cubes: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each cube and channel: floating [..., P] in 0 … 1 → two of [..., 1, 3].

    The deviation is the square root of the unbiased variance, plus 1e-6, as in VideoMAE's engine_for_pretraining.py.
    """
    pixels = cubes.view(*cubes.shape[:-1], -1, 3)
    mean = pixels.mean(-2, keepdim=True)
    # On a CPU, torch.var over any dimension but the last takes four times as long.
    variance = (pixels - mean).square_().sum(-2, keepdim=True) / (pixels.shape[-2] - 1)
    return mean, variance.sqrt_().add_(1e-6)


def normalised_targets(frames: Tensor, masked: Tensor, patch: int, tubelet: int, dtype: torch.dtype) -> Tensor:
    """Return what the decoder must predict: frames uint8 [B, T, H, W, 3], masked int32 [B, M] → `dtype` [B, M, P]."""
    cubes = gather_cubes(frames, masked, patch, tubelet).to(dtype).div_(255)
    mean, deviation = cube_statistics(cubes)
    return (cubes.view(*cubes.shape[:-1], -1, 3) - mean).div_(deviation).flatten(-2)


def masked_mse_reference(prediction: Tensor, frames: Tensor, masked: Tensor, patch: int, tubelet: int) -> Tensor:
    """Compute `masked_mse` in plain torch; in float64 for a float64 prediction, otherwise in float32."""
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    targets = normalised_targets(frames, masked, patch, tubelet, dtype)
    return (prediction.to(dtype) - targets).square().mean()


@triton.jit  # type: ignore[untyped-decorator]
def _standardise(level: tl.tensor, inside: tl.tensor, statistics: tl.tensor, PIXELS: tl.constexpr) -> tl.tensor:
    """Return the targets of one channel, float32 [BLOCK]. Store its mean and reciprocal deviation in `statistics`.

    Both are of levels 0 … 255; the targets are the same as for values in 0 … 1, with 1e-6 scaled to 255e-6.
    """
    # The sum of levels is exact in int32, so a flat cube gives targets of exactly 0.
    mean = tl.div_rn(tl.sum(level.to(tl.int32), 0).to(tl.float32), PIXELS * 1.0)
    centred = tl.where(inside, level.to(tl.float32) - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, 0), PIXELS - 1.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance) + 255e-6)
    tl.store(statistics, mean)
    tl.store(statistics + 1, scale)
    return centred * scale


# One program sums the squared errors of one masked token: program number = clip · count + position in `masked`.
@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    prediction: tl.tensor,  # [B, count, P], contiguous
    frames: tl.tensor,  # uint8 [B, T, H, W, 3]
    masked: tl.tensor,  # integer [B, count]
    sums: tl.tensor,  # out: float32 [B · count]
    statistics: tl.tensor,  # out: float32 [B, count, 3, 2], mean and reciprocal deviation per channel
    count: tl.tensor,  # masked tokens per clip
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    masked_stride_b: tl.tensor,
    masked_stride_m: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
    TUBELET: tl.constexpr,
    BLOCK: tl.constexpr,  # at least PIXELS
) -> None:
    PIXELS: tl.constexpr = TUBELET * PATCH * PATCH

    # Which token this program takes.
    program = tl.program_id(0)
    clip, number, row = (program // count).to(tl.int64), program % count, program.to(tl.int64)
    token = tl.load(masked + clip * masked_stride_b + number.to(tl.int64) * masked_stride_m).to(tl.int32)

    # Where its pixels lie in the frames and in the prediction. A lane's element is a pixel: three values in a row.
    first = tl.arange(0, BLOCK) * 3
    inside = first < PIXELS * 3
    source = frames + clip * stride_b + cube_start(token, stride_t, stride_h, ROWS, COLUMNS, PATCH, TUBELET)
    source += value_offset(first, stride_t, stride_h, PATCH)
    predicted = prediction + row * (PIXELS * 3) + first

    # Load everything before the first sum, so that all loads wait for memory together.
    red = tl.load(source, mask=inside, other=0)
    green = tl.load(source + 1, mask=inside, other=0)
    blue = tl.load(source + 2, mask=inside, other=0)
    red_error = tl.load(predicted, mask=inside, other=0.0).to(tl.float32)
    green_error = tl.load(predicted + 1, mask=inside, other=0.0).to(tl.float32)
    blue_error = tl.load(predicted + 2, mask=inside, other=0.0).to(tl.float32)

    # Subtract the targets, channel by channel.
    red_error -= _standardise(red, inside, statistics + row * 6, PIXELS)
    green_error -= _standardise(green, inside, statistics + row * 6 + 2, PIXELS)
    blue_error -= _standardise(blue, inside, statistics + row * 6 + 4, PIXELS)

    # One sum per token, and no atomic addition: torch adds them up in a fixed order.
    tl.store(sums + row, tl.sum(red_error * red_error + green_error * green_error + blue_error * blue_error, 0))


# One program writes the gradient of one masked token; programs are numbered as in `_forward`.
@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    prediction: tl.tensor,  # [B, count, P], contiguous
    frames: tl.tensor,  # uint8 [B, T, H, W, 3]
    masked: tl.tensor,  # integer [B, count]
    statistics: tl.tensor,  # float32 [B, count, 3, 2], from `_forward`
    upstream: tl.tensor,  # scalar: the gradient of the loss
    gradient: tl.tensor,  # out: [B, count, P], contiguous
    factor: tl.tensor,  # 2 / number of values, from the mean of squares
    count: tl.tensor,  # masked tokens per clip
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    masked_stride_b: tl.tensor,
    masked_stride_m: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
    TUBELET: tl.constexpr,
    BLOCK: tl.constexpr,  # values per round of the loop
) -> None:
    VALUES: tl.constexpr = TUBELET * PATCH * PATCH * 3

    # Which token this program takes, and where it starts in the frames.
    program = tl.program_id(0)
    clip, number, row = (program // count).to(tl.int64), program % count, program.to(tl.int64)
    token = tl.load(masked + clip * masked_stride_b + number.to(tl.int64) * masked_stride_m).to(tl.int32)
    source = frames + clip * stride_b + cube_start(token, stride_t, stride_h, ROWS, COLUMNS, PATCH, TUBELET)

    # Scalars of the token: the gradient's factor, and the mean and reciprocal deviation of each channel.
    slope = tl.load(upstream).to(tl.float32) * factor
    saved = statistics + row * 6
    red_mean, green_mean, blue_mean = tl.load(saved), tl.load(saved + 2), tl.load(saved + 4)
    red_scale, green_scale, blue_scale = tl.load(saved + 1), tl.load(saved + 3), tl.load(saved + 5)

    # Walk over the token's values in memory order, BLOCK at a time. Compute each target again, then the
    # gradient (prediction - target) · slope.
    for start in range(0, VALUES, BLOCK):
        value, channel = value_tile(start, BLOCK)
        inside = value < VALUES
        level = tl.load(source + value_offset(value, stride_t, stride_h, PATCH), mask=inside, other=0).to(tl.float32)
        predicted = tl.load(prediction + row * VALUES + value, mask=inside, other=0.0).to(tl.float32)
        mean = by_channel(channel, red_mean, green_mean, blue_mean)
        scale = by_channel(channel, red_scale, green_scale, blue_scale)
        result = (predicted - (level - mean) * scale) * slope
        tl.store(gradient + row * VALUES + value, result.to(gradient.dtype.element_ty), mask=inside)


class _MaskedMSE(torch.autograd.Function):
    """The two kernels as one autograd function."""

    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        frames: Tensor,
        masked: Tensor,
        patch: int,
        tubelet: int,
        forward: Launch,
        backward: Launch,
    ) -> Tensor:
        _, rows, columns = token_grid(frames, masked, patch, tubelet)
        prediction = prediction.contiguous()
        batch, count = masked.shape
        sums = prediction.new_empty(batch * count, dtype=torch.float32)
        statistics = prediction.new_empty(batch, count, 3, 2, dtype=torch.float32)
        assert forward.block >= tubelet * patch**2
        assert backward.block >= 16
        _forward[(batch * count,)](
            prediction,
            frames,
            masked,
            sums,
            statistics,
            count,
            *frames.stride()[:3],
            *masked.stride(),
            ROWS=rows,
            COLUMNS=columns,
            PATCH=patch,
            TUBELET=tubelet,
            BLOCK=forward.block,
            num_warps=forward.num_warps,
        )
        ctx.save_for_backward(prediction, frames, masked, statistics)
        ctx.cube, ctx.launch = (patch, tubelet, rows, columns), backward
        return sums.sum() / prediction.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        prediction, frames, masked, statistics = ctx.saved_tensors
        patch, tubelet, rows, columns = ctx.cube
        batch, count = masked.shape
        gradient = torch.empty_like(prediction)
        _backward[(batch * count,)](
            prediction,
            frames,
            masked,
            statistics,
            upstream,
            gradient,
            2 / prediction.numel(),
            count,
            *frames.stride()[:3],
            *masked.stride(),
            ROWS=rows,
            COLUMNS=columns,
            PATCH=patch,
            TUBELET=tubelet,
            BLOCK=ctx.launch.block,
            num_warps=ctx.launch.num_warps,
        )
        return gradient, None, None, None, None, None, None


def masked_mse_kernel(
    prediction: Tensor,
    frames: Tensor,
    masked: Tensor,
    patch: int,
    tubelet: int,
    forward: Launch | None = None,
    backward: Launch | None = None,
) -> Tensor:
    """Compute `masked_mse` with the kernels, in float32.

    forward    launch; block: at least the pixels of a cube
    backward   launch; block: values per round, at least 16

    Token numbers are not checked: they must lie in 0 … tokens - 1.
    """
    pixels = tubelet * patch**2
    launches = forward or whole_block(pixels), backward or block_of_values(3 * pixels)
    loss: Tensor = _MaskedMSE.apply(prediction, frames, masked, patch, tubelet, *launches)  # type: ignore[no-untyped-call]
    return loss


def masked_mse(prediction: Tensor, frames: Tensor, masked: Tensor, patch: int, tubelet: int) -> Tensor:
    """Return the mean squared error over all masked values, a float32 scalar (float64 for a float64 prediction).

    prediction   floating [B, M, P]; its gradient has the same dtype
    frames       uint8 [B, T, H, W, 3]; on CUDA backward reads them again, so do not overwrite them before
    masked       int32 [B, M]; not checked on CUDA
    patch        pixels
    tubelet      frames

    A prediction of zero has a loss of about 1. Uses the kernels on CUDA and the reference on a CPU. float64 uses the
    reference on every device.
    Raises ValueError for a prediction of another shape, and as `gather_tokens` does.
    """
    token_grid(frames, masked, patch, tubelet)
    expected = [*masked.shape, tubelet * patch**2 * 3]
    if list(prediction.shape) != expected:
        raise ValueError(f"expected a prediction {expected}, got {list(prediction.shape)}")
    on_kernel = prediction.is_cuda and prediction.dtype != torch.float64
    loss = masked_mse_kernel if on_kernel else masked_mse_reference
    return loss(prediction, frames, masked, patch, tubelet)
