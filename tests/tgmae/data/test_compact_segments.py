"""Compacting: every segment becomes a file of its own, with its captions, boxes and numbers in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import av
import pyarrow.parquet as pq
import pytest

from dali_pipelines.types import Caption
from tests.support.segments import cut_segments
from tests.support.videos import make_video, read_number, write_numbered
from tgmae.cli.compact import _total, decode_whole, decode_windows
from tgmae.data.compact import JOURNAL, compact, name_results
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.transcode import CompactConfig, choose_frames


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Segments of a.mp4 and a whole file whose result would have the name of one of theirs."""
    folder = tmp_path_factory.mktemp("compact") / "in"
    write_numbered(folder / "a.mp4", g="12", keyint_min="12", sc_threshold="0", bf="2")
    write_numbered(folder / "a-5-20.avi", codec="mpeg4", num_frames=16)
    write_numbered(folder / "turned.mkv", num_frames=30, rotation=270)
    index_folder(folder, folder / "manifest.parquet", num_workers=1)
    files = read_manifest(folder / "manifest.parquet")
    assert [files[row].path for row in range(3)] == ["a-5-20.avi", "a.mp4", "turned.mkv"]
    segments = [(1, (5, 20)), (1, (30, 40)), (1, None), (0, None), (2, (28, 30)), (1, (0, 1))]
    return cut_segments(files, folder.parent / "segments.parquet", segments)


def numbers_in(file: str) -> list[int]:
    with av.open(file) as container:
        return [read_number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


@pytest.mark.slow
def test_segments_become_files_of_their_own(numbered: Manifest, tmp_path: Path) -> None:
    config = CompactConfig(short_side=None, align=2, gop=4)
    result = compact(numbered, tmp_path / "out", config, num_workers=2)
    assert (result.rows, result.num_reused, result.excluded) == (tuple(range(6)), 0, [])
    made = read_manifest(result.manifest)
    assert len(set(made.names())) == 6
    for row in range(6):
        before, after = numbered[row], made[row]
        assert after.segment is None
        assert numbers_in(made.file(row)) == list(range(before.start, before.end)), before.name
        assert after.num_frames == before.length
        for name in ("captions", "label", "split", "width", "height"):
            assert getattr(after, name) == getattr(before, name), name
    assert made[0].captions == (Caption("frames 5 to 20", "test"),)
    assert {made[row].path for row in (1, 2, 4)} == {"a-30-40.mp4", "a.mp4", "turned-28-30.mp4"}
    assert {made[row].path for row in (0, 3)} == {"a.mp4#5-20.mp4", "a-5-20.avi.mp4"}  # both would be a-5-20.mp4

    # The same command again finds all of them done, also where a former version wrote the journal.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.mp4")}
    journal = tmp_path / "out" / JOURNAL
    lines = [json.loads(line.partition("\t")[0]) for line in journal.read_text().splitlines() if line]
    assert {line[0] for line in lines[1:]} == set(numbered.names())
    for line in lines[1:]:
        line[3]["captions"] = ["ab"]
        del line[3]["segment"]
    for text in (journal.read_text(), "\n".join(json.dumps(line) for line in lines)):
        journal.write_text(text)
        again = compact(numbered, tmp_path / "out", config, num_workers=2)
        assert (again.rows, again.num_reused, again.excluded) == (tuple(range(6)), 6, [])
        after = read_manifest(again.manifest)
        assert [after[row] for row in range(6)] == [made[row] for row in range(6)]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_results_have_different_names() -> None:
    sources = [
        make_video(path=path, segment=segment)
        for path, segment in (
            ("a.mp4", (3, 9)), ("a.avi", (3, 9)), ("a-3-9.mkv", None), ("a.mp4", None), ("a.mp4", (9, 12)),
            ("b/a.mp4", (3, 9)),
        )
    ]  # fmt: skip
    names = name_results(sources, ".webm")
    assert list(names) == [video.name for video in sources]
    assert len(set(names.values())) == len(sources)
    assert [names[name] for name in ("a.mp4", "a.mp4#9-12", "b/a.mp4#3-9")] == [
        "a.webm", "a-9-12.webm", "b/a-3-9.webm",
    ]  # fmt: skip


def test_kept_frames_are_counted_from_the_segment(numbered: Manifest) -> None:
    video, file = numbered[0], numbered.file(0)
    frames, rate = choose_frames(file, video, CompactConfig(stride=4))
    assert (frames, float(rate)) == ([5, 9, 13, 17], 6.25)
    frames, rate = choose_frames(file, video, CompactConfig(fps=12.5))
    assert (frames, float(rate)) == ([5, 7, 9, 11, 13, 15, 17, 19], 12.5)


def test_boxes_follow_their_segments(shapes: Path, tmp_path: Path) -> None:
    """Two segments of one file each take the boxes of their frames, and no seed says what else was drawn."""
    files = read_manifest(shapes)
    segments = cut_segments(files, tmp_path / "segments.parquet", [(0, (4, 20)), (0, (20, 38)), (1, None)])
    compact(segments, tmp_path / "out", CompactConfig(short_side=None, align=2), num_workers=1)
    old, new = (pq.read_table(folder / "boxes.parquet") for folder in (shapes.parent, tmp_path / "out"))
    before = {row["path"]: row["boxes"] for row in old.to_pylist()}
    after = {row["path"]: row["boxes"] for row in new.to_pylist()}
    name = files[0].path.removesuffix(".mp4")
    assert after == {
        f"{name}-4-20.mp4": before[files[0].path][4:20],
        f"{name}-20-38.mp4": before[files[0].path][20:38],
        files[1].path: before[files[1].path],
    }
    assert b"seed" in old.schema.metadata
    assert b"seed" not in (new.schema.metadata or {})


def test_the_report_counts_segments(numbered: Manifest) -> None:
    videos = [numbered[row] for row in range(len(numbered))]
    total = _total(videos)
    sizes = {video.path: video.num_bytes for video in videos}
    assert (total["files"], total["frames"]) == (3, 15 + 10 + 40 + 16 + 2 + 1)
    assert total["bytes"] == sum(sizes.values())
    assert total["hours"] == pytest.approx(84 / 25 / 3600)
    assert total["bits_per_pixel"] == pytest.approx(8 * total["bytes"] / ((40 + 16 + 30) * 160 * 120))
    for row in range(len(numbered)):
        assert decode_whole(numbered.file(row), numbered[row], 0) == numbered[row].length
        assert decode_windows(numbered.file(row), numbered[row], row) == 4


def test_the_speed_is_measured_within_the_segment(numbered: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "dali_pipelines.video.decode.decode_frames", lambda file, video, frames, seek: asked.extend(frames) or iter(())
    )
    for place in range(20):
        decode_windows("", replace(numbered[2], segment=(12, 31)), place)
    assert (min(asked), max(asked)) == (12, 30)
