"""Two data sets whose videos have the same names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from dali_pipelines.types import Video
from tgmae.data.manifest import read_manifest, write_manifest


def split_shapes(shapes: Path, folder: Path) -> tuple[Path, Path]:
    """Make two manifests of the 24 shapes clips, a and b: 14 and 6 to train on, 2 each held out.

    Those of b are copies in a folder of its own, under the names that other videos have in a.
    """
    whole = read_manifest(shapes)
    rows = list(range(len(whole)))
    held_out = [row for row in rows if whole[row].split == "val"]
    train = [row for row in rows if row not in held_out]
    ours, theirs = train[:14] + held_out[:2], train[14:] + held_out[2:]
    copies: list[Video] = []
    for row, name in zip(theirs, ours, strict=False):
        copies.append(replace(whole[row], path=whole[name].path))
        target = folder / "b" / whole[name].path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(whole.file(row), target)
    write_manifest(folder / "a.parquet", [whole[row] for row in ours], whole.root)
    write_manifest(folder / "b" / "manifest.parquet", copies, folder / "b")
    return folder / "a.parquet", folder / "b" / "manifest.parquet"
