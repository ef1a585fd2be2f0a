"""Whatever a run cannot write ends it with one line, and what it has learned is kept where there is room for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.faults.disks import small_disk
from tests.support.runs import command, run_here
from tgmae.model.huggingface import read_step
from tgmae.telemetry.metrics import read_metrics
from tgmae.training.checkpoints.folder import newest_checkpoint
from tgmae.training.checkpoints.read import load_checkpoint

FLAGS = (
    "--pipeline", "pyav", "--epochs", "10", "--max-steps", "3", "--log.picture-every", "2", "--log.checkpoint-every",
    "50", "--log.tensorboard", "--log.no-progress",
)  # fmt: skip


def fail(arguments: list[str]) -> str:
    """Run the command, which must end with one line and exit code 1 (as sys.exit with a text does)."""
    with pytest.raises(SystemExit) as caught:
        run_here(arguments)
    assert isinstance(caught.value.code, str)
    assert caught.value.code.startswith("tgmae-train: ")
    assert "\n" not in caught.value.code
    return caught.value.code


def saved_step(run_dir: Path) -> int:
    newest = newest_checkpoint(run_dir / "checkpoints")
    return 0 if newest is None else int(load_checkpoint(newest)["step"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"),
    [("run.lock", 0), ("config.json", 0), ("metrics.jsonl", 0), ("tensorboard", 1), ("pictures", 1), ("checkpoints", 0),
     ("loss.png", 3), ("hf", 3)],
)  # fmt: skip
def test_something_is_in_the_way(shapes: Path, tmp_path: Path, name: str, steps: int) -> None:
    """A file in place of a folder, and a folder in place of a file: root cannot write those either.

    The steps that were taken until then are saved, and once the obstacle is gone the same command goes on from there.
    """
    run_dir, obstacle = tmp_path / "run", tmp_path / "run" / name
    run_dir.mkdir()
    if "." in name:
        obstacle.mkdir()
        (obstacle / "file").touch()
    else:
        obstacle.touch()
    arguments = command(shapes, run_dir, *FLAGS)
    assert str(obstacle) in fail(arguments)
    assert not list(run_dir.rglob("*.tmp"))
    assert read_step(run_dir / "hf") == (3 if name == "loss.png" else None)
    if "." in name:
        (obstacle / "file").unlink()
        obstacle.rmdir()
    else:
        obstacle.unlink()
    assert saved_step(run_dir) == steps
    run_here(arguments)
    assert saved_step(run_dir) == read_step(run_dir / "hf") == 3
    assert (run_dir / "loss.png").exists()


@pytest.mark.slow
def test_a_profile_that_cannot_be_written(shapes: Path, tmp_path: Path) -> None:
    """It is written after ten steps of warm-up and two that were profiled."""
    (tmp_path / "profile").touch()
    arguments = command(shapes, tmp_path, *FLAGS, "--max-steps", "14", "--profile", "2", "--log.picture-every", "50")
    assert str(tmp_path / "profile") in fail(arguments)
    assert saved_step(tmp_path) == 12


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "24k", "1M", "2M", "2500k"])
def test_a_full_disk(shapes: Path, tmp_path: Path, size: str) -> None:
    """The disk is full at another file each time. With more room the same command goes on from what was kept."""
    disk = tmp_path / "disk"
    with small_disk(disk, size):
        arguments = command(shapes, disk / "run", *FLAGS, "--log.checkpoint-every", "1")
        message = fail(arguments)
        assert "No space left on device" in message
        assert str(disk / "run") in message
        step = saved_step(disk / "run")
        assert all(line["step"] <= 3 for line in read_metrics(disk / "run"))
        subprocess.run(["mount", "-o", "remount,size=50M", disk], check=True)
        run_here(arguments)
        assert saved_step(disk / "run") == read_step(disk / "run" / "hf") == 3 >= step


@pytest.mark.slow
def test_a_read_only_disk(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is noticed before anything takes time."""
    disk = tmp_path / "disk"
    with small_disk(disk, "10M"):
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "Read-only file system" in fail(command(shapes, disk / "run", *FLAGS))
        assert os.listdir(disk) == []
    assert "pipeline" not in capsys.readouterr().out
