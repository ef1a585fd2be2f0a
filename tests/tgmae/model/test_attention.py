"""Attention backends against a softmax in float64.

Dimensions: B clips, L tokens, H heads, C channels per head.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conftest import skip_or_fail
from tgmae.model.attention import Backend, attend, choose_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def qkv(shape: tuple[int, int, int, int], seed: int) -> list[Tensor]:
    """Make q, k, v and a gradient of the output, float64 [B, L, H, C]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(4)]


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhc,bmhc->bhlm", q, k) / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhlm,bmhc->blhc", weights / weights.sum(-1, keepdim=True), v)


def with_gradients(tensors: list[Tensor], backend: Backend | None) -> list[Tensor]:
    """Return the output and the gradients of q, k and v, as float64 on the CPU. Backend None is the reference."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    out = reference(q, k, v) if backend is None else attend(q, k, v, backend)
    gradients = torch.autograd.grad(out, (q, k, v), tensors[3])
    return [x.detach().double().cpu() for x in (out, *gradients)]


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 5), (1, 17, 2, 64), (3, 64, 4, 8), (2, 129, 1, 33)])
def test_sdpa_equals_softmax(shape: tuple[int, int, int, int]) -> None:
    tensors = qkv(shape, seed=1)
    expected = with_gradients(tensors, None)
    got = with_gradients(tensors, "sdpa")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    single = with_gradients([x.float() for x in tensors], "sdpa")
    for a, b in zip(single, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sdpa_does_not_mix_clips_or_heads() -> None:
    q, k, v, _ = qkv((2, 6, 3, 4), seed=2)
    out = attend(q, k, v, "sdpa")
    assert out.shape == q.shape
    for clip in range(2):
        for head in range(3):
            part = (slice(clip, clip + 1), slice(None), slice(head, head + 1))
            torch.testing.assert_close(out[part], reference(q[part], k[part], v[part]), rtol=1e-10, atol=1e-12)


def test_choice_on_a_cpu() -> None:
    assert choose_attention("auto", CPU) == "sdpa"
    assert choose_attention("sdpa", CPU) == "sdpa"


@pytest.mark.parametrize("backend", ["xformers", "cudnn"])
def test_no_backend_is_replaced_on_a_cpu(backend: Backend) -> None:
    with pytest.raises(
        ValueError, match=rf"{backend} attention needs a CUDA device, got cpu; use --model\.attention sdpa"
    ):
        choose_attention(backend, CPU)


def test_choice_on_cuda() -> None:
    """Choosing needs no GPU: it looks only at the device's type."""
    assert choose_attention("sdpa", CUDA) == "sdpa"
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(ValueError, match=r"pip install xformers"):
            choose_attention("auto", CUDA)
    else:
        assert choose_attention("auto", CUDA) == choose_attention("xformers", CUDA) == "xformers"


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "channels"), [(632, 632, 12, 64), (936, 1568, 6, 64), (24, 32, 3, 8)]
)
def test_xformers_accepts_what_training_gives_it_on_a_gpu(
    queries: int, keys: int, heads: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apply its own rules for an H100 to tensors without contents, forward and backward."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert choose_attention("xformers", CUDA) == "xformers"
    with FakeTensorMode():
        q = torch.empty(2, queries, heads, channels, dtype=torch.bfloat16, device="cuda:0")
        k, v = torch.empty(2, keys, 2, heads, channels, dtype=torch.bfloat16, device="cuda:0").unbind(2)
        assert attend(q, k, v, "xformers").shape == q.shape
        out, sums = fmha.memory_efficient_attention_forward_requires_grad(q, k, v)
        gradients = fmha.memory_efficient_attention_backward(torch.empty_like(out), out, sums, q, k, v)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["xformers", "cudnn"])
@pytest.mark.parametrize("shape", [(2, 1, 3, 64), (2, 17, 3, 64), (3, 160, 12, 64), (1, 1568, 6, 64), (2, 63, 3, 32)])
def test_other_backends_are_as_accurate_as_flash_attention(shape: tuple[int, int, int, int], backend: Backend) -> None:
    """In bfloat16, errors of output and gradients against float64 are at most twice those of torch's FlashAttention.

    The comparison names FlashAttention because sdpa, left to itself, uses cuDNN on Hopper.
    """
    if backend == "cudnn" and shape[1] == 1:
        pytest.skip("cuDNN does not accept a single token; no clip has only one")
    try:
        choose_attention(backend, CUDA)
    except ValueError as error:
        skip_or_fail(str(error))
    tensors = [x.bfloat16() for x in qkv(shape, seed=3)]  # both start from the same rounded values
    expected = with_gradients([x.double() for x in tensors], None)
    on_gpu = [x.cuda() for x in tensors]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        allowed = errors(with_gradients(on_gpu, "sdpa"), expected)
    got = errors(with_gradients(on_gpu, choose_attention(backend, CUDA)), expected)
    # A single token has weight 1, so the gradients of q and k are zero and both errors are NaN or rounding.
    parts = range(4) if shape[1] > 1 else (0, 3)
    for part in parts:
        assert got[part] <= 2 * allowed[part] + 1e-12, ("out", "dq", "dk", "dv")[part]
