"""How similar the patches of frames are to texts: an engine, run in passes of bounded size.

Dimensions: F frames, H W pixels, N patches per frame, C texts per frame, E embedding.
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
    """Embeds the patches of frames and compares them with texts.

    engine         runs a patch tower (patch, student) or a frame tower (dense)
    name           of the tower; identifies the scores that are kept
    patch_size     pixels
    batch          inputs per pass: patches for a patch tower, frames for a frame tower
    whole_frames   the tower takes frames of one fixed size; otherwise patches, so that frames may have any size
    """

    def __init__(
        self, engine: Engine, clip_model: CLIPModel, name: str, patch_size: int, batch: int, whole_frames: bool
    ) -> None:
        self.engine, self.name, self.patch_size = engine, name, patch_size
        self.mean, self.std = clip_model.mean, clip_model.std
        self.batch, self.whole_frames = batch, whole_frames

    def frames_per_pass(self, frames: Tensor) -> int:
        """Return how many frames of this size, [F, H, W, 3], fill a pass of the engine; at least one."""
        if self.whole_frames:
            return self.batch
        return max(1, self.batch // ((frames.shape[1] // self.patch_size) * (frames.shape[2] // self.patch_size)))

    def embed(self, frames: Tensor) -> Tensor:
        """Embed uint8 [F, H, W, 3] → L2-normalised [F, N, E] in the engine's dtype. Holds all of it in memory."""
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

    def cosines(self, frames: Tensor, texts: Tensor) -> Tensor:
        """Return cosines of patches and texts: uint8 [F, H, W, 3], float32 [F, C, E] → float32 [F, C, N].

        Every frame has its own; who masks tubelets takes the mean over their frames.
        """
        step = self.frames_per_pass(frames)
        parts = []
        for start in range(0, len(frames), step):
            embeddings = self.embed(frames[start : start + step]).float()
            parts.append(torch.einsum("fne,fce->fcn", embeddings, texts[start : start + step]))
        return torch.cat(parts)

    def compare(self, frames: Tensor, texts: Tensor) -> Tensor:
        """Return `cosines`. Raises ValueError if one is NaN or infinite, because it would rank above every other score.

        The check makes the calling thread wait for the result.
        """
        cosines = self.cosines(frames, texts)
        if not bool(cosines.isfinite().all()):
            raise ValueError(self.describe_bad(cosines))
        return cosines

    def describe_bad(self, cosines: Tensor) -> str:
        """Say why scores may not be finite, and what to do."""
        precision = str(self.engine.dtype).removeprefix("torch.")
        bad = int((~cosines.isfinite()).sum())
        return (
            f"CLIP gives NaN for {bad} of {cosines.numel()} scores in {precision}: either its activations overflow "
            "(use --clip.precision fp32, or bf16), or its weights contain NaN"
        )


def make_tower(clip_model: CLIPModel, spec: TowerSpec, patch_size: int, height: int, width: int) -> Tower:
    """Make the tower of a scorer, for frames of `height` × `width` pixels.

    Raises FileNotFoundError for a missing student, and ValueError for one of another CLIP or patch size.
    """
    if spec.kind == "student":
        assert spec.student is not None
        return load_student(Path(spec.student), clip_model.fingerprint, patch_size)
    if spec.kind == "dense":
        return FrameTower(clip_model.visual, height, width, patch_size, spec.last_block)
    return PatchTower(clip_model.visual, patch_size)


def make_patch_similarity(
    clip_model: CLIPModel,
    config: CLIPConfig,
    spec: TowerSpec,
    patch_size: int,
    height: int,
    width: int,
    device: torch.device,
    frames_per_batch: int | None = None,
) -> PatchSimilarity:
    """Make what a scorer (patch, dense or student) runs on `device`, for frames of `height` × `width` pixels.

    frames_per_batch   how many frames will be scored at once, where that is known

    Raises as `make_tower` does, and ValueError if the engine cannot run on `device`.
    """
    tower = make_tower(clip_model, spec, patch_size, height, width)
    patches = (height // patch_size) * (width // patch_size)
    itemsize = choose_dtype(config, device).itemsize
    batch = inputs_per_pass(tower, config, patches, itemsize, device, frames_per_batch)
    engine = open_engine(tower, config, device, batch)
    return PatchSimilarity(engine, clip_model, tower.name, patch_size, batch, isinstance(tower, FrameTower))
