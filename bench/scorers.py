"""How well does each scorer agree with `patch`, how well does it find the object, and what does it cost?

    python -m bench.scorers data/one
    python -m bench.scorers data/one --scores data/one/scores --student student.safetensors --two data/two

The folders hold shapes clips, made by `tgmae-data shapes` with a seed that the tiny CLIP was not trained on. The second
part counts the arithmetic of each scorer at production size (CLIP ViT-B/32, 16 frames of 224²), with random weights,
which do not matter for it. Writes bench/results/scorers.<cpu or GPU>.json.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from bench.harness.command_line import run_from_shell
from bench.harness.report import write_report
from bench.harness.tables import Row, Table
from bench.workloads.inputs import make_random_clip
from dali_pipelines.types import ClipBatch
from engines.towers.student import read_about
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.agreement import compare_scorers, count_gflop, load_clips
from tgmae.presets import PRESETS
from tgmae.shapes.judge import area_under_curve, judge, mean_of
from tgmae.shapes.truth import object_coverage, read_objects
from tgmae.telemetry.flops import count_flops
from tgmae.training.parallel import choose_device


@dataclass(frozen=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional]  # folder of clips with one object
    student: Path | None = None  # student of the tiny CLIP; without it scorer student is left out
    scores: Path | None = None  # score maps of FOLDER; without them scorer cached is left out
    two: Path | None = None  # folder of clips with two objects
    two_scores: Path | None = None  # score maps of --two
    clips: int = 128  # clips that are scored
    batch: int = 8  # clips scored at a time


def run(options: Options) -> None:
    demo = PRESETS["demo"]
    device = choose_device("auto")
    mask = replace(demo.mask, student=options.student, scores=options.scores)
    config = InputConfig(model=demo.model, clip=demo.clip, mask=mask, data=replace(demo.data, split=""))
    manifest = read_manifest(options.folder / "manifest.parquet")
    batches = load_clips(config, manifest, options.clips, options.batch, device)
    reports, scores = compare_scorers(config, manifest, batches, device)
    truth = _truth(options.folder, batches, config, manifest)
    first, num_masked = [t[0] for t in truth], mask.masked_per_slot(demo.model.patches_per_slot)
    rows = [
        {**dataclasses.asdict(report), **judge(first, list(scores[report.name].numpy()), num_masked)}
        for report in reports
    ]
    chance = torch.rand(scores["patch"].shape, generator=torch.Generator().manual_seed(0))
    rows.append({"name": "random", **judge(first, list(chance.numpy()), num_masked)})

    results: dict[str, Any] = {"clips": len(truth), "ratio": mask.ratio, "scorers": rows, "two_objects": {}}
    if options.two is not None:
        results["two_objects"] = _two_objects(options.two, config, options, device)
    if options.student is not None:
        results["student"] = read_about(options.student)
    results["production_gflop_per_clip"] = _production_cost()
    for row in rows:
        print(
            "  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{value}" for name, value in row.items())
        )
    print(results["two_objects"], results["production_gflop_per_clip"], sep="\n")
    speed = [
        Row(
            report.name, report.clips_per_s,
            {"agreement": report.agreement, "rank": report.rank_correlation, "GFLOP a clip": report.gflop_per_clip},
        )
        for report in reports
    ]  # fmt: skip
    write_report("scorers", [Table("scorers, clips in memory", "clips/s", speed, "patch")], None, device, results)


def _truth(
    folder: Path, batches: list[ClipBatch], config: InputConfig, manifest: Manifest
) -> list[list[NDArray[np.bool_]]]:
    """Return for each clip, and each of its objects, the patches that the object covers at least half: bool [S, N]."""
    objects, model = read_objects(folder), config.model
    found = []
    for request in (request for clips in batches for request in clips.requests):
        things = objects[manifest[request.row].path]
        sizes = (model.image_size, model.patch_size, model.tubelet_size)
        found.append(
            [
                object_coverage(thing, request, *sizes, on_top=things[number + 1 :]) >= 0.5
                for number, thing in enumerate(things)
            ]
        )
    return found


def _two_objects(folder: Path, config: InputConfig, options: Options, device: torch.device) -> dict[str, Any]:
    """Return how well each scorer tells the named object from the other, for either name.

    The figure is the area under the ROC curve of the named object's patches against the other's.
    """
    manifest = read_manifest(folder / "manifest.parquet")
    config = replace(config, mask=replace(config.mask, scores=options.two_scores))
    batches = load_clips(config, manifest, options.clips, options.batch, device)
    truth = _truth(folder, batches, config, manifest)
    found: dict[str, Any] = {}
    for named in (0, 1):
        asked = [
            replace(clips, requests=tuple(replace(request, caption=named) for request in clips.requests))
            for clips in batches
        ]
        _, scores = compare_scorers(config, manifest, asked, device)
        for name, values in scores.items():
            areas = [
                area_under_curve(t[named][t[0] | t[1]], score[t[0] | t[1]])
                for t, score in zip(truth, values.numpy(), strict=True)
            ]
            found.setdefault(name, {})["first" if named == 0 else "second"] = mean_of(areas)
    return found


def _production_cost() -> dict[str, float]:
    """Count each scorer's GFLOP per clip with CLIP ViT-B/32 on 16 frames of 224²."""
    clip, shape = make_random_clip(), ModelConfig()
    with torch.inference_mode():
        enlarged = count_flops(lambda: clip.open_clip.visual(torch.zeros(1, 3, 224, 224)))
    frames, patches = shape.num_frames, shape.patches_per_slot
    cost = {"patch, enlarging each patch": enlarged * frames * patches / 1e9}
    cost["patch"] = count_gflop(clip, shape, MaskConfig(scorer="patch"))
    cost["patch, first frame"] = count_gflop(clip, shape, MaskConfig(scorer="patch", frames_per_tubelet=1))
    for last_block in ("maskclip", "sclip", "clearclip", "naclip"):
        cost[f"dense, {last_block}"] = count_gflop(clip, shape, MaskConfig(scorer="dense", dense=last_block))
    hidden, values, embed = 1024, shape.patch_size**2 * 3, 512
    cost["student, 1024 wide"] = 2 * frames * patches * (values * hidden + hidden**2 + hidden * embed) / 1e9
    return cost


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
