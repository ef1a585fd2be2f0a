"""Reconstruction and contrast together: batches in pieces and in two processes give the gradients of one batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.topk_mask import topk_mask
from tests.support.processes import run_two
from tgmae.config.loss import LossConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import TrainConfig
from tgmae.config.training import OptimConfig
from tgmae.model.contrastive import ContrastiveHead
from tgmae.model.pretraining import Pretraining
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE
from tgmae.training.optim import make_optimizer
from tgmae.training.parallel import ALONE, World
from tgmae.training.sharding import gather, is_sharded, shard, shares_network
from tgmae.training.step import Inputs, Losses, TrainingStep

CLIPS = 8
CONFIG = TrainConfig(
    device="cpu", batch_size=CLIPS, device_batch_size=CLIPS, mask=MaskConfig(kind="random", ratio=0.75),
    model=ModelConfig(
        image_size=32, num_frames=4, patch_size=8, width=48, depth=2, num_heads=3,
        decoder_width=48, decoder_depth=1, decoder_num_heads=3, attention="sdpa",
    ),
    optim=OptimConfig(clip_norm=1.0),
)  # fmt: skip
# The losses that are compared, by name. The last contrasts whole steps, which matters with accumulation only.
LOSSES = {
    "reconstruction": LossConfig(),
    "both": LossConfig(contrastive=0.5),
    "contrast": LossConfig(reconstruction=0, contrastive=1, learn_temperature=True),
    "observed": LossConfig(observe_contrastive=True),
    "both over steps": LossConfig(contrastive=0.5, contrast_over="step"),
    "contrast over steps": LossConfig(reconstruction=0, contrastive=1, contrast_over="step", learn_temperature=True),
}


def make_step(config: TrainConfig, world: World) -> TrainingStep:
    use_bf16 = config.precision == "bf16"
    torch.manual_seed(0)
    mae, loss = VideoMAE(config.model), config.loss
    head = ContrastiveHead(config.model.width, 16, loss.temperature, loss.learn_temperature) if loss.contrasts else None
    model = Pretraining(mae, head)
    model.freeze_unused(loss)
    if shares_network(config, world):
        shard(mae, world, use_bf16)
    return TrainingStep(model, make_optimizer(model, config.optim), config, world, use_bf16)


def make_batch() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (CLIPS, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    visible, masked = topk_mask(torch.rand(CLIPS, 2, 16, generator=generator), 12)
    captions = torch.tensor([0, 1, 2, 3, 4, 5, 0, 6])
    text = F.normalize(torch.randn(7, 16, generator=generator), dim=1)[captions]
    return Inputs(frames, TokenMasks(visible=visible, masked=masked), text, captions)


def pick(inputs: Inputs, rows: slice) -> Inputs:
    masks = TokenMasks(visible=inputs.masks.visible[rows], masked=inputs.masks.masked[rows])
    assert inputs.text is not None
    assert inputs.captions is not None
    return Inputs(inputs.frames[rows], masks, inputs.text[rows], inputs.captions[rows])


def gradients(config: TrainConfig, world: World, pieces: list[slice]) -> dict[str, Tensor]:
    """Run one step over pieces of the batch; return the gradient of every parameter, and the mean losses."""
    step, inputs, losses = make_step(config, world), make_batch(), list[Losses]()
    for number, rows in enumerate(pieces, 1):
        losses += step.add_gradients(pick(inputs, rows), is_last=number == len(pieces))[0]
    assert len(losses) == len(pieces)
    found = {name: gather(p.grad).clone() for name, p in step.model.named_parameters() if p.grad is not None}
    means = {name: torch.stack([getattr(one, name) for one in losses]).mean() for name in ("total", "contrastive")}
    return found | means


def update(config: TrainConfig, world: World, rows: slice) -> dict[str, Tensor]:
    """Take a step, and another that is infinite in a part of the gradients that only the last process may have.

    Returns the norms of the first, and the weights after each.
    """
    step, inputs = make_step(config, world), pick(make_batch(), rows)
    found: dict[str, Tensor] = {}
    for after in ("first", "second"):
        step.add_gradients(inputs)
        if after == "second":
            gradient = step.model.mae.head.weight.grad
            assert gradient is not None
            local = gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[attr-defined, operator]
            if world.rank == world.size - 1 or not is_sharded(gradient):
                local.view(-1)[0] = float("inf")
        norms = step.update(1e-3)
        found |= {f"{after} {name}": gather(p.detach()).clone() for name, p in step.model.named_parameters()}
        found |= {"norms": norms.clone()} if after == "first" else {}
    return found


def flatten(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for name, gradient in found.items() if name not in ("total", "contrastive")])


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world, half = World(rank, 2, torch.device("cpu")), CLIPS // 2
    results: dict[str, Any] = {}
    for name, loss in LOSSES.items():
        config = replace(CONFIG, device_batch_size=half, loss=loss)
        results[name] = gradients(config, world, [slice(rank * half, rank * half + half)])
        # In two passes each. The batch of the step is the same; a pass is contrasted with that of the other process.
        quarter, first = half // 2, rank * half
        pieces = [slice(first, first + quarter), slice(first + quarter, first + half)]
        config = replace(config, device_batch_size=quarter)
        results[f"{name}, in pieces"] = gradients(config, world, pieces)
        config = replace(config, parallel="fsdp", activation_checkpointing=True)
        results[f"{name}, in pieces, sharded"] = gradients(config, world, pieces)
    config = replace(CONFIG, device_batch_size=half, loss=LOSSES["both"], optim=OptimConfig(clip_norm=0.1))
    for parallel in ("ddp", "fsdp"):
        rows = slice(rank * half, rank * half + half)
        results[parallel] = update(replace(config, parallel=parallel), world, rows)
        for precision in ("fp32", "bf16"):
            one = replace(config, precision=precision, parallel=parallel)
            results[f"{parallel} {precision}"] = gradients(one, world, [rows])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    run_two(one_of_two, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, loss in LOSSES.items():
        expected = gradients(replace(CONFIG, loss=loss), ALONE, [slice(0, CLIPS)])
        # Contrast over passes is another loss in pieces: batch norm and negatives are those of the pass.
        is_same_in_pieces = loss.contrast_over == "step" or not loss.contrasts
        for case in [name] + [f"{name}, in pieces"] * is_same_in_pieces:
            parts = [ranks[case] for ranks in both]
            assert parts[0].keys() == expected.keys()
            for key, value in expected.items():
                got = [part[key] for part in parts]
                if key in ("total", "contrastive"):  # each process knows the loss of its own clips
                    got = [(got[0] + got[1]) / 2] * 2
                for one in got:
                    assert torch.allclose(one, value, rtol=1e-4, atol=1e-6), f"{case}: {key}"
        # FSDP2 sums the same two numbers as DDP, and recomputing a block repeats it bit for bit.
        for part in both:
            copied, sharded = part[f"{name}, in pieces"], part[f"{name}, in pieces, sharded"]
            assert copied.keys() == sharded.keys()
            assert all(torch.equal(value, sharded[key]) for key, value in copied.items()), name
    # Updates are clipped by the norm of all parts, and an infinite one is skipped as a whole, by both.
    for part in both:
        # Weights are gathered in bfloat16 where autocast would round them, and norms' and biases' besides.
        exact = flatten(part["ddp fp32"])
        errors = [(flatten(part[f"{parallel} bf16"]) - exact).norm() / exact.norm() for parallel in ("ddp", "fsdp")]
        assert 1e-4 < errors[1] < 1.2 * errors[0] < 0.2
        assert part["ddp"]["norms"].min() > 0.1
        for key, value in part["ddp"].items():
            torch.testing.assert_close(part["fsdp"][key], value, rtol=1e-5, atol=1e-7)
            kind, _, name = key.partition(" ")
            assert kind != "second" or torch.equal(part["fsdp"][key], part["fsdp"][f"first {name}"])


def test_a_step_in_pieces_is_contrasted_as_a_whole() -> None:
    loss = LossConfig(contrastive=0.5, contrast_over="step")
    whole = gradients(replace(CONFIG, loss=replace(loss, contrast_over="pass")), ALONE, [slice(0, CLIPS)])
    config = replace(CONFIG, loss=loss, device_batch_size=2)
    pieces = gradients(config, ALONE, [slice(start, start + 2) for start in range(0, CLIPS, 2)])
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-4, atol=1e-6)


def test_observing_leaves_the_autoencoder_alone() -> None:
    """The weights after two steps are those of training without a head, bit for bit; the head learns."""
    states = []
    for loss in (LossConfig(), LossConfig(observe_contrastive=True)):
        step = make_step(replace(CONFIG, loss=loss), ALONE)
        before = None if step.model.head is None else step.model.head.last.weight.clone()
        for _ in range(2):
            (losses,), _ = step.add_gradients(make_batch())
            step.update(1e-3)
        assert torch.equal(losses.total, losses.reconstruction)
        states.append(step.model.mae.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert before is not None
    assert step.model.head is not None
    assert not torch.equal(before, step.model.head.last.weight)
    assert losses.contrastive > 0
    assert losses.duplicate_pairs == 1


def test_contrast_alone_runs_no_decoder() -> None:
    step = make_step(replace(CONFIG, loss=LOSSES["contrast"]), ALONE)
    decoder = {name: p.clone() for name, p in step.model.mae.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in decoder} == {"to_decoder", "mask_token", "decoder", "decoder_norm", "head"}
    _, prediction = step.add_gradients(make_batch())
    step.update(1e-3)
    assert prediction is None
    assert all(torch.equal(p, decoder[name]) for name, p in step.model.mae.named_parameters() if name in decoder)


def test_a_learned_temperature_stays_above_its_least() -> None:
    step = make_step(replace(CONFIG, loss=LOSSES["contrast"]), ALONE)
    head = step.model.head
    assert head is not None
    before = head.temperature
    step.add_gradients(make_batch())
    step.update(0.1)
    assert 0.01 < head.temperature != before == pytest.approx(0.1)
    head.log_temperature.data.fill_(-9.0)
    step.update(0.0)
    assert head.temperature == pytest.approx(0.01)


def test_text_is_needed() -> None:
    step = make_step(replace(CONFIG, loss=LossConfig(contrastive=1)), ALONE)
    with pytest.raises(ValueError, match="needs the text of the batch"):
        step.add_gradients(make_batch()._replace(text=None))
