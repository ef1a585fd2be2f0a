"""One step of train.py on a batch that is already on the device, and its time by stage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm

from bench.harness.measure import now
from bench.workloads.attention import Kernel, using_attention
from kernels.topk_mask import topk_mask
from tgmae.config.masks import MaskConfig
from tgmae.config.run import TrainConfig
from tgmae.model.attention import choose_attention
from tgmae.model.pretraining import Inputs, Pretraining
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import Attention, VideoMAE
from tgmae.training.async_losses import AsyncLosses
from tgmae.training.optim import make_optimizer
from tgmae.training.parallel import World
from tgmae.training.step import TrainingStep

Mode = Literal["graph", "compiled", "compiled graph", "half residual", "compiled half residual"]


@dataclass
class StepCase:
    """The settings of a training step, and what was measured beside its time."""

    preset: TrainConfig
    batch: int
    ratio: float
    attention: Kernel
    steps: int  # timed in a round
    warmup: int  # steps before the timed ones
    mode: Literal["plain"] | Mode = "plain"
    shares: dict[str, list[float]] = field(default_factory=dict)  # of the step's time, by stage
    peak_gib: float = 0.0

    def forget(self) -> None:
        """Drop what a warm-up recorded."""
        self.shares.clear()

    def config(self) -> TrainConfig:
        """Return the configuration of a run with these choices."""
        return replace(
            self.preset, batch_size=self.batch, device_batch_size=self.batch,
            mask=replace(self.preset.mask, ratio=self.ratio), compile="compiled" in self.mode,
            cuda_graph="graph" in self.mode,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return f"γ {self.ratio}, {self.attention}, batch {self.batch}" + f", {self.mode}" * (self.mode != "plain")


class Step:
    """A network with its optimiser. A call does one step of train.py."""

    def __init__(self, model: VideoMAE, config: TrainConfig, device: torch.device) -> None:
        self.rate, self.losses = config.optim.base_lr, AsyncLosses(device)
        networks = Pretraining(model)
        optimizer = make_optimizer(networks, config.optim)
        self.training = TrainingStep(networks, optimizer, config, World(0, 1, device), device.type == "cuda")

    def __call__(self, frames: Tensor, masks: TokenMasks) -> None:
        losses, _ = self.training.add_gradients(Inputs(frames, masks))
        self.losses.push(0, losses, self.training.update(self.rate), [])
        assert all(seen.is_finite for seen in self.losses.pop(wait=False))


def halve_residual(model: VideoMAE) -> None:
    """Keep sums and layer norms of the tokens in bfloat16, where autocast keeps them in float32."""

    def halve(_: object, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, *others = given
        return tokens.bfloat16(), *others

    def normalise(norm: LayerNorm, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, norm.normalized_shape, norm.weight.bfloat16(), norm.bias.bfloat16(), norm.eps)

    for blocks in (model.encoder, model.decoder):
        blocks[0].register_forward_pre_hook(halve)
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.forward = partial(normalise, module)  # type: ignore[method-assign]


def make_step(config: TrainConfig, device: torch.device) -> Step:
    """Make the step of a new network, with the attention that `config` names."""
    torch.manual_seed(0)
    model = VideoMAE(config.model, choose_attention(config.model.attention, device)).to(device)
    return Step(model, config, device)


class StepTimer:
    """Network, optimiser and random batches of one preset on the device, and the time of a training step.

    case        the first case to run. Its mode holds for all others; with a CUDA graph it must be the only one.
    prepare_s   seconds to make the step and run it for the first time: compilation, capture, loading libraries
    """

    def __init__(self, case: StepCase, largest_batch: int, device: torch.device) -> None:
        self.device, self.config = device, case.config()
        config, held = self.config.model, _allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        shape = (largest_batch, config.num_frames, config.image_size, config.image_size, 3)
        self.frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.scores = torch.rand(largest_batch, config.num_slots, config.patches_per_slot, device=device)
        torch.manual_seed(0)
        with using_attention(case.attention) as backend:
            with device:  # initial weights are drawn on the GPU, which is quicker
                self.model = VideoMAE(config, backend)
            if "half residual" in case.mode:
                halve_residual(self.model)
            started = now(device)
            self.step = Step(self.model, self.config, device)
            self.step(*self._batch(case))
        self.prepare_s = now(device) - started
        self.held = _allocated(device) - held
        # A replayed graph allocates nothing; the memory it holds shows only while it is captured.
        self.captured = torch.cuda.max_memory_allocated() - held if self.config.cuda_graph else 0

    def run(self, case: StepCase) -> float:
        """Train for the case's steps and return milliseconds per step.

        Records in `case` the share of each stage and the peak of memory.
        """
        with using_attention(case.attention) as backend:
            for module in self.model.modules():
                if isinstance(module, Attention):
                    module.backend = backend
            return self._run(case)

    def _run(self, case: StepCase) -> float:
        batch, on_cuda = self._batch(case), self.device.type == "cuda"
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        others = _allocated(self.device) - self.held  # bytes of other timers' networks
        for _ in range(case.warmup):
            self.step(*batch)
        started, before = now(self.device), self._stages()
        for _ in range(case.steps):
            self.step(*batch)
        seconds = (now(self.device) - started) / case.steps
        for stage, spent in self._stages().items():
            share = (spent - before.get(stage, 0.0)) / case.steps / seconds
            case.shares.setdefault(stage, []).append(share)
        if on_cuda:
            case.peak_gib = max(torch.cuda.max_memory_allocated() - others, self.captured) / 2**30
        return seconds * 1000

    def _batch(self, case: StepCase) -> tuple[Tensor, TokenMasks]:
        k = MaskConfig(ratio=case.ratio).masked_per_slot(case.preset.model.patches_per_slot)
        visible, masked = topk_mask(self.scores[: case.batch], k)
        return self.frames[: case.batch], TokenMasks(visible=visible, masked=masked)

    def _stages(self) -> dict[str, float]:
        self.step.training.clock.collect()
        return self.step.training.clock.totals()


def _allocated(device: torch.device) -> int:
    """Return the bytes that tensors hold on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
