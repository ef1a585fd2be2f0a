"""A video that was replaced after indexing is skipped and named, whatever reads it and however it was replaced.

.venv/bin/python -m pytest tests/faults/test_replaced_videos.py    # 20 ways
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dali_pipelines.dali_pipeline import DaliPipeline
from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import ClipPipeline
from tests.support.requests import Plan, request
from tests.support.videos import write_numbered
from tgmae.config.data import DataConfig
from tgmae.data.compact import CompactConfig, compact
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.maps.frames import decode_in_workers

SIZE, FRAMES = 32, tuple(range(8, 24, 2))


def rewrite(file: Path, **options: object) -> None:
    """Replace a video by another encoding of other frames."""
    other = file.with_name(f"new{file.suffix}")
    codec = "libvpx-vp9" if file.suffix == ".webm" else "libx264"
    write_numbered(other, **{"codec": codec, "g": "12", "num_frames": 40, **options})  # type: ignore[arg-type]
    os.replace(other, file)


def same_size(file: Path) -> None:
    """Other content of as many bytes."""
    size = file.stat().st_size
    rewrite(file, rate=24, crf="60" if file.suffix == ".webm" else "40")
    data = file.read_bytes()[:size]
    file.write_bytes(data + bytes(size - len(data)))


def change_bytes(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


def older(file: Path) -> None:
    """A copy from a backup, with its own old date."""
    rewrite(file, rate=24)
    os.utime(file, (1_600_000_000, 1_600_000_000))


def link(file: Path, make: Callable[[Path, Path], None]) -> None:
    other = file.with_name(f"other{file.suffix}.bak")
    file.rename(other)
    rewritten = file.with_name(f"again{file.suffix}")
    shutil.copy(other, rewritten)
    rewrite(rewritten, rate=24)
    make(rewritten, file)


WAYS: dict[str, Callable[[Path], None]] = {
    "other content": lambda file: rewrite(file, rate=24),
    "longer": lambda file: rewrite(file, num_frames=80),
    "shorter": lambda file: rewrite(file, num_frames=30),
    "much shorter": lambda file: rewrite(file, num_frames=10),
    "other keyframes": lambda file: rewrite(file, g="5"),
    "one keyframe": lambda file: rewrite(file, g="999"),
    "larger picture": lambda file: rewrite(file, width=320, height=240),
    "other shape": lambda file: rewrite(file, width=120, height=160),
    "turned": lambda file: rewrite(file, rotation=0 if file.suffix == ".webm" else 90, rate=24),
    "other chroma": lambda file: rewrite(file, pix_fmt="yuv444p"),
    "better quality": lambda file: rewrite(file, crf="5"),
    "worse quality": lambda file: rewrite(file, crf="50"),
    "as many bytes": same_size,
    "one byte": change_bytes,
    "bytes appended": lambda file: file.write_bytes(file.read_bytes() + b"\0" * 100) and None,
    "cut off": lambda file: os.truncate(file, file.stat().st_size * 2 // 3),
    "emptied": lambda file: os.truncate(file, 0),
    "from a backup": older,
    "a symbolic link": lambda file: link(file, lambda target, name: name.symlink_to(target)),
    "a hard link": lambda file: link(file, lambda target, name: name.hardlink_to(target)),
}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two videos for every way, which go to a worker's decoder and to DALI's, and one of each that stays."""
    folder = tmp_path_factory.mktemp("replaced")
    originals = [
        write_numbered(folder / "originals" / "a.mp4", g="12"),
        write_numbered(folder / "originals" / "b.webm", codec="libvpx-vp9", g="12"),
    ]
    for number in range(len(WAYS) + 1):
        for original in originals:
            (folder / "v").mkdir(exist_ok=True)
            shutil.copy(original, folder / "v" / f"{number:02}{original.suffix}")
    index_folder(folder / "v", folder / "m.parquet")
    manifest = read_manifest(folder / "m.parquet")
    for number, replace_video in enumerate(WAYS.values()):
        for original in originals:
            replace_video(folder / "v" / f"{number:02}{original.suffix}")
    return manifest


def last(manifest: Manifest) -> list[int]:
    return [row for row in range(len(manifest)) if manifest[row].path.startswith(f"{len(WAYS):02}")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:DALI cannot decode")
@pytest.mark.parametrize("kind", ["dali", "pyav"])
def test_pipelines_skip_them(indexed: Manifest, kind: str, record_counts: Callable[..., None]) -> None:
    plan = Plan(tuple(request(indexed, row, FRAMES) for row in range(len(indexed))))
    config = DataConfig(num_workers=2)
    pipeline: ClipPipeline = (
        DaliPipeline(indexed, plan, config, SIZE) if kind == "dali" else PyavPipeline(indexed, plan, SIZE)
    )
    try:
        batch = pipeline.next_batch()
    finally:
        pipeline.close()
    reasons = {video.row: video.reason for video in batch.skipped}
    assert sorted(set(range(len(indexed))) - reasons.keys()) == last(indexed)
    assert all("indexed" in reason for reason in reasons.values()), reasons
    record_counts(f"replaced videos, {kind}", tried=len(indexed) - len(last(indexed)), skipped=len(reasons))


@pytest.mark.slow
def test_maps_skip_them(indexed: Manifest, tmp_path: Path, record_counts: Callable[..., None]) -> None:
    result = build_motion(indexed, tmp_path / "motion", 2)
    named = {video.row: video.reason for video in result.skipped}
    h264 = [row for row in range(len(indexed)) if indexed[row].codec == "h264"]
    assert set(h264) - named.keys() == set(h264) & set(last(indexed))
    assert all("indexed" in named[row] for row in h264 if row in named)
    frames = list(decode_in_workers(indexed, list(range(len(indexed))), 6, 16, 4, 2))
    assert [row for row, (found, _) in enumerate(frames) if found is not None] == last(indexed)
    assert all("indexed" in reason for found, reason in frames if found is None)
    skipped = {"motion": len(set(h264) & named.keys()), "scores": sum(found is None for found, _ in frames)}
    record_counts("replaced videos, maps", tried=len(indexed) - len(last(indexed)), skipped=skipped)


@pytest.mark.slow
def test_compacting_leaves_them_out(indexed: Manifest, tmp_path: Path, record_counts: Callable[..., None]) -> None:
    result = compact(indexed, tmp_path / "out", CompactConfig(short_side=64), 2)
    kept = {indexed[row].path for row in result.rows}
    assert kept == {indexed[row].path for row in last(indexed)}
    assert len(result.excluded) == 2 * len(WAYS)
    record_counts("replaced videos, compact", tried=2 * len(WAYS), skipped=len(result.excluded))
