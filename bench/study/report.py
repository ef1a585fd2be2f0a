"""The study's tables, from what its cells left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, get_args

from bench.harness.tables import Row, Table
from bench.study.cells import RATIOS, Cell, Kind
from bench.study.judge import NUM_CLASSES
from tgmae.telemetry.metrics import read_metrics

PAPERS_GAIN: dict[Kind, float] = {"tube": 12.5, "mgm": 4.1, "tgm": 7.2}  # points of linear probe, SSv2, table 2
_LAST = 0.1  # share of the steps over which a run's final losses are averaged

Found = Mapping[str, Mapping[str, Any]]  # what was judged, by name: a cell's, "raw pixels", "random encoder, seed 0"


def name_random(seed: int) -> str:
    return f"random-encoder-{seed}"


def read_losses(run_dir: Path) -> dict[str, float]:
    """Return both losses of a run at its end, and the seconds that its steps took."""
    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    steps = [line["step"] for line in lines]
    last = [line for line in lines if line["step"] > (1 - _LAST) * steps[-1]]
    spans = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    return {
        **{name: mean(line[name] for line in last) for name in ("reconstruction_loss", "contrastive_loss")},
        "pretrain_s": sum(span * line["step_ms"] / 1000 for span, line in zip(spans, lines, strict=True)),
    }


def make_tables(found: Found, seeds: Sequence[int], num_held_out: int) -> list[Table]:
    """Make a table for each task, one of what the contrastive loss adds, and one of the losses."""

    def accuracies(task: str, names: Sequence[str]) -> list[float]:
        return [100 * found[name][task]["accuracy"] for name in names]

    def cells(kind: Kind, is_optimised: bool) -> list[str]:
        return [Cell(kind, is_optimised, seed).name for seed in seeds]

    runs: dict[str, list[str]] = {
        f"{kind}, γ {RATIOS[kind]}" + ", contrastive" * on: cells(kind, on)
        for kind in get_args(Kind)
        for on in (False, True)
    }
    rows = {"raw pixels": ["raw-pixels"], "random encoder": [name_random(seed) for seed in seeds], **runs}
    tables = [
        Table(
            f"{task}, {count} classes",
            f"% of {num_held_out} held-out videos",
            [_make_row(name, accuracies(task, names)) for name, names in rows.items()],
            note=f"chance is {100 / count:.3g} %",
        )
        for task, count in NUM_CLASSES.items()
    ]
    gains = [
        _make_row(
            f"{kind}, {task}",
            [
                with_it - without
                for without, with_it in zip(
                    accuracies(task, cells(kind, False)), accuracies(task, cells(kind, True)), strict=True
                )
            ],
            **{"the paper, SSv2": PAPERS_GAIN[kind]},
        )
        for task in NUM_CLASSES
        for kind in get_args(Kind)
    ]
    tables.append(Table("what the contrastive loss adds, within a seed", "points", gains))
    for name in ("contrastive", "reconstruction"):
        values = {row: [found[cell][f"{name}_loss"] for cell in names] for row, names in runs.items()}
        tables.append(
            Table(f"{name} loss at the end", "loss", [_make_row(row, losses) for row, losses in values.items()])
        )
    return tables


def _make_row(name: str, values: Sequence[float], **facts: float) -> Row:
    return Row(name, values, {"mean": mean(values), **facts})
