"""Launch configurations of the kernels: what may be tuned for a chip without changing a result.

The defaults follow from the size of the work; `python -m bench.kernel_tuning` measures the alternatives. Triton's
num_stages is left alone: for sm_90, loops over a token's values compile to the same code with 1 to 4 stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Launch:
    """One program's share of the work.

    block      items held at once, a power of two: all of the program's items, or one round of its loop over them
    num_warps  warps of 32 lanes that share the block
    """

    block: int
    num_warps: int


def whole_block(count: int) -> Launch:
    """Return the launch config of a program that reduces over all `count` items in one block.

    Used by top-k and by the forward pass of the loss. Up to 512 items take one warp, so that sums need no barrier.
    """
    block: int = triton.next_power_of_2(count)
    return Launch(block, min(max(block // 512, 1), 16))


def block_of_values(values: int) -> Launch:
    """Return the launch config of a program that loops over a token's values.

    Used by gather and by the backward pass of the loss. Each lane takes 16 values: one load of 16 bytes.
    """
    block = min(max(triton.next_power_of_2(values), 16), 2048)
    return Launch(block, max(block // 512, 1))
