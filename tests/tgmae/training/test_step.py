"""The training step: accumulation, what a CUDA graph must repeat, and that the host does not wait for the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from kernels.topk_mask import topk_mask
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import TrainConfig
from tgmae.config.training import OptimConfig
from tgmae.model.pretraining import Inputs, Pretraining
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import Block, VideoMAE
from tgmae.training.async_losses import AsyncLosses, StepRecord
from tgmae.training.optim import make_optimizer
from tgmae.training.parallel import World
from tgmae.training.step import TrainingStep

CONFIG = TrainConfig(
    device="cpu", batch_size=4, device_batch_size=4, mask=MaskConfig(kind="random", ratio=0.75),
    model=ModelConfig(
        image_size=32, num_frames=4, patch_size=8, width=96, depth=2, num_heads=3,
        decoder_width=96, decoder_depth=2, decoder_num_heads=3, attention="sdpa",
    ),
    optim=OptimConfig(clip_norm=1.0),
)  # fmt: skip


def make_step(config: TrainConfig, device: str = "cpu") -> TrainingStep:
    torch.manual_seed(0)
    model = Pretraining(VideoMAE(config.model)).to(device)
    optimizer = make_optimizer(model, config.optim)
    return TrainingStep(model, optimizer, config, World(0, 1, torch.device(device)), use_bf16=device == "cuda")


def make_batch(seed: int, clips: int, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (clips, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    visible, masked = topk_mask(torch.rand(clips, 2, 16, generator=generator), 12)
    return Inputs(frames.to(device), TokenMasks(visible=visible.to(device), masked=masked.to(device)))


def train(step: TrainingStep, device: str, accumulation: int) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradient norms of four steps."""
    losses, norms = [], []
    for number in range(4):
        for micro in range(accumulation):
            (one,), prediction = step.add_gradients(make_batch(10 * number + micro, 4, device))
            assert prediction is not None
            assert prediction.shape == (4, 24, 384)
            losses.append(one.total)
        norms.append(step.update(1e-3))
    return losses, norms


def test_a_batch_in_pieces_gives_the_same_step() -> None:
    whole, pieces = make_step(CONFIG), make_step(replace(CONFIG, device_batch_size=2))
    assert (whole.accumulation, pieces.accumulation) == (1, 2)
    frames, plan, *_ = make_batch(0, 4)
    (whole_loss,), _ = whole.add_gradients(Inputs(frames, plan))
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        part = TokenMasks(visible=plan.visible[half], masked=plan.masked[half])
        parts.append(pieces.add_gradients(Inputs(frames[half], part))[0][0].total)
    torch.testing.assert_close(torch.stack(parts).mean(), whole_loss.total)
    torch.testing.assert_close(pieces.update(1e-3), whole.update(1e-3))
    for one, other in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert one.grad is None  # forgotten: the next step begins with none


def test_evaluating_changes_nothing_and_compiles_nothing() -> None:
    """The loss is the training pass's, to the bit; compiled blocks would be compiled again for each batch size."""
    step, compiled = make_step(CONFIG), make_step(replace(CONFIG, compile=True))
    counters = torch._dynamo.utils.counters
    counters.clear()
    for clips in (4, 3):
        frames, masks, *_ = make_batch(0, clips)
        before = torch.random.get_rng_state()
        loss = step.evaluate(frames, masks)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not loss.requires_grad
        assert torch.equal(compiled.evaluate(frames, masks), loss)
        assert torch.equal(step.add_gradients(Inputs(frames, masks))[0][0].total, loss)
    assert not counters["stats"]


def test_stages_are_timed() -> None:
    step = make_step(CONFIG)
    train(step, "cpu", 1)
    assert set(step.clock.totals()) == {"forward", "backward", "optimizer"}


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"--cuda-graph needs one process on a CUDA device, got 1 × cpu"):
        make_step(replace(CONFIG, cuda_graph=True))


def test_a_block_for_the_last_tokens_is_the_block() -> None:
    """What the decoder's last block leaves out changes neither its output nor any gradient."""
    torch.manual_seed(0)
    block = Block(24, 3, 4.0, 1e-6, "sdpa").double()
    for name, parameter in block.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    inputs, found = [x, *block.parameters()], []
    for out in (block(x)[:, -3:], block(x, last=3)):
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(("accumulation", "compiled"), [(1, False), (2, False), (1, True)])
def test_a_graph_repeats_the_step(accumulation: int, compiled: bool) -> None:
    config = replace(CONFIG, device="cuda", batch_size=4 * accumulation, compile=compiled)
    launched = train(make_step(config, "cuda"), "cuda", accumulation)
    replayed = train(make_step(replace(config, cuda_graph=True), "cuda"), "cuda", accumulation)
    for one, other in zip(launched, replayed, strict=True):
        torch.testing.assert_close(torch.stack(other), torch.stack(one), rtol=2e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"the captured step takes \[4, 4, 32, 32, 3\], got \[2"):
        make_step(replace(config, cuda_graph=True), "cuda").add_gradients(make_batch(0, 2, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_step_and_readback_do_not_wait_for_the_gpu(graph: bool) -> None:
    """What train.py does with every batch, the loader apart. torch raises where the host would be made to wait.

    Not for the event of the step before, which `pop` waits for.
    """
    step = make_step(replace(CONFIG, device="cuda", cuda_graph=graph), "cuda")
    readback, batch = AsyncLosses(torch.device("cuda")), make_batch(0, 4, "cuda")
    train(step, "cuda", 1)  # compiles kernels and makes the optimiser's state
    seen: list[StepRecord] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            losses, _ = step.add_gradients(batch)
            readback.push(number, losses, step.update(1e-3), [])
            seen += readback.pop(wait=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [record.step for record in seen] == [0, 1]
    seen += readback.pop(wait=True)
    assert [record.step for record in seen] == [0, 1, 2]
    assert all(record.is_finite for record in seen)
