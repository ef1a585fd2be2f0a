"""Every command offers the flags that it reads and no others, explains each of them, and starts quickly."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import tyro

from tgmae.cli import caption, data, engine, info, train, viz
from tgmae.cli.parser.flags import Flag, UsageError, find_typed, list_flags
from tgmae.cli.parser.subcommands import parse_command
from tgmae.config.run import TrainConfig
from tgmae.presets import DESCRIPTIONS, PRESETS, PresetName

ROOT = Path(__file__).resolve().parents[4]
COMMANDS: dict[str, type[Any]] = {
    **{f"tgmae-data {name}": command for name, command in data.COMMANDS.items()},
    **{f"tgmae-caption {name}": command for name, command in caption.COMMANDS.items()},
    **{f"tgmae-engine {name}": command for name, command in engine.COMMANDS.items()},
    **{f"tgmae-viz {name}": command for name, command in viz.COMMANDS.items()},
    "tgmae-info": info.Info,
}
CLIP = "clip.model clip.weights clip.tag clip.trust-code clip.engine clip.precision clip.batch clip.cache-dir"
SAMPLING = (
    "data.root device seed data.split data.sampling data.stride data.crop-scales data.flip data.captions "
    "captions.sources captions.per-video model.image-size model.num-frames model.patch-size model.tubelet-size"
)
TOWER = (
    "clip.model clip.weights clip.tag clip.trust-code clip.engine clip.precision clip.cache-dir tower patch-size "
    "height width last-block student"
)
ASK = "model backend url key-env max-tokens batch device concurrency timeout retries"
FLAGS = {
    "tgmae-data shapes": "out count codec objects camera seed workers",
    "tgmae-data index": "folder out csv split min-frames decode-all workers",
    "tgmae-data import": "dataset annotations videos out label min-frames decode-all workers",
    "tgmae-data show": "manifest out root count seed",
    "tgmae-data scores": "manifest preset out every workers device data.root data.split captions.sources "
    f"model.image-size model.patch-size mask.scorer mask.dense mask.student mask.no-caption {CLIP}",
    "tgmae-data motion": "manifest out root split workers",
    "tgmae-data compact": "manifest out root workers short-side grow align codec fps stride gop quality",
    "tgmae-caption generate": f"manifest {ASK} prompt frames captions-per max-side source out root split workers",
    "tgmae-caption oracle": "manifest out",
    "tgmae-caption human": "manifest file path-column caption-column under source out",
    "tgmae-caption llm": f"manifest {ASK} answers templates seed source out",
    "tgmae-caption show": "manifest out root count seed",
    "tgmae-engine export": f"{TOWER} out opset",
    "tgmae-engine build": f"{TOWER} clip.batch out target",
    "tgmae-engine check": f"{TOWER} clip.batch clip.cuda-graph manifest frames min-cosine device seed",
    "tgmae-engine agree": f"manifest preset clips batch out {SAMPLING} {CLIP} clip.cuda-graph "
    "mask.ratio mask.frames-per-tubelet mask.scores mask.student mask.no-caption",
    "tgmae-engine distill": "manifest preset out check-split pipeline hidden rounds clips batch learning-rate "
    "check-clips "
    f"{SAMPLING} {CLIP} clip.cuda-graph mask.ratio mask.frames-per-tubelet mask.no-caption "
    "data.decode data.num-workers data.prefetch data.pipelines data.threads",
    "tgmae-viz masks": f"manifest preset out count text {SAMPLING} {CLIP} clip.cuda-graph mask.ratio mask.scorer "
    "mask.frames-per-tubelet mask.dense mask.scores mask.student mask.motion mask.flow mask.no-caption "
    "mask.no-motion",
    "tgmae-viz loss": "run-dir",
    "tgmae-viz losses": "run-dirs out smooth",
    "tgmae-info": "json",
}


def flags_of(name: str) -> list[Flag]:
    return list_flags(COMMANDS[name], COMMANDS[name].make_default([]))


def parse(name: str, arguments: list[str]) -> Any:
    return train.parse(arguments)[0] if name == "tgmae-train" else parse_command(name, COMMANDS[name], arguments)


def read_help(name: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(name, [*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


# Which flags exist


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_exactly_these_flags(name: str) -> None:
    assert sorted(flag.name for flag in flags_of(name)) == sorted(FLAGS[name].split())


@pytest.mark.parametrize("name", [*COMMANDS, "tgmae-train"])
def test_tyro_calls_the_flags_by_the_same_names(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads them; of those that the command does not read it knows more."""
    monkeypatch.setenv("COLUMNS", "80")
    command = COMMANDS.get(name, TrainConfig)
    default = command.make_default([]) if name in COMMANDS else PRESETS["demo"]
    with pytest.raises(SystemExit):
        tyro.cli(command, default=default, args=["--help"])
    theirs = set(re.findall(r"^[│ ] --(\w[\w.-]*)", capsys.readouterr().out, re.MULTILINE))
    ours = {flag.name for flag in list_flags(command, default) if not flag.is_positional}
    assert ours <= theirs
    if name == "tgmae-train" or getattr(command, "READS", None) is None:
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.READS is not None])
def test_a_flag_that_a_command_does_not_read_is_refused(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever its value, and before anything else is done."""
    exists = set(FLAGS[name].split())
    refused = [flag.name for flag in list_flags(TrainConfig) if flag.name not in exists]
    assert len(refused) > 30
    for flag in refused:
        for form in ([f"--{flag}", "1"], [f"--{flag}=1"]):
            with pytest.raises(UsageError, match=rf"^--{re.escape(flag)} is not a flag of {name}"):
                parse_command(name, COMMANDS[name], [str(tmp_path / "m.parquet"), *form])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["tgmae-data scores", "tgmae-viz masks", "tgmae-engine agree", "tgmae-engine distill"])
def test_the_manifest_is_the_first_argument_only(name: str) -> None:
    with pytest.raises(UsageError, match=r"^--data\.manifest is not a flag of .*: MANIFEST, the first argument"):
        parse_command(name, COMMANDS[name], ["m.parquet", "--data.manifest", "/nonexistent"])


def test_masks_without_text_are_asked_for_otherwise_than_in_training() -> None:
    with pytest.raises(UsageError, match=r"--mask\.kind is not a flag of tgmae-viz masks: .* --no-text leaves out"):
        parse_command("tgmae-viz masks", viz.Masks, ["m.parquet", "--mask.kind", "tube"])


def test_scores_are_not_made_of_scores() -> None:
    for form in (["--mask.scorer", "cached"], ["--mask.scorer=cached"]):
        with pytest.raises(UsageError, match=r"does not accept --mask\.scorer cached; use patch or dense or student"):
            parse_command("tgmae-data scores", COMMANDS["tgmae-data scores"], ["m.parquet", *form])


def test_flags_are_found_in_every_form_that_tyro_reads() -> None:
    flags = list_flags(TrainConfig)
    typed = ["--data.num_workers=3", "--no-compile", "--data.no-flip", "--optim.betas", "0.9", "0.95", "--seed", "1"]
    tyro.cli(TrainConfig, default=PRESETS["demo"], args=typed)
    found = [flag.name for flag in find_typed("tgmae-train", typed, flags)]
    assert found == ["data.num-workers", "compile", "data.flip", "optim.betas", "seed"]
    for wrong in ("--no-epochs", "--data.no-stride", "--", "--data"):
        with pytest.raises(UsageError, match="there is no flag"):
            find_typed("tgmae-train", [wrong], flags)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--mask.rati", "did you mean --mask.ratio?"),
        ("--width", "did you mean --model.width?"),
        ("--manifest", "did you mean --data.manifest?"),
        ("--batchsize", "did you mean --batch-size?"),
        ("--strid", "did you mean --data.stride?"),
        ("--cuda_graph_", "did you mean"),
        ("--xyzzy", "(tgmae-train --help lists all flags)"),
    ],
)
def test_an_unknown_flag_gives_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_typed("tgmae-train", [typed, "1"], list_flags(TrainConfig))
    assert str(caught.value).startswith(f"there is no flag {typed}")
    assert meant in str(caught.value)


def test_presets_are_named_and_described() -> None:
    assert list(PRESETS) == list(get_args(PresetName)) == list(DESCRIPTIONS)


# Help


@pytest.mark.parametrize("name", [*COMMANDS, "tgmae-train"])
def test_every_flag_has_a_text(name: str) -> None:
    flags = list_flags(TrainConfig) if name == "tgmae-train" else flags_of(name)
    assert [flag.name for flag in flags if len(flag.help) < 10] == []
    texts = [flag.help for flag in flags if "." not in flag.name]
    assert all(text[0].isupper() or text.startswith(("auto ", "h264 ", "torch.compile")) for text in texts), texts
    assert all(text.endswith(".") or "\n  " in text for text in texts), texts


@pytest.mark.parametrize("name", [*COMMANDS, "tgmae-train"])
def test_help_begins_with_two_examples_and_the_flags_used_most(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = read_help(name, capsys=capsys)
    assert max(map(len, (line for line in text.splitlines() if not line.startswith("  tgmae-")))) <= 100
    usage, _, rest = text.partition("\n\nexamples:\n")
    assert usage.startswith(f"usage: {name} ")
    examples, _, rest = rest.partition("\n\n")
    lines = examples.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"  {name}") for line in lines[::2])
    assert all(re.match(r"      [A-Z].*\.$", line) for line in lines[1::2])
    flags = list_flags(TrainConfig) if name == "tgmae-train" else flags_of(name)
    common = train.COMMON if name == "tgmae-train" else COMMANDS[name].COMMON
    if len(flags) > 12:
        assert len(common) >= 4
        assert rest.index("most used flags:") < rest.index("\nother ")
    assert set(common) <= {flag.name for flag in flags}
    for flag in flags:  # each once
        shown = flag.name.upper().replace("-", "_") if flag.is_positional else f"--{flag.name}"
        if flag.is_switch:
            shown = re.sub(r"([.-])([\w]+[\w-]*)$", r"\1[no-]\2", shown)
        assert len(re.findall(rf"^  {re.escape(shown)}(?: |$)", text, re.MULTILINE)) == 1, shown


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMANDS, "tgmae-train"])
def test_the_examples_are_command_lines_that_are_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = train.EXAMPLES if name == "tgmae-train" else COMMANDS[name].EXAMPLES
    monkeypatch.setattr(train, "read_config", lambda file: (PRESETS["demo"], True))
    for example in examples:
        arguments = example.partition("  # ")[0].removeprefix(name).split()
        parse(name, arguments)


def test_help_keeps_the_table_of_mask_kinds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = read_help("tgmae-train", "ssv2", capsys=capsys)
    assert "(default: tgm)\n" + " " * 32 + "tgm      similarity to the caption" in text
    assert re.search(r"^ {32}mgm_box  a box .*\n {41}[a-z]", text, re.MULTILINE)  # broken below the words
    assert re.search(r"^ {32}tube     all slots share one draw \(VideoMAE\)$", text, re.MULTILINE)


@pytest.mark.parametrize(("columns", "lines_a_flag"), [(80, 3.4), (110, 2.6)])
def test_training_help_is_short(
    columns: int, lines_a_flag: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples, presets and tables included."""
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = read_help("tgmae-train", "ssv2", capsys=capsys).splitlines()
    assert len(lines) < lines_a_flag * len(list_flags(TrainConfig))


def test_a_long_help_may_be_cut_off() -> None:
    done = subprocess.run(
        f"{sys.executable} -m tgmae.cli.train --help | head -1", shell=True, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.startswith("usage: tgmae-train")
    assert done.stderr == ""


# Start

SLOW = ("torch", "open_clip", "matplotlib", "pyarrow", "av", "numpy", "nvidia.dali", "PIL", "xformers", "rich.console")


def test_help_does_without_slow_imports() -> None:
    """`--help` of every command in one process: what it had to import is then known."""
    lines = ["import contextlib, io, sys"]
    for program, commands in (("train", [""]), ("data", data.COMMANDS), ("engine", engine.COMMANDS), ("info", [""])):
        for words in ([], *([name] for name in commands if name)):
            lines += [
                f"from tgmae.cli.{program} import main",
                f"sys.argv = ['tgmae-{program}', *{words!r}, '--help']",
                "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit): main()",
                "assert out.getvalue().startswith('usage: '), (sys.argv, out.getvalue())",
            ]
    lines += [
        "from tgmae.cli.viz import main",
        "for words in ([], ['masks'], ['loss'], ['losses']):",
        "    sys.argv = ['tgmae-viz', *words, '--help']",
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit): main()",
        "    assert out.getvalue().startswith('usage: '), (sys.argv, out.getvalue())",
        f"print([name for name in {SLOW} if name in sys.modules])",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert ast.literal_eval(done.stdout) == []


def test_training_says_its_first_line_before_it_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from tgmae.cli import train; "
        "train.run = lambda config: print(sorted({'torch', 'numpy', 'av', 'pyarrow'} & sys.modules.keys())); "
        f"sys.argv = ['tgmae-train', 'ssv2', '--run-dir', {str(tmp_path)!r}]; train.main()"
    )
    for rank, lines in (("0", [f"tgmae 0.1.0  preset ssv2, run folder {tmp_path}", "[]"]), ("1", ["[]"])):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "RANK": rank}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.stdout.splitlines() == lines, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["data", "engine", "viz", "train", "info"])
def test_modules_of_commands_say_what_they_are(name: str) -> None:
    module = importlib.import_module(f"tgmae.cli.{name}")
    assert inspect.cleandoc(module.__doc__ or "").startswith(f"tgmae-{name}")
