"""Steps are read back whole and in order, and one with bad gradients changes nothing."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch._inductor.config

from dali_pipelines.types import CropBox
from tests.tgmae.masks.test_motion_field import request
from tgmae.config.model import ModelConfig
from tgmae.config.training import OptimConfig
from tgmae.model.pretraining import Losses
from tgmae.model.videomae import VideoMAE
from tgmae.training.async_losses import AsyncLosses
from tgmae.training.optim import apply_gradients, make_optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REQUESTS = [request(row, (0,), CropBox(x=0, y=0, width=1, height=1)) for row in range(4)]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE, requires_grad=True)


def losses(total: float, dtype: torch.dtype = torch.float32) -> Losses:
    """The losses of a pass: other numbers than the total, so that none is taken for another."""
    return Losses(*(scalar(total + more).to(dtype) for more in range(4)))


def test_steps_come_back_in_order() -> None:
    readback = AsyncLosses(DEVICE)
    assert list(readback.pop(wait=True)) == []
    seen = []
    for step in range(1, 6):
        readback.push(
            step, [losses(float(step)), losses(step + 0.5)], torch.tensor([10.0 * step], device=DEVICE), REQUESTS[:step]
        )
        seen += list(readback.pop(wait=False))
        # The GPU may be one step behind, a CPU is not.
        assert len(seen) == step - (DEVICE.type == "cuda")
    seen += list(readback.pop(wait=True))
    assert [record.step for record in seen] == [1, 2, 3, 4, 5]
    assert seen[2].losses == [3.0, 3.5]
    assert seen[2].grad_norms == [30.0]
    assert seen[2].means == {"total": 3.25, "reconstruction": 4.25, "contrastive": 5.25, "duplicate_pairs": 6.25}
    assert seen[2].requests == REQUESTS[:3]
    assert all(record.is_finite for record in seen)


@pytest.mark.parametrize(
    ("totals", "norms"),
    [([1.0, math.nan], [1.0]), ([1.0, math.inf], [1.0]), ([1.0, 1.0], [math.inf]), ([1.0, 1.0], [1.0, math.nan])],
)
def test_what_is_not_finite_says_so(totals: list[float], norms: list[float]) -> None:
    readback = AsyncLosses(DEVICE)
    readback.push(1, [losses(total, torch.bfloat16) for total in totals], torch.tensor(norms, device=DEVICE), [])
    [seen] = readback.pop(wait=True)
    assert not seen.is_finite


def test_bad_gradients_move_neither_weights_nor_moments() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(DEVICE)
    optimizer = make_optimizer(model, OptimConfig(warmup_lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    apply_gradients([model], optimizer, None)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert not apply_gradients([model], optimizer, 1.0).isfinite()
    for parameter, value, moment in zip(model.parameters(), before, moments, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
        assert optimizer.state[parameter]["step"] == 1
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert apply_gradients([model], optimizer, 1.0).item() == pytest.approx(18**0.5)
    assert not any(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And keep their names, so that checkpoints of either kind fit the other."""
    # torch would compile and load a test program for each vector instruction set: half of the test's time.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)
    config = ModelConfig(
        image_size=32, num_frames=4, patch_size=8, width=32, depth=2, num_heads=2, decoder_width=32, decoder_depth=1,
        decoder_num_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = VideoMAE(config)
    compiled = VideoMAE(config)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_blocks()
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    visible = torch.arange(0, 32, 3, dtype=torch.int32).expand(2, -1)
    outputs = []
    for model in (plain, compiled):
        features = model.encode(frames, visible)
        features.square().mean().backward()
        outputs.append((features, model.encoder[0].mlp[0].weight.grad))  # type: ignore[union-attr, index]
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
