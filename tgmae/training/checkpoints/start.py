"""Where a run starts: from a checkpoint, from weights, or fresh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tgmae.config.run import TrainConfig
from tgmae.model.initial_weights import read_initial_weights
from tgmae.training.checkpoints.folder import newest_checkpoint, read_number
from tgmae.training.checkpoints.read import load_checkpoint, load_newest
from tgmae.training.parallel import World


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from: a checkpoint, or weights by our names, or neither. `notes` are for the user.

    path      of the checkpoint, and its content `state`: None and empty for none
    norm_eps  the epsilon of the layer norms, which comes with the weights
    """

    path: Path | None
    state: dict[str, Any]
    weights: dict[str, Tensor]
    norm_eps: float
    notes: list[str]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state["step"]) if self.state else 0

    @property
    def text_width(self) -> int | None:
        """Width of the text that the checkpoint's head was made for, None where it has none."""
        weight = self.state.get("model", {}).get("head.last.weight")
        return None if weight is None else len(weight)


def find_start(config: TrainConfig, world: World) -> Start:
    """Read the checkpoint that `config.resume` names; where there is none, the weights that --init-from names."""
    path: Path | None = None
    state: dict[str, Any] = {}
    notes: list[str] = []
    if config.resume == "auto":
        newest = newest_checkpoint(config.run_dir / "checkpoints")
        require_same_step(config, world, 0 if newest is None else read_number(newest))  # they verify it together
        path, state, notes = load_newest(config.run_dir / "checkpoints", world)
    elif config.resume != "never":
        path = Path(config.resume)
        state = load_checkpoint(path, world)

    weights, norm_eps, source = {}, config.model.norm_eps, path
    if path is not None:
        norm_eps = state["config"]["model"]["norm_eps"]
        unused = f"; --init-from {config.init_from} is not used" if config.init_from else ""
        notes.append(f"resuming from {path}{unused}")
    elif config.init_from is not None:
        found = read_initial_weights(config.init_from, config.model)
        weights, source = found.weights, found.source
        norm_eps = norm_eps if found.norm_eps is None else found.norm_eps
        notes += found.notes
    if norm_eps != config.model.norm_eps:
        notes.append(f"layer norms have the epsilon {norm_eps} of {source}; --model.norm-eps is not used")
    return Start(path=path, state=state, weights=weights, norm_eps=norm_eps, notes=notes)


def require_same_step(config: TrainConfig, world: World, step: int) -> None:
    """Raise ValueError where processes would start from different steps. Every process must call it."""
    if world.max(step, -step) != (step, -step):
        raise ValueError(
            f"process {world.rank} of {world.size} would start from step {step}, another one from another step: "
            f"all of them must read the same checkpoints in {config.run_dir}"
        )
