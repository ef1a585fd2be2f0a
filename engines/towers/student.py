"""Files of students: small networks that embed raw patches as CLIP does, trained by `tgmae-engine distill`.

A student is possible because a patch is only a few hundred numbers, and `PatchTower` a fixed function of them that is
costly merely because it enlarges the patch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from engines.clip_model import fingerprint
from engines.files import write_atomically
from engines.towers.clip_towers import StudentTower

_META = "tgmae_student"


def save_student(path: Path, tower: StudentTower, clip_fingerprint: str, measured: dict[str, Any]) -> None:
    """Write a student atomically, as safetensors.

    clip_fingerprint   the CLIP that it was distilled from
    measured           how well it agrees with that CLIP; JSON values
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tower.state_dict().items()}
    first, last = tower.layers[0], tower.layers[-1]
    about = {
        "clip": clip_fingerprint,
        "values": first.in_features,
        "hidden": first.out_features,
        "embed": last.out_features,
        "measured": measured,
    }
    about["checksum"] = _checksum(weights, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(weights, metadata={_META: json.dumps(about)}))


def read_about(path: Path) -> dict[str, Any]:
    """Read what a student file says about itself: clip, values, hidden, embed and measured (see `save_student`).

    Raises FileNotFoundError if there is no such file, and ValueError if it is not a student or damaged.
    """
    return _read(path)[0]


def load_student(path: Path, clip_fingerprint: str, patch_size: int) -> StudentTower:
    """Load a student. Its name includes a hash of its weights.

    Raises FileNotFoundError if there is no such file, and ValueError if it is not a student, is damaged, or was
    distilled from another CLIP or for patches of another size.
    """
    about, state = _read(path)
    if about["clip"] != clip_fingerprint:
        raise ValueError(
            f"{path} was distilled from the CLIP {about['clip']}, but --clip.model and --clip.weights give "
            f"{clip_fingerprint}; distill it again with tgmae-engine distill, or use the CLIP it was made from"
        )
    if about["values"] != patch_size**2 * 3:
        raise ValueError(f"{path} takes patches of {about['values']} values, got patches of {patch_size**2 * 3}")
    tower = StudentTower(patch_size, about["hidden"], about["embed"])
    tower.load_state_dict(state)
    tower.name += f"-{fingerprint(state, '')[:8]}"
    return tower


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a student file says about itself, and its weights. Raises as `load_student` does."""
    if not path.is_file():
        raise FileNotFoundError(f"no student at {path}; make one with: tgmae-engine distill MANIFEST --out {path}")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_META])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name in ("clip", "values", "hidden", "embed", "measured"):
            about[name]
    except OSError:
        raise
    except Exception as error:  # safetensors, JSON and torch raise errors of their own for a damaged header
        raise ValueError(f"{path} is not a student made by tgmae-engine distill") from error
    if about.pop("checksum", None) not in (None, _checksum(state, about)):  # students made before have none
        raise ValueError(f"{path} is damaged: its checksum is another one; make it again with tgmae-engine distill")
    return about, state


def _checksum(weights: dict[str, Tensor], about: dict[str, Any]) -> str:
    """Return a digest of everything in a student file but itself."""
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(weights.items())}
    return fingerprint(weights, json.dumps([about, shapes], sort_keys=True))
