"""tgmae-data scores, tgmae-viz masks, tgmae-engine agree and distill, as a user meets them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engines.towers.student import read_about
from tests.support.runs import tiny
from tests.support.videos import write_numbered
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import read_manifest, write_manifest
from tgmae.masks.cached_scorer import COMMAND
from tgmae.masks.maps.store import MapFolder, digest_videos
from tgmae.presets import PRESETS
from tgmae.train import train

REPOSITORY = Path(__file__).resolve().parents[3]


class Terminal:
    """Runs tgmae-<name> in this process; returns (exit status or message, stdout, stderr)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_dir: Path) -> None:
        self.monkeypatch, self.capsys, self.cache_dir = monkeypatch, capsys, cache_dir

    def __call__(self, name: str, *arguments: object, small: bool = True) -> tuple[Any, str, str]:
        flags = ["--device", "cpu"] * small
        flags += ["--clip.cache-dir", str(self.cache_dir)] * (small and "cached" not in arguments)
        flags += ["--data.num-workers", "1"] * (small and "distill" in arguments)
        self.monkeypatch.setattr(sys, "argv", [f"tgmae-{name}", *map(str, arguments), *flags])
        self.capsys.readouterr()
        code: Any = 0
        try:
            importlib.import_module(f"tgmae.cli.{name}").main()
        except SystemExit as leave:
            code = leave.code
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def tgmae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_dir: Path) -> Iterator[Terminal]:
    monkeypatch.setenv("COLUMNS", "200")
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # tgmae-viz turns gradients off for its whole process
        yield Terminal(monkeypatch, capsys, cache_dir)


