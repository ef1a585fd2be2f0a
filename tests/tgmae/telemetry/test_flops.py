"""Floating-point operations are counted as matrix products on tensors with and without contents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgmae.telemetry.flops import count_flops


def test_a_multiply_add_counts_as_two() -> None:
    a, b = torch.zeros(5, 7), torch.zeros(7, 3)
    assert count_flops(lambda: (a @ b).exp() + 1) == 2 * 5 * 7 * 3
    with FakeTensorMode():
        a, b = torch.empty(5, 7), torch.empty(7, 3)
        assert count_flops(lambda: a @ b) == 2 * 5 * 7 * 3


def test_fused_attention_counts_as_its_products() -> None:
    q, k = torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 6, 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * 2 * (2 * 4 * 10 * 6 * 8)


def test_the_fast_path_of_torchs_attention_is_counted_and_kept() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.zeros(1, 10, 8)
    with torch.inference_mode():
        flops = count_flops(lambda: layer(x, x, x, need_weights=False))
    assert flops == 2 * 10 * 8 * 8 * 4 + 2 * 2 * 10 * 10 * 8
    assert torch.backends.mha.get_fastpath_enabled()
