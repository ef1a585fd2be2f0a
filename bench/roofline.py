"""What does a clip cost, which stage binds on a GPU, and how near has the project come? Needs no GPU: it counts.

    python -m bench.roofline [MANIFEST] [--gpu H200] [--ratio 0.6] [--batch 64]

For a clip of the production model (ViT-B, 16×224²) and the videos of a manifest, bytes and floating-point operations of
every stage are counted from shapes (bench/clip_costs.py, bench/traffic.py), and divided by what the GPU can do at most
by its data sheet (bench/chips.py). A stage's limit is what it would reach if nothing else ran and it met that bound.
NVDEC, PCIe and the SMs work side by side, so of these the slowest binds; on the SMs the stages' times add up.

"of a step" is a stage's time by that of a step at the target, 45 % of the tensor cores' peak. "reached" is measured on
such a GPU, from the reports in bench/results. Writes bench/results/roofline.<name>.<gpu>.json and .png, named after the
manifest or its folder, and prints the tables in Markdown as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from bench.costs.clip_costs import SCORERS, STEP, Footage, Stage, loading_stages, scorer_stages, step_stages, survey
from bench.costs.traffic import count_traffic
from bench.harness.chips import FULL_HD, Chip, find_chip, short_name
from bench.harness.figures import Reports, best, find_rows, load_reports, values
from bench.harness.gpu_targets import STEP_SHARE
from bench.harness.report import RESULTS, Row, Table, environment, markdown, print_table, run_from_shell, source_name
from tgmae.data.config import DEMO_MANIFEST
from tgmae.data.manifest import read_manifest
from tgmae.presets import PRESETS
from tgmae.shapes.demo import provide_demo

NOT_RUN = "not run"


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # the default is made where it is missing
    gpu: str = ""  # a chip of bench/chips.py; by default the one at hand, or H200
    ratio: float = 0.6  # of masked patches
    batch: int = 64  # clips in a forward pass, and in an optimiser step
    picture: bool = True  # --no-picture for machines without matplotlib
    markdown: bool = False  # print the tables as docs/performance.md has them
    since: float = 0.0  # seconds since 1970: what was reached before does not count


def seconds(stage: Stage, chip: Chip) -> float | None:
    """The least time a stage can take for one clip on its own; None where the limit is not known."""
    if stage.resource == "PCIe":
        return stage.moved / (chip.pcie_gb_s * 1e9)
    if stage.resource == "NVDEC":
        return None if chip.h264_frames_s is None else stage.pixels / (chip.h264_frames_s * FULL_HD)
    peak = chip.tensor_tflops if stage.unit == "tensor cores" else chip.float32_tflops
    return max(stage.moved / (chip.memory_tb_s * 1e12), stage.operations / (peak * 1e12))


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def target_clips_s(stages: Sequence[Stage], chip: Chip) -> float:
    """Clips/s of a step whose matrix products keep the tensor cores as busy as the target says."""
    (products,) = (stage.operations for stage in stages if stage.name == "matrix products")
    return STEP_SHARE * chip.tensor_tflops * 1e12 / products


def stage_table(
    stages: Sequence[Stage], chip: Chip, target: float, reached: dict[str, float], title: str, note: str
) -> Table:
    rows = []
    for stage in stages:
        if (spent := seconds(stage, chip)) is None:
            continue
        by_memory = stage.resource == "SMs" and stage.moved / chip.memory_tb_s > stage.operations / (
            chip.tensor_tflops if stage.unit == "tensor cores" else chip.float32_tflops
        )
        facts: dict[str, float | str] = {
            "limited by": "memory" if by_memory else stage.unit if stage.resource == "SMs" else stage.resource,
            "MB": stage.moved / 1e6,
            "GFLOP": stage.operations / 1e9,
            "µs a clip": 1e6 * spent,
            "of a step": _percent(spent * target),
            "reached": reached.get(stage.name, NOT_RUN),
        }
        rows.append(Row(stage.name, [1 / spent], facts))
    return Table(title, "clips/s", rows, note=note)


def binding_table(
    loading: Sequence[Stage], scorers: dict[str, Stage], step: Sequence[Stage], chip: Chip, target: float,
    reached: dict[str, float], title: str,
) -> Table:  # fmt: skip
    """What binds, scorer by scorer: the busiest of NVDEC, PCIe and SMs, and on the SMs the longest stage."""
    rows = []
    for name, stages in {
        "step alone": list(step),
        **{f"tgm {name}": [*loading, scorers[name], *step] for name in SCORERS},
    }.items():
        spent: dict[str, float] = {}
        for stage in stages:
            spent[stage.resource] = spent.get(stage.resource, 0.0) + (seconds(stage, chip) or 0.0)
        busiest = max(spent, key=lambda resource: spent[resource])
        on_it = [stage for stage in stages if stage.resource == busiest]
        longest = max(on_it, key=lambda stage: seconds(stage, chip) or 0.0)
        limit = 1 / spent[busiest]
        facts: dict[str, float | str] = {f"{r} µs": 1e6 * spent.get(r, 0.0) for r in ("SMs", "NVDEC", "PCIe")}
        facts |= {
            "binds": f"{busiest}: {longest.name}",
            "of the target": limit / target,
            "reached": reached.get(name, NOT_RUN),
        }
        rows.append(Row(name, [limit], facts))
    note = f"The target is {STEP_SHARE:.0%} of {chip.tensor_tflops:,.0f} TFLOP/s: {target:,.0f} clips/s."
    return Table(title, "clips/s", rows, note=note)


def find_reached(reports: Reports, ratio: float, batch: int) -> dict[str, float]:
    """Measured clips/s of stages and of whole strategies, by the names of this benchmark's rows."""
    found: dict[str, float | None] = {
        "decode": best(
            [
                *find_rows(reports, "decode.*", "", "^h264.*DALI GPU$"),
                *find_rows(reports, "decode.*", "NVDEC", "threads?$"),  # of H.264; others say so
            ]
        ),
        "step alone": best(find_rows(reports, "step", "ViT-B", rf"^γ {ratio},.*batch {batch}(,|$)"), "clips/s"),
        **{f"scores, {s}": best(find_rows(reports, "masks", "16×224²", f"^tgm {s}$"), "clips/s") for s in SCORERS},
        **{f"tgm {s}": best(find_rows(reports, "train", "own ratios", f"^tgm {s}, γ {ratio}$")) for s in SCORERS},
    }
    operations = {
        "top-k": "topk_mask", "gather": "gather_tokens", "loss": "masked_mse forward",
        "loss, backward": "masked_mse backward",
    }  # fmt: skip
    for stage, operation in operations.items():
        row = rf"^{batch} clips 16×224², γ {ratio}: kernel$"
        spent = values(find_rows(reports, "kernels", f"^{operation}$", row), "µs")
        found[stage] = 1e6 * batch / min(spent) if spent else None
    return {name: value for name, value in found.items() if value is not None}


