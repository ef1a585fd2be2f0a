"""tgmae-data as a user meets it: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.videos import real_data_folder, write_numbered
from tgmae.cli.data import main
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import read_manifest, write_manifest

REPOSITORY = Path(__file__).resolve().parents[3]


class Console:
    """Runs tgmae-data in this process; returns (exit status or message, stdout, stderr)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[Any, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["tgmae-data", *map(str, arguments)])
        self.capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def tgmae_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Console:
    monkeypatch.setenv("COLUMNS", "200")
    return Console(monkeypatch, capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, one of them turned, and their manifest."""
    root = tmp_path_factory.mktemp("videos")
    write_numbered(root / "walk" / "a.mp4", num_frames=40)
    write_numbered(root / "walk" / "b.mp4", num_frames=50, rotation=90, g="12")
    write_numbered(root / "run" / "c.webm", "libvpx-vp9", num_frames=20, width=96, height=64)
    index_folder(root, root / "manifest.parquet", num_workers=1)
    return root


# show


def test_show_summarises_and_draws(tgmae_data: Console, folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "deep" / "sheet.png"
    code, out, err = tgmae_data("show", folder / "manifest.parquet", "--out", sheet)
    assert (code, err) == (0, "")
    for text in (
        "3 videos below",
        "0.1 min; frames 20 to 50, median 40",
        "h264 (2), vp9 (1)",
        "160×120 (2), 96×64 (1)",
        "walk (2), run (1)",
        "train (3)",
        "3 videos without any",
    ):
        assert text in out
    assert f"contact sheet: {sheet}" in out
    picture = np.asarray(Image.open(sheet).convert("RGB"))
    # The numbered frames are there: black and white blocks, and the gradient's green below red at the right.
    flat = picture.reshape(-1, 3).astype(int)
    assert (flat.max(axis=1) < 30).mean() > 0.05
    assert ((flat[:, 1] - flat[:, 0]) > 100).mean() > 0.002


@pytest.mark.slow
def test_show_turns_pictures_upright(tgmae_data: Console, tmp_path: Path) -> None:
    """The sheet of a turned video is that of the same video stored upright."""
    sheets = []
    for rotation in (0, 270):
        root = tmp_path / str(rotation)
        write_numbered(root / "a.mp4", rotation=rotation, crf="5")
        index_folder(root, root / "manifest.parquet", num_workers=1)
        assert tgmae_data("show", root / "manifest.parquet")[0] == 0
        sheets.append(np.asarray(Image.open(root / "manifest.png").convert("RGB")).astype(int))
    assert sheets[0].shape == sheets[1].shape
    assert np.abs(sheets[0] - sheets[1]).mean() < 3
    assert np.abs(sheets[0] - sheets[1][::-1, ::-1]).mean() > 10  # the measure would see a wrong turn


def test_show_survives_a_missing_video(tgmae_data: Console, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_numbered(tmp_path / name)
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    (tmp_path / "a.mp4").unlink()
    code, out, err = tgmae_data("show", tmp_path / "manifest.parquet")
    assert code == 0
    assert "2 videos below" in out
    assert err.startswith("could not be read: a.mp4: ")
    assert err.count("\n") == 1
    Image.open(tmp_path / "manifest.png").verify()


def test_show_counts_videos_of_unknown_frame_rate(tgmae_data: Console, tmp_path: Path) -> None:
    """Their length is not taken for nothing, and does not make the others' unknown."""
    write_numbered(tmp_path / "a.mp4", num_frames=16)
    out = tmp_path / "manifest.parquet"
    index_folder(tmp_path, out, num_workers=1)
    whole = read_manifest(out)[0]
    hour = replace(whole, segment=None, num_frames=90_000)
    write_manifest(out, [hour, replace(whole, path="b.mp4", fps=0.0)], tmp_path)
    assert "1.0 h and 1 video of unknown frame rate; frames 16 to 90000" in tgmae_data("show", out)[1]


def test_show_prints_labels_as_they_are(tgmae_data: Console, tmp_path: Path) -> None:
    root = tmp_path / "[old] clips"
    write_numbered(root / "[hd] walk" / "a.mp4", num_frames=16)
    index_folder(root, root / "manifest.parquet", num_workers=1)
    code, out, _ = tgmae_data("show", root / "manifest.parquet")
    assert code == 0
    assert "[hd] walk (1)" in out


def test_show_draws_captions_as_they_are(tgmae_data: Console, tmp_path: Path) -> None:
    caption = r"from $5 to 3\frac of $6"
    write_numbered(tmp_path / "a.mp4", num_frames=16)
    (tmp_path / "list.csv").write_text(f'path,caption\na.mp4,"{caption}"\n')
    index_folder(tmp_path, tmp_path / "manifest.parquet", csv_path=tmp_path / "list.csv", num_workers=1)
    code, _, _ = tgmae_data("show", tmp_path / "manifest.parquet")
    assert code == 0
    Image.open(tmp_path / "manifest.png").verify()


def test_show_without_a_manifest(tgmae_data: Console, tmp_path: Path) -> None:
    code, _, _ = tgmae_data("show", tmp_path / "none.parquet")
    assert str(code).startswith("tgmae-data: no manifest at ")
    assert "tgmae-data index" in code


# index


def test_index_reports(tgmae_data: Console, folder: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "new" / "manifest.parquet"
    code, out, err = tgmae_data(
        "index", folder, "--out", out_file, "--min-frames", "30", "--split", "val", "--workers", "1"
    )
    assert code == 0
    assert f"{out_file}: 2 videos (0 unchanged), 1 left out" in out
    assert f"{out_file}.excluded.csv says why" in out
    assert "left out run/c.webm: 20 frames, fewer than 30" in err
    manifest = read_manifest(out_file)
    assert [(manifest[row].path, manifest[row].split) for row in range(2)] == [
        ("walk/a.mp4", "val"),
        ("walk/b.mp4", "val"),
    ]


@pytest.mark.parametrize("arguments", [("nowhere",), ("videos", "--csv", "none.csv")])
def test_index_of_what_is_not_there(
    tgmae_data: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    code, _, _ = tgmae_data("index", *arguments)
    assert str(code).startswith("tgmae-data: ")
    assert arguments[-1] in code


def drop_the_power_to_write_anywhere() -> None:
    """Root may write into read-only folders; CAP_DAC_OVERRIDE (1) is what lets it. PR_CAPBSET_DROP is 24."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def run_unprivileged(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tgmae.cli.data", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True,
        preexec_fn=drop_the_power_to_write_anywhere, check=False, timeout=120,
    )  # fmt: skip


def check_read_only(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """index refuses to write into `root`, and writes to `out`; returns the second run."""
    before = sorted(os.listdir(root))
    refused = run_unprivileged("index", root)
    assert refused.returncode == 1
    assert (
        refused.stderr.strip()
        == f"tgmae-data: cannot write {root / 'manifest.parquet'}; choose a place for the manifest with --out"
    )
    done = run_unprivileged("index", root, "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(root)) == before
    return done


@pytest.mark.slow
def test_index_of_a_read_only_folder(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    write_numbered(root / "a.mp4", num_frames=16)
    root.chmod(0o555)
    try:
        done = check_read_only(root, tmp_path / "out" / "manifest.parquet")
    finally:
        root.chmod(0o755)
    assert "1 video (0 unchanged), 0 left out" in done.stdout
    assert len(read_manifest(tmp_path / "out" / "manifest.parquet")) == 1


@pytest.mark.slow
def test_index_of_real_read_only_videos(tmp_path: Path) -> None:
    data = real_data_folder()
    if data is None:
        pytest.skip("no real videos: set TGMAE_REAL_DATA")
    root = data / "videos" / "misc"
    if root.stat().st_mode & 0o222:
        pytest.skip(f"{root} can be written to")
    done = check_read_only(root, tmp_path / "manifest.parquet")
    assert "15 videos (0 unchanged), 5 left out" in done.stdout
    manifest = read_manifest(tmp_path / "manifest.parquet")
    assert all(os.path.isfile(manifest.file(row)) for row in range(15))


# shapes


@pytest.mark.slow
def test_shapes(tgmae_data: Console, tmp_path: Path) -> None:
    code, out, _ = tgmae_data("shapes", tmp_path / "shapes", "--count", "5", "--objects", "2", "--workers", "1")
    assert code == 0
    assert "5 videos (0 unchanged), 0 left out" in out
    names = sorted(p.name for p in (tmp_path / "shapes").iterdir())
    assert {"boxes.parquet", "captions.csv", "manifest.parquet", "videos"} <= set(names)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "help_given"),
    [
        (("indx", "folder"), "shapes, index, import"),
        (("indx", "folder"), "there is no command 'indx'; did you mean index?"),
        (("--count", "3"), "there is no command '--count' (commands: shapes, index, import"),
        ((), "shapes, index, import"),
        ((), "no command was given"),
        (("index", "folder", "--min-frame", "3"), "--min-frames"),
        (("index",), "FOLDER is missing (tgmae-data index --help lists all flags)"),
        (("index", "folder", "--min-frames", "few"), "--min-frames"),
        (("shapes", "folder", "--codec", "h265"), "h264"),
        (("shapes", "folder", "--objects", "3"), "--objects"),
        (("show", "m.parquet", "--cuont", "3"), "--count"),
    ],
)
def test_typing_errors(tgmae_data: Console, arguments: tuple[str, ...], help_given: str) -> None:
    code, out, err = tgmae_data(*arguments)
    assert code == 2
    assert help_given in out + err
    assert "Traceback" not in out + err


def test_impossible_values_are_errors_of_one_line(tgmae_data: Console, tmp_path: Path) -> None:
    code, _, _ = tgmae_data("shapes", tmp_path / "shapes", "--count", "0")
    assert code == "tgmae-data: expected at least one clip and 1 or 2 objects, got 0 and 1"


def test_help_names_the_subcommands(tgmae_data: Console) -> None:
    code, out, _ = tgmae_data("--help")
    assert code == 0
    for name in ("shapes", "index", "show", "scores"):
        assert name in out
