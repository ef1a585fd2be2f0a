"""The checkpoints in a folder: which there are, which is the newest, which go."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step_(\d{8})\.(pt|dcp)")

FORMAT = 3  # of what a checkpoint holds. 2 held the autoencoder alone, 1 had no number; both are still read


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, by their steps."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def read_number(path: Path) -> int:
    """Return the steps that a checkpoint's name says."""
    return int(path.stem.removeprefix("step_"))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for path in list_checkpoints(folder)[:-keep]:
        if path.is_dir():  # a folder that is deleted in part must not look like a checkpoint
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))
        else:
            path.unlink()


def remove_left_overs(folder: Path) -> None:
    """Delete what killed runs had not finished to write. No other process may be writing."""
    for left_over in folder.glob("*.tmp"):
        if left_over.is_dir():
            shutil.rmtree(left_over)
        else:
            left_over.unlink()


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of more than `step` steps, which this run does not resume from, to .old-<n>."""
    newer = [path for path in list_checkpoints(folder) if read_number(path) > step]
    return [path.rename(free_name(path)) for path in newer]


def free_name(path: Path) -> Path:
    """Return PATH.old-<n> with the first n that is free."""
    numbers = itertools.count(1)
    return next(old for number in numbers if not (old := path.with_name(f"{path.name}.old-{number}")).exists())


def describe_failure(path: Path, reason: object) -> str:
    """Say that a checkpoint could not be written, and which one to go on from."""
    kept = newest_checkpoint(path.parent)
    return f"could not write {path}: {reason}. " + (
        f"{kept} is whole; make room and start again to resume from it" if kept else "no checkpoint was kept"
    )
