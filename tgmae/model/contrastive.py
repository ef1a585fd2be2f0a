"""Video-text contrastive learning on what the encoder sees (Fan et al. 2024, section 3.4).

The mean of a clip's visible tokens goes through a prediction head. Its embedding is compared with CLIP's embedding of
the caption that the clip drew, against the captions and clips of the whole batch, over all processes.

Dimensions: n clips of this process, N clips of all processes, D encoder width, E text embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tgmae.config.loss import LEAST_LEARNED_TEMPERATURE, Duplicates
from tgmae.model.collectives import gather_rows, sum_over_processes, world_size


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm over the batches of all processes: what nn.BatchNorm1d computes for one batch of them together.

    nn.SyncBatchNorm does the same, and refuses tensors on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features [n, D]. Raises ValueError in training for a single row, whose variance is 0."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        count = len(x) * world_size()
        mean = sum_over_processes(x.sum(0)) / count
        variance = sum_over_processes((x - mean).square().sum(0)) / count
        with torch.no_grad():
            unbiased = variance * (count / max(count - 1, 1))
            for running, seen in ((self.running_mean, mean), (self.running_var, unbiased)):
                if running is not None and self.momentum is not None:
                    running.lerp_(seen, self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class ContrastiveHead(nn.Module):
    """The prediction head of SimCLR (Chen et al. 2020, section 4.2): two layers with a batch norm between them.

    log_temperature   logarithm of the temperature, a parameter if it is learned, a buffer if not
    """

    def __init__(self, width: int, text_width: int, temperature: float = 0.1, learn_temperature: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.norm = GlobalBatchNorm(width)
        self.last = nn.Linear(width, text_width)
        start = torch.tensor(temperature).log()
        self.log_temperature: Tensor
        if learn_temperature:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start)

    @property
    def temperature(self) -> float:
        """Return the temperature. Waits for the device."""
        return float(self.log_temperature.detach().exp())

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Raise a learned temperature that a step has taken too low. Call it after every step."""
        if isinstance(self.log_temperature, nn.Parameter):
            self.log_temperature.clamp_(min=math.log(LEAST_LEARNED_TEMPERATURE))

    def forward(self, features: Tensor) -> Tensor:
        """Return embeddings float32 [n, E], L2-normalised, of pooled features [n, D]."""
        with torch.autocast(features.device.type, enabled=False):  # statistics of a batch want full precision
            hidden = self.norm(self.first(features.float())).relu()
            return F.normalize(self.last(hidden), dim=-1)


def contrast(
    video: Tensor, text: Tensor, captions: Tensor, log_temperature: Tensor, duplicates: Duplicates
) -> tuple[Tensor, Tensor]:
    """Return the symmetric InfoNCE loss of this process's clips, a scalar float32, against those of all processes.

    Beside it stands how many pairs of clips of the whole batch have one caption, a scalar int64.

    video      float32 [n, E], L2-normalised      text   float32 [n, E], L2-normalised, without gradient
    captions   int64 [n]: equal numbers are equal captions, in all processes

    The mean over processes is the loss of the whole batch, and the mean of their gradients its gradient.
    Source: Fan et al. 2024, equation 4, averaged over both directions.
    """
    every_video, every_text, every_caption = gather_rows(video), gather_rows(text), gather_rows(captions)
    same = captions[:, None] == every_caption  # [n, N]
    first = torch.distributed.get_rank() * len(video) if world_size() > 1 else 0
    own = first + torch.arange(len(video), device=video.device)  # [n], the column of each row's own pair
    scale = (-log_temperature).exp()
    to_text = _nce(scale * video @ every_text.T, own, same, duplicates)
    to_video = _nce(scale * text @ every_video.T, own, same, duplicates)
    pairs = ((every_caption[:, None] == every_caption).sum() - len(every_caption)) // 2
    return (to_text + to_video) / 2, pairs


def _nce(logits: Tensor, own: Tensor, same: Tensor, duplicates: Duplicates) -> Tensor:
    """Return the mean InfoNCE loss of n queries; logits and `same` (one caption) are [n, N], `own` [n]."""
    if duplicates == "positive":
        return -((F.log_softmax(logits, 1) * same).sum(1) / same.sum(1)).mean()
    if duplicates == "mask":
        others = same.scatter(1, own[:, None], False)
        logits = logits.masked_fill(others, float("-inf"))
    return F.cross_entropy(logits, own)
