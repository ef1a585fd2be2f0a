"""AdamW, its parameter groups, and the learning-rate schedule of VideoMAE's pretraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tgmae.config.training import OptimConfig
from tgmae.training.sharding import gather, is_sharded


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only: not on biases, norms, the mask token and the temperature."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.dim() < 2 or name.endswith("mask_token")]
    matrices = [p for name, p in named if not (p.dim() < 2 or name.endswith("mask_token"))]
    groups = [
        {"params": alike, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (plain, 0.0))
        for alike in _part_by_sharding(parameters)
    ]
    return torch.optim.AdamW(groups, lr=config.warmup_lr, betas=config.betas, fused=True)


def _part_by_sharding(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Part parameters into those that processes share and those that each has a copy of: one kernel takes one kind."""
    parts = [[p for p in parameters if is_sharded(p) == shared] for shared in (True, False)]
    return [part for part in parts if part]


def apply_gradients(networks: Sequence[nn.Module], optimizer: torch.optim.AdamW, clip_norm: float | None) -> Tensor:
    """Clip the gradients of each network and take a step; return their norms before clipping, on the device.

    Each network is clipped by its own norm: a head that only observes must not shorten the steps of the others.

    A step with a norm that is not finite changes nothing, not even the moments. The device decides that, so the host
    need not wait for the norms: fused AdamW reads `found_inf`, as it does for torch's GradScaler.
    """
    gradients = ([p.grad for p in network.parameters() if p.grad is not None] for network in networks)
    norms = [nn.utils.get_total_norm(of_one) for of_one in gradients]  # over all processes where they are sharded
    if clip_norm is not None:
        for network, norm in zip(networks, norms, strict=True):
            nn.utils.clip_grads_with_norm_(network.parameters(), clip_norm, norm)
    every = torch.stack([gather(norm) for norm in norms])
    optimizer.found_inf = every.isfinite().all().logical_not().float()  # type: ignore[attr-defined]
    optimizer.step()
    return every


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then half a cosine down to the smallest rate.

    batch_size    clips per optimiser step; every rate is multiplied by batch_size / 256 (VideoMAE scales all three)
    """

    config: OptimConfig
    batch_size: int
    total_steps: int
    steps_per_epoch: float

    @property
    def warmup_steps(self) -> int:
        return min(round(self.config.warmup_epochs * self.steps_per_epoch), self.total_steps)

    @property
    def note(self) -> str:
        """Say that the warm-up takes the whole run, "" where it does not."""
        return (
            f"the warm-up takes all {self.total_steps} steps of the run, so the learning rate rises to the end and is "
            f"never lowered; give less than --optim.warmup-epochs {self.config.warmup_epochs:g}, or more --epochs"
        ) * (self.warmup_steps == self.total_steps)

    def rate(self, step: int) -> float:
        """Return the learning rate of optimiser step `step`, counted from 0."""
        config, scale, warmup = self.config, self.batch_size / 256, self.warmup_steps
        if step < warmup:
            share = step / max(warmup - 1, 1)
            return scale * (config.warmup_lr + share * (config.base_lr - config.warmup_lr))
        share = (step - warmup) / max(self.total_steps - warmup, 1)
        return scale * (config.min_lr + 0.5 * (config.base_lr - config.min_lr) * (1 + math.cos(math.pi * share)))
