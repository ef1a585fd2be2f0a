"""Every code block of the documentation runs as it stands: page by page, in order, in a folder such as a reader has.

A block's language says what it is:

bash     typed line by line. Of README's first block on one's own videos a real shell runs every line to its end. In
         the others, flags behind a line (`shrink`) make networks tiny and runs short; what needs a GPU is only parsed.
python   a script; the block behind it is what it prints
csv      captions.csv, which commands on the pages read
text     output or a drawing; not run
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import parse_args

from bench.gpu import Options
from tests.support.clip_models import save_small_clip
from tests.tgmae.captions.generate.networks import save_blip2, save_llama
from tgmae.cli import caption, data, engine, info, train, viz
from tgmae.cli.parser.subcommands import parse_command
from tgmae.model.huggingface import export_hf
from tgmae.model.videomae import VideoMAE
from tgmae.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "tgmae-caption": caption, "tgmae-data": data, "tgmae-engine": engine, "tgmae-info": info,
    "tgmae-train": train, "tgmae-viz": viz,
}  # fmt: skip
TINY = shlex.split(
    "--device cpu --model.width 48 --model.depth 1 --model.decoder-width 24 --model.decoder-depth 1 --batch-size 2 "
    "--device-batch-size 2 --data.num-workers 1 --log.no-tensorboard --log.no-progress"
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def find_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in found]


def is_run(block: Block) -> bool:
    return block.language in ("bash", "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    assert [str(block) for block in find_blocks(page) if block.language not in ("bash", "python", "csv", "text")] == []
    assert not re.search(r"^\n {4}\S", page.read_text(encoding="utf-8"), flags=re.MULTILINE), "an indented block"


@pytest.fixture(scope="module")
def reader(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: videos, captions.csv, the demo's data and weights, an index."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(shapes.parent, folder / "data" / "shapes")
    [captions] = [block for page in PAGES for block in find_blocks(page) if block.language == "csv"]
    (folder / "captions.csv").write_text(captions.text)
    clips = sorted((shapes.parent / "videos").rglob("*.mp4"))
    for clip, path in zip(clips, re.findall(r"^[^,\s]+\.mp4", captions.text, flags=re.MULTILINE), strict=False):
        (folder / "videos" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / "videos" / path)
    write_ssv2(folder / "ssv2", clips)
    save_small_clip(folder / "clip")
    save_blip2(folder / "eyes")
    save_llama(folder / "words")
    scripts = folder / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "activate").write_text(f'PATH="{scripts}:$PATH"\n')
    for program, module in PROGRAMS.items():
        (scripts / program).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module.__name__} "$@"\n')
        (scripts / program).chmod(0o755)
    export_hf(VideoMAE(PRESETS["demo"].model), folder / "runs" / "demo" / "hf")
    data.Index(folder / "videos", folder / "data" / "mine.parquet", workers=1).run()
    return folder


def write_ssv2(folder: Path, clips: Sequence[Path]) -> None:
    """Write the annotation files of Something-Something V2 for four clips, and the clips under their names."""
    (folder / "labels").mkdir(parents=True)
    (folder / "videos").mkdir()
    lists: dict[str, object] = {"labels": {"Moving something": "0"}, "test": [{"id": "4"}]}
    line = {"label": "moving a disc", "template": "Moving [something]", "placeholders": ["a disc"]}
    lists |= {"train": [{"id": "1", **line}, {"id": "2", **line}], "validation": [{"id": "3", **line}]}
    for name, value in lists.items():
        (folder / "labels" / f"{name}.json").write_text(json.dumps(value))
    for number, clip in enumerate(clips[:4], 1):
        shutil.copy(clip, folder / "videos" / f"{number}.webm")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, find_blocks(page)))], ids=lambda p: p.name)
def test_blocks_run(page: Path, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(reader, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # of caches
    blocks = find_blocks(page)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        text = block.text.replace("/path/to/", "")
        if block.language == "python":
            printed = run([sys.executable, "-"], text)
            assert after is not None
            assert drop_request(printed) == drop_request(after.text), block
        elif block.language == "bash" and page.name == "README.md" and text.startswith("source"):
            run(["bash", "-e"], text)
        elif text.startswith("#!/bin/bash"):  # for Slurm, which is not here
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
            [launch] = re.findall(r"^srun (torchrun .*?) && exit$", text.replace("\\\n", " "), flags=re.MULTILINE)
            type_line(shlex.split(launch.replace("$SLURM_NNODES", "2")), block, monkeypatch)
        elif block.language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                type_line(shlex.split(line, comments=True), block, monkeypatch)


def run(command: list[str], text: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def drop_request(printed: str) -> list[str]:
    """Leave out which clip comes first: that depends on the size of the data set."""
    return [line for line in printed.splitlines() if not line.startswith("epoch")]


def type_line(words: list[str], block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    match words:
        case [] | ["source", ".venv/bin/activate"]:
            pass
        case ["python3", "-m", "venv", ".venv"]:
            pass
        case [".venv/bin/pip", "install", "-c", constraints, "-e", target]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert (ROOT / constraints).exists()
            assert target.removeprefix(".[").removesuffix("]") in extras
        case ["make", *target]:
            command = ["make", "-C", str(ROOT), "-n", "PYTHON=python3", *target]
            planned = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for flags in re.findall(r"-m tgmae\.cli\.train(.*)", planned):
                train.parse(shlex.split(flags))
            for flags in re.findall(r"-m bench\.gpu(.*)", planned):
                tyro.cli(Options, args=shlex.split(flags))
        case ["nsys", "stats", *_]:
            pass
        case ["nsys", "profile", *_]:
            train.parse(words[words.index("tgmae-train") + 1 :])
        case ["export", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]:
            pass
        case ["torchrun", *flags]:  # several processes: tests/tgmae/cli, tests/faults and bench.faults run them
            given = parse_args(flags)
            assert given.module
            type_shared([given.training_script, *given.training_script_args])
        case ["srun", *_]:
            type_shared(words[words.index("tgmae.cli.data") :])
        case ["tgmae-data", "import", name, *flags] if name != "ssv2":  # tests/tgmae/data/importers runs them
            parse_command("tgmae-data import", data.COMMANDS["import"], [name, *flags])
        case ["tgmae-caption", name, *flags] if "openai" in flags:  # tests/tgmae/cli/test_caption.py runs a server
            parse_command(f"tgmae-caption {name}", caption.COMMANDS[name], flags)
        case ["tgmae-engine", "build", *flags]:
            parse_command("tgmae-engine build", engine.Build, flags)
        case ["python", "-m", module, *_, "--help"]:
            monkeypatch.setattr(sys, "argv", words[2:])
            with pytest.raises(SystemExit) as left:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            assert left.value.code == 0
        case [program, *_] if program in PROGRAMS:
            monkeypatch.setattr(sys, "argv", shrink(words))
            try:
                PROGRAMS[program].main()
            except SystemExit as left:
                if left.code:
                    pytest.fail(f"{block}: {shlex.join(words)}: {left.code}")
        case _:
            pytest.fail(f"{block}: no test knows how to run {shlex.join(words)!r}")


def type_shared(words: list[str]) -> None:
    """Parse a command that several processes run."""
    match words:
        case ["tgmae.cli.data", name, *flags]:
            parse_command(f"tgmae-data {name}", data.COMMANDS[name], flags)
        case ["tgmae.cli.caption", name, *flags]:
            parse_command(f"tgmae-caption {name}", caption.COMMANDS[name], flags)
        case ["tgmae.cli.train", *flags]:
            config, _ = train.parse(flags)
            assert config.accumulation_steps(16) >= 1
        case _:
            pytest.fail(f"no test knows {words[0]}")


def shrink(words: Sequence[str]) -> list[str]:
    """Add flags that make a command small; later flags win. The number of steps stays where it is named."""
    clip = ["--clip.model", "clip"]  # the weights of a real one are on a hub
    clip_of_preset = clip if "ssv2" in words and "--mask.kind" not in words else []
    match words:
        case ["tgmae-train", *flags]:
            steps = [] if "--max-steps" in flags else ["--max-steps", "1"]
            return [*words, *TINY, *steps, *clip_of_preset]
        case ["tgmae-data", "import", *_]:
            return [*words]
        case ["tgmae-engine", "distill", *_]:
            small = "--hidden 16 --rounds 1 --clips 2 --check-clips 2 --batch 64 --data.num-workers 1"
            return [*words, *small.split()]
        case ["tgmae-engine", "agree", *_]:
            return [*words, "--clips", "2", "--batch", "2"]
        case ["tgmae-caption", "generate" | "llm" as name, *_]:
            return [*words, "--model", {"generate": "eyes", "llm": "words"}[name], "--max-tokens", "8"]
        case ["tgmae-engine", "export" | "check", *_]:
            return [*words, *clip]
        case _:
            return [*words, *clip_of_preset]
