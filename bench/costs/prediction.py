"""The speed of the training step on a GPU, predicted: counted work at published or assumed efficiencies.

Attention runs at the TFLOP/s that FlashAttention-3's authors published for an H100 SXM (Shah et al. 2024: heads of 64,
no causal mask; forward counts two matrix products, backward five), interpolated by the logarithm of the sequence length
and scaled by the tensor cores' peak. All other efficiencies are assumed, and named below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.costs.clip_costs import Stage
from bench.harness.chips import CHIPS, Chip
from bench.harness.tables import Row, Table
from bench.workloads.kernel_operations import Size

# TFLOP/s of forward and backward on an H100 SXM, by the length of the sequence.
ATTENTION: Mapping[str, Mapping[int, tuple[float, float]]] = {
    "FlashAttention 2": {512: (282, 198), 1024: (306, 238), 2048: (318, 264)},
    "cuDNN": {512: (335, 266), 1024: (373, 348), 2048: (395, 395)},
    "FlashAttention 3": {512: (333, 272), 1024: (392, 363), 2048: (460, 422)},
}
LINEAR_SHARE = 0.75  # assumed: of the tensor cores' peak, reached by the linear layers
EAGER_SHARE, COMPILED_SHARE = 0.7, 0.85  # assumed: of memory bandwidth, reached by everything without a matrix product
# Share of the other operators' bytes that --compile saves at γ .6. Counted once: Inductor (torch 2.11) lowered forward
# and backward of the blocks on a CPU, and each of its kernels reads its inputs once and writes its outputs once.
FUSED_SHARE = 0.21


@dataclass(frozen=True)
class Attention:
    """Attention of one kind of block, of one clip."""

    blocks: int
    queries: int
    keys: int
    width: int

    @property
    def gflop(self) -> float:
        """Operations of the two matrix products of the forward pass, over all blocks."""
        return self.blocks * 4 * self.queries * self.keys * self.width / 1e9


def list_attention(size: Size) -> list[Attention]:
    """List the attention of the encoder's blocks, the decoder's, and its last, which has masked queries only."""
    model = size.model
    visible, inner = model.num_tokens - size.num_masked, model.decoder_width
    return [
        Attention(model.depth, visible, visible, model.width),
        Attention(model.decoder_depth - 1, model.num_tokens, model.num_tokens, inner),
        Attention(1, size.num_masked, model.num_tokens, inner),
    ]


def attention_us(parts: Sequence[Attention], kernel: str, chip: Chip) -> float:
    """Return the microseconds of a clip's attention, forward and backward."""
    scale, spent = chip.tensor_tflops / CHIPS["H100"].tensor_tflops, 0.0
    for part in parts:
        forward, backward = (rate * scale for rate in _interpolate(ATTENTION[kernel], part.keys))
        spent += part.gflop / forward + 2.5 * part.gflop / backward
    return 1e3 * spent


def _interpolate(published: Mapping[int, tuple[float, float]], length: int) -> tuple[float, float]:
    lengths = sorted(published)
    length = min(max(length, lengths[0]), lengths[-1])
    low = max(known for known in lengths[:-1] if known <= length)
    share = math.log2(length / low)  # the lengths double
    (forward, backward), (above, backward_above) = published[low], published[2 * low]
    return forward + share * (above - forward), backward + share * (backward_above - backward)


def prediction_table(step: Sequence[Stage], half_others: float, size: Size, chip: Chip, title: str) -> Table:
    """Predict the step with each attention kernel, eager and compiled.

    step          its stages (`step_stages`)
    half_others   bytes a clip of the other operators where the residual stream is in bfloat16
    """
    stages = {stage.name: stage for stage in step}
    products, others = stages.pop("matrix products"), stages.pop("other operators")
    parts = list_attention(size)
    attention = 3e9 * sum(part.gflop for part in parts)  # as `products` counts it
    peak = chip.tensor_tflops * 1e6  # operations per µs
    linear_us = (products.operations - attention) / (LINEAR_SHARE * peak)
    rest_us = sum(stage.moved for stage in stages.values()) / (EAGER_SHARE * chip.memory_tb_s * 1e6)
    eager_us = others.moved / (EAGER_SHARE * chip.memory_tb_s * 1e6)
    saved = (1 - FUSED_SHARE) / (COMPILED_SHARE * chip.memory_tb_s * 1e6)
    modes = {"eager": eager_us, "compiled": others.moved * saved, "compiled, bf16 residual": half_others * saved}
    rows = []
    for mode, others_us in modes.items():
        for kernel in ATTENTION:
            kernel_us = attention_us(parts, kernel, chip)
            step_us = linear_us + kernel_us + others_us + rest_us
            facts: dict[str, float | str] = {
                "linear layers µs": linear_us, "attention µs": kernel_us, "other operators µs": others_us,
                "the rest µs": rest_us, "step µs": step_us, "attention, of peak": f"{attention / kernel_us / peak:.0%}",
                "step, of peak": f"{products.operations / step_us / peak:.1%}",
            }  # fmt: skip
            rows.append(Row(f"{mode}, {kernel}", [1e6 / step_us], facts))
    note = (
        f"Assumed: linear layers at {LINEAR_SHARE:.0%} of the peak; everything without a matrix product at "
        f"{EAGER_SHARE:.0%} of the bandwidth, at {COMPILED_SHARE:.0%} compiled. Compilation saves {FUSED_SHARE:.0%} of "
        "the other operators' bytes, counted with the residual stream in float32. Attention as published for an H100 "
        "(FlashAttention-3, heads of 64)."
    )
    return Table(title, "clips/s", rows, note=note)
