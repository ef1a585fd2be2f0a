"""The classic roofline: TFLOP/s over operations per byte, with a point for each stage below the GPU's limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_POINT, _ROOF, _LOWER = "#33608c", "#b03030", "#c07070"
_SIZE, _DPI = 9, 120  # points of the labels
_LINE, _CHARACTER = 1.35 * _SIZE * _DPI / 72, 0.58 * _SIZE * _DPI / 72  # pixels: a label's height, a letter's width
_ASIDE = 11  # pixels from a point to its label


@dataclass(frozen=True)
class Point:
    """A stage: operations per byte, TFLOP/s at its limit, and TFLOP/s measured."""

    name: str
    operations_a_byte: float
    limit_tflops: float
    reached_tflops: float | None = None


def draw_roofline(
    points: Sequence[Point], memory_tb_s: float, roofs: Mapping[str, float], path: Path, title: str
) -> None:
    """Write a PNG.

    roofs   TFLOP/s of each kind of arithmetic unit; a stage lies below the one that it uses
    """
    figure, axis = plt.subplots(figsize=(9.5, 6))
    figure.subplots_adjust(left=0.075, right=0.98, top=0.94, bottom=0.09)
    _draw_roofs(axis, points, memory_tb_s, roofs)
    for point, place in zip(points, _place_labels(axis, points), strict=True):
        x, top = point.operations_a_byte, point.limit_tflops
        axis.plot(x, top, "o", color=_POINT, fillstyle="none", markersize=7)
        if point.reached_tflops is not None:
            axis.plot([x, x], [point.reached_tflops, top], color=_POINT, linewidth=0.8, linestyle=":")
            axis.plot(x, point.reached_tflops, "o", color=_POINT, markersize=6)
        axis.annotate(
            point.name, (x, top), xytext=place, textcoords="figure pixels", fontsize=_SIZE, va="center", color=_POINT,
            parse_math=False, arrowprops={"arrowstyle": "-", "color": _POINT, "linewidth": 0.5, "shrinkB": 4},
        )  # fmt: skip
    is_measured = any(point.reached_tflops is not None for point in points)
    measured = "dots: measured" if is_measured else "nothing measured yet"
    axis.set_title(title, fontsize=11, parse_math=False)
    axis.set_xlabel(f"floating-point operations per byte   (circles: limits of the stages; {measured})")
    axis.set_ylabel("TFLOP/s")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _draw_roofs(axis: Axes, points: Sequence[Point], memory_tb_s: float, roofs: Mapping[str, float]) -> None:
    knees = [peak / memory_tb_s for peak in roofs.values()]
    places = [point.operations_a_byte for point in points] + knees
    left, right, highest = min(places) / 3, max(places) * 40, max(roofs.values())
    axis.figure.set_dpi(_DPI)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    reached = [point.reached_tflops / 2 for point in points if point.reached_tflops]
    axis.set_ylim(min([left * memory_tb_s, *reached]), highest * 2)
    axis.grid(which="major", color="#dddddd", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.plot([left, max(knees)], [left * memory_tb_s, highest], color=_ROOF, linewidth=1.5)
    for (name, peak), knee in zip(roofs.items(), knees, strict=True):
        colour = _ROOF if peak == highest else _LOWER
        axis.plot([knee, right], [peak, peak], color=colour, linewidth=1.5)
        axis.text(right / 1.3, peak * 1.1, f"{name}: {peak:,.0f} TFLOP/s", color=colour, ha="right", fontsize=_SIZE)
    x = max(knees) / 2
    axis.text(x / 1.3, x * memory_tb_s, f"memory: {memory_tb_s:g} TB/s", color=_ROOF, ha="right", fontsize=_SIZE)


def _place_labels(axis: Axes, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the labels' left ends in pixels: to the right of their points and a little lower.

    A label moves down until it overlaps neither another label nor a point.
    """
    dots = [axis.transData.transform((point.operations_a_byte, point.limit_tflops)) for point in points]
    taken = [(x - 6, x + 6, y) for x, y in dots]
    places = []
    # From right to left, because labels extend to the right.
    for number in sorted(range(len(points)), key=lambda number: -dots[number][0]):
        left, y = dots[number][0] + _ASIDE, dots[number][1] - _LINE / 2
        right = left + _CHARACTER * len(points[number].name)
        while any(left < r and l < right and abs(y - at) < _LINE for l, r, at in taken):  # noqa: E741
            y -= 2
        taken.append((left, right, y))
        places.append((number, (left, y)))
    return [place for _, place in sorted(places)]
