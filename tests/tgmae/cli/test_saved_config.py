"""`tgmae-train --config FILE` runs a saved configuration again, and says what is wrong with a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults.flips import TryFlips
from tgmae.cli import train
from tgmae.config.run import TrainConfig
from tgmae.config.saved import FORMAT, from_dict, read_config, to_dict, write_config
from tgmae.presets import PRESETS
from tgmae.training.checkpoints.restore import changed_settings


def save(path: Path, config: TrainConfig, **changes: Any) -> Path:
    path.write_text(json.dumps({**to_dict(config), **changes}))
    return path


def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        train.parse(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_its_file(name: str, tmp_path: Path) -> None:
    file = save(tmp_path / "config.json", PRESETS[name])
    assert from_dict(json.loads(file.read_text()), str(file)) == PRESETS[name]
    config, source = train.parse(["--config", str(file)])
    assert config == PRESETS[name]
    assert type(config.run_dir) is type(config.data.manifest) is type(Path())
    assert source == f"configuration {file}"


def test_values_that_no_preset_has_survive_too() -> None:
    arguments = [
        "--mask.kind", "mgmae", "--mask.flow", "raft.pth", "--max-steps", "3", "--init-from", "hf", "--optim.clip-norm",
        "None", "--data.crop-scales", "1.0", "--data.threads", "2", "--data.flip", "--optim.betas", "0.8", "0.9",
    ]  # fmt: skip
    config, _ = train.parse(arguments)
    assert from_dict(json.loads(json.dumps(to_dict(config))), "x") == config


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_flags_on_top_change_the_file(form: list[str], tmp_path: Path) -> None:
    file = save(tmp_path / "config.json", PRESETS["ssv2"])
    named = [word.format(file) for word in form]
    for arguments in (["--epochs", "10", *named, "--data.stride", "3"], [*named, "--epochs", "10", "--data.stride=3"]):
        config, _ = train.parse(arguments)
        assert config == replace(PRESETS["ssv2"], epochs=10, data=replace(PRESETS["ssv2"].data, stride=3))


def test_an_edited_file_is_used_and_said_to_be_edited(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_config(PRESETS["demo"], file)
    assert train.parse(["--config", str(file)]) == (PRESETS["demo"], f"configuration {file}")
    file.write_text(json.dumps({**json.loads(file.read_text()), "epochs": 61}))
    said = f"configuration {file}, edited by hand or damaged since a run wrote it"
    assert train.parse(["--config", str(file)]) == (replace(PRESETS["demo"], epochs=61), said)


def test_no_flipped_bit_in_a_configuration_is_silent(tmp_path: Path, try_flips: TryFlips) -> None:
    file = tmp_path / "config.json"
    write_config(PRESETS["ssv2"], file)

    def read() -> TrainConfig:
        config, is_as_written = read_config(file)
        if not is_as_written:
            raise ValueError("said")
        return config

    assert "said" in try_flips(file, read).messages


@pytest.mark.parametrize("resume", ["never", "runs/x/checkpoints/step_00000001.pt"])
def test_a_saved_run_is_resumed_however_it_began(resume: str, tmp_path: Path) -> None:
    """Or it would start over, and set aside what is to be continued."""
    file = save(tmp_path / "config.json", replace(PRESETS["demo"], resume=resume))
    assert train.parse(["--config", str(file)])[0] == PRESETS["demo"]
    assert train.parse(["--config", str(file), "--resume", "never"])[0].resume == "never"


def test_help_shows_the_values_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "config.json", replace(PRESETS["demo"], epochs=123))
    with pytest.raises(SystemExit) as caught:
        train.parse(["--config", str(file), "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 123)" in text
    assert f"theconfiguration{file}" in "".join(text.split())  # a long path wraps
    assert "Without other flags this resumes that run, whose --run-dir is in the file." in text


def test_a_preset_and_a_file_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "config.json", PRESETS["demo"])
    said = refuse(["ssv2", "--config", str(file)], capsys)
    assert said.startswith(f"tgmae-train: ssv2 and --config {file} exclude each other")


def test_a_file_in_the_place_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "config.json", PRESETS["demo"])
    assert f"there is no preset '{file}'; did you mean --config {file}?" in refuse([str(file)], capsys)
    assert "there is no flag --confg; did you mean --config?" in refuse(["--confg", str(file)], capsys)


def test_a_file_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert refuse(["--config"], capsys).startswith("tgmae-train: --config needs a file")


@pytest.mark.parametrize("kind", ["nothing", "folder"])
def test_a_file_that_is_not_there(kind: str, tmp_path: Path) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"no configuration at .*; expected a file such as RUN/config\.json"):
        train.parse(["--config", str(path)])


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff\xfe"])
def test_a_file_that_is_something_else(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is not a saved configuration"):
        train.parse(["--config", str(file)])


def without(config: dict[str, Any], name: str) -> dict[str, Any]:
    group, _, last = name.rpartition(".")
    if not group:
        return {key: value for key, value in config.items() if key != last}
    return {**config, group: {key: value for key, value in config[group].items() if key != last}}


@pytest.mark.parametrize("name", ["epochs", "data.stride", "mask", "optim.betas"])
def test_a_missing_setting_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^x\.json: the setting {name} is missing; add it"):
        from_dict(without(to_dict(PRESETS["demo"]), name), "x.json")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epoch", 1, "there is no setting epoch; did you mean epochs?"),
        ("xyzzy", 1, "there is no setting xyzzy; remove it"),
        ("data.strid", 1, "there is no setting data.strid; did you mean data.stride?"),
        ("epochs", "many", 'epochs must be an integer, got "many"'),
        ("epochs", 1.5, "epochs must be an integer, got 1.5"),
        ("epochs", True, "epochs must be an integer, got true"),
        ("epochs", None, "epochs must be an integer, got null"),
        ("max_steps", "x", 'max_steps must be an integer, got "x"'),
        ("run_dir", 1, "run_dir must be a path, as a string, got 1"),
        ("resume", 1, "resume must be a string, got 1"),
        ("compile", 0, "compile must be true or false, got 0"),
        ("device", "gpu", 'device must be one of "auto", "cuda", "cpu", got "gpu"'),
        ("mask.ratio", "0.6", 'mask.ratio must be a number, got "0.6"'),
        ("mask.ratio", 1.5, "--mask.ratio must lie strictly between 0 and 1, got 1.5"),
        ("mask.frames_per_tubelet", True, "mask.frames_per_tubelet must be one of 1, 2, got true"),
        ("optim.betas", [0.9], "optim.betas must be a list of 2 numbers, got [0.9]"),
        ("optim.betas", ["a", "b"], 'optim.betas must be a number, got "a"'),
        ("data.crop_scales", 1.0, "data.crop_scales must be a list of numbers, got 1.0"),
        ("mask", [], "mask must be a JSON object, got []"),
        ("data.repeat", 3, "--device-batch-size must be a multiple of --data.repeat, got 16 and 3"),
    ],
)
def test_an_impossible_setting_is_named(name: str, value: Any, words: str) -> None:
    plain = to_dict(PRESETS["demo"])
    group, _, last = name.rpartition(".")
    (plain[group] if group else plain)[last] = value
    with pytest.raises(ValueError, match=r"^runs/x\.json: ") as caught:
        from_dict(plain, "runs/x.json")
    assert str(caught.value) == f"runs/x.json: {words}"


def test_another_format_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "config.json", PRESETS["demo"], format=FORMAT + 1)
    with pytest.raises(ValueError, match=rf"has format {FORMAT + 1}, and this version of tgmae reads format {FORMAT}"):
        train.parse(["--config", str(file)])


def test_a_file_from_before_the_formats_were_numbered_is_read(tmp_path: Path) -> None:
    plain = to_dict(PRESETS["demo"])
    assert plain.pop("format") == FORMAT
    assert from_dict(plain, "x") == PRESETS["demo"]


def test_a_file_from_before_a_setting_existed_is_read() -> None:
    """Runs that were saved before files of weights had a tag meant none."""
    plain = to_dict(PRESETS["ssv2"])
    for name in ("tag", "trust_code"):
        del plain["clip"][name]
    assert from_dict(plain, "config.json") == PRESETS["ssv2"]


def test_the_format_is_not_a_changed_setting() -> None:
    """Of a checkpoint's configuration, with a format or from before."""
    old = to_dict(PRESETS["demo"])
    new = replace(PRESETS["demo"], epochs=61)
    for saved in (old, {key: value for key, value in old.items() if key != "format"}):
        assert changed_settings({"config": saved}, new) == ["--epochs 60 → 61"]


@pytest.mark.parametrize(
    ("arguments", "late"),
    [(["--epochs", "3", "ssv2"], "ssv2"), (["--compile", "demo"], "demo"), (["--epochs=3", "k400"], "k400")],
)
def test_a_preset_comes_first(arguments: list[str], late: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refuse(arguments, capsys) == f"tgmae-train: the preset comes first: tgmae-train {late} --flag value ...\n"


def test_a_value_may_be_called_like_a_preset() -> None:
    assert train.parse(["--run-dir", "demo", "--data.split", "ssv2"])[0].run_dir == Path("demo")
