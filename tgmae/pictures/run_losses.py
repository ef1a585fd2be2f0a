"""The losses of several runs over their steps, figure 4 of Fan et al. 2024: contrastive and reconstruction.

Runs that optimise the contrastive loss are solid, those that only observe it dashed; where nothing else differs, both
have one colour. Runs that differ in nothing but the seed are drawn as their mean, within their range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tgmae.config.differences import describe_differences
from tgmae.config.run import TrainConfig
from tgmae.config.saved import read_config
from tgmae.pictures.figures import save_figure
from tgmae.telemetry.metrics import METRICS_FILE, read_metrics

# Okabe and Ito's colours, which the colour-blind tell apart; in the order of groups, so that figure 4's are the first.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_INK, _FAINT, _GRID = "#222222", "#777777", "#e6e6e6"
_STYLES: dict[str, Any] = {  # of lines, by the role that the contrastive loss has in a run
    "contrastive loss optimised": "-",
    "contrastive loss only observed": (0, (3.5, 1.6)),
    "no contrastive loss": (0, (1, 1)),
}
_TITLES = {
    "contrastive": "contrastive loss, between clips and captions",
    "reconstruction": "reconstruction loss, MSE of normalised pixels",
}


@dataclass(frozen=True)
class RunLosses:
    """One run: its configuration, and its losses by step.

    contrastive, reconstruction   float64 [n, 2], steps and losses; empty where the run has none
    """

    run_dir: Path
    config: TrainConfig
    contrastive: NDArray[np.float64]
    reconstruction: NDArray[np.float64]

    @property
    def role(self) -> str:
        """What the run does with the contrastive loss."""
        optimised, observed, none = _STYLES
        loss = self.config.loss
        return optimised if loss.contrastive else observed if loss.is_observing else none


def read_losses(run_dir: Path) -> RunLosses:
    """Read the losses of a run. Raises ValueError, which names what is missing, for a folder that is not a run's."""
    if not run_dir.is_dir():
        raise ValueError(f"there is no folder {run_dir}; expected the folder of a run, such as runs/demo")
    try:
        config, _ = read_config(run_dir / "config.json")
    except FileNotFoundError as error:
        raise ValueError(f"{run_dir} is not the folder of a run: it has no config.json; leave it out") from error
    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    if not lines:
        raise ValueError(f"{run_dir} has no losses yet: there are none in its {METRICS_FILE}; leave it out")
    # A run without a head logs one loss, which is the weighted reconstruction.
    name, weight = ("reconstruction_loss", 1.0) if config.loss.contrasts else ("loss", config.loss.reconstruction)
    reconstruction = _points(lines, name) / (1.0, weight) if config.loss.reconstruction else np.empty((0, 2))
    contrastive = _points(lines, "contrastive_loss") if config.loss.contrasts else np.empty((0, 2))
    return RunLosses(run_dir, config, contrastive, reconstruction)


def _points(lines: Sequence[dict[str, Any]], name: str) -> NDArray[np.float64]:
    return np.array([(line["step"], line[name]) for line in lines if name in line], np.float64).reshape(-1, 2)


def smooth(points: NDArray[np.float64], window: float) -> NDArray[np.float64]:
    """Return the mean over `window` steps around each point, [n, 2].

    Near an end the window is narrower, on both sides alike, so that a straight line stays where it is.
    """
    steps, values = points.T
    half = np.minimum(np.minimum(steps - steps[0], steps[-1] - steps), window / 2)
    first, last = np.searchsorted(steps, steps - half), np.searchsorted(steps, steps + half, side="right")
    total = np.concatenate([[0.0], np.cumsum(values)])
    return np.stack([steps, (total[last] - total[first]) / (last - first)], axis=1)


def draw_run_losses(run_dirs: Sequence[Path], out: Path, window: float = 0.05) -> list[str]:
    """Draw the losses of runs as a PNG, and return what is not in it, in words.

    window   share of the longest run's steps over which curves are averaged, 0 for none; the curves as they were
             logged stand faintly behind

    Raises ValueError for a folder that is not a run's, or is given twice, and for a window that is not in [0, 1).
    """
    if not 0 <= window < 1:
        raise ValueError(f"--smooth must lie in [0, 1), got {window}")
    seen: set[Path] = set()
    for run_dir in run_dirs:
        if run_dir.resolve() in seen:
            raise ValueError(f"{run_dir} is given twice")
        seen.add(run_dir.resolve())
    runs = [read_losses(run_dir) for run_dir in run_dirs]
    notes, panels = _choose_panels(runs)
    figure = _draw(runs, panels, window)
    save_figure(figure, out, dpi=150)
    return notes


def _choose_panels(runs: Sequence[RunLosses]) -> tuple[list[str], list[str]]:
    """Return which runs are left out of a panel, in words, and the panels that have any run."""
    without = {
        "contrastive": "trained without one; --loss.observe-contrastive logs it without training with it",
        "reconstruction": "trained with the contrastive loss alone",
    }
    notes, panels = [], []
    for name, reason in without.items():
        missing = [str(run.run_dir) for run in runs if not len(getattr(run, name))]
        if missing:
            notes.append(f"no {name} loss of {', '.join(missing)}: {reason}")
        if len(missing) < len(runs):
            panels.append(name)
    return notes, panels


