"""Targets are judged by the figures that reports hold, whatever is missing from them."""

from __future__ import annotations

from typing import Any

import pytest

from bench.gpu_report.targets import TARGETS, judge, memory_markdown, peak_memory, targets_markdown
from bench.harness.tables import Row, Table


def as_reports(**tables: list[Table]) -> dict[str, dict[str, Any]]:
    return {name: {"headline": {}, "tables": [one.to_dict() for one in found]} for name, found in tables.items()}


def measured_reports() -> dict[str, dict[str, Any]]:
    """Return reports of a GPU that reaches all targets but two: the step, and one kernel."""
    kernel = "64 clips 16×224², γ 0.6: kernel"
    reports = as_reports(
        step=[
            Table("ViT-B, 16×224², by mask ratio", "TFLOP/s", [
                Row("γ 0.6, xformers, batch 64", [330.0], {"of peak": 0.33, "clips/s": 660.0, "peak GiB": 11.0}),
                Row("γ 0.9, xformers, batch 64", [450.0], {"of peak": 0.455, "peak GiB": 5.0}),
                Row("matrix product", [700.0]),
            ]),
            Table("ViT-B, 16×224², by attention", "TFLOP/s", [
                Row("γ 0.6, sdpa, batch 64", [460.0], {"of peak": 0.46, "clips/s": 900.0, "peak GiB": 11.5}),
            ]),
            Table("demo's network", "TFLOP/s", [Row("γ 0.6, sdpa, batch 16", [1.0], {"of peak": 0.99})]),
        ],
        step_modes=[
            Table("ViT-B, 16×224², compiled", "TFLOP/s", [
                Row("γ 0.6, xformers, batch 64", [430.0], {"of peak": 0.43, "peak GiB": 11.0}),
                Row("γ 0.6, xformers, batch 64, compiled", [470.0], {"of peak": 0.47, "peak GiB": 12.0}),
            ]),
        ],
        kernels=[
            Table(name, "GB/s", [Row(kernel, [1.0], {"of copy": share}), Row("copy", [1.0])])
            for name, share in (("gather_tokens", 0.9), ("masked_mse forward", 0.7), ("masked_mse backward", 0.81))
        ],
        train=[
            Table("training, ViT-B, 16×224², γ 0.65", "clips/s",
                  [Row("tgm cached", [100.0]), Row("mgm", [102.0]), Row("ceiling", [105.0])], "mgm"),
            Table("training, ViT-B, 16×224², own ratios", "clips/s",
                  [Row("tgm cached, γ 0.6", [100.0], {"of ceiling": 0.96})], "tgm cached, γ 0.6"),
        ],
    )  # fmt: skip
    reports["loader.shapes"] = as_reports(x=[Table("loaders, tube masks", "clips/s", [Row("dali", [900.0])])])["x"]
    reports["train"]["results"] = {"projected_hours": {"tgm cached, γ 0.6": 10.5, "mgm, γ 0.75": 8.0}}
    return reports


def test_targets_are_judged_by_what_was_measured() -> None:
    judged = {one["name"]: one for one in judge(measured_reports())}
    assert [(one["measured"], one["verdict"]) for one in judged.values()] == [
        (0.96, "reached"), (pytest.approx(1.02), "reached"), (0.33, "not reached"), (0.47, "reached"),
        (0.9, "reached"), (0.7, "not reached"), (0.81, "reached"), (900, "reached"), (10.5, "reached"),
    ]  # fmt: skip
    text = targets_markdown(list(judged.values()))
    for line in ("| end to end / ceiling, tgm cached, γ .6 | ≥ 95% | 96% | reached |",
                 "| wall clock of TGM (cached) / MGM, one ratio | ≤ 1.03 | 1.02 | reached |",
                 "| loader on the given manifest | ≥ 855 clips/s | 900 clips/s | reached |",
                 "| SSv2, 200 epochs, tgm cached, γ .6 | ≤ 11 h | 10.5 h | reached |"):  # fmt: skip
        assert line in text


@pytest.mark.parametrize("missing", ["step", "kernels", "train", "loader.shapes"])
def test_what_a_failed_part_leaves_out_is_not_measured(missing: str) -> None:
    reports = measured_reports()
    del reports[missing]
    found = {one["verdict"] for one in judge(reports)}
    assert "not measured" in found
    assert "reached" in found


def test_no_report_however_odd_breaks_the_summary() -> None:
    odd: list[dict[str, dict[str, Any]]] = [
        {}, {"train": {}}, {"train": {"results": None, "tables": []}}, {"step": {"tables": [{}]}},
        {"train": {"results": {"projected_hours": []}, "tables": [{"title": "training, γ 0.65", "rows": [
            {"name": "tgm cached"}, {"name": "tgm cached", "ratio": {"median": 0}}, {},
        ]}]}},
    ]  # fmt: skip
    for reports in odd:
        assert {one["verdict"] for one in judge(reports)} == {"not measured"}
        assert targets_markdown(judge(reports)).count("not measured") == len(TARGETS)
        assert peak_memory({}, reports) == []


def test_peak_memory_is_by_part_and_by_step() -> None:
    text = memory_markdown(peak_memory({"tests": 2048.0, "step": 15360.0}, measured_reports()))
    for line in ("| tests | 2.0 |  |", "| step | 15.0 |  |", "| step, γ 0.6, xformers, batch 64 |  | 11.0 |"):
        assert line in text
    assert "matrix product" not in text
    assert "Nothing was recorded" in memory_markdown([])