def describe(footage: Footage, chip: Chip, target: float) -> str:
    note = (
        f"Means of {footage.clips} clips: a file of {footage.file_bytes / 1024:,.0f} KiB, at the target "
        f"{footage.file_bytes * target / 1e6:,.0f} MB/s from disk; {footage.frames_passed:.3g} frames of "
        f"{footage.pixels:,.0f} pixels ({', '.join(sorted(footage.codecs))}) decoded for the clip's 16."
    )
    if chip.h264_frames_s is None:
        return (
            f"{note}\nNo frames/s are known for {chip.name}'s {chip.nvdec_engines} NVDEC engines: no limit of decoding."
        )
    note += f"\nNVDEC: H.264 on {chip.nvdec_engines} engines, scaled by pixels, which flatters small frames."
    if footage.codecs != {"h264"}:
        note += " These videos are not all H.264, for which alone there is a figure."
    return note


def run(options: Options) -> None:
    if not options.gpu and not torch.cuda.is_available():
        options = replace(options, gpu="H200")
    chip, config = find_chip(options.gpu or torch.cuda.get_device_name()), PRESETS["ssv2"]
    provide_demo(options.manifest)
    footage = survey(read_manifest(options.manifest), config)
    loading = loading_stages(footage, config.model)
    scorers = scorer_stages(config.model, options.batch, config.mask.frames_per_tubelet)
    step = step_stages(config, options.ratio, options.batch)
    assert tuple(stage.name for stage in step) == STEP
    target = target_clips_s(step, chip)
    device = short_name(chip.name)  # as the other reports of such a GPU are called
    reached = find_reached(load_reports(RESULTS, device, options.since), options.ratio, options.batch)
    stages = [*loading, *scorers.values(), *step]
    what = f"γ {options.ratio}, batch {options.batch}, {chip.name}"
    tables = [
        stage_table(stages, chip, target, reached, f"stages of a clip, {what}", describe(footage, chip, target)),
        binding_table(loading, scorers, step, chip, target, reached, f"what binds, {what}"),
    ]
    plain = [table.to_dict() for table in tables]
    if options.markdown:
        print("\n".join(markdown(table) for table in plain))
    else:
        for table in tables:
            print_table(table)
    binding = {row.name: f"{row.facts['binds']}, {row.values[0]:,.0f} clips/s at most" for row in tables[1].rows}
    report = {
        **environment(), "counted": True, "chip": asdict(chip), "source": source_name(options.manifest),
        "headline": binding, "tables": plain, "stages": [asdict(stage) for stage in stages],
        "footage": {**asdict(footage), "codecs": sorted(footage.codecs)},
        "other_operators_bytes": dict(count_traffic(config.model, options.ratio, options.batch).by_operator),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"roofline.{source_name(options.manifest)}.{device}.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if options.picture:
        draw(stages, chip, reached, path.with_name(f"{path.stem}.png"), what)
    print(f"written to {path.name}{' and .png' * options.picture} in bench/results")


def draw(stages: Sequence[Stage], chip: Chip, reached: dict[str, float], path: Path, title: str) -> None:
    from bench.pictures.roofline import (
        Point,
        draw_roofline,  # matplotlib, which a GPU machine may lack
    )

    points = []
    for stage in stages:
        if stage.resource == "SMs" and stage.operations and (spent := seconds(stage, chip)):
            rate = reached.get(stage.name)
            done = rate * stage.operations / 1e12 if rate else None
            points.append(Point(stage.name, stage.operations / stage.moved, stage.operations / spent / 1e12, done))
    roofs = {"tensor cores, bfloat16": chip.tensor_tflops, "float32": chip.float32_tflops}
    draw_roofline(points, chip.memory_tb_s, roofs, path, f"{title}: arithmetic by bytes moved")


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
