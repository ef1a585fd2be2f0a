"""The summary names failed parts and repeats what the others wrote."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from bench.gpu_report.parts import Outcome, Part
from bench.gpu_report.summary import read_reports, write_summary
from bench.harness.tables import Row, Table


def part(name: str, reports: str = "") -> Part:
    return Part(name, f"Does {name} work?", ("python", "-m", name), 1.0, reports)


def test_the_summary_answers_in_order(results: Path) -> None:
    results.mkdir()
    since = time.time() - 1
    table = Table("Speeds", "clips/s", [Row("a", [1.0, 2.0, 3.0], {"GiB": 1.5}), Row("b", [2.0, 4.0, 6.0])], "a", 8.0)
    (results / "speed.cpu.json").write_text(json.dumps({"headline": {"fastest": "b"}, "tables": [table.to_dict()]}))
    (results / "old.cpu.json").write_text("{}")
    os.utime(results / "old.cpu.json", (1, 1))
    outcomes = [
        Outcome(part("tests"), "exit status 1", 2.0, "the last words", {}),
        Outcome(part("speed", "speed"), "ok", 3.0, "", {"utilization.decoder, most": 97.0}),
        Outcome(part("old", "old"), "ok", 1.0, "nothing new", {}),
    ]
    assert read_reports(outcomes[2].part, "cpu", since) == {}
    path, _ = write_summary(outcomes, "cpu", since)
    text = path.read_text()
    assert (
        text.index("## Targets")
        < text.index("Does tests work?")
        < text.index("Does speed work?")
        < text.index("Does old work?")
    )
    for said in ("the last words", "- fastest: b", "utilization.decoder, most 97", "| b | 4 (2 to 6) | 2.00 |  |",
                 "| a | 2 (1 to 3) | 1.00 | 1.5 |", "Limit: 8 clips/s.", "nothing new",
                 "Parts that failed or were stopped: tests (exit status 1).", "## Peak memory"):  # fmt: skip
        assert said in text
    plain = json.loads(path.with_suffix(".json").read_text())
    assert [entry["status"] for entry in plain["parts"]] == ["exit status 1", "ok", "ok"]
    assert plain["parts"][1]["reports"]["speed"]["tables"][0]["rows"][1]["ratio"]["median"] == 2
    assert {target["verdict"] for target in plain["targets"]} == {"not measured"}


def test_reports_that_were_cut_off_are_left_out(results: Path) -> None:
    results.mkdir()
    (results / "loader.a.cpu.json").write_text('{"headline": {')
    (results / "loader.b.cpu.json").write_text('{"headline": {}, "tables": []}')
    assert list(read_reports(part("loader", "loader.*"), "cpu", 0)) == ["loader.b"]
    write_summary([Outcome(part("loader", "loader.*"), "not done after 3 s", 3.0, "", {})], "cpu", 0)


def test_parts_of_an_earlier_run_stay_and_say_whence(results: Path) -> None:
    """Targets are judged by all of them. A report that this version cannot read is not merged."""
    results.mkdir()
    row = Row("γ 0.6, xformers, batch 64", [1.0], {"of peak": 0.35})
    table = Table("ViT-B, by mask ratio", "TFLOP/s", [row])
    (results / "step.cpu.json").write_text(json.dumps({"headline": {}, "tables": [table.to_dict()]}))
    write_summary([Outcome(part("step", "step"), "ok", 1.0, "", {})], "cpu", 0)
    path = results / "gpu.cpu.json"
    earlier, late = json.loads(path.read_text()), Outcome(part("late"), "ok", 1.0, "", {})
    earlier["parts"][0]["commit"] = "abc1234"
    path.write_text(json.dumps(earlier))
    (results / "step.cpu.json").unlink()
    text = write_summary([late], "cpu", time.time(), ["step", "late"])[0].read_text()
    assert "Parts of other commits: step (abc1234)." in text
    assert "| ≥ 34% | 35% | reached |" in text
    assert text.index("Does step work?") < text.index("Does late work?")
    path.write_text(json.dumps({"parts": [{"name": "step", "reports": []}]}))
    text = write_summary([late], "cpu", time.time(), ["step", "late"])[0].read_text()
    assert "Parts that have not run: step." in text
