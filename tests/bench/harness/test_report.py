"""A report is written whatever the machine lacks, and a user's mistakes end with one line."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.harness import environment as origin
from bench.harness.command_line import run_from_shell
from bench.harness.environment import environment
from bench.harness.tables import Row, Table, markdown, print_table


def test_a_table_is_printed_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("Speeds", "clips/s", [Row("a", [1.0, 2.0]), Row("b", [2.0, 4.0])], "a", note="noted")
    for module in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, module, None)
    print_table(table)
    assert capsys.readouterr().out == markdown(table.to_dict()) + "\n"


def test_a_commit_that_cannot_be_found_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "BENCH", tmp_path)  # outside the repository
    assert environment()["commit"] == "not known"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert environment()["commit"] == "not known"


@dataclass(frozen=True)
class Options:
    package: str = "sys"


def test_what_a_user_can_fix_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bench/some.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_from_shell(lambda options: [importlib.import_module(options.package)][1], Options, "")
        return caught.value.code

    assert end("--package", "no_such_package") == "bench.some: No module named 'no_such_package'"
    assert end("--pakage", "sys") == 2
    with pytest.raises(IndexError):  # our own mistakes keep their traceback
        end()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("decode", ("nowhere.parquet",), "no manifest at nowhere.parquet"),
        ("engines", ("nowhere.parquet",), "no manifest at nowhere.parquet"),
        ("host", ("nowhere.parquet",), "no manifest at nowhere.parquet"),
        ("loader", ("nowhere.parquet", "--clips", "12"), "--clips must be a multiple of"),
        ("masks", ("nowhere.parquet",), "no manifest at nowhere.parquet"),
        ("overlap", ("nowhere.parquet",), "no manifest at nowhere.parquet"),
        ("roofline", ("--gpu", "B200"), "no figures for GPU 'B200'; known GPUs: H200, H200 NVL, "),
        ("train", ("--strategies", "mgm", "text"), "--strategies needs mgm to compare with and takes tgm patch"),
    ],
)
def test_benchmarks_name_what_is_wrong(
    name: str, arguments: tuple[str, ...], words: str, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"bench/{name}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"bench.{name}").main()
    assert str(caught.value.code).startswith(f"bench.{name}: ")
    assert words in str(caught.value.code)
    assert not results.exists()


def test_the_driver_is_nvidia_smis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin._driver() == ""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    smi.chmod(0o755)
    assert origin._driver() == "580.95.05"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert origin._driver() == ""


def test_a_table_without_ratios_or_facts() -> None:
    assert markdown(Table("T", "ms", [Row("x", [1234.0])]).to_dict()) == (
        "**T**\n\n|  | ms |\n|---|---|\n| x | 1,234 |\n"
    )
    assert "| x | 5 (4 to 6) |" in markdown(Table("T", "ms", [Row("x", [5.0, 4.0, 6.0])]).to_dict())
