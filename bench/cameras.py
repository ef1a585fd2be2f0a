"""Which masks find the object when the camera stands still, and when it pans? The paper's motivation, in numbers.

    python -m bench.cameras
    python -m bench.cameras --clips 32 --ratio 0.75

Takes about two minutes on two cores, most of it for drawing the clips. Writes bench/results/cameras.<cpu or GPU>.json.

With the same seed, shapes clips show the same objects before the same backgrounds. The backgrounds stand still, drift
more slowly than the objects (as in the demo), or pass as fast as the objects move. Every strategy masks the same clips,
and its scores are judged by the patches that the object covers at least half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from bench.harness.command_line import run_from_shell
from bench.harness.report import save_report, write_report
from bench.harness.tables import Row, Table
from dali_pipelines.types import ClipBatch
from dali_pipelines.workers.processes import count_cores
from tgmae.config.masks import MaskKind
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.agreement import load_clips
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.scorer import bind_scorer
from tgmae.presets import PRESETS
from tgmae.shapes.judge import judge
from tgmae.shapes.scenes import Camera, make_shapes
from tgmae.shapes.truth import object_coverage, read_objects
from tgmae.training.parallel import choose_device

SEED = 77003  # its clips are in neither the demo nor its CLIP's training


@dataclass(frozen=True)
class Options:
    clips: int = 96  # clips for each camera
    ratio: float = 0.6  # mask ratio
    work_dir: Path = Path("data/bench")  # folder for clips and their motion vectors


def prepare(folder: Path, camera: Camera, clips: int) -> Manifest:
    """Create shapes clips of a camera and their motion vectors, unless they exist."""
    path = folder / "manifest.parquet"
    if not path.exists():
        make_shapes(
            folder, count=clips, seed=SEED, codec="h264", num_objects=1, num_workers=count_cores(), camera=camera
        )
    manifest = read_manifest(path)
    build_motion(manifest, folder / "motion", count_cores())
    return manifest


def find_truth(manifest: Manifest, batches: list[ClipBatch], config: InputConfig) -> list[NDArray[np.bool_]]:
    """Return for each clip the patches that its object covers at least half: bool [S, N]."""
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
    """Score the clips of one camera with every strategy, and judge the masks."""
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
