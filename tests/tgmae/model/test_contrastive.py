"""The contrastive loss against open_clip's, and its batch norm against torch's, in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from tests.support.processes import run_two
from tgmae.config.loss import Duplicates
from tgmae.model.collectives import gather_rows
from tgmae.model.contrastive import ContrastiveHead, GlobalBatchNorm, contrast

LOG_TEMPERATURE = torch.tensor(0.1).log()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeddings(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings of clips and captions [rows, 16], and the captions' numbers; the last two are equal."""
    video, text = F.normalize(draw(1, rows, 16), dim=1), F.normalize(draw(2, rows, 16), dim=1)
    captions = torch.arange(rows)
    captions[-1] = captions[-2]
    text[-1] = text[-2]
    return video, text, captions


def test_the_loss_is_open_clips() -> None:
    video, text, captions = embeddings(6)
    ours, theirs = video.clone().requires_grad_(), video.clone().requires_grad_()
    loss, _ = contrast(ours, text, captions, LOG_TEMPERATURE, "keep")
    expected = ClipLoss()(theirs, text, logit_scale=1 / LOG_TEMPERATURE.exp())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, ours)[0], torch.autograd.grad(expected, theirs)[0])


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_equal_captions_are_no_negatives(duplicates: Duplicates) -> None:
    """Against a sum over rows, written out in float64."""
    video, text, captions = embeddings(6)
    expected = 0.0
    for queries, keys in ((video, text), (text, video)):
        similarity = (queries.double() @ keys.double().T / 0.1).exp()
        for row in range(6):
            equal = [other for other in range(6) if captions[other] == captions[row]]
            negatives = [other for other in range(6) if other not in equal]
            positives = equal if duplicates == "positive" else [row]
            total = similarity[row, negatives + positives].sum()
            expected -= sum(float((similarity[row, one] / total).log()) for one in positives) / len(positives) / 12
    loss, pairs = contrast(video, text, captions, LOG_TEMPERATURE, duplicates)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert pairs == 1


def test_without_equal_captions_the_three_ways_agree() -> None:
    video, text, _ = embeddings(5)
    ways: list[Duplicates] = ["keep", "mask", "positive"]
    losses = [contrast(video, text, torch.arange(5), LOG_TEMPERATURE, way)[0].item() for way in ways]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def run_head(head: ContrastiveHead, features: Tensor, text: Tensor, captions: Tensor) -> dict[str, Any]:
    features = features.clone().requires_grad_()
    loss, _ = contrast(head(features), text, captions, head.log_temperature, "mask")
    loss.backward()
    assert features.grad is not None
    return {
        "loss": loss.detach(), "features": features.grad, "running_var": head.norm.running_var,
        "running_mean": head.norm.running_mean, **{name: p.grad for name, p in head.named_parameters()},
    }  # fmt: skip


def make_head() -> ContrastiveHead:
    torch.manual_seed(3)
    return ContrastiveHead(8, 16, temperature=0.1, learn_temperature=True)


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    features = draw(4, 6, 8)
    _, text, captions = embeddings(6)
    mine = slice(3 * rank, 3 * rank + 3)
    torch.save(run_head(make_head(), features[mine], text[mine], captions[mine]), f"{folder}/{rank}.pt")
    assert torch.equal(gather_rows(captions[mine]), captions)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Loss, gradients of head and features, and the batch norm's running statistics."""
    features = draw(4, 6, 8)
    _, text, captions = embeddings(6)
    head = make_head()
    assert isinstance(head.norm, nn.BatchNorm1d)
    one = run_head(head, features, text, captions)  # alone, the batch norm is torch's own
    run_two(one_of_two, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, expected in one.items():
        if name == "features":  # DDP divides the gradients of parameters by the number of processes
            got = torch.cat([part[name] for part in parts]) / 2
        elif name.startswith("running"):
            got = parts[1][name]
        else:
            got = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_batch_norm_in_evaluation_is_torchs() -> None:
    norm, theirs = GlobalBatchNorm(8).eval(), nn.BatchNorm1d(8).eval()
    x = draw(5, 4, 8)
    torch.testing.assert_close(norm(x), theirs(x))
