"""The variant with a residual stream in bfloat16 computes the same up to that precision, and moves fewer bytes."""

from __future__ import annotations

import torch

from bench.costs.traffic import count_traffic
from bench.workloads.training_step import halve_residual
from tests.tgmae.training.test_step import CONFIG, make_batch
from tgmae.model.videomae import VideoMAE


def test_half_a_residual_stream_is_the_same_network() -> None:
    torch.manual_seed(0)
    model, batch, seen = VideoMAE(CONFIG.model), make_batch(0, 4), list[torch.dtype]()
    model.encoder[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    losses = []
    for half in (False, True):
        if half:
            halve_residual(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch.frames, batch.masks).loss
        loss.backward()
        losses.append(loss.detach())
    assert seen == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    whole, half_bytes = (count_traffic(CONFIG.model, 0.75, 4, half_residual=half).others for half in (False, True))
    assert 0.3 < half_bytes / whole < 0.9
