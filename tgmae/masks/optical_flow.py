"""Motion fields from optical flow (RAFT, Teed and Deng 2020) between the frames of the clips themselves.

Dimensions: B clips, T frames, H W pixels, Y X cells.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_pipelines.types import ClipBatch
from engines.torch_files import read_torch_file
from tgmae.masks.motion_field import MotionField

_CELL = 8  # pixels: RAFT's own grid, which it upsamples at the end
_LEAST = 128  # pixels: smaller frames leave nothing at the top of RAFT's pyramid
_PAIRS = 32  # pairs of frames per pass


class RaftMotion:
    """Motion fields from a torchvision RAFT checkpoint, small or large.

    Raises FileNotFoundError where there is none, ValueError where the file is not a RAFT checkpoint.
    """

    note = ""

    def __init__(self, checkpoint: Path, device: torch.device) -> None:
        self.model, self.device = _load_raft(checkpoint).to(device), device

    def __call__(self, clips: ClipBatch) -> MotionField:
        frames = clips.frames
        batch, count, height, width = frames.shape[:4]
        size = torch.tensor([0.0, 0.0, width, height], device=self.device)
        flow = self._flow(frames[:, 1:], frames[:, :-1])
        cell = width / flow.shape[-1]
        return MotionField(
            # Flow to the previous frame leads back; the content moved the other way. The first frame takes the
            # second's.
            vectors=-torch.cat([flow[:, :1], flow], 1),
            steps=torch.ones(batch, count, device=self.device),
            moves=torch.ones(batch, count, dtype=torch.bool, device=self.device),  # a repeated frame has no flow
            grids=torch.tensor([[flow.shape[-1], flow.shape[-2]]], dtype=torch.float32, device=self.device),
            origin=torch.full((batch, 2), cell / 2, device=self.device),
            cell=cell,
            crops=size.expand(batch, 4),
            flips=torch.zeros(batch, dtype=torch.bool, device=self.device),
        )

    @torch.inference_mode()
    def _flow(self, frames: Tensor, others: Tensor) -> Tensor:
        """Return how far each cell of `frames` lies from its place in `others`, on average.

        Both are uint8 [B, T, H, W, 3]; the result is float32 [B, T, 2, Y, X], in pixels.
        """
        pairs = zip(*(torch.split(x.flatten(0, 1), _PAIRS) for x in (frames, others)), strict=True)
        found = torch.cat([self._flow_of_pairs(one, other) for one, other in pairs])
        return found.view(*frames.shape[:2], *found.shape[1:])

    def _flow_of_pairs(self, frames: Tensor, others: Tensor) -> Tensor:
        height, width = frames.shape[1:3]
        scale = max(1.0, _LEAST / min(height, width))
        size = [math.ceil(scale * side / 8) * 8 for side in (height, width)]
        images = [
            F.interpolate(x.permute(0, 3, 1, 2).float() / 127.5 - 1, size, mode="bilinear", align_corners=False)
            for x in (frames, others)
        ]
        flow: Tensor = self.model(*images)[-1]
        grid = (math.ceil(height / _CELL), math.ceil(width / _CELL))
        shrink = torch.tensor([width / size[1], height / size[0]], device=flow.device).view(1, 2, 1, 1)
        return F.adaptive_avg_pool2d(flow, grid) * shrink


def _load_raft(checkpoint: Path) -> nn.Module:
    from torchvision.models.optical_flow import raft_large, raft_small

    if not checkpoint.is_file():
        raise FileNotFoundError(f"no RAFT checkpoint at {checkpoint}; torchvision publishes raft_small and raft_large")
    weights = read_torch_file(checkpoint)
    for make in (raft_small, raft_large):
        model: nn.Module = make(weights=None)
        if isinstance(weights, dict) and weights.keys() == model.state_dict().keys():
            try:
                model.load_state_dict(weights)
            except RuntimeError:
                continue
            return model.eval().requires_grad_(False)
    raise ValueError(f"{checkpoint} holds neither torchvision's raft_small nor raft_large")
