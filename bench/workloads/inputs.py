"""Inputs of the benchmarks of masks and training: videos with motion vectors and score maps, and the scorers.

Missing inputs are created by the functions behind `tgmae-data shapes`, `tgmae-data motion` and `tgmae-data scores`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import open_clip
import torch

from bench.harness.report import source_name
from dali_pipelines.workers.processes import count_cores
from engines.clip_model import CLIPModel, load_clip
from engines.config import CLIPConfig, TowerSpec
from engines.open_clip_model import OpenCLIP
from engines.towers.clip_towers import StudentTower
from engines.towers.student import save_student
from tgmae.captions.policy import require_captions
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.config.training import DistillConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.maps.build_scores import build_scores
from tgmae.masks.scorer import BoundScorer, bind_scorer
from tgmae.shapes.demo import provide_demo

Engine = Literal["torch", "onnxruntime", "tensorrt", "tensorrt_rtx"]
STRATEGIES = ("random", "tube", "mgm", "mgm_box", "mgmae", "tgm patch", "tgm dense", "tgm student", "tgm cached")
WITH_CLIP = ("tgm patch", "tgm dense", "tgm student")  # run CLIP's tower, or a stand-in, on every clip
_LARGE_CLIP = "ViT-B-32-quickgelu"
_EVERY = 2  # video frames from one score map to the next: the default of `tgmae-data scores`


@dataclass(frozen=True)
class Videos:
    """A manifest whose videos all have captions, and the files that masks need beside it."""

    manifest: Manifest
    motion: Path  # folder of motion vectors
    scores: Path  # folder of score maps
    student: Path  # written by `make_strategy_scorer`
    cache: Path  # caption embeddings, graphs and plans


def prepare_videos(
    work_dir: Path, manifest_path: Path, model: ModelConfig, device: torch.device, first: int | None = None
) -> Videos:
    """Create motion vectors and score maps below `work_dir` for clips of the model's size, unless they exist.

    first  use only this many of the manifest's videos

    The maps come from scorer dense with the tiny CLIP, the fastest to make. The cost of reading maps does not depend on
    how they were made.
    """
    provide_demo(manifest_path)
    manifest, note = require_captions(read_manifest(manifest_path), "label")
    if note:
        print(note)
    folder = work_dir / source_name(manifest_path)
    if first is not None:
        manifest, folder = Manifest(manifest.table.slice(0, first), manifest.root), folder / f"first-{first}"
    cells = model.image_size // model.patch_size
    cache = work_dir / "cache"
    student = cache / "student.safetensors"
    videos = Videos(manifest, folder / "motion", folder / f"scores-{cells}", student, cache)
    build_motion(manifest, videos.motion, count_cores())
    build_scores(
        manifest, videos.scores, _tiny_clip(videos, "torch"), TowerSpec(kind="dense"), cells=cells,
        patch_size=model.patch_size, every=_EVERY, device=device, num_workers=count_cores(),
    )  # fmt: skip
    return videos


def choose_mask(strategy: str, preset: MaskConfig, videos: Videos, ratio: float) -> MaskConfig:
    """Return the mask configuration of a strategy. Raises ValueError for a name that is not in STRATEGIES."""
    kind, _, scorer = strategy.partition(" ")
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown mask strategy {strategy!r}; use one of: {', '.join(STRATEGIES)}")
    files = {"motion": videos.motion, "scores": videos.scores, "student": videos.student}
    return replace(preset, kind=kind, scorer=scorer or "patch", ratio=ratio, **files)  # type: ignore[arg-type]


def make_strategy_scorer(
    config: InputConfig,
    videos: Videos,
    device: torch.device,
    engine: Engine,
    num_clips: int,
    clip: CLIPModel | None = None,
) -> BoundScorer:
    """Make the scorer of `config.mask` for batches of `num_clips`. Text-guided ones use the tiny CLIP, or `clip`.

    Scorer student has random weights; its cost does not depend on them.
    """
    config = replace(config, clip=_tiny_clip(videos, engine))
    if config.mask.kind == "tgm" and config.mask.scorer == "student":
        make_random_student(videos.student, clip or load_clip(config.clip), config.model.patch_size)
    if clip is not None and config.mask.kind == "tgm" and config.mask.scorer != "cached":
        large = replace(config, clip=replace(config.clip, model=_LARGE_CLIP))
        return bind_scorer(large, videos.manifest, device, clip, num_clips)
    return bind_scorer(config, videos.manifest, device, num_clips=num_clips)


def make_random_clip() -> CLIPModel:
    """Make CLIP ViT-B/32 with random weights, without a download: the cost of scoring does not depend on them."""
    torch.manual_seed(0)
    model = open_clip.create_model(_LARGE_CLIP, pretrained=None).eval().requires_grad_(False)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
    tokenizer = open_clip.get_tokenizer(_LARGE_CLIP)
    return CLIPModel.of(OpenCLIP(model=model, tokenizer=tokenizer, mean=mean, std=std))


def make_random_student(path: Path, clip: CLIPModel, patch_size: int) -> None:
    """Write a student of this CLIP with random weights, in the size that `tgmae-engine distill` makes."""
    torch.manual_seed(0)
    tower = StudentTower(patch_size, DistillConfig().hidden, clip.visual.proj.shape[1])
    save_student(path, tower, clip.fingerprint, {})


def _tiny_clip(videos: Videos, engine: Engine) -> CLIPConfig:
    return CLIPConfig(model="shapes", engine=engine, cache_dir=videos.cache)
