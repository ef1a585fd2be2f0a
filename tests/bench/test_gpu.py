"""The report that qualifies a GPU survives its parts; what it says of them is what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu
from bench.gpu import Outcome, Part, find_gpu_tests, list_parts, read_reports, run_part, write_summary
from bench.harness import report
from bench.harness.gpu_targets import TARGETS, judge, memory_markdown, peak_memory, targets_markdown
from bench.harness.gpu_watch import GpuWatch
from bench.harness.report import Row, Table, markdown


def part(name: str, code: str, share: float = 1.0, reports: str = "") -> Part:
    return Part(name, f"Does {name} work?", (sys.executable, "-c", code), share, reports)


def test_a_part_that_fails_or_hangs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run_part(
        part("good", "import os; assert os.environ['TGMAE_REQUIRE_GPU'] == '1'; print('fine')"), tmp_path, 60
    )
    assert (good.status, good.tail.strip()) == ("ok", "fine")
    bad = run_part(part("bad", "raise SystemExit(3)"), tmp_path, 60)
    assert bad.status == "exit status 3"
    broken = run_part(part("broken", "1 / 0"), tmp_path, 60)
    assert "ZeroDivisionError" in broken.tail
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_part_ends_with_all_its_processes(tmp_path: Path) -> None:
    child = tmp_path / "child"
    # A shell starts at once, however busy the machine is; it waits for the other, which becomes the sleep.
    command = ("sh", "-c", f"sh -c 'echo $$ > {child}; exec sleep 600'; true")
    started = time.perf_counter()
    assert run_part(Part("slow", "", command, 1.0), tmp_path, 5).status == "not done after 5 s"
    assert time.perf_counter() - started < 300
    pid = int(child.read_text())
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":  # ended, and whoever adopted it has not looked yet
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the part's own process outlived it")


def test_the_summary_answers_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    since = time.time() - 1
    table = Table("Speeds", "clips/s", [Row("a", [1.0, 2.0, 3.0], {"GiB": 1.5}), Row("b", [2.0, 4.0, 6.0])], "a", 8.0)
    (tmp_path / "speed.cpu.json").write_text(json.dumps({"headline": {"fastest": "b"}, "tables": [table.to_dict()]}))
    (tmp_path / "old.cpu.json").write_text("{}")
    os.utime(tmp_path / "old.cpu.json", (1, 1))
    outcomes = [
        Outcome(part("tests", ""), "exit status 1", 2.0, "the last words", {}),
        Outcome(part("speed", "", reports="speed"), "ok", 3.0, "", {"utilization.decoder, most": 97.0}),
        Outcome(part("old", "", reports="old"), "ok", 1.0, "nothing new", {}),
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
                 "Parts that did not end well: tests (exit status 1).", "## Peak memory"):  # fmt: skip
        assert said in text
    plain = json.loads(path.with_suffix(".json").read_text())
    assert [entry["status"] for entry in plain["parts"]] == ["exit status 1", "ok", "ok"]
    assert plain["parts"][1]["reports"][0]["tables"][0]["rows"][1]["ratio"]["median"] == 2
    assert {target["verdict"] for target in plain["targets"]} == {"not measured"}


def test_reports_that_were_cut_off_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    (tmp_path / "loader.a.cpu.json").write_text('{"headline": {')
    (tmp_path / "loader.b.cpu.json").write_text('{"headline": {}, "tables": []}')
    assert list(read_reports(part("loader", "", reports="loader.*"), "cpu", 0)) == ["loader.b"]
    write_summary([Outcome(part("loader", "", reports="loader.*"), "not done after 3 s", 3.0, "", {})], "cpu", 0)


def as_reports(**tables: list[Table]) -> dict[str, dict[str, Any]]:
    return {name: {"headline": {}, "tables": [one.to_dict() for one in found]} for name, found in tables.items()}


def measured_reports() -> dict[str, dict[str, Any]]:
    """Of a GPU that reaches all targets but two: the step, and one kernel."""
    kernel = "64 clips 16×224², γ 0.6: kernel"
    reports = as_reports(
        step=[
            Table("ViT-B, 16×224², by mask ratio", "TFLOP/s", [
                Row("γ 0.6, xformers, batch 64", [430.0], {"of peak": 0.43, "clips/s": 860.0, "peak GiB": 11.0}),
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
        (0.96, "reached"), (pytest.approx(1.02), "reached"), (0.43, "not reached"), (0.47, "reached"),
        (0.9, "reached"), (0.7, "not reached"), (0.81, "reached"), (900, "reached"), (10.5, "reached"),
    ]  # fmt: skip
    text = targets_markdown(list(judged.values()))
    for line in ("| end to end by the ceiling, tgm cached, γ .6 | ≥ 95% | 96% | reached |",
                 "| wall clock of TGM (cached) by MGM, one ratio | ≤ 1.03 | 1.02 | reached |",
                 "| loader, the manifest given | ≥ 855 clips/s | 900 clips/s | reached |",
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
    assert "Nothing was seen" in memory_markdown([])


def test_the_driver_is_nvidia_smis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report._driver() == ""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    smi.chmod(0o755)
    assert report._driver() == "580.95.05"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert report._driver() == ""


def test_a_table_without_ratios_or_facts() -> None:
    assert markdown(Table("T", "ms", [Row("x", [1234.0])]).to_dict()) == (
        "**T**\n\n|  | ms |\n|---|---|\n| x | 1,234 |\n"
    )
    assert "| x | 5 (4 to 6) |" in markdown(Table("T", "ms", [Row("x", [5.0, 4.0, 6.0])]).to_dict())


def test_utilisation_is_means_and_maxima(tmp_path: Path) -> None:
    file = tmp_path / "smi.csv"
    assert GpuWatch(file).read() == {}
    file.write_text("10, 50, 1000\n30, 100, 3000\n[N/A], [N/A], 2000\n")
    assert GpuWatch(file).read() == {
        "utilization.gpu, mean": 20, "utilization.gpu, most": 30, "utilization.decoder, mean": 75,
        "utilization.decoder, most": 100, "memory.used, mean": 2000, "memory.used, most": 3000,
    }  # fmt: skip


def test_the_parts_share_the_time() -> None:
    parts = list_parts(Path("m.parquet"), 0.0)
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert [part.name for part in parts] == [
        "tests",
        "decode",
        "attention",
        "step",
        "kernels",
        "tuning",
        "engines",
        "masks",
        "overlap",
        "loader",
        "train",
        "modes",
        "roofline",
    ]


def test_gpu_tests_are_those_with_the_mark() -> None:
    files = find_gpu_tests()
    assert {
        "tests/dali_pipelines/test_pipelines.py",
        "tests/tgmae/model/test_attention.py",
        "tests/kernels/test_topk_mask.py",
    } <= set(files)
    assert "tests/tgmae/test_config.py" not in files
    assert set(files) < set(list_parts(Path("m.parquet"), 0.0)[0].command)


def test_a_missing_optional_package_stops_no_part(tmp_path: Path) -> None:
    """But the tests of what needs it. Pictures are matplotlib's, curves TensorBoard's, judging masks scikit-learn's."""
    for name in ("rich", "matplotlib", "tensorboard", "sklearn", "scipy", "transformers", "decord", "torchcodec"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')\n")
    modules = {part.command[2] for part in list_parts(Path("m.parquet"), 0.0)} - {"pytest"}
    code = "import tests.conftest, " + ", ".join(sorted(modules))
    path = os.pathsep.join([str(tmp_path), str(gpu.ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def run_in_simulated_time(
    spent_s: dict[str, float], monkeypatch: pytest.MonkeyPatch, folder: Path, preparing_s: float = 0.0
) -> tuple[dict[str, float], float, float]:
    """Parts a, b, c with shares .5, .3, .2 of five minutes: each one's limit, when all were done, and when it is 0."""
    clock, limits = [1000.0], dict[str, float]()
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(gpu, "RESULTS", folder)
    monkeypatch.setattr(gpu, "list_parts", lambda *_: [part("a", "", 0.5), part("b", "", 0.3), part("c", "", 0.2)])

    def prepare(manifest: Path) -> Path:
        clock[0] += preparing_s
        return manifest

    def run(part: Part, folder: Path, limit_s: float) -> Outcome:
        limits[part.name] = limit_s
        clock[0] += min(spent_s[part.name], limit_s + gpu._GRACE_S)
        return Outcome(part, "ok", spent_s[part.name], "", {})

    monkeypatch.setattr(gpu, "provide_videos", prepare)
    monkeypatch.setattr(gpu, "run_part", run)
    assert gpu.run(gpu.Options(Path("mine.parquet"), minutes=5))
    return limits, clock[0] - 1000, gpu._GRACE_S


def test_time_that_is_left_goes_to_later_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, _, grace = run_in_simulated_time({"a": 10.0, "b": 200.0, "c": 1.0}, monkeypatch, tmp_path)
    assert limits == pytest.approx({"a": 150 - grace, "b": 290 * 0.6 - grace, "c": 290 * 0.4 - grace})


@pytest.mark.parametrize("preparing_s", [0.0, 100.0])
def test_parts_that_hang_keep_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preparing_s: float) -> None:
    limits, seconds, _ = run_in_simulated_time(dict.fromkeys("abc", 1e6), monkeypatch, tmp_path, preparing_s)
    assert seconds <= 300 + 1e-6
    assert min(limits.values()) > 30
    assert limits["a"] > limits["b"] > limits["c"]


def test_a_part_that_comes_late_still_has_some_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, _, _ = run_in_simulated_time(dict.fromkeys("abc", 1.0), monkeypatch, tmp_path, preparing_s=400)
    assert set(limits.values()) == {gpu._LEAST_S}


def test_an_interruption_leaves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(part: Part, folder: Path, limit_s: float) -> Outcome:
        if part.name == "b":
            raise KeyboardInterrupt
        return Outcome(part, "ok", 1.0, "of the first part", {})

    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "list_parts", lambda *_: [part("a", ""), part("b", "")])
    monkeypatch.setattr(gpu, "run_part", run)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(gpu.Options(Path("mine.parquet")))
    assert "of the first part" in (tmp_path / f"gpu.{report.device_name(None)}.md").read_text()


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match=r"no parts \['nonsense'\] \(there are: tests, decode"):
        gpu.run(gpu.Options(only=("nonsense",)))
