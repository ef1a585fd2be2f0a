"""Damaged clips through everything that reads them: no crash, no hang, and no wrong picture that FFmpeg flags.

TGMAE_FAULTS=all .venv/bin/python -m pytest tests/faults/test_damaged_clips.py    # 200 clips
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import pytest

from dali_pipelines.dali_pipeline import DaliPipeline
from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import ClipPipeline, ClipRequest
from tests.support.faults.damage import damage
from tests.support.requests import request
from tests.support.runs import tiny
from tests.support.videos import write_numbered
from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.train import train

CODECS = {
    "mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "mkv": "libx264", "mov": "mjpeg", "ts": "mpeg2video",
    "vp8.webm": "libvpx",
}  # fmt: skip
SIZE, FRAMES = 32, tuple(range(4, 36, 4))


def write_damaged(folder: Path, count: int) -> Counter[str]:
    """Write `count` damaged clips of 40 frames, and two of every format that are not."""
    kinds: Counter[str] = Counter()
    for place, (suffix, codec) in enumerate(CODECS.items()):
        pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        whole = write_numbered(folder / f"whole_0.{suffix}", codec=codec, g="12", pix_fmt=pixels)
        (folder / f"whole_1.{suffix}").write_bytes(whole.read_bytes())
        for number in range(place, count, len(CODECS)):
            file = folder / f"damaged_{number:03}.{suffix}"
            file.write_bytes(whole.read_bytes())
            kinds[damage(file, seed=number)] += 1
    return kinds


def flagged(file: str, stream: int) -> set[int]:
    """Return the frames that FFmpeg itself calls corrupt, read from the start."""
    numbers: set[int] = set()
    with av.open(file) as container:
        try:
            for number, frame in enumerate(container.decode(container.streams.video[stream])):
                if frame.is_corrupt:
                    numbers.add(number)
        except av.FFmpegError:
            pass
    return numbers


def data_command(*arguments: object) -> str:
    """Run tgmae-data, which must end by itself and without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "tgmae.cli.data", *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    said = done.stdout + done.stderr
    assert done.returncode in (0, 1), said
    assert "Traceback" not in said, said
    return said


class OneByOne:
    """Batch b holds the clip of row b alone; picklable for the worker processes."""

    def __init__(self, requests: list[ClipRequest]) -> None:
        self.requests = requests

    def __call__(self, batch: int) -> tuple[ClipRequest, ...]:
        return (self.requests[batch % len(self.requests)],)


def read_all(pipeline: ClipPipeline, manifest: Manifest) -> set[int]:
    """Return the rows whose clips were handed out rather than skipped."""
    taken: set[int] = set()
    try:
        for row in range(len(manifest)):
            batch = pipeline.next_batch()
            if not batch.skipped:
                taken.add(row)
    finally:
        pipeline.close()
    return taken


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:DALI cannot decode")
def test_damaged_clips(
    tmp_path: Path, repetitions: Callable[[int, int], int], record_counts: Callable[..., None]
) -> None:
    count, videos, out = repetitions(7, 200), tmp_path / "videos", tmp_path / "m.parquet"
    videos.mkdir()
    kinds = write_damaged(videos, count)
    listed = "".join(f"{file.name},a square moves right\n" for file in sorted(videos.iterdir()))
    (tmp_path / "captions.csv").write_text(f"path,caption\n{listed}")
    data_command("index", videos, "--out", out, "--csv", tmp_path / "captions.csv")
    manifest = read_manifest(out)
    names = {manifest[row].path for row in range(len(manifest))}
    assert {f"whole_{copy}.{suffix}" for copy in (0, 1) for suffix in CODECS} <= names

    # Everything that reads whole videos.
    data_command("compact", out, "--out", tmp_path / "compacted", "--short-side", 64)
    data_command("motion", out, "--out", tmp_path / "motion")
    data_command("scores", out, "--out", tmp_path / "scores", "--clip.model", "shapes")

    # Every clip by itself, in both pipelines: what FFmpeg flags must have been skipped.
    requests = [request(manifest, row, FRAMES) for row in range(len(manifest))]
    wrong = {row: flagged(manifest.file(row), manifest[row].stream) & set(FRAMES) for row in range(len(manifest))}
    pipelines: dict[str, ClipPipeline] = {
        "dali": DaliPipeline(manifest, OneByOne(requests), DataConfig(num_workers=2), SIZE),
        "pyav": PyavPipeline(manifest, OneByOne(requests), SIZE),
    }
    taken = {name: read_all(pipeline, manifest) for name, pipeline in pipelines.items()}
    silent = {name: [manifest[row].path for row in sorted(rows) if wrong[row]] for name, rows in taken.items()}
    assert not any(silent.values()), silent
    assert all(manifest[row].path.startswith("damaged") for row in range(len(manifest)) if row not in taken["pyav"])

    # Thirty steps, with both pipelines.
    for name in pipelines:
        config = tiny(out, tmp_path / name, pipeline=name, max_steps=30, epochs=200)
        result = train(replace(config, data=replace(config.data, max_skipped=1.0)))
        assert result.step == 30
    record_counts(
        "damaged clips", tried=count, kinds=dict(sorted(kinds.items())), formats=len(CODECS),
        indexed=len(manifest) - 2 * len(CODECS),
        skipped={name: len(manifest) - len(rows) for name, rows in taken.items()},
        with_frames_that_ffmpeg_flags=sum(map(bool, wrong.values())), of_these_handed_out=0,
    )  # fmt: skip
