"""Motion-guided masks: mask what moves, mask a box that moves, or leave visible what a moving map carries along.

Dimensions: B clips, T frames, S slots, N patches per slot, G points per side (two per patch), C centres.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dali_pipelines.types import ClipBatch
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest
from tgmae.masks.motion_field import MotionField

_PER_PATCH = 2  # points per side of a patch at which motion is read
_TIE = 1e-3  # pixels per frame: far below what vectors resolve (a quarter), so that lots decide between equals only
_BUMP_PX = 16.0  # width of MGMAE's Gaussians, in pixels of the clip


class MotionSource(Protocol):
    """Gives the motion field of a batch. Two exist: the codec's vectors and optical flow."""

    note: str
    device: torch.device

    def __call__(self, clips: ClipBatch) -> MotionField: ...


class MotionScorer:
    """The scorer for mask kinds mgm, mgm_box and mgmae."""

    needs_text = False

    def __init__(self, config: InputConfig, manifest: Manifest, device: torch.device) -> None:
        model = config.model
        self.slots, self.tubelet = model.num_slots, model.tubelet_size
        self.side = model.image_size // model.patch_size
        self.num_masked = config.mask.masked_per_slot(model.patches_per_slot)
        self.bump = _BUMP_PX / model.image_size  # of the clip's side
        self.source = _make_source(config, manifest, device)
        self.note = self.source.note
        kinds: dict[str, Callable[[MotionField, ClipBatch], Tensor]] = {
            "mgm": self._speed,
            "mgm_box": self._moving_box,
            "mgmae": self._moving_bumps,
        }
        self.score = kinds[config.mask.kind]

    def __call__(self, clips: ClipBatch, text: Tensor | None = None) -> Tensor:
        """Return float32 [B, S, N]."""
        return self.score(self.source(clips), clips)

    def _speed(self, field: MotionField, clips: ClipBatch) -> Tensor:
        """Score for mgm: pixels per frame, averaged over a patch and the frames of its tubelet. Lots break ties."""
        vectors = field.at(slice(None), field.points(self.side * _PER_PATCH))  # [B, T, G², 2]
        return self._pool(vectors.norm(dim=-1) / field.steps[..., None]) + _TIE * self._lots(clips, self.slots)

    def _moving_box(self, field: MotionField, clips: ClipBatch) -> Tensor:
        """Score for mgm_box: a box of as many patches as are masked.

        It is centred on the fastest patch of the first slot, then carried along by the motion inside it: the mean of
        the vectors, weighted by their length, so that what stands still does not count. Where clip frames lie more than
        16 video frames apart, only the last 16 carry it.

        The score falls with the distance from the centre of the box, so that the top patches are the box.
        """
        vectors = field.at(slice(None), field.points(self.side * _PER_PATCH)) * field.moves[..., None, None]
        mirrored = torch.where(field.flips, -1.0, 1.0)
        to_patches = self.side / field.crops[:, 2:] * torch.stack([mirrored, torch.ones_like(mirrored)], 1)
        moved = self._pool(vectors * to_patches[:, None, None]) * self.tubelet  # [B, S, N, 2], since the slot before
        speed = moved.norm(dim=-1)
        first = speed[:, :1].reshape(-1, 1, self.side, self.side)
        smooth = F.avg_pool2d(first, 3, 1, 1, count_include_pad=False)
        fastest = (smooth.flatten(1) + _TIE * self._lots(clips, 1)[:, 0]).argmax(1)
        patch = torch.arange(self.side**2, device=speed.device)
        patches = torch.stack([patch % self.side, patch // self.side], -1).float()  # [N, 2], x and y
        width = math.ceil(math.sqrt(self.num_masked))
        half, last = width / 2, self.side - width
        centre, scores = patches[fastest], []
        for slot in range(self.slots):
            if slot:
                inside = ((patches - centre[:, None]).abs().amax(-1) <= half) * speed[:, slot]
                shift = (inside[..., None] * moved[:, slot]).sum(1) / inside.sum(1, keepdim=True).clamp(min=1e-9)
                centre = centre + shift
            # The box stays inside the clip and covers whole patches. Its outermost ring may not fit whole; then the
            # patches nearest to the centre are taken.
            corner = (centre - (width - 1) / 2).clamp(0, last)
            centre = corner + (width - 1) / 2
            away = patches - (corner.round() + (width - 1) / 2)[:, None]
            scores.append(-away.abs().amax(-1) - _TIE * away.norm(dim=-1))
        return torch.stack(scores, 1)

    def _moving_bumps(self, field: MotionField, clips: ClipBatch) -> Tensor:
        """Score for mgmae (Huang et al. 2023): Gaussian bumps on the middle frame, carried along by the motion.

        The patches under most of the bumps stay visible, so their scores are lowest. There are as many bumps as a slot
        has visible patches. A point that the motion leads out of the clip keeps the value of its own place. Codec
        vectors are followed over at most 16 video frames from one clip frame to the next.

        This is the paper's mask. The authors' code (github.com/MCG-NJU/MGMAE, engine_for_mgmae.py, af7beb9) asks for
        'backwarp' where the option is called 'backward', so that it warps the frames before the middle one the wrong
        way. It also leaves int(196 · (1 − γ)) patches of a slot visible, which rounds to 19 at γ .9; here it is 20.
        """
        points = field.points(self.side * _PER_PATCH)
        frames, middle = field.vectors.shape[1], field.vectors.shape[1] // 2
        place = points[:, None].repeat(1, frames, 1, 1)  # [B, T, G², 2], where each point is in the middle frame
        for frame in range(frames - 1, middle, -1):  # back to the frame before
            later = place[:, frame:]
            place[:, frame:] = later - self._moved(field, frame, later)
        for frame in range(1, middle + 1):  # on to this frame, whose vectors are known at the end of the way
            earlier = place[:, :frame]
            end = earlier
            for _ in range(3):
                end = earlier + self._moved(field, frame, end)
            place[:, :frame] = end
        corner, size = field.crops[:, None, None, :2], field.crops[:, None, None, 2:]
        relative, here = (place - corner) / size, (points[:, None] - corner) / size  # of the crop's sides
        out = ((relative < 0) | (relative > 1)).any(-1, keepdim=True)
        relative = torch.where(out, here, relative)
        # Without a matrix product, whose rounding would depend on the batch.
        away = torch.cdist(
            relative.flatten(1, 2), self._bump_centres(field, clips), compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest = away.amin(-1)
        return -self._pool(torch.exp(-((nearest / self.bump) ** 2)).view(len(points), frames, -1))

    def _bump_centres(self, field: MotionField, clips: ClipBatch) -> Tensor:
        """Draw patch centres by the mask seeds, as shares of the crop before it is flipped: float32 [B, C, 2]."""
        count = self.side**2 - self.num_masked
        drawn = [np.random.default_rng(r.mask_seed).permutation(self.side**2)[:count] for r in clips.requests]
        patch = torch.from_numpy(np.stack(drawn)).to(field.crops.device, non_blocking=True)
        centres = (torch.stack([patch % self.side, patch // self.side], -1) + 0.5) / self.side
        across = torch.where(field.flips[:, None], 1 - centres[..., 0], centres[..., 0])
        return torch.stack([across, centres[..., 1]], -1)

    def _moved(self, field: MotionField, frame: int, places: Tensor) -> Tensor:
        """Return how far places [B, frames, P, 2] have moved on the way to one frame, in the same shape."""
        vectors = field.at(frame, places.flatten(1, 2)[:, None]).view_as(places)
        return vectors * field.moves[:, frame, None, None, None]

    def _lots(self, clips: ClipBatch, slots: int) -> Tensor:
        """Draw lots that break ties, from the requests' mask seeds: float32 [B, slots, N] in 0 … 1."""
        shape = (slots, self.side**2)
        lots = [np.random.default_rng(request.mask_seed).random(shape, np.float32) for request in clips.requests]
        return torch.from_numpy(np.stack(lots)).to(self.source.device, non_blocking=True)

    def _pool(self, values: Tensor) -> Tensor:
        """Average over patches and tubelets: [B, T, G², …] → [B, S, N, …]."""
        shape = (self.slots, self.tubelet, self.side, _PER_PATCH, self.side, _PER_PATCH)
        return values.reshape(len(values), *shape, *values.shape[3:]).mean((2, 4, 6)).flatten(2, 3)


def _make_source(config: InputConfig, manifest: Manifest, device: torch.device) -> MotionSource:
    mask = config.mask
    if mask.kind == "mgmae" and mask.flow is not None:
        from tgmae.masks.optical_flow import RaftMotion

        return RaftMotion(mask.flow, device)
    from tgmae.masks.motion_field import CodecMotion

    assert isinstance(mask.motion, Path)
    return CodecMotion(mask.motion, manifest, device)
