"""What the user types: presets, flags, and messages where they are misspelt."""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tgmae.cli import info, train
from tgmae.cli.info import PACKAGES, backends
from tgmae.config.run import TrainConfig
from tgmae.presets import PRESETS

ROOT = Path(__file__).resolve().parents[3]


def parse(arguments: list[str]) -> TrainConfig:
    return train.parse(arguments)[0]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` in a terminal wide enough that no line is broken."""
    command = [sys.executable, "-m", module, *arguments]
    wide = {**os.environ, "COLUMNS": "400", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=120)


def message(capsys: pytest.CaptureFixture[str], caught: pytest.ExceptionInfo[SystemExit]) -> str:
    """All that a user sees: printed before leaving, or given to sys.exit. Frames and line breaks are taken out."""
    assert caught.value.code not in (None, 0)
    printed = capsys.readouterr()
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", f"{printed.out} {printed.err} {caught.value.code}").split())


def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    """0, 1 and 2 stay taken, or FFmpeg's messages would be written into the run's files."""
    code = "import os, sys; sys.argv[0] = 'tgmae-data'; import tgmae.cli; print('x', file=sys.stderr); "
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code + "os._exit(os.open('/dev/null', 0))"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode >= 3


def test_a_closed_pipe_is_told_in_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tgmae-train"])
    monkeypatch.setattr(train, "run", lambda _: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(SystemExit, match=r"^tgmae-train: nothing reads its output any more$"):
        train.main()


def test_the_demo_is_the_default() -> None:
    assert parse([]) == PRESETS["demo"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_by_name(name: str) -> None:
    assert parse([name]) == PRESETS[name]


def test_flags_change_the_preset_and_nothing_else() -> None:
    got = parse(["ssv2", "--data.stride", "3", "--optim.base-lr", "1e-3", "--mask.kind", "random", "--run-dir", "x/y"])
    assert (got.data.stride, got.optim.base_lr, got.mask.kind, got.run_dir) == (3, 1e-3, "random", Path("x/y"))
    rest = parse([
        *("ssv2", "--data.stride", "2", "--optim.base-lr", "1.5e-4"),
        *("--mask.kind", "tgm", "--mask.scorer", "auto", "--run-dir", "runs/ssv2"),
    ])  # fmt: skip
    assert rest == PRESETS["ssv2"]


def test_flags_without_a_preset_change_the_demo() -> None:
    got = parse(["--epochs", "3", "--data.flip", "--log.no-tensorboard", "--max-steps", "5", "--init-from", "folder"])
    assert (got.epochs, got.data.flip, got.log.tensorboard, got.max_steps) == (3, True, False, 5)
    assert got.init_from == "folder"
    assert got.model == PRESETS["demo"].model


@pytest.mark.parametrize(
    ("flags", "num_processes", "size", "said"),
    [
        ([], 2, 8, " with --device-batch-size 8 (16 clips over 2 processes)"),
        (["--batch-size", "4"], 1, 4, " with --device-batch-size 4 (4 clips)"),
        (["--device-batch-size", "16"], 2, 16, ""),
        (["--device-batch-size=16"], 2, 16, ""),
        ([], 3, 16, ""),  # 16 clips are no multiple of 3: an error says so
        (["--data.repeat", "16"], 2, 16, ""),
        (["--batch-size", "64"], 2, 16, ""),
    ],
)
def test_processes_share_a_batch(
    flags: list[str], num_processes: int, size: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device batch that was typed stays."""
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    config, source = train.parse(flags)
    assert config.device_batch_size == size
    assert source == f"preset demo{said}"


@pytest.mark.parametrize(
    ("typed", "meant"), [("demoo", "demo"), ("ssv", "ssv2"), ("K400", "k400"), ("ucf10", "ucf101")]
)
def test_a_misspelt_preset_names_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([typed])
    words = message(capsys, caught)
    assert f"no preset '{typed}'" in words
    assert f"did you mean {meant}?" in words
    assert all(name in words for name in PRESETS)


def test_a_preset_like_no_other_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["imagenet"])
    words = message(capsys, caught)
    assert "did you mean" not in words
    assert all(name in words for name in PRESETS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--data.strid", "2"], "--data.stride"),
        (["--batch-siz", "16"], "--batch-size"),
        (["ssv2", "--mask.ratioo", ".5"], "--mask.ratio"),
        (["--optim.base_lrr", "1"], "--optim.base-lr"),
        (["--stride", "2"], "--data.stride"),
    ],
)
def test_a_misspelt_flag_names_the_nearest(typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(typed)
    words = message(capsys, caught)
    assert next(word for word in typed if word.startswith("--")) in words
    assert re.search(rf"{meant}(?![\w-])", words)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--mask.ratio", "1.5"], ("--mask.ratio", "1.5")),
        (["--model.patch-size", "17"], ("--model.patch-size", "96", "17")),
        (["--data.repeat", "3"], ("--device-batch-size", "--data.repeat", "16", "3")),
        (["--mask.kind", "tubes"], ("--mask.kind", "tubes", "tube")),
        (["--epochs", "many"], ("--epochs", "many")),
        (["--mask.scorer", "cached"], ("--mask.scorer cached", "--mask.scores", "tgmae-data scores")),
        (["--mask.scorer", "studnet"], ("--mask.scorer", "studnet", "student")),
        (["--clip.engine", "onnx"], ("--clip.engine", "onnxruntime")),
    ],
)
def test_an_impossible_value_is_named(
    typed: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(typed)
    seen = message(capsys, caught)
    assert all(word in seen for word in words), seen


def test_a_misspelt_resume_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--resume", "nver"])
    assert "did you mean --resume never?" in message(capsys, caught)


def test_help_names_every_group_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["k400", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--data.stride", "--model.attention", "--mask.ratio", "--mask.scorer", "--clip.model", "--optim.base-lr",
        "--log.picture-every",
    ):  # fmt: skip
        assert flag in text
    assert all(name in text for name in PRESETS)


def test_ctrl_c_during_imports_leaves_no_traceback() -> None:
    code = (
        # As a shell starts it; the tests themselves may run where Ctrl-C is ignored, as with nohup.
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv[0] = 'tgmae-train'; import tgmae.cli; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.slow
def test_the_command_says_what_is_missing_without_a_traceback(tmp_path: Path) -> None:
    """A typo and a manifest that is not there, as a user meets them."""
    typo = run("tgmae.cli.train", "demo", "--data.strid", "2")
    assert typo.returncode != 0
    assert "--data.stride" in typo.stdout + typo.stderr
    manifest = tmp_path / "none" / "manifest.parquet"
    missing = run("tgmae.cli.train", "ssv2", "--data.manifest", str(manifest), "--run-dir", str(tmp_path / "run"))
    assert missing.returncode != 0
    assert "tgmae-train: " in missing.stderr
    assert str(manifest) in missing.stderr
    assert "Traceback" not in typo.stderr + missing.stderr


@pytest.mark.slow
def test_info_names_every_backend_with_its_reason() -> None:
    done = run("tgmae.cli.info")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^CPU: \d+ cores, \d+ GiB", done.stdout, re.MULTILINE)
    for package in PACKAGES:
        assert package in done.stdout
    assert re.search(rf"torch *│ *{re.escape(importlib.metadata.version('torch'))}", done.stdout)
    found = backends()
    assert {"pipeline pyav", "attention sdpa", "attention xformers", "precision"} <= found.keys()
    assert any(name.startswith("pipeline dali") for name in found)
    for name, value in found.items():
        assert re.search(rf"{re.escape(name)} *│ *{re.escape(value)}", done.stdout), name


def test_what_cannot_run_says_why() -> None:
    found = backends()
    assert "fp32" in found.pop("precision")
    for name, value in found.items():
        assert re.match(r"(yes|installed|no: .{10,}|builds plans; does not run them: .{10,})", value), name
    if not torch.cuda.is_available():
        assert "--model.attention sdpa" in found["attention xformers"]
        assert found["attention xformers"].startswith("no: ")
        dali = found.get("pipeline dali, gpu (NVDEC)", found.get("pipeline dali", ""))
        assert dali.startswith("no: ")
        assert "CUDA" in dali or "pip install" in dali


@pytest.mark.slow
def test_info_explains_itself_and_speaks_json() -> None:
    asked = run("tgmae.cli.info", "--help")
    assert asked.returncode == 0
    assert asked.stdout.startswith("usage: tgmae-info")
    assert "CPU:" not in asked.stdout
    wrong = run("tgmae.cli.info", "--jsn")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("tgmae-info: there is no flag --jsn; did you mean --json?")
    done = run("tgmae.cli.info", "--json")
    facts = json.loads(done.stdout)
    assert set(facts) == {"tgmae", "python", "platform", "devices", "versions", "backends", "conflicts"}
    assert facts["versions"].keys() == set(PACKAGES)
    assert facts["backends"] == backends()


def test_no_garbage_is_looked_for_while_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgmae.train.train", lambda config: gc.isenabled())
    assert train.run(PRESETS["ssv2"]) is False
    assert gc.isenabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks torch about the GPU")
def test_info_takes_no_seconds_to_start_without_a_gpu() -> None:
    code = (
        "import sys; from tgmae.cli.info import main; sys.argv = ['tgmae-info']; main(); "
        "print([name for name in ('torch', 'torchvision', 'xformers', 'open_clip', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_info_says_why_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the torch that is installed, which is asked without being imported."""
    reasons = set()
    for cuda in ("None", "'13.0'"):
        monkeypatch.setattr(info.runpy, "run_path", lambda path, cuda=cuda: {"cuda": ast.literal_eval(cuda)})
        for driver in (True, False):

            def load(name: str, driver: bool = driver) -> None:
                if not driver:
                    raise OSError(name)

            monkeypatch.setattr(info.ctypes, "CDLL", load)
            reasons.add(info.why_no_cuda())
    assert reasons == {
        "this torch is built without CUDA",
        "there is no CUDA driver (no GPU, or a container without access to it)",
        "torch finds no CUDA device (no GPU, or a driver too old for CUDA 13.0)",
    }
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    assert info.why_no_cuda() == "torch is not installed"
