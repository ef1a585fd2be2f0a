"""torch's switch between FlashAttention kernels is used for one kernel and put back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import attention
from torch.nn.attention import _registry

from bench.workloads.attention import find_attention, using_attention
from tests.support.cubes import DEVICE


class Handle:
    def remove(self) -> None:
        """Do nothing."""


def test_a_registered_kernel_is_active_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: Handle())
    with using_attention("FlashAttention 3") as backend:
        assert (backend, attention.current_flash_attention_impl()) == ("sdpa", "FA3")
        assert not torch.backends.cuda.math_sdp_enabled()
    assert attention.current_flash_attention_impl() is None
    assert torch.backends.cuda.math_sdp_enabled()


def test_a_kernel_that_is_not_installed_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Handle:
        raise ModuleNotFoundError("No module named 'flash_attn_interface'")

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", missing)
    with pytest.raises(ModuleNotFoundError), using_attention("FlashAttention 3"):
        pass
    assert attention.current_flash_attention_impl() is None
    with using_attention("cudnn") as backend:
        assert backend == "cudnn"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="has a GPU")
def test_a_cpu_has_sdpa() -> None:
    assert find_attention(torch.device("cpu")) == (["sdpa"], [])
