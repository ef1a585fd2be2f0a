"""FP8 layers against the same sums in float64, on their own and in towers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engines.towers.blocks import Block
from engines.towers.clip_towers import FrameTower, PatchTower, StudentTower, Tower
from engines.towers.fp8 import Fp8Linear, use_fp8
from kernels.quantize_rows import E4M3, quantize_rows_reference, reserve
from tests.support.clip_models import cosine_error, small_clip, vit_b_32

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nan_stays_in_its_row() -> None:
    x = torch.zeros(3, 16)
    x[1, 4], x[2] = float("nan"), 5.0
    product = Fp8Linear(nn.Linear(16, 16), CPU)(x)
    assert product.isnan().any(dim=1).tolist() == [False, True, False]


def test_a_layer_is_the_product_of_its_rounded_parts() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    x = draw(3, 7, 64)
    ours = Fp8Linear(layer, CPU)(x)
    assert (ours.dtype, tuple(ours.shape)) == (torch.bfloat16, (3, 7, 48))
    a, b = (v.double() * s.double() for v, s in map(quantize_rows_reference, (x.view(-1, 64), layer.weight)))
    expected = (a @ b.T + layer.bias.double()).view(3, 7, 48)
    torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=2e-3)
    activated = Fp8Linear(layer, CPU, silu=True)(x)
    torch.testing.assert_close(activated, Fp8Linear(layer, CPU)(F.silu(x)))
    # And therefore as close to the exact product as 4 significant bits allow.
    exact = layer(x)
    assert 0.002 < (ours.float() - exact).norm() / exact.norm() < 0.05


def test_sizes_that_have_no_product_are_refused() -> None:
    for sizes in ((24, 48), (48, 24)):
        with pytest.raises(ValueError, match=rf"multiples of 16, got {sizes[0]} to {sizes[1]}: use --clip.precision"):
            Fp8Linear(nn.Linear(*sizes), CPU)


def test_a_towers_blocks_are_replaced_and_nothing_else() -> None:
    visual = small_clip(1, layers=3).visual
    towers: list[Tower] = [PatchTower(visual, 8), FrameTower(visual, 32, 48, 8, "sclip")]
    for tower, layers in zip(towers, (3 + 3 + 4, 3 * 3), strict=True):
        x = draw(6, *tower.input_shape)
        exact = tower(x)
        use_fp8(tower, CPU)
        assert sum(isinstance(module, Fp8Linear) for module in tower.modules()) == layers
        kept = {name.split(".")[-1] for name, module in tower.named_modules() if isinstance(module, nn.Linear)}
        assert kept == {"out"}
        tower.to(torch.bfloat16)
        blocks = [module for module in tower.modules() if isinstance(module, Block)]
        assert {block.fc.weight.dtype for block in blocks} == {E4M3}
        assert {block.fc.scale.dtype for block in blocks} == {torch.float32}
        rough = tower(x.bfloat16())
        assert rough.dtype == torch.bfloat16
        assert 1e-4 < cosine_error(rough, exact) < 5e-3


@pytest.mark.slow
def test_a_real_network_keeps_its_embeddings() -> None:
    tower, x = PatchTower(vit_b_32().visual, 16), draw(4, 768)
    exact = tower(x)
    use_fp8(tower, CPU)
    assert cosine_error(tower.to(torch.bfloat16)(x.bfloat16()), exact) < 0.02


def test_a_student_has_nothing_to_replace() -> None:
    with pytest.raises(ValueError, match=r"student8-32 has none: use --clip\.precision fp16"):
        use_fp8(StudentTower(8, 32, 16), CPU)


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(
        ValueError, match=r"capability 8.9 or later .* got NVIDIA A100 with 8.0: use --clip.precision fp16"
    ):
        use_fp8(PatchTower(small_clip(1).visual, 8), torch.device("cuda"))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 96, 288), (37, 3072, 768), (3528 * 50, 768, 2304)])
def test_torch_takes_what_a_gpu_would_be_given(rows: int, inputs: int, outputs: int) -> None:
    """Torch checks its own rules for `_scaled_mm` on CUDA, on tensors without contents."""
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        layer = Fp8Linear(nn.Linear(inputs, outputs), device)
        product = layer.multiply_quantized(*reserve(rows, inputs, device))
    padded = -(-rows // 16) * 16
    assert (tuple(product.shape), product.dtype, product.device) == ((padded, outputs), torch.bfloat16, device)


def needs_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 products")


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 288), (768, 2304), (3072, 768), (208, 48)])
@pytest.mark.parametrize("rows", [1, 15, 16, 50, 257, 3920])
def test_the_product_on_a_gpu(rows: int, inputs: int, outputs: int) -> None:
    needs_fp8()
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs), draw(rows, 2, inputs).bfloat16()
    expected = Fp8Linear(layer, CPU)(x).double()
    ours = Fp8Linear(layer, torch.device("cuda"))
    for given in (x.cuda(), x.cuda()[:, :1]):
        product = ours(given).cpu().double()
        wanted = expected[:, : given.shape[1]]
        assert product.shape == wanted.shape
        assert (product - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["patch", "sclip"])
def test_a_tower_on_a_gpu(kind: str) -> None:
    needs_fp8()
    visual, towers = small_clip(1, layers=3).visual, []
    for device in (CPU, torch.device("cuda")):
        tower: Tower = PatchTower(visual, 8) if kind == "patch" else FrameTower(visual, 32, 48, 8, "sclip")
        use_fp8(tower, device)
        towers.append(tower.to(device, torch.bfloat16))
    x = draw(37, *towers[0].input_shape).bfloat16()
    assert cosine_error(towers[1](x.cuda()).cpu(), towers[0](x)) < 5e-3
