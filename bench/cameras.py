"""Which masks find the object, before a still camera and before one that pans? The paper's motivation, in numbers.

    python -m bench.cameras [--clips 96] [--ratio 0.6] [--work-dir data/bench]

Shapes clips under one seed show the same objects before the same backgrounds; the backgrounds stand still, drift slower
than the objects (the demo), or pass as fast as they move. Every strategy masks the same clips; its scores are judged
against the patches that the object covers at least half. About two minutes on 2 cores, most of it drawing the clips.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from bench.harness.report import Row, Table, run_from_shell, save_report, write_report
from dali_pipelines.processes import count_cores
from dali_pipelines.types import ClipBatch
from tgmae.config import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.agreement import load_clips
from tgmae.masks.config import MaskKind
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.scorer import bind_scorer
from tgmae.presets import PRESETS
from tgmae.shapes.judge import judge
from tgmae.shapes.scenes import Camera, make_shapes
from tgmae.shapes.truth import object_coverage, read_objects
from tgmae.training.parallel import choose_device

SEED = 77003  # no clip of the demo's or of its CLIP's training


@dataclass(frozen=True)
class Options:
    clips: int = 96
    ratio: float = 0.6
    work_dir: Path = Path("data/bench")  # clips and their motion stay here


def prepare(folder: Path, camera: Camera, clips: int) -> Manifest:
    """Shapes clips of a camera with their motion, made where they are missing."""
    path = folder / "manifest.parquet"
    if not path.exists():
        make_shapes(
            folder, count=clips, seed=SEED, codec="h264", num_objects=1, num_workers=count_cores(), camera=camera
        )
    manifest = read_manifest(path)
    build_motion(manifest, folder / "motion", count_cores())
    return manifest


def find_truth(manifest: Manifest, batches: list[ClipBatch], config: InputConfig) -> list[NDArray[np.bool_]]:
    """For each clip the patches that its object covers at least half, [S, N]."""
    objects, model = read_objects(manifest.root), config.model
    return [
        object_coverage(
            objects[manifest[request.row].path][0], request, model.image_size, model.patch_size, model.tubelet_size
        )
        >= 0.5
        for clips in batches
        for request in clips.requests
    ]


def judge_camera(folder: Path, manifest: Manifest, options: Options) -> list[Row]:
    demo, device = PRESETS["demo"], choose_device("auto")
    mask = replace(demo.mask, ratio=options.ratio, motion=folder / "motion")
    config = InputConfig(model=demo.model, clip=demo.clip, mask=mask, data=replace(demo.data, split=""))
    batches = load_clips(config, manifest, options.clips, 16, device)
    truth, num_masked = find_truth(manifest, batches, config), mask.masked_per_slot(config.model.patches_per_slot)
    rows = []
    for kind in get_args(MaskKind):
        scorer = bind_scorer(replace(config, mask=replace(mask, kind=kind)), manifest, device)
        scores = [score.cpu().numpy() for clips in batches for score in scorer(clips)]
        found = judge(truth, scores, num_masked)
        rows.append(Row(kind, [found["masked_top"]], {"AUC in a slot": found["auc_slot"], "found": found["found"]}))
    return rows


def run(options: Options) -> None:
    tables, device = [], choose_device("auto")
    for camera in get_args(Camera):
        folder = options.work_dir / f"camera-{camera}"
        manifest = prepare(folder, camera, options.clips)
        rows = judge_camera(folder, manifest, options)
        tables.append(Table(f"{camera} camera, ratio {options.ratio}", "share of the object masked", rows))
        save_report("cameras", tables, None, device)
    write_report("cameras", tables, device=device, results={"clips": options.clips})


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
