"""Count the floating-point operations of a piece of work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], object]) -> int:
    """Call `run` once and return its floating-point operations; a multiply-add counts as two.

    Counts matrix products, convolutions and attention, not element-wise work. Tensors may be fake
    (torch's FakeTensorMode), so that nothing is computed.

    torch's counter sees single operators and knows few of the fused ones: an attention kernel it does not know counts
    as nothing, and so does the fast path of nn.MultiheadAttention. Both are switched off while `run` is called.
    SDPBackend.MATH does attention as two matrix products, which are counted on every device.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())