@pytest.fixture(scope="module")
def few(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six of the shapes clips: the first four train, the others val."""
    manifest = read_manifest(shapes)
    videos = [replace(manifest[row], split="train" if row < 4 else "val") for row in range(6)]
    path = tmp_path_factory.mktemp("few") / "manifest.parquet"
    write_manifest(path, videos, manifest.root)
    return path


# tgmae-data scores


@pytest.mark.slow
def test_scores_of_every_split_with_the_demos_clip(tgmae: Terminal, few: Path, tmp_path: Path) -> None:
    """Says what it did and how to train with it; once more it finds all."""
    out = tmp_path / "maps"
    code, said, _ = tgmae("data", "scores", few, "--out", out, "--every", 8, "--workers", 0, "--data.split", "")
    assert code == 0, code
    assert f"{out}: 6 computed, 0 already there, 0 unreadable" in said
    assert f"--mask.scorer cached --mask.scores {out}" in said
    maps, manifest = MapFolder(out, COMMAND), read_manifest(few)
    assert maps.check_videos(manifest, digest_videos(manifest, "captions")) == ""
    assert (maps.key["tower"], maps.key["cells"], maps.key["every"]) == ("patch16", 6, 8)
    assert maps.read(manifest[5].path).shape == (5, 1, 6, 8)
    code, said, _ = tgmae("data", "scores", few, "--out", out, "--every", 8, "--workers", 0, "--data.split", "")
    assert (code, f"{out}: 0 computed, 6 already there, 0 unreadable" in said) == (0, True)


def test_scores_name_their_folder_after_the_scorer(tgmae: Terminal, shapes: Path, tmp_path: Path) -> None:
    manifest = read_manifest(shapes)
    write_manifest(tmp_path / "m.parquet", [manifest[0]], manifest.root)
    code, said, _ = tgmae(
        "data", "scores", tmp_path / "m.parquet", "--mask.scorer", "dense", "--mask.dense", "naclip", "--every", 20,
        "--workers", 0, "--model.image-size", 64,
    )  # fmt: skip
    assert code == 0, code
    assert f"{tmp_path / 'scores-dense'}: 1 computed" in said
    key = MapFolder(tmp_path / "scores-dense", COMMAND).key
    assert (key["tower"], key["cells"]) == ("naclip16", 4)


def test_scores_report_what_cannot_be_read(tgmae: Terminal, tmp_path: Path) -> None:
    for name in "ab":
        write_numbered(tmp_path / f"{name}.mp4", num_frames=16)
    (tmp_path / "list.csv").write_text("path,caption\na.mp4,a square\nb.mp4,a circle\n")
    index_folder(tmp_path, tmp_path / "m.parquet", csv_path=tmp_path / "list.csv", num_workers=1)
    (tmp_path / "b.mp4").unlink()
    code, said, err = tgmae("data", "scores", tmp_path / "m.parquet", "--workers", 0)
    assert code == 0
    assert "1 computed, 0 already there, 1 unreadable" in said
    assert "could not be read: b.mp4: " in err
    assert "these videos are not the demo's shapes, and --clip.model shapes knows nothing else" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("engine", "distill", "--rounds", 1, "--clips", 2, "--batch", 16),
        ("engine", "agree", "--clips", 1, "--batch", 1),
        ("viz", "masks", "--count", 1),
    ],
)
def test_the_demos_clip_warns_of_other_videos(tgmae: Terminal, tmp_path: Path, command: tuple[Any, ...]) -> None:
    for name in "ab":
        write_numbered(tmp_path / f"{name}.mp4", num_frames=40)
    (tmp_path / "list.csv").write_text("path,caption\na.mp4,a square\nb.mp4,a circle\n")
    index_folder(tmp_path, tmp_path / "m.parquet", csv_path=tmp_path / "list.csv", num_workers=1)
    name, *arguments = command
    code, said, _ = tgmae(name, arguments[0], tmp_path / "m.parquet", *arguments[1:])
    assert code == 0, code
    assert said.count("these videos are not the demo's shapes") == 1


def test_scores_need_captions(tgmae: Terminal, tmp_path: Path) -> None:
    write_numbered(tmp_path / "walking_home" / "a.mp4", num_frames=16)
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    code, _, _ = tgmae("data", "scores", tmp_path / "m.parquet")
    assert str(code).startswith("tgmae-data: 1 of 1 video has no caption, such as walking_home/a.mp4.")
    assert not (tmp_path / "scores-patch").exists()
    assert "without text" not in str(code)
    code, _, _ = tgmae("viz", "masks", tmp_path / "m.parquet")
    assert str(code).endswith("; or draw masks without text: --no-text")
    code, said, _ = tgmae("data", "scores", tmp_path / "m.parquet", "--mask.no-caption", "label", "--workers", 0)
    assert code == 0, code
    assert "1 video without a caption uses its label" in said


# tgmae-viz


@pytest.mark.slow
def test_masks_draw_clips(tgmae: Terminal, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "masks.png"
    code, said, _ = tgmae("viz", "masks", few, "--count", 3, "--out", out)
    assert code == 0, code
    assert f"masks of 3 clips: {out}" in said
    with Image.open(out) as picture:
        assert 1200 < picture.width <= 1620  # clips side by side, on a screen


@pytest.mark.slow
def test_motion_and_its_masks(tgmae: Terminal, few: Path, tmp_path: Path) -> None:
    """Motion of all rows beside the manifest, once; then masks by motion with text and without."""
    code, said, _ = tgmae("data", "motion", few, "--workers", 1, small=False)
    folder = few.parent / "motion"
    assert code == 0, code
    assert f"{folder}: 6 computed, 0 already there, 0 unreadable" in said
    assert f"--mask.kind mgm --mask.motion {folder}" in said
    code, said, _ = tgmae("data", "motion", few, "--workers", 1, small=False)
    assert (code, f"{folder}: 0 computed, 6 already there" in said) == (0, True)
    widths = []
    for text in ("text", "no-text"):
        out = tmp_path / f"{text}.png"
        code, _, _ = tgmae(
            "viz", "masks", few, "--count", 1, f"--{text}", "--mask.motion", folder, "--out", out,
            small=text == "text",
        )  # fmt: skip
        assert code == 0, code
        with Image.open(out) as picture:
            widths.append(picture.width)
    assert widths[0] > widths[1] + 200  # columns of similarity and text-guided masks


@pytest.mark.slow
def test_codecs_without_motion_are_named(tgmae: Terminal, tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", num_frames=40)
    write_numbered(tmp_path / "b.webm", "libvpx-vp9", num_frames=40)
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    code, said, err = tgmae("data", "motion", tmp_path / "manifest.parquet", "--workers", 1, small=False)
    assert code == 0, code
    assert "1 computed, 0 already there, 0 unreadable" in said
    assert "Train with" not in said
    assert (
        "no motion vectors in 1 of 2 videos: vp9 (1); re-encode the data set to H.264 with: tgmae-data compact" in err
    )
    assert f"; or train without them: --mask.kind mgm --mask.motion {tmp_path}/motion --mask.no-motion exclude\n" in err
    code, _, _ = tgmae(
        "viz", "masks", tmp_path / "manifest.parquet", "--no-text", "--mask.motion", tmp_path / "motion", small=False
    )
    assert "1 of 2 videos has no motion vectors (h264 and mpeg4 do), such as b.webm (vp9)" in code
    code, said, _ = tgmae(
        "viz", "masks", tmp_path / "manifest.parquet", "--no-text", "--mask.motion", tmp_path / "motion", "--count", 1,
        "--mask.no-motion", "exclude", small=False,
    )  # fmt: skip
    assert (code, "1 video without motion vectors is left out" in said) == (0, True)
    config = tiny(tmp_path / "manifest.parquet", tmp_path / "run", epochs=1, batch_size=1, device_batch_size=1)
    for choice, steps in (("exclude", 1), ("error", 0)):
        mask = replace(config.mask, kind="mgm", motion=tmp_path / "motion", no_motion=choice)
        with nullcontext() if steps else pytest.raises(ValueError, match=r"--mask\.no-motion exclude"):
            assert train(replace(config, mask=mask, resume="never")).step == steps


def test_masks_default_to_the_manifests_name(tgmae: Terminal, few: Path) -> None:
    code, _, _ = tgmae("viz", "masks", few, "--count", 1, "--mask.frames-per-tubelet", 2)
    assert code == 0, code
    Image.open(few.with_name("manifest.masks.png")).verify()


def test_loss_of_a_run_without_metrics(tgmae: Terminal, tmp_path: Path) -> None:
    code, _, _ = tgmae("viz", "loss", tmp_path / "nope", small=False)
    assert str(code).startswith(f"tgmae-viz: there is no folder {tmp_path / 'nope'}; ")
    code, _, _ = tgmae("viz", "loss", tmp_path, small=False)
    assert code == f"tgmae-viz: {tmp_path} has no metrics yet"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "wait_share": 0.1}\n' * 2)
    code, said, _ = tgmae("viz", "loss", tmp_path, small=False)
    assert (code, said.strip()) == (0, f"loss curve: {tmp_path / 'loss.png'}")


# tgmae-engine distill and agree


@pytest.mark.slow
def test_distill_then_agree_on_everything(tgmae: Terminal, few: Path, tmp_path: Path) -> None:
    """The student is measured on the other split, and compared with cached scores and all the others."""
    student, maps, table = tmp_path / "student.safetensors", tmp_path / "maps", tmp_path / "new" / "agree.json"
    code, said, _ = tgmae(
        "engine", "distill", few, "--out", student, "--hidden", 64, "--rounds", 3, "--clips", 2, "--batch", 64,
        "--check-clips", 2, "--data.stride", 2,
    )  # fmt: skip
    assert code == 0, code
    measured = read_about(student)["measured"]
    assert f"{student}: agreement with patch {measured['agreement']:.3f}" in said
    assert "on split val" in said
    assert f"--mask.scorer student --mask.student {student}" in said
    assert tgmae("data", "scores", few, "--out", maps, "--every", 4, "--workers", 0)[0] == 0
    code, said, _ = tgmae(
        "engine", "agree", few, "--clips", 3, "--batch", 2, "--out", table, "--mask.student", student,
        "--mask.scores", maps, "--mask.frames-per-tubelet", 2,
    )  # fmt: skip
    assert code == 0, code
    rows = {row["name"]: row for row in json.loads(table.read_text())}
    assert list(rows) == [
        "patch", "patch, first frame", "dense, maskclip", "dense, sclip", "dense, clearclip", "dense, naclip",
        "student", "cached",
    ]  # fmt: skip
    for name, row in rows.items():
        assert name in said
        assert f"{row['agreement']:.3f}" in said
    assert "4 clips, 21 of 36 patches masked (chance agrees on 0.58)" in said
    assert (rows["patch"]["agreement"], rows["cached"]["gflop_per_clip"]) == (1, 0)
    assert rows["cached"]["agreement"] > 0.62
    assert 0 < rows["student"]["gflop_per_clip"] < rows["patch"]["gflop_per_clip"]


# Presets and mistakes


@pytest.mark.parametrize(
    ("name", "command"), [("data", "scores"), ("viz", "masks"), ("engine", "agree"), ("engine", "distill")]
)
def test_help_shows_the_presets_values(
    tgmae: Terminal, name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every group of flags, without asking for a manifest first."""
    monkeypatch.setenv("COLUMNS", "80")  # one box below the other, so that lines can be joined again

    def read_help(*form: str) -> str:
        code, out, err = tgmae(name, command, *form, "--help", small=False)
        assert (code, err) == (0, "")
        return " ".join(out.replace("│", " ").split())

    demo = read_help()
    for flag in ("--preset", "--mask.no-caption", "--clip.model", "--model.image-size"):
        assert flag in demo
    assert ("--mask.ratio" in demo) == (command != "scores")  # scores of all patches, masked or not
    assert "default: shapes" in demo
    assert "VideoMAE ViT-B" not in demo
    assert ("score maps by `tgmae-data scores`" in demo) == ((name, command) == ("viz", "masks"))  # scores makes them
    for form in (["--preset", "k400"], ["--preset=k400"]):
        k400 = read_help(*form)
        assert "default: ViT-B-32-quickgelu" in k400
        assert "default: shapes" not in k400


@pytest.mark.parametrize("name", ["data", "viz", "engine"])
def test_help_names_the_subcommands(tgmae: Terminal, name: str) -> None:
    code, out, _ = tgmae(name, "--help", small=False)
    assert code == 0
    commands = {"data": ("shapes", "index", "show", "scores"), "viz": ("masks", "loss"),
                "engine": ("export", "build", "check", "agree", "distill")}  # fmt: skip
    assert all(command in out for command in commands[name])


@pytest.mark.parametrize("form", [["--preset", "imagenet"], ["--preset=imagenet"]])
@pytest.mark.parametrize(("name", "command"), [("data", "scores"), ("viz", "masks"), ("engine", "agree")])
def test_unknown_preset(tgmae: Terminal, few: Path, name: str, command: str, form: list[str]) -> None:
    code, _, err = tgmae(name, command, few, *form)
    assert (code, err) == (2, f"tgmae-{name}: there is no preset 'imagenet' (presets: {', '.join(PRESETS)})\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("data", "scores", "--every", 0), "--every must be at least 1, got 0"),
        (("data", "scores", "--mask.scorer", "student", "--mask.student", "x"), "no student at x; make one with"),
        (("data", "scores", "--clip.model", "ViT-B-23"), "open_clip has no model 'ViT-B-23'; did you mean"),
        (("viz", "masks", "--count", 0), "--count must be at least 1, got 0"),
        (("viz", "masks", "--data.split", "test"), "no video has split 'test', only 'train', 'val'; a CSV"),
        (("viz", "masks", "--data.stride", 100), "a clip spans 701 frames"),
        (("viz", "masks", "--mask.scorer", "cached", "--mask.scores", "nowhere"), "no maps in nowhere"),
        (("engine", "agree", "--clips", 0), "--clips and --batch must be at least 1, got 0 and 8"),
        (("engine", "agree", "--batch", 0), "--clips and --batch must be at least 1, got 32 and 0"),
        (("engine", "distill", "--rounds", 0), "--rounds must be at least 1, got 0"),
        (("engine", "distill", "--batch", 0), "--batch must be at least 1, got 0"),
        (("engine", "distill", "--check-clips", 0), "--check-clips must be at least 1, got 0"),
        (("engine", "distill", "--batch", 1000000), "fewer than --batch 1000000"),
    ],
)  # fmt: skip
def test_impossible_values_are_errors_of_one_line(
    tgmae: Terminal, few: Path, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    name, command, *flags = arguments
    made = ("--out", tmp_path / "out") if command != "agree" else ()
    code, _, _ = tgmae(str(name), command, few, *flags, *made)
    assert str(code).startswith(f"tgmae-{name}: ")
    assert words in str(code)
    assert "\n" not in str(code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("data", "scores"), "MANIFEST is missing (tgmae-data scores --help lists all flags)"),
        (("viz", "masks", "m.parquet", "--mask.ratio", "2"), "mask.ratio"),
        (("viz", "masks", "m.parquet", "--mask.scorre", "dense"), "--mask.scorer"),
        (("viz", "mask"), "masks"),
        (("engine", "agree", "m.parquet", "--clips", "few"), "--clips"),
        (("viz", "masks", "m.parquet", "--mask.scorer", "cached"), "tgmae-data scores"),
        (
            ("data", "scores", "m.parquet", "--mask.scorer", "cached"),
            "tgmae-data scores does not accept --mask.scorer cached; use patch or dense or student",
        ),
    ],
)
def test_typing_errors(tgmae: Terminal, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = tgmae(*arguments, small=False)
    assert code not in (None, 0)
    assert words in f"{out}{err}{code}"
    assert "Traceback" not in out + err


def test_a_manifest_that_is_not_there(tgmae: Terminal, tmp_path: Path) -> None:
    for name, command in (("data", "scores"), ("viz", "masks"), ("engine", "agree"), ("engine", "distill")):
        code, _, _ = tgmae(name, command, tmp_path / "none.parquet")
        assert str(code).startswith(f"tgmae-{name}: no manifest at ")


@pytest.mark.slow
def test_what_needs_no_clip_does_not_import_it() -> None:
    """open_clip takes seconds to import, and every spawned worker imports its command's module anew."""
    code = "import sys, {0}; assert 'open_clip' not in sys.modules, '{0}'"
    names = ("tgmae.cli.data", "tgmae.cli.train", "tgmae.cli.viz", "tgmae.cli.engine", "tgmae.train")
    together = "; ".join(code.format(name) for name in (*names, "tgmae.masks.text_scorer", "tgmae.captions.embeddings"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", together], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
