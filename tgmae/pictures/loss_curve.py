"""The loss curve of a run, and the share of the time that each stage takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tgmae.pictures.figures import save_figure
from tgmae.telemetry.metrics import read_metrics


def draw_loss(run_dir: Path) -> Path | None:
    """Draw a run's metrics as `run_dir`/loss.png and return its path; return None if there are no metrics yet."""
    lines = read_metrics(run_dir)
    if not lines:
        return None
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained")

    _plot(top, lines, "loss", color="tab:blue", label="loss on masked tokens")
    if any("validation_loss" in line for line in lines):
        _plot(top, lines, "validation_loss", color="tab:orange", label="on held-out clips")
    for name in dict.fromkeys(name for line in lines for name in line if name.startswith("validation_loss/")):
        _plot(top, lines, name, linewidth=1, label=f"of {name.partition('/')[2]}")
    top.axhline(1.0, color="tab:grey", linestyle="--", linewidth=1, label="predicting zero")
    top.set_ylabel("MSE of normalised pixels")
    top.legend(frameon=False)

    for name in dict.fromkeys(name for line in lines for name in line if name.endswith("_share")):
        label = {"wait_share": "waiting for input"}.get(name, name.removesuffix("_share"))
        style = {"color": "black", "linewidth": 2} if name == "wait_share" else {"linewidth": 1}
        _plot(bottom, lines, name, 100, label=label, **style)
    bottom.set_ylabel("% of the time")
    bottom.set_ylim(0, 105)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.set_xlabel("optimiser step (load, score and mask run beside the step)")
    bottom.legend(frameon=False, fontsize=7, ncols=4)

    path = run_dir / "loss.png"
    save_figure(figure, path, dpi=110)
    return path


def _plot(axes: Axes, lines: list[dict[str, Any]], name: str, scale: float = 1, **style: Any) -> None:
    """Plot one number over the steps of the lines that have it."""
    points = [(line["step"], scale * line[name]) for line in lines if name in line]
    axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else "", **style)  # a line needs two points
