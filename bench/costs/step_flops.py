"""Arithmetic of the training step, counted from shapes."""

from __future__ import annotations

from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE
from tgmae.telemetry.flops import count_flops


@cache
def count_step_gflop(model: ModelConfig, ratio: float) -> float:
    """Count the floating-point operations of forward and backward for one clip, in 1e9; a multiply-add counts as two.

    Counts matrix products and attention of the forward pass on tensors without contents, and takes them three times.
    """
    num_masked = MaskConfig(ratio=ratio).masked_per_slot(model.patches_per_slot) * model.num_slots
    with FakeTensorMode():
        network = VideoMAE(model)
        frames = torch.empty(1, model.num_frames, model.image_size, model.image_size, 3, dtype=torch.uint8)
        visible, masked = (torch.empty(1, n, dtype=torch.int32) for n in (model.num_tokens - num_masked, num_masked))
        flops = count_flops(lambda: network(frames, TokenMasks(visible=visible, masked=masked)))
    return 3 * float(flops) / 1e9
