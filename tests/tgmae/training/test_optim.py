"""The schedule against VideoMAE's, written out with numpy; weight decay reaches matrices and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tgmae.config.model import ModelConfig
from tgmae.config.training import OptimConfig
from tgmae.model.videomae import VideoMAE
from tgmae.presets import PRESETS
from tgmae.training.optim import Schedule, make_optimizer

SMALL = ModelConfig(
    image_size=32, num_frames=4, width=24, depth=2, num_heads=2, decoder_width=12, decoder_depth=1, decoder_num_heads=2
)


def published_rates(config: OptimConfig, batch_size: int, epochs: int, steps_per_epoch: int) -> NDArray[np.float64]:
    """VideoMAE: utils.cosine_scheduler with the scaled rates of run_mae_pretraining.py, warmup_lr among them.

    The script itself scales warmup_lr and does not hand it over, so that its warm-up starts from 0.
    """
    base, warm, low = (rate * batch_size / 256 for rate in (config.base_lr, config.warmup_lr, config.min_lr))
    warmup_iters = int(config.warmup_epochs * steps_per_epoch)
    rising = np.linspace(warm, base, warmup_iters)
    count = epochs * steps_per_epoch - warmup_iters
    falling = low + 0.5 * (base - low) * (1 + np.cos(np.pi * np.arange(count) / count))
    return np.concatenate([rising, falling])


def rates(config: OptimConfig, batch_size: int, epochs: int, steps_per_epoch: int) -> NDArray[np.float64]:
    total = epochs * steps_per_epoch
    schedule = Schedule(config=config, batch_size=batch_size, total_steps=total, steps_per_epoch=steps_per_epoch)
    return np.array([schedule.rate(step) for step in range(total)])


@pytest.mark.parametrize(
    ("config", "batch_size", "epochs", "steps_per_epoch"),
    [
        (PRESETS["ssv2"].optim, 2048, 800, 3),
        (PRESETS["k400"].optim, 2048, 200, 7),
        (PRESETS["ucf101"].optim, 192, 3200, 1),
        (PRESETS["demo"].optim, 16, 16, 20),
        (OptimConfig(warmup_epochs=1), 256, 5, 1),  # a warm-up of one step
        (OptimConfig(warmup_epochs=0), 64, 4, 5),
        (OptimConfig(warmup_epochs=2.5), 512, 6, 4),
    ],
)
def test_schedule_is_videomaes(config: OptimConfig, batch_size: int, epochs: int, steps_per_epoch: int) -> None:
    expected = published_rates(config, batch_size, epochs, steps_per_epoch)
    got = rates(config, batch_size, epochs, steps_per_epoch)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_schedule_goes_through_the_stated_rates() -> None:
    got = rates(OptimConfig(), 2048, 800, 3)
    assert got[0] == pytest.approx(8 * 1e-6)
    assert got[119] == pytest.approx(8 * 1.5e-4)  # the last step of 40 epochs' warm-up
    assert got.argmax() in (119, 120)
    assert (np.diff(got[:120]) > 0).all()
    assert (np.diff(got[120:]) < 0).all()
    assert 8 * 1e-5 < got[-1] < 8 * 1.0001e-5


def test_every_rate_scales_with_the_batch() -> None:
    small, large = rates(OptimConfig(), 256, 50, 2), rates(OptimConfig(), 1024, 50, 2)
    np.testing.assert_allclose(large, 4 * small, rtol=1e-12)


def test_schedule_with_a_fraction_of_a_step_an_epoch() -> None:
    """Data sets are no multiple of the batch; 40 epochs of 2.4 steps are 96 steps."""
    schedule = Schedule(config=OptimConfig(), batch_size=256, total_steps=240, steps_per_epoch=2.4)
    assert schedule.rate(95) == pytest.approx(1.5e-4)
    assert schedule.rate(96) == pytest.approx(1.5e-4)
    assert schedule.rate(97) < 1.5e-4


def test_warm_up_longer_than_the_run() -> None:
    schedule = Schedule(config=OptimConfig(warmup_epochs=40), batch_size=256, total_steps=10, steps_per_epoch=1)
    got = [schedule.rate(step) for step in range(11)]
    assert all(math.isfinite(rate) and rate > 0 for rate in got)
    assert got[:10] == sorted(got[:10])
    assert schedule.note.startswith("the warm-up takes all 10 steps of the run")
    assert "less than --optim.warmup-epochs 40, or more --epochs" in schedule.note
    assert not replace(schedule, total_steps=41).note


def test_every_parameter_is_in_one_group_once() -> None:
    model = VideoMAE(SMALL)
    optimizer = make_optimizer(model, OptimConfig())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(set(grouped)) == len(grouped)


def test_decay_reaches_matrices_only() -> None:
    model = VideoMAE(SMALL)
    decay = {
        id(p): group["weight_decay"]
        for group in make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
        for p in group["params"]
    }
    # From the modules' types, not from the parameters' shapes.
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    assert len(matrices) == 3 + 4 * (SMALL.depth + SMALL.decoder_depth)
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if id(parameter) in matrices else 0.0), name
    assert decay[id(model.mask_token)] == 0.0


def test_a_step_without_gradient_shrinks_matrices_alone() -> None:
    torch.manual_seed(0)
    model = VideoMAE(SMALL)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.head.weight, before["head.weight"] * (1 - 0.1 * 0.5))
    for name in ("mask_token", "encoder.0.norm1.weight", "encoder.0.attention.q_bias", "head.bias"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_frozen_parameters_are_left_out() -> None:
    model = VideoMAE(SMALL)
    model.head.requires_grad_(False)
    grouped = {id(p) for group in make_optimizer(model, OptimConfig()).param_groups for p in group["params"]}
    assert id(model.head.weight) not in grouped
    assert len(grouped) == len(list(model.parameters())) - 2


def test_betas_are_the_configurations() -> None:
    optimizer = make_optimizer(VideoMAE(SMALL), OptimConfig(betas=(0.8, 0.7)))
    assert all(group["betas"] == (0.8, 0.7) for group in optimizer.param_groups)
