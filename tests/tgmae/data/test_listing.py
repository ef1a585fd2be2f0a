"""What a folder holds: every video is listed, and what is not taken is counted."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.videos import write_numbered
from tgmae.data.indexing import index_folder
from tgmae.data.listing import SUFFIXES, list_folder
from tgmae.data.manifest import read_manifest

REPOSITORY = Path(__file__).resolve().parents[3]


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"\0\xff")


def paths(root: Path) -> list[str]:
    return [entry.path for entry in list_folder(root, "train").entries]


def test_suffixes_of_cameras_and_recorders(tmp_path: Path) -> None:
    suffixes = "MTS m2ts asf vob mxf gif qt f4v divx y4m 3g2 mpg4 mjpeg h264 m2t rm MP4 dv ogm"
    names = suffixes.split()
    touch(tmp_path, *(f"a.{name}" for name in names), "noext", "a.jpg", "a.png", "a.srt", "a.mp3", "a.json", "a.webp")
    listing = list_folder(tmp_path, "train")
    assert {entry.path for entry in listing.entries} == {*(f"a.{name}" for name in names), "noext"}
    assert listing.others == Counter({".jpg": 1, ".png": 1, ".srt": 1, ".mp3": 1, ".json": 1, ".webp": 1})
    assert not SUFFIXES & {".txt", ".csv", ".json", ".srt", ".jpg", ".png", ".webp", ".mp3", ".wav", ".m3u8"}


def test_files_without_a_suffix(tmp_path: Path) -> None:
    """Text is not a video, nor is what hides; all else is opened."""
    touch(tmp_path, "clip", ".DS_Store", ".git/objects/0a1b")
    (tmp_path / "README").write_text("Grüße\n" * 200)
    (tmp_path / "cut").write_text("x" * 511 + "ü" * 100)  # the first 512 bytes end within a character
    (tmp_path / "_SUCCESS").touch()
    listing = list_folder(tmp_path, "train")
    assert [entry.path for entry in listing.entries] == ["clip"]
    assert listing.others == Counter({"": 5})


def test_videos_that_are_not_called_so_are_indexed(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.avi"):
        write_numbered(tmp_path / "walk" / name, "mpeg4", num_frames=16)
    (tmp_path / "walk" / "a.mp4").rename(tmp_path / "walk" / "noext")
    (tmp_path / "walk" / "b.avi").rename(tmp_path / "walk" / "b.DIVX")
    touch(tmp_path, "walk/binary", "x.srt", "y.srt", "z.TXT")
    out = tmp_path / "manifest.parquet"
    result = index_folder(tmp_path, out, num_workers=1)
    manifest = read_manifest(out)
    assert [(manifest[row].path, manifest[row].label) for row in range(2)] == [
        ("walk/b.DIVX", "walk"),
        ("walk/noext", "walk"),
    ]
    assert [excluded.path for excluded in result.excluded] == ["walk/binary"]
    assert result.describe(out, 0.0) == (
        f"{out}: 2 videos (0 unchanged), 1 left out ({result.report} says why), "
        "3 other files (.srt 2, .TXT 1) not taken, 0.0 s"
    )


def test_what_tgmae_writes_is_not_worth_a_word(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", num_frames=16)
    out = tmp_path / "manifest.parquet"
    index_folder(tmp_path, out, num_workers=1)
    names = "manifest.png boxes.parquet compact.json manifest.parquet.journal m.parquet.123.tmp motion/part-0.arrow"
    touch(tmp_path, *names.split(), "motion/maps.json", "scores/writing-0.lock")
    assert list_folder(tmp_path, "train", out).others == Counter()
    touch(tmp_path, "other.png")
    assert list_folder(tmp_path, "train", out).others == Counter({".png": 1})


# Links


def test_two_links_to_a_folder_are_two_classes(tmp_path: Path) -> None:
    touch(tmp_path, "store/1.mp4", "set/top.mp4", "set/zebra/2.mp4")
    (tmp_path / "set" / "running").symlink_to("../store")
    (tmp_path / "set" / "jogging").symlink_to("../store")
    (tmp_path / "set" / "animals").symlink_to("zebra")
    entries = list_folder(tmp_path / "set", "train").entries
    assert [(entry.path, entry.label) for entry in entries] == [
        ("top.mp4", ""),
        ("animals/2.mp4", "animals"),
        ("jogging/1.mp4", "jogging"),
        ("running/1.mp4", "running"),
        ("zebra/2.mp4", "zebra"),
    ]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    touch(tmp_path, "set/a/1.mp4", "set/b/2.mp4")
    (tmp_path / "set" / "loop").symlink_to(".")
    (tmp_path / "set" / "a" / "up").symlink_to("../..")
    (tmp_path / "set" / "a" / "to_b").symlink_to("../b")
    (tmp_path / "set" / "b" / "to_a").symlink_to("../a")
    found = paths(tmp_path / "set")
    assert {"a/1.mp4", "b/2.mp4", "a/to_b/2.mp4", "b/to_a/1.mp4"} <= set(found)
    assert len(found) == len(set(found)) < 20


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", num_frames=16)
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    result = index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    assert [excluded.path for excluded in result.excluded] == ["gone.mp4"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", num_frames=16)
    for name in ("pipe.mp4", "pipe"):
        os.mkfifo(tmp_path / name)
    result = index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    assert {excluded.path for excluded in result.excluded} == {"pipe.mp4", "pipe"}


# Folders that cannot be read


def drop_the_power_to_read_anything() -> None:
    """Root may read what is closed, by CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2). PR_CAPBSET_DROP is 24."""
    if os.geteuid() == 0:
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def index_unprivileged(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tgmae.cli.data", "index", str(root), "--out", str(out), "--workers", "1"]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
        preexec_fn=drop_the_power_to_read_anything,
    )  # fmt: skip


@pytest.mark.slow
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    root, out = tmp_path / "videos", tmp_path / "m.parquet"
    write_numbered(root / "open" / "a.mp4", num_frames=16)
    write_numbered(root / "shut" / "b.mp4", num_frames=16)
    (root / "shut").chmod(0)
    try:
        done = index_unprivileged(root, out)
        assert "left out shut: Permission denied\n" in done.stderr
        assert (done.returncode, "1 video (0 unchanged), 1 left out" in done.stdout) == (0, True)
        (root / "open" / "a.mp4").unlink()
        refused = index_unprivileged(root, out)
        assert refused.returncode == 1
        assert "shut cannot be read (Permission denied)" in refused.stderr
        root.chmod(0)
        assert index_unprivileged(root, out).stderr.count("\n") == 1
    finally:
        root.chmod(0o755)
        (root / "shut").chmod(0o755)


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", num_frames=16)
    for name in (b"\xff.mp4", b"x.\xff"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).touch()
    (tmp_path / "b\\..\\c.mp4").touch()
    out = tmp_path / "manifest.parquet"
    result = index_folder(tmp_path, out, num_workers=1)
    assert {excluded.path: excluded.reason.partition(":")[0] for excluded in result.excluded} == {
        "\\udcff.mp4": "the file name is not UTF-8",
        "b\\..\\c.mp4": "path leaves the root",
    }
    assert r"1 other file (.\udcff 1) not taken" in result.describe(out, 0.0)