def _draw(runs: Sequence[RunLosses], panels: Sequence[str], window: float) -> Figure:
    without = ["seed", "loss.observe_contrastive"]
    if len({run.config.loss.contrastive for run in runs} - {0}) < 2:  # the line's style tells them apart
        without.append("loss.contrastive")
    groups = describe_differences([run.config for run in runs], without)
    colours = {group: _COLOURS[number % len(_COLOURS)] for number, group in enumerate(dict.fromkeys(groups))}
    longest = max(points[-1, 0] for run in runs for name in panels if len(points := getattr(run, name)))
    tall = {"contrastive": 3.3, "reconstruction": 2.2}
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(7.2, 0.9 + sum(tall[name] for name in panels)), sharex=True, squeeze=False,
        height_ratios=[tall[name] for name in panels], layout="constrained",
    )  # fmt: skip
    alike: dict[tuple[str, str], list[RunLosses]] = {}  # runs that differ in the seed alone, or in nothing
    for run, group in zip(runs, groups, strict=True):
        alike.setdefault((group, run.role), []).append(run)
    for axes, name in zip(grid[:, 0], panels, strict=True):
        for (group, role), same in alike.items():
            curves = [points for run in same if len(points := getattr(run, name))]
            _plot(axes, curves, window * longest, colours[group], _STYLES[role])
        _finish(axes, _TITLES[name], longest)
        _mark_chance(axes, name, runs, longest)
    grid[-1, 0].set_xlabel("optimiser step", color=_INK)
    labels = {group: _label(group, runs, groups) for group in colours} if len(runs) > 1 else {}
    rows = [[Line2D([], [], color=colours[group], linewidth=2.2, label=label) for group, label in labels.items()]]
    if "contrastive" in panels:
        roles = [role for role in _STYLES if role in {run.role for run in runs}]
        rows.append(
            [Line2D([], [], color=_FAINT, linewidth=1.8, linestyle=_STYLES[role], label=role) for role in roles]
        )
    _add_legend(figure, rows)
    return figure


def _plot(axes: Axes, curves: Sequence[NDArray[np.float64]], window: float, colour: str, line: Any) -> None:
    """Plot runs that are alike: where they end with the same step, their mean and range; else each by itself."""
    if len(curves) > 1 and len({curve[-1, 0] for curve in curves}) == 1:
        # A run that was stopped and resumed has a report more than the others.
        steps = reduce(np.intersect1d, [curve[:, 0] for curve in curves])
        losses = np.stack([smooth(curve, window)[np.isin(curve[:, 0], steps), 1] for curve in curves])
        axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.16, linewidth=0, zorder=2)
        axes.plot(steps, losses.mean(0), color=colour, linestyle=line, linewidth=1.8, zorder=3)
        return
    for curve in curves:
        if len(curve) == 1:  # a line needs two points
            axes.plot(*curve.T, marker="o", color=colour)
            continue
        if window:
            axes.plot(*curve.T, color=colour, alpha=0.25, linewidth=0.8, zorder=2)
        axes.plot(*smooth(curve, window).T, color=colour, linestyle=line, linewidth=1.8, zorder=3)


def _add_legend(figure: Figure, rows: Sequence[Sequence[Line2D]]) -> None:
    """Put a legend above the panels, with rows of its own for colours and for lines."""
    widest = max((len(str(handle.get_label())) for row in rows for handle in row), default=0)
    columns = 3 if widest <= 34 else 2 if widest <= 52 else 1
    cut = [row[first : first + columns] for row in rows for first in range(0, len(row), columns)]
    if not cut:
        return
    blank = Line2D([], [], linestyle="", label="")
    padded = [[*row, *[blank] * (min(columns, max(map(len, cut))) - len(row))] for row in cut]
    by_column = [handle for column in zip(*padded, strict=True) for handle in column]  # as matplotlib fills it
    figure.legend(
        handles=by_column, loc="outside upper left", ncols=len(padded[0]), frameon=False, fontsize=9, labelcolor=_INK,
        handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip


def _finish(axes: Axes, title: str, longest: float) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axes.set_xlim(0, longest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _mark_chance(axes: Axes, name: str, runs: Sequence[RunLosses], longest: float) -> None:
    """Mark what knowing nothing costs: ln of the clips that are contrasted, or the variance of normalised pixels."""
    clips = {_contrasted(run.config) for run in runs if len(run.contrastive)}
    if name == "reconstruction":
        height, words = 1.0, "predicting zero"
    elif len(clips) == 1 and (count := clips.pop()) is not None:
        height, words = math.log(count), f"chance among {count} clips"
    else:
        return
    axes.axhline(height, color=_FAINT, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
    axes.annotate(
        words, (longest, height), (0, 2), textcoords="offset points", ha="right", va="bottom", fontsize=8, color=_FAINT
    )


def _contrasted(config: TrainConfig) -> int | None:
    """Return how many clips are contrasted with each other; None where that depends on the number of processes."""
    is_known = config.loss.contrast_over == "step" or config.device_batch_size == config.batch_size
    return config.batch_size if is_known else None


def _label(group: str, runs: Sequence[RunLosses], groups: Sequence[str]) -> str:
    seeds = {run.config.seed for run, other in zip(runs, groups, strict=True) if other == group}
    counted = f" ({len(seeds)} seeds)" * (len(seeds) > 1)
    return (group or "all runs") + counted
