"""The loss curve of a run, and the share of the time that each stage takes."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from tgmae.pictures.figures import save_figure
from tgmae.telemetry.metrics import read_metrics


def draw_loss(run_dir: Path) -> Path | None:
    """Draw a run's metrics as `run_dir`/loss.png and return its path; return None if there are no metrics yet."""
    lines = read_metrics(run_dir)
    if not lines:
        return None
    steps = [line["step"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained")

    marker = "o" if len(lines) == 1 else ""  # a line needs two points
    losses = [line.get("loss", np.nan) for line in lines]
    top.plot(steps, losses, color="tab:blue", marker=marker, label="loss on masked tokens")
    top.axhline(1.0, color="tab:grey", linestyle="--", linewidth=1, label="predicting zero")
    top.set_ylabel("MSE of normalised pixels")
    top.legend(frameon=False)

    for name in (name for name in lines[-1] if name.endswith("_share")):
        label = "waiting for input" if name == "wait_share" else name.removesuffix("_share")
        style = {"color": "black", "linewidth": 2} if name == "wait_share" else {"linewidth": 1}
        bottom.plot(steps, [100 * line.get(name, np.nan) for line in lines], label=label, marker=marker, **style)
    bottom.set_ylabel("% of the time")
    bottom.set_ylim(0, 105)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.set_xlabel("optimiser step (load, score and mask run beside the step)")
    bottom.legend(frameon=False, fontsize=7, ncols=4)

    path = run_dir / "loss.png"
    save_figure(figure, path, dpi=110)
    return path
