"""How a kernel is started: what may be tuned to a chip without changing a result.

What a kernel takes by default is decided here, by size; `python -m bench.kernel_tuning` measures the alternatives.
Triton's num_stages is left alone: compiled for sm_90, loops over a token's values are the same code under 1 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Launch:
    """One program's share of the work.

    block      items that it holds at once, a power of two: all of them, or what a walk over them takes in a round
    num_warps  that share the block, 32 lanes each
    """

    block: int
    num_warps: int


def whole_block(count: int) -> Launch:
    """Of a program that holds all of `count` items at once and adds over them (top-k, the loss's forward).

    One warp up to 512 items: sums then need no barrier.
    """
    block: int = triton.next_power_of_2(count)
    return Launch(block, min(max(block // 512, 1), 16))


def block_of_values(values: int) -> Launch:
    """Of a program that walks over a token's values, 16 a lane: one load of 16 bytes (gather, the loss's backward)."""
    block = min(max(triton.next_power_of_2(values), 16), 2048)
    return Launch(block, max(block // 512, 1))
