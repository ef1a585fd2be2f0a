"""The student: a small network that gives a raw patch an embedding like CLIP's, and how it is trained and kept.

A patch is a few hundred numbers and `PatchTower` a fixed function of them, costly only because it enlarges the patch.

Dimensions: n patches, P values of a raw patch, E embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.clip import fingerprint
from engines.towers import StudentTower
from tgmae.files import replacing

_META = "tgmae_student"


def save_student(path: Path, tower: StudentTower, clip_fingerprint: str, measured: dict[str, Any]) -> None:
    """Write the network with what it was distilled from and how well it agrees, whole or not at all."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tower.state_dict().items()}
    first, last = tower.layers[0], tower.layers[-1]
    about = {
        "clip": clip_fingerprint,
        "values": first.in_features,
        "hidden": first.out_features,
        "embed": last.out_features,
        "measured": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={_META: json.dumps(about)})


def read_about(path: Path) -> dict[str, Any]:
    """What a student file says of itself. Raises FileNotFoundError, or ValueError where it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no student at {path}; make one with: tgmae-engine distill MANIFEST --out {path}")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_META])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no student made by tgmae-engine distill") from error
    assert isinstance(about, dict)
    return about


def load_student(path: Path, clip_fingerprint: str, patch_size: int) -> StudentTower:
    """Raises ValueError where the student was distilled from another CLIP or for patches of another size."""
    about = read_about(path)
    if about["clip"] != clip_fingerprint:
        raise ValueError(
            f"{path} was distilled from the CLIP {about['clip']}, but clip.model and clip.weights give "
            f"{clip_fingerprint}; distill it anew with tgmae-engine distill, or choose the CLIP it was made from"
        )
    if about["values"] != patch_size**2 * 3:
        raise ValueError(f"{path} takes patches of {about['values']} values, got patches of {patch_size**2 * 3}")
    tower = StudentTower(patch_size, about["hidden"], about["embed"])
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    tower.load_state_dict(state)
    tower.name += f"-{fingerprint(state, '')[:8]}"
    return tower


class Distillation:
    """Fits a student to pairs of patches and CLIP embeddings, step by step.

    The loss is the squared error of cosines between the patches of a batch and a set of text embeddings, which is what
    masks are made of, plus one minus the cosine of student and teacher, which holds for texts not seen.

    num_steps   of the whole run: the learning rate follows half a cosine
    texts       float32 [C, E], the captions that scores are wanted for
    """

    def __init__(self, tower: StudentTower, texts: Tensor, num_steps: int, learning_rate: float) -> None:
        self.tower, self.texts, self.step, self.num_steps = tower.train(), texts, 0, num_steps
        self.optimizer = torch.optim.AdamW(tower.parameters(), lr=learning_rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)

    def update(self, patches: Tensor, teacher: Tensor) -> float:
        """One step on normalised patches [n, P] and teacher embeddings [n, E]; returns the loss."""
        student = self.tower(patches)
        # Only differences between patches move a mask: what all patches share is taken out first.
        wanted, given = ((x @ self.texts.T) for x in (teacher, student))
        spread = wanted.std(0, keepdim=True) + 1e-6
        centred = [(x - x.mean(0, keepdim=True)) / spread for x in (wanted, given)]
        loss = (centred[0] - centred[1]).square().mean() + (1 - (student * teacher).sum(-1)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tower": self.tower.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.tower.load_state_dict(state["tower"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def split_rows(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled row numbers in groups of `size`; what is left over is dropped."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]
