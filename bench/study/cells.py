"""The cells of the study: what is pretrained, on which clips, and how."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dali_pipelines.workers.processes import count_cores
from engines.config import TowerSpec
from engines.files import write_atomically
from tgmae.config.loss import LossConfig
from tgmae.config.run import TrainConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.maps.build_scores import build_scores
from tgmae.presets import PRESETS
from tgmae.shapes.scenes import make_shapes

Kind = Literal["tube", "mgm", "tgm"]
RATIOS: dict[Kind, float] = {"tube": 0.75, "mgm": 0.75, "tgm": 0.6}  # Fan et al. 2024, table 2
CLIPS_SEED = 77014  # its clips are in neither the demo nor its CLIP's training
_EVERY = 2  # video frames from one score map to the next: the default of `tgmae-data scores`


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all cells have in common. A folder holds the cells of one plan."""

    clips: int
    epochs: int
    image_size: int


@dataclass(frozen=True)
class Cell:
    """One pretraining run. With or without, the contrastive loss is logged; without, no gradient of it is used."""

    kind: Kind
    is_optimised: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{'contrastive' if self.is_optimised else 'plain'}-{self.seed}"

    def __str__(self) -> str:
        return f"{self.kind}, {'with' if self.is_optimised else 'without'} the contrastive loss, seed {self.seed}"


def list_cells(seeds: tuple[int, ...]) -> list[Cell]:
    """Return all cells, one seed after the other, so that a study that is stopped has whole seeds."""
    return [Cell(kind, on, seed) for seed in seeds for kind in get_args(Kind) for on in (False, True)]


def claim_folder(folder: Path, plan: Plan) -> None:
    """Note which plan a folder belongs to. Raises ValueError where it holds cells of another one."""
    path, text = folder / "plan.json", json.dumps(asdict(plan), indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        raise ValueError(
            f"{folder} holds a study of other settings, {' '.join(path.read_text().split())}: resume it with those, "
            "or give another --work-dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def prepare_clips(folder: Path, plan: Plan) -> Manifest:
    """Draw the clips, extract their motion and compute their score maps, unless they are there. Return the manifest."""
    path = folder / "clips" / "manifest.parquet"
    if not path.exists():
        make_shapes(
            path.parent, count=plan.clips, seed=CLIPS_SEED, codec="h264", num_objects=1, num_workers=count_cores()
        )
    manifest, demo = read_manifest(path), PRESETS["demo"]
    trained = manifest.select_split("train")
    build_motion(trained, folder / "motion", count_cores())
    build_scores(
        trained, folder / "scores", replace(demo.clip, cache_dir=folder / "cache"), TowerSpec(kind="patch"),
        cells=plan.image_size // demo.model.patch_size, patch_size=demo.model.patch_size, every=_EVERY,
        device=torch.device("cpu"), num_workers=count_cores(),
    )  # fmt: skip
    return manifest


def make_config(folder: Path, plan: Plan, cell: Cell, num_trained: int) -> TrainConfig:
    """Return the configuration of a cell: the demo's network and schedule, with shorter training.

    num_trained   videos that are trained on
    """
    demo = PRESETS["demo"]
    warmup_steps = demo.optim.warmup_epochs * 256 / demo.batch_size  # 256 of the demo's clips are trained on
    loss = LossConfig(contrastive=1.0) if cell.is_optimised else LossConfig(observe_contrastive=True)
    changes: dict[str, Any] = {"kind": cell.kind, "ratio": RATIOS[cell.kind]}
    if cell.kind == "tgm":
        changes |= {"scorer": "cached", "scores": folder / "scores"}
    if cell.kind == "mgm":
        changes |= {"motion": folder / "motion"}
    return replace(
        demo,
        run_dir=folder / "runs" / cell.name,
        seed=cell.seed,
        epochs=plan.epochs,
        data=replace(demo.data, manifest=folder / "clips" / "manifest.parquet"),
        model=replace(demo.model, image_size=plan.image_size),
        mask=replace(demo.mask, **changes),
        clip=replace(demo.clip, cache_dir=folder / "cache"),
        loss=loss,
        optim=replace(demo.optim, warmup_epochs=warmup_steps * demo.batch_size / num_trained),
        validation=replace(demo.validation, every=0),
        log=replace(
            demo.log, metrics_every=10, picture_every=10**6, checkpoint_every=100, keep_checkpoints=1, tensorboard=False
        ),
    )  # fmt: skip
