"""What does a clip cost, which stage binds on a GPU, and how close has the project come?

    python -m bench.roofline
    python -m bench.roofline data/mine.parquet --gpu H100 --ratio 0.75

Needs no GPU: nothing is timed. For a clip of the production model (ViT-B, 16×224²) and the videos of a manifest, it
counts every stage's bytes and floating-point operations from shapes (bench/costs) and divides them by what the GPU can
do at most, by its data sheet (bench/harness/chips.py). A stage's limit is what it would reach if nothing else ran and
it met that bound. NVDEC, PCIe and the SMs work side by side, so the slowest of them binds; on the SMs the times of the
stages add up.

The column "of a step" is a stage's time as a share of a step's at the target, 46 % of the tensor cores' peak,
and "reached" what the reports in bench/results measured on such a GPU. A third table predicts the step
(bench/costs/prediction.py), at published speeds of attention and assumed ones of all else. Writes
bench/results/roofline.<name>.<gpu>.json and .png, named after the manifest or its folder, and prints the tables, with
--markdown as Markdown.
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
from bench.costs.prediction import prediction_table
from bench.costs.traffic import count_traffic
from bench.gpu_report.targets import COMPILED_SHARE
from bench.harness.chips import FULL_HD, Chip, find_chip, short_name
from bench.harness.command_line import run_from_shell
from bench.harness.environment import environment
from bench.harness.figures import Reports, best, find_rows, load_reports, values
from bench.harness.report import RESULTS, source_name
from bench.harness.tables import Row, Table, markdown, print_table
from bench.workloads.kernel_operations import Size
from tgmae.config.data import DEMO_MANIFEST
from tgmae.data.manifest import read_manifest
from tgmae.presets import PRESETS
from tgmae.shapes.demo import provide_demo

NOT_RUN = "not run"


@dataclass(frozen=True)
class Options:
    manifest: Annotated[Path, tyro.conf.Positional] = DEMO_MANIFEST  # manifest; the demo's is created if missing
    gpu: str = ""  # a chip of bench/harness/chips.py; by default this machine's GPU, or H200 without one
    ratio: float = 0.6  # mask ratio
    batch: int = 64  # clips in a forward pass, and in an optimiser step
    picture: bool = True  # draw the picture, which needs matplotlib
    markdown: bool = False  # print the tables as Markdown, as in docs/performance.md
    since: float = 0.0  # seconds since 1970; older reports do not count as reached


def seconds(stage: Stage, chip: Chip) -> float | None:
    """Return the least time in seconds that a stage alone can take for one clip; None if the limit is not known."""
    if stage.resource == "PCIe":
        return stage.moved / (chip.pcie_gb_s * 1e9)
    if stage.resource == "NVDEC":
        return None if chip.h264_frames_s is None else stage.pixels / (chip.h264_frames_s * FULL_HD)
    peak = chip.tensor_tflops if stage.unit == "tensor cores" else chip.float32_tflops
    return max(stage.moved / (chip.memory_tb_s * 1e12), stage.operations / (peak * 1e12))


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def target_clips_s(stages: Sequence[Stage], chip: Chip) -> float:
    """Return the clips/s of a step whose matrix products reach the target share of the tensor cores' peak."""
    (products,) = (stage.operations for stage in stages if stage.name == "matrix products")
    return COMPILED_SHARE * chip.tensor_tflops * 1e12 / products


def stage_table(
    stages: Sequence[Stage], chip: Chip, target: float, reached: dict[str, float], title: str, note: str
) -> Table:
    """Make a row for each stage: its limit, what limits it, and what was reached."""
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
    """Find what binds with each scorer: the busiest of NVDEC, PCIe and SMs, and the longest stage on it."""
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
    note = f"The target is {COMPILED_SHARE:.0%} of {chip.tensor_tflops:,.0f} TFLOP/s: {target:,.0f} clips/s."
    return Table(title, "clips/s", rows, note=note)


def find_reached(reports: Reports, ratio: float, batch: int) -> dict[str, float]:
    """Return measured clips/s of stages and of whole strategies, by the names of this benchmark's rows."""
    found: dict[str, float | None] = {
        "decode": best(
            [
                *find_rows(reports, "decode.*", "", "^h264.*DALI GPU$"),
                *find_rows(reports, "decode.*", "NVDEC", "threads?$"),  # H.264's rows; those of other codecs name them
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
    """Describe the videos, and NVDEC's limit, in the note below the stages."""
    note = (
        f"Means over {footage.clips} clips: a file of {footage.file_bytes / 1024:,.0f} KiB, at the target "
        f"{footage.file_bytes * target / 1e6:,.0f} MB/s from disk; {footage.frames_passed:.3g} frames of "
        f"{footage.pixels:,.0f} pixels ({', '.join(sorted(footage.codecs))}) decoded for the clip's 16."
    )
    if chip.h264_frames_s is None:
        engines = f"{chip.name}'s {chip.nvdec_engines} NVDEC engines"
        return f"{note}\nNo limit of decoding: the frames/s of {engines} are not known."
    note += f"\nNVDEC: H.264 on {chip.nvdec_engines} engines, scaled by pixels, which flatters small frames."
    if footage.codecs != {"h264"}:
        note += " Only H.264 has a figure, and not all of these videos are H.264."
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
    device = short_name(chip.name)  # as in the names of such a GPU's other reports
    reached = find_reached(load_reports(RESULTS, device, options.since), options.ratio, options.batch)
    stages = [*loading, *scorers.values(), *step]
    setting = f"γ {options.ratio}, batch {options.batch}, {chip.name}"
    size = Size("", config.model, options.batch, options.ratio, torch.bfloat16)
    halved = count_traffic(config.model, options.ratio, options.batch, half_residual=True)
    tables = [
        stage_table(stages, chip, target, reached, f"stages of a clip, {setting}", describe(footage, chip, target)),
        binding_table(loading, scorers, step, chip, target, reached, f"what binds, {setting}"),
        prediction_table(step, halved.others, size, chip, f"the step, predicted, {setting}"),
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
        draw(stages, chip, reached, path.with_name(f"{path.stem}.png"), setting)
    print(f"written to {path.name}{' and .png' * options.picture} in bench/results")


def draw(stages: Sequence[Stage], chip: Chip, reached: dict[str, float], path: Path, title: str) -> None:
    """Draw every stage with arithmetic as a PNG."""
    # Imports matplotlib, which a GPU machine may lack.
    from bench.pictures.roofline import Point, draw_roofline

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
