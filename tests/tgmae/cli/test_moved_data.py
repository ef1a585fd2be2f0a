"""Videos that moved after they were indexed: every command says which folder is gone, and takes the new one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.videos import write_numbered
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import open_manifest, read_manifest

REPOSITORY = Path(__file__).resolve().parents[3]
QUICK = (
    "--max-steps", "1", "--batch-size", "4", "--device-batch-size", "4", "--mask.kind", "tube", "--pipeline", "pyav",
    "--log.no-progress", "--log.no-tensorboard", "--device", "cpu",
)  # fmt: skip


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tgmae.cli.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `videos` and, beside it, work/m.parquet: the root is stored as an absolute path."""
    folder = tmp_path_factory.mktemp("moved")
    for number in range(6):
        write_numbered(folder / "old" / f"{number}.mp4", num_frames=40)
    index_folder(folder / "old", folder / "work" / "m.parquet", num_workers=1)
    return folder


@pytest.fixture
def moved(indexed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return the manifest, and where the videos are now."""
    new = Path(shutil.copytree(indexed / "old", tmp_path / "new"))
    manifest = Path(shutil.copy(indexed / "work" / "m.parquet", tmp_path / "m.parquet"))
    (indexed / "old").rename(indexed / "gone")
    try:
        yield manifest, new  # type: ignore[misc]
    finally:
        (indexed / "gone").rename(indexed / "old")


def test_a_folder_that_is_gone_is_named(moved: tuple[Path, Path], indexed: Path) -> None:
    manifest, new = moved
    with pytest.raises(
        FileNotFoundError,
        match=rf"the folder of the videos in {manifest} is not there: {indexed}/old; say where they are now with --x F",
    ):
        open_manifest(manifest, flag="--x")
    assert open_manifest(manifest, new).file(3) == str(new / "3.mp4")
    assert len(read_manifest(manifest)) == 6  # what opens no video needs none


def test_a_folder_of_other_files_is_not_taken_for_it(moved: tuple[Path, Path], tmp_path: Path) -> None:
    manifest, new = moved
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"are not there: .*other/0\.mp4 and 5 others looked for; say where"):
        open_manifest(manifest, tmp_path / "other")
    (new / "0.mp4").unlink()  # some may be missing: training counts them
    assert len(open_manifest(manifest, new)) == 6


@pytest.mark.slow
def test_every_command_says_so_in_one_line(moved: tuple[Path, Path], tmp_path: Path) -> None:
    manifest, _ = moved
    for flag, arguments in (
        ("--root", ("data", "show", manifest)),
        ("--root", ("data", "motion", manifest)),
        ("--root", ("data", "compact", manifest, "--out", tmp_path / "c")),
        ("--data.root", ("data", "scores", manifest, "--mask.no-caption", "label")),
        ("--data.root", ("viz", "masks", manifest, "--no-text")),
        ("--data.root", ("train", "demo", "--data.manifest", manifest, "--run-dir", tmp_path / "run", *QUICK)),
    ):
        done = run(*arguments)  # type: ignore[arg-type]
        assert done.returncode == 1, arguments
        assert f"is not there: {read_manifest(manifest).root}; say where they are now with {flag} FOLDER" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "Train with" not in done.stdout


@pytest.mark.slow
def test_the_new_place_is_taken(moved: tuple[Path, Path], tmp_path: Path) -> None:
    manifest, new = moved
    done = run("data", "motion", manifest, "--root", new, "--out", tmp_path / "motion", "--workers", "1")
    assert (done.returncode, "6 computed" in done.stdout) == (0, True), done.stderr
    assert run("data", "show", manifest, "--root", new).returncode == 0
    flags = ("demo", "--data.manifest", manifest, "--data.root", new, "--run-dir", tmp_path / "run", *QUICK)
    done = run("train", *flags)
    assert (done.returncode, "0 videos skipped" in done.stdout) == (0, True), done.stderr


@pytest.mark.slow
def test_what_could_not_be_read_trains_nothing(tmp_path: Path) -> None:
    """All files are there and none can be read."""
    for name in ("a.mp4", "b.mp4"):
        write_numbered(tmp_path / name, num_frames=20)
    out = tmp_path / "m.parquet"
    index_folder(tmp_path, out, num_workers=1)
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x" * 100)
    done = run("data", "motion", out, "--workers", "1")
    assert done.returncode == 1
    assert "none of 2 videos could be read" in done.stderr
    assert "Train with" not in done.stdout


def test_an_index_of_the_new_place_opens_nothing(moved: tuple[Path, Path]) -> None:
    """Sizes and dates are the same. Files that changed on the way are opened."""
    manifest, new = moved
    write_numbered(new / "5.mp4", num_frames=50)
    result = index_folder(new, manifest, num_workers=1)
    assert (result.num_videos, result.num_reused, result.num_gone) == (6, 5, 0)
    assert read_manifest(manifest).root == new
    (new / "0.mp4").unlink()
    result = index_folder(new, manifest, num_workers=1)
    assert "5 videos (5 unchanged), 0 left out, 1 no longer listed, " in result.describe(manifest, 0.0)
