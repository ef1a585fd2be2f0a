"""A part ends with its processes, however it ends, and its outcome says how."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench.gpu_report.parts import Part, run_part


def part(name: str, code: str) -> Part:
    return Part(name, f"Does {name} work?", (sys.executable, "-c", code), 1.0)


def test_a_part_that_fails_or_hangs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run_part(
        part("good", "import os; assert os.environ['SOME'] == '1'; print('fine')"),
        tmp_path,
        60,
        {"SOME": "1"},
    )
    assert (good.status, good.tail.strip()) == ("ok", "fine")
    bad = run_part(part("bad", "raise SystemExit(3)"), tmp_path, 60)
    assert bad.status == "exit status 3"
    broken = run_part(part("broken", "1 / 0"), tmp_path, 60)
    assert "ZeroDivisionError" in broken.tail
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_ends_with_all_its_processes(tmp_path: Path) -> None:
    child = tmp_path / "child"
    # A shell starts at once, however busy the machine is. It waits for a second shell, which becomes the sleep.
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
        if state == "Z":  # ended, but its new parent has not collected it yet
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the part's child process outlived it")
