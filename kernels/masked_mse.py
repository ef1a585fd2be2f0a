"""Reconstruction loss on masked tokens, with targets normalised cube by cube straight from the uint8 frames.

    prediction  [B, M, P]                B clips, M masked tokens, P = tubelet · patch² · 3 values a token
    frames      uint8 [B, T, H, W, 3]    any strides over clips, frames and rows
    masked      integer [B, M]           token numbers
    loss        float32 scalar           mean over B · M · P squared errors

The target of a value is (value - mean) / (deviation + 1e-6), of values in 0 … 1, with the mean and the unbiased
deviation of its cube and channel. Targets are never written: forward keeps a mean and a reciprocal deviation for each
token and channel (24 bytes a token), backward computes targets and gradient from them. No atomics: the same result
every time.

Kernels, one program a token. In bfloat16, 64 clips of 16×224×224 with 936 masked tokens, at an H200's 4.8 TB/s and
30·10¹² instructions a second (instructions counted in what is compiled for it):
    forward   reads P + 2·P bytes, 276 MB, 58 µs; at most 23 instructions a value, 70 µs. Lanes are pixels and have
              three channels, so that a sum over lanes is one over a channel; a warp's three loads share cache lines.
    backward  reads P + 2·P bytes and writes 2·P, 460 MB, 96 µs; 19 instructions a value, 58 µs. Lanes are values, so
              that the gradient is written in whole 16-byte pieces.
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
    """Mean and deviation of each cube and channel, of values in 0 … 1.

    cubes floating [..., P] in 0 … 1 → two of [..., 1, 3]. The deviation is the square root of the unbiased variance
    plus 1e-6, as in VideoMAE's engine_for_pretraining.py.
    """
    pixels = cubes.view(*cubes.shape[:-1], -1, 3)
    mean = pixels.mean(-2, keepdim=True)
    # torch's own var over a dimension that is not the last takes four times as long on a CPU.
    variance = (pixels - mean).square_().sum(-2, keepdim=True) / (pixels.shape[-2] - 1)
    return mean, variance.sqrt_().add_(1e-6)


def normalised_targets(frames: Tensor, masked: Tensor, patch: int, tubelet: int, dtype: torch.dtype) -> Tensor:
    """What the decoder must predict: uint8 [B, T, H, W, 3], int32 [B, M] → `dtype` [B, M, P]."""
    cubes = gather_cubes(frames, masked, patch, tubelet).to(dtype).div_(255)
    mean, deviation = cube_statistics(cubes)
    return (cubes.view(*cubes.shape[:-1], -1, 3) - mean).div_(deviation).flatten(-2)


def masked_mse_reference(prediction: Tensor, frames: Tensor, masked: Tensor, patch: int, tubelet: int) -> Tensor:
    """`masked_mse` in plain torch. Computes in float64 for a float64 prediction, else in float32."""
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    targets = normalised_targets(frames, masked, patch, tubelet, dtype)
    return (prediction.to(dtype) - targets).square().mean()


@triton.jit  # type: ignore[untyped-decorator]
def _standardise(level: tl.tensor, inside: tl.tensor, statistics: tl.tensor, PIXELS: tl.constexpr) -> tl.tensor:
    """Targets of one channel; stores its mean and reciprocal deviation, both of levels 0 … 255."""
    # The sum of levels is exact in int32, so a flat cube gives targets of exactly 0.
    mean = tl.div_rn(tl.sum(level.to(tl.int32), 0).to(tl.float32), PIXELS * 1.0)
    centred = tl.where(inside, level.to(tl.float32) - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, 0), PIXELS - 1.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance) + 255e-6)
    tl.store(statistics, mean)
    tl.store(statistics + 1, scale)
    return centred * scale


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    prediction: tl.tensor,
    frames: tl.tensor,
    masked: tl.tensor,
    sums: tl.tensor,
    statistics: tl.tensor,
    count: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    masked_stride_b: tl.tensor,
    masked_stride_m: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
    TUBELET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    PIXELS: tl.constexpr = TUBELET * PATCH * PATCH
    program = tl.program_id(0)
    clip, number, row = (program // count).to(tl.int64), program % count, program.to(tl.int64)
    token = tl.load(masked + clip * masked_stride_b + number.to(tl.int64) * masked_stride_m).to(tl.int32)
    first = tl.arange(0, BLOCK) * 3  # each pixel's first value
    inside = first < PIXELS * 3
    source = frames + clip * stride_b + cube_start(token, stride_t, stride_h, ROWS, COLUMNS, PATCH, TUBELET)
    source += value_offset(first, stride_t, stride_h, PATCH)
    predicted = prediction + row * (PIXELS * 3) + first
    # All loads stand before the first sum, so that they wait for memory together.
    red = tl.load(source, mask=inside, other=0)
    green = tl.load(source + 1, mask=inside, other=0)
    blue = tl.load(source + 2, mask=inside, other=0)
    red_error = tl.load(predicted, mask=inside, other=0.0).to(tl.float32)
    green_error = tl.load(predicted + 1, mask=inside, other=0.0).to(tl.float32)
    blue_error = tl.load(predicted + 2, mask=inside, other=0.0).to(tl.float32)
    red_error -= _standardise(red, inside, statistics + row * 6, PIXELS)
    green_error -= _standardise(green, inside, statistics + row * 6 + 2, PIXELS)
    blue_error -= _standardise(blue, inside, statistics + row * 6 + 4, PIXELS)
    tl.store(sums + row, tl.sum(red_error * red_error + green_error * green_error + blue_error * blue_error, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    prediction: tl.tensor,
    frames: tl.tensor,
    masked: tl.tensor,
    statistics: tl.tensor,
    upstream: tl.tensor,
    gradient: tl.tensor,
    factor: tl.tensor,
    count: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    masked_stride_b: tl.tensor,
    masked_stride_m: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
    TUBELET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = TUBELET * PATCH * PATCH * 3
    program = tl.program_id(0)
    clip, number, row = (program // count).to(tl.int64), program % count, program.to(tl.int64)
    token = tl.load(masked + clip * masked_stride_b + number.to(tl.int64) * masked_stride_m).to(tl.int32)
    source = frames + clip * stride_b + cube_start(token, stride_t, stride_h, ROWS, COLUMNS, PATCH, TUBELET)
    slope = tl.load(upstream).to(tl.float32) * factor
    saved = statistics + row * 6
    red_mean, green_mean, blue_mean = tl.load(saved), tl.load(saved + 2), tl.load(saved + 4)
    red_scale, green_scale, blue_scale = tl.load(saved + 1), tl.load(saved + 3), tl.load(saved + 5)
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
    """`masked_mse` by the kernels, in float32. Token numbers are not checked: they must lie in 0 … tokens - 1.

    forward: at least a cube's pixels a block; backward: at least 16 values a round.
    """
    pixels = tubelet * patch**2
    launches = forward or whole_block(pixels), backward or block_of_values(3 * pixels)
    loss: Tensor = _MaskedMSE.apply(prediction, frames, masked, patch, tubelet, *launches)  # type: ignore[no-untyped-call]
    return loss


def masked_mse(prediction: Tensor, frames: Tensor, masked: Tensor, patch: int, tubelet: int) -> Tensor:
    """Mean squared error over all masked values, a scalar in float32 (float64 for a float64 prediction).

    prediction [B, M, P], frames uint8 [B, T, H, W, 3], masked int32 [B, M]. Predicting zero costs about 1. The gradient
    has the prediction's dtype. float64 takes the reference on every device. On CUDA token numbers are not checked, and
    backward reads the frames again: they must not be overwritten before.
    Raises ValueError for a prediction of another shape, and as `gather_tokens` does.
    """
    token_grid(frames, masked, patch, tubelet)
    expected = [*masked.shape, tubelet * patch**2 * 3]
    if list(prediction.shape) != expected:
        raise ValueError(f"expected a prediction {expected}, got {list(prediction.shape)}")
    on_kernel = prediction.is_cuda and prediction.dtype != torch.float64
    loss = masked_mse_kernel if on_kernel else masked_mse_reference
    return loss(prediction, frames, masked, patch, tubelet)
