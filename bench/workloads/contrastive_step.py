"""The training step with a contrastive loss, in its roles, on batches that are already on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.harness.measure import now
from engines.clip_model import load_clip
from kernels.topk_mask import topk_mask
from tgmae.config.loss import LossConfig
from tgmae.config.run import TrainConfig
from tgmae.model.attention import choose_attention
from tgmae.model.contrastive import ContrastiveHead, contrast
from tgmae.model.pretraining import Inputs, Pretraining
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE
from tgmae.training.async_losses import AsyncLosses
from tgmae.training.optim import apply_gradients, make_optimizer
from tgmae.training.parallel import World
from tgmae.training.step import TrainingStep

OFF, TERM = "off", "the term alone"
ROLES = {
    OFF: LossConfig(),
    "observed": LossConfig(observe_contrastive=True),
    "optimised": LossConfig(contrastive=1.0),
    "optimised over the whole step": LossConfig(contrastive=1.0, contrast_over="step"),
}


class Spent(NamedTuple):
    """Milliseconds a step: passed, and of CPU time in this process."""

    wall_ms: float
    cpu_ms: float


class ContrastiveStep:
    """A preset's network, with the head that a role needs, and the passes of one step: random frames, masks and text.

    Text has the width of the preset's CLIP; every clip has a caption of its own.
    """

    def __init__(self, preset: TrainConfig, loss: LossConfig, num_passes: int, device: torch.device) -> None:
        size = preset.batch_size // num_passes
        self.device = device
        self.config = replace(preset, loss=loss, device_batch_size=size)
        text_width = load_clip(preset.clip).visual.proj.shape[1]
        torch.manual_seed(0)
        mae = VideoMAE(preset.model, choose_attention(preset.model.attention, device))
        head = ContrastiveHead(preset.model.width, text_width) if loss.contrasts else None
        networks = Pretraining(mae, head).to(device)
        optimizer = make_optimizer(networks, preset.optim)
        self.training = TrainingStep(networks, optimizer, self.config, World(0, 1, device), device.type == "cuda")
        self.losses = AsyncLosses(device)
        self.passes = [self._draw_inputs(size, number, text_width) for number in range(num_passes)]

    def _draw_inputs(self, size: int, number: int, text_width: int) -> Inputs:
        model, device = self.config.model, self.device
        shape = (size, model.num_frames, model.image_size, model.image_size, 3)
        scores = torch.rand(size, model.num_slots, model.patches_per_slot, device=device)
        visible, masked = topk_mask(scores, self.config.mask.masked_per_slot(model.patches_per_slot))
        return Inputs(
            torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
            TokenMasks(visible=visible, masked=masked),
            F.normalize(torch.randn(size, text_width, device=device), dim=1),
            torch.arange(number * size, (number + 1) * size, device=device),
        )

    def run(self, num_steps: int) -> Spent:
        """Do steps of train.py and return what one of them took."""
        return self._time(self._step, num_steps)

    def run_term(self, num_steps: int) -> Spent:
        """Do what the contrastive loss adds to a step and nothing else, and return what one took.

        That is head, loss and backward on features of the first pass, and the update of the head.
        """
        return self._time(self._step_of_head, num_steps)

    def _step(self) -> None:
        losses = []
        for number, inputs in enumerate(self.passes, 1):
            done, _ = self.training.add_gradients(inputs, is_last=number == len(self.passes))
            losses += done
        rate = self.config.optim.base_lr * self.config.batch_size / 256
        self.losses.push(0, losses, self.training.update(rate), [])
        assert all(seen.is_finite for seen in self.losses.pop(wait=False))

    def _step_of_head(self) -> None:
        head, inputs = self.training.model.head, self.passes[0]
        assert head is not None
        assert inputs.text is not None
        assert inputs.captions is not None
        features = torch.randn(len(inputs.frames), self.config.model.width, device=self.device, requires_grad=True)
        loss, _ = contrast(
            head(features), inputs.text, inputs.captions, head.log_temperature, self.config.loss.duplicates
        )
        torch.autograd.backward(loss)
        apply_gradients([head], self.training.optimizer, self.config.optim.clip_norm)
        self.training.optimizer.zero_grad()

    def _time(self, work: Callable[[], None], times: int) -> Spent:
        started, used = now(self.device), time.process_time()
        for _ in range(times):
            work()
        passed, spent = now(self.device) - started, time.process_time() - used
        return Spent(1000 * passed / times, 1000 * spent / times)
