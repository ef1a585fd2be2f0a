"""Frames → how much each of their patches is like a text: an engine, fed and read in passes of bounded size.

Dimensions: F frames, H W pixels, N patches a frame, C texts a frame, E embedding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engines.auto_batch import inputs_per_pass
from engines.clip_model import CLIPModel
from engines.config import CLIPConfig, TowerSpec
from engines.engine import Engine, choose_dtype, open_engine
from engines.towers.clip_towers import FrameTower, PatchTower, Tower
from engines.towers.student import load_student
from kernels.gather_tokens import gather_tokens


class PatchSimilarity:
    """Embeddings of the patches of frames: of any size for a patch tower, of its own size for a frame tower.

    engine           of a patch tower (patch, student) or a frame tower (dense)
    name             of the tower, for what is kept of the scores
    whole_frames     the tower takes frames, not patches
    batch            patches in one pass of a patch tower, frames in one of a frame tower
    """

    def __init__(
        self, engine: Engine, clip: CLIPModel, name: str, patch_size: int, batch: int, whole_frames: bool
    ) -> None:
        self.engine, self.name, self.patch_size = engine, name, patch_size
        self.mean, self.std = clip.mean, clip.std
        self.batch, self.whole_frames = batch, whole_frames

    def frames_per_pass(self, frames: Tensor) -> int:
        """How many such frames fill a pass of the engine; at least one."""
        if self.whole_frames:
            return self.batch
        return max(1, self.batch // ((frames.shape[1] // self.patch_size) * (frames.shape[2] // self.patch_size)))

    def embed(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] → L2-normalised [F, N, E] in the engine's dtype. Holds all of it at once."""
        frames = frames.to(self.engine.device)
        dtype = self.engine.dtype
        if self.whole_frames:
            # Channel by channel, so that no constant has to be copied to the device.
            planes = [(frames[..., c] / 255 - self.mean[c]) / self.std[c] for c in range(3)]
            return self._run(torch.stack(planes, dim=1).to(dtype))
        patches = gather_tokens(frames[:, None], None, self.patch_size, 1, dtype, self.mean, self.std)
        return self._run(patches.flatten(0, 1)).view(*patches.shape[:2], -1)

    def _run(self, x: Tensor) -> Tensor:
        passes = [self.engine(x[start : start + self.batch]) for start in range(0, len(x), self.batch)]
        return passes[0] if len(passes) == 1 else torch.cat(passes)

    def compare(self, frames: Tensor, texts: Tensor) -> Tensor:
        """Cosines of patches and texts: uint8 [F, H, W, 3], float32 [F, C, E] → float32 [F, C, N].

        Raises ValueError where one is NaN, which would rank above every other score. The calling thread waits for the
        result on that account.
        """
        step = self.frames_per_pass(frames)
        parts = []
        for start in range(0, len(frames), step):
            embeddings = self.embed(frames[start : start + step]).float()
            parts.append(torch.einsum("fne,fce->fcn", embeddings, texts[start : start + step]))
        cosines = torch.cat(parts)
        if bool(cosines.isnan().any()):
            precision = str(self.engine.dtype).removeprefix("torch.")
            raise ValueError(
                f"CLIP gives NaN for {int(cosines.isnan().sum())} of {cosines.numel()} scores in {precision}: its "
                "values do not fit (take --clip.precision fp32, or bf16), or its weights are no numbers"
            )
        return cosines


def make_tower(clip: CLIPModel, spec: TowerSpec, patch_size: int, height: int, width: int) -> Tower:
    """Make the tower of a scorer, for frames of `height` × `width` pixels. Raises ValueError for an unfit student."""
    if spec.kind == "student":
        assert spec.student is not None
        return load_student(Path(spec.student), clip.fingerprint, patch_size)
    if spec.kind == "dense":
        return FrameTower(clip.visual, height, width, patch_size, spec.last_block)
    return PatchTower(clip.visual, patch_size)


def make_patch_similarity(
    clip: CLIPModel,
    config: CLIPConfig,
    spec: TowerSpec,
    patch_size: int,
    height: int,
    width: int,
    device: torch.device,
) -> PatchSimilarity:
    """What a scorer (patch, dense or student) runs, on `device`. Raises ValueError where its engine cannot run here."""
    tower = make_tower(clip, spec, patch_size, height, width)
    patches = (height // patch_size) * (width // patch_size)
    batch = inputs_per_pass(tower, config, patches, choose_dtype(config, device).itemsize, device)
    engine = open_engine(tower, config, device, batch)
    return PatchSimilarity(engine, clip, tower.name, patch_size, batch, isinstance(tower, FrameTower))
