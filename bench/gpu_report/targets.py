"""The project's targets on a GPU, beside what the benchmarks measured, for the head of the GPU report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.harness.figures import Reports, best, find_rows, values

# topk_mask moves too little to be memory-bound.
KERNELS = ("gather_tokens", "masked_mse forward", "masked_mse backward")
LOADER_CLIPS_S = 5 * 171  # five times SPDL's published rate per GPU: 1,368 clips/s of K400 on eight H100 with NVDEC
# Of the tensor cores' peak, reached by the step's matrix products: as train.py runs by default, and at best.
EAGER_SHARE, COMPILED_SHARE = 0.34, 0.46
OWN_RATIOS, ONE_RATIO = "^training, .*own ratios$", r"^training, .*γ 0\.\d+$"


@dataclass(frozen=True)
class Target:
    """A figure that is wanted, and where to find what was measured. Unit "%" means that the figure is a share."""

    name: str
    sign: Literal["≥", "≤"]
    wanted: float
    unit: str
    find: Callable[[Reports], float | None]


def _wall_clock(reports: Reports) -> float | None:
    """Return the wall clock of TGM with cached scores divided by MGM's: the inverse of the ratio of their clips/s."""
    rows = find_rows(reports, "train", ONE_RATIO, "^tgm cached$")
    ratios = [row["ratio"].get("median") for row in rows if isinstance(row.get("ratio"), Mapping)]
    found = [1 / ratio for ratio in ratios if isinstance(ratio, int | float) and ratio > 0]
    return min(found, default=None)


def _kernel(operation: str) -> Callable[[Reports], float | None]:
    def find(reports: Reports) -> float | None:
        return best(find_rows(reports, "kernels", f"^{operation}$", "^64 clips 16×224², γ 0.6: kernel$"), "of copy")

    return find


def _hours(reports: Reports) -> float | None:
    results = reports.get("train", {}).get("results")
    hours = results.get("projected_hours") if isinstance(results, Mapping) else None
    return best([hours], "tgm cached, γ 0.6") if isinstance(hours, Mapping) else None


TARGETS = (
    Target("end to end / ceiling, tgm cached, γ .6", "≥", 0.95, "%",
           lambda reports: best(find_rows(reports, "train", OWN_RATIOS, "^tgm cached,"), "of ceiling")),
    Target("wall clock of TGM (cached) / MGM, one ratio", "≤", 1.03, "", _wall_clock),
    Target("step / data sheet's peak, γ .6, batch 64, train.py's defaults", "≥", EAGER_SHARE, "%",
           lambda reports: best(find_rows(reports, "step", "by mask ratio$", "^γ 0.6,"), "of peak")),
    Target("the same at best: compiled, as a CUDA graph, bf16 residual", "≥", COMPILED_SHARE, "%",
           lambda reports: best(find_rows(reports, "step_modes", "ViT-B", "(compiled|graph|residual)$"), "of peak")),
    *(Target(f"{name} / copy bandwidth, 64 clips, γ .6", "≥", 0.8, "%", _kernel(name)) for name in KERNELS),
    Target("loader on the given manifest", "≥", LOADER_CLIPS_S, "clips/s",
           lambda reports: best(find_rows(reports, "loader.*", "^loaders", "^dali$"))),
    Target("SSv2, 200 epochs, tgm cached, γ .6", "≤", 11, "h", _hours),
)  # fmt: skip


def judge(reports: Reports) -> list[dict[str, Any]]:
    """Return each target with what was measured (None if nothing was) and a verdict, as JSON types."""
    found = []
    for target in TARGETS:
        measured = target.find(reports)
        verdict = "not measured"
        if measured is not None:
            is_met = measured >= target.wanted if target.sign == "≥" else measured <= target.wanted
            verdict = "reached" if is_met else "not reached"
        found.append({
            "name": target.name, "sign": target.sign, "wanted": target.wanted, "unit": target.unit,
            "measured": measured, "verdict": verdict,
        })  # fmt: skip
    return found


def targets_markdown(judged: Sequence[Mapping[str, Any]]) -> str:
    """Format what `judge` returned as a table."""
    lines = ["| target | wanted | measured | |", "|---|---|---|---|"]
    for one in judged:
        measured = "" if one["measured"] is None else _show(one["measured"], one["unit"])
        lines.append(f"| {one['name']} | {one['sign']} {_show(one['wanted'], one['unit'])} | {measured} "
                     f"| {one['verdict']} |")  # fmt: skip
    return "\n".join([*lines, ""])


def _show(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.1%}".replace(".0%", "%")
    return f"{value:,.4g} {unit}".strip()


def peak_memory(seen_mib: Mapping[str, float], reports: Reports) -> list[dict[str, Any]]:
    """Return GiB by row: each part as nvidia-smi saw the whole GPU, then the step's own peaks as torch counted them."""
    rows: list[dict[str, Any]] = [
        {"what": part, "nvidia_smi_gib": mib / 1024, "torch_gib": None} for part, mib in seen_mib.items()
    ]
    torch_rows = {
        str(row["name"]): row for row in find_rows(reports, "step*", "ViT-B", "^γ") if values([row], "peak GiB")
    }
    for name, row in torch_rows.items():
        rows.append({"what": f"step, {name}", "nvidia_smi_gib": None, "torch_gib": values([row], "peak GiB")[0]})
    return rows


def memory_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format what `peak_memory` returned as a table."""
    if not rows:
        return "Nothing was recorded: nvidia-smi is missing, and so is the step's table.\n"
    lines = ["|  | nvidia-smi, GiB | torch, GiB |", "|---|---|---|"]
    for row in rows:
        cells = ["" if row[key] is None else f"{row[key]:.1f}" for key in ("nvidia_smi_gib", "torch_gib")]
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "nvidia-smi counts everything on the GPU, torch the tensors of its own process.", ""])
