"""The report that qualifies a GPU survives its parts; what it says of them is what they wrote."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, report
from bench.gpu import Outcome, Part, list_parts, read_reports, run_part, write_summary
from bench.gpu_watch import GpuWatch
from bench.report import Row, Table, markdown


def part(name: str, code: str, limit_s: float = 60.0, reports: str = "") -> Part:
    return Part(name, f"Does {name} work?", (sys.executable, "-c", code), limit_s, reports)


def test_a_part_that_fails_or_hangs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run_part(part("good", "import os; assert os.environ['TGMAE_REQUIRE_GPU'] == '1'; print('fine')"), tmp_path)
    assert (good.status, good.tail.strip()) == ("ok", "fine")
    bad = run_part(part("bad", "raise SystemExit(3)"), tmp_path)
    assert bad.status == "exit status 3"
    broken = run_part(part("broken", "1 / 0"), tmp_path)
    assert "ZeroDivisionError" in broken.tail
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_part_ends_with_all_its_processes(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); open({str(child)!r}, 'w').write(str(p.pid)); p.wait()"  # noqa: E501
    started = time.perf_counter()
    assert run_part(part("slow", code, limit_s=3.0), tmp_path).status == "not done after 3 s"
    assert time.perf_counter() - started < 30
    pid = int(child.read_text())
    for _ in range(50):
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
    assert read_reports(outcomes[2].part, "cpu", since) == []
    path = write_summary(outcomes, "cpu", since)
    text = path.read_text()
    assert text.index("Does tests work?") < text.index("Does speed work?") < text.index("Does old work?")
    for said in ("the last words", "- fastest: b", "utilization.decoder, most 97", "| b | 4 (2 to 6) | 2.00 |  |",
                 "| a | 2 (1 to 3) | 1.00 | 1.5 |", "Limit: 8 clips/s.", "nothing new"):  # fmt: skip
        assert said in text
    plain = json.loads(path.with_suffix(".json").read_text())
    assert [entry["status"] for entry in plain["parts"]] == ["exit status 1", "ok", "ok"]
    assert plain["parts"][1]["reports"][0]["tables"][0]["rows"][1]["ratio"]["median"] == 2


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
    parts = list_parts(Path("m.parquet"))
    assert sum(part.limit_s for part in parts) == pytest.approx(1)
    assert [part.name for part in parts] == [
        "tests",
        "decode",
        "attention",
        "step",
        "kernels",
        "loader",
        "masks",
        "train",
    ]


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match=r"no parts \['nonsense'\] \(there are: tests, decode"):
        gpu.run(gpu.Options(only=("nonsense",)))
