"""Segments in the manifest, in the clips that are drawn from them, and where a folder is indexed again."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dali_pipelines.types import Caption, ClipRequest, Video
from tests.support.videos import make_video, write_numbered
from tgmae.captions.policy import require_captions
from tgmae.cli.data import _summary
from tgmae.config.data import DataConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.data.sampling import ClipSampler, sample_frames
from tgmae.masks.maps.store import digest_videos

SEGMENTED = [
    make_video(segment=(0, 20), captions=(Caption("he sits", "csv"), Caption("a man sits down", "a captioning model"))),
    make_video(segment=(20, 40), captions=(Caption("he stands", ""),)),
    make_video(),
    make_video(path="läuft/b 2.webm", captions=(), segment=(39, 40), split="val"),
]


def written(folder: Path, videos: list[Video]) -> Manifest:
    write_manifest(folder / "manifest.parquet", videos, folder)
    return read_manifest(folder / "manifest.parquet")


def rewritten(path: Path, **columns: object) -> Path:
    """Replace columns of a manifest's file, as a tool of the user's might."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)
    return path


# The manifest


def test_segments_and_sources_are_read_back(tmp_path: Path) -> None:
    manifest = written(tmp_path, SEGMENTED)
    for found in (manifest, pickle.loads(pickle.dumps(manifest))):  # workers get it pickled
        assert [found[row] for row in range(4)] == SEGMENTED
    assert manifest.names() == [video.name for video in SEGMENTED]
    assert manifest.names() == ["walk/a.mp4#0-20", "walk/a.mp4#20-40", "walk/a.mp4", "läuft/b 2.webm#39-40"]
    assert manifest.captions() == [list(video.captions) for video in SEGMENTED]
    assert manifest.captions()[0][1].source == "a captioning model"
    assert manifest.file(0) == manifest.file(2) == str(tmp_path.resolve() / "walk" / "a.mp4")
    assert [video.name for video in map(manifest.select_split("val").__getitem__, range(1))] == ["läuft/b 2.webm#39-40"]


def test_other_captions_keep_the_segments(tmp_path: Path) -> None:
    manifest = written(tmp_path, SEGMENTED)
    captions = [[Caption(f"number {row}", "test")] * row for row in range(4)]
    changed = manifest.with_captions(captions)
    assert changed.captions() == captions
    assert [changed[row].captions for row in range(4)] == [tuple(row) for row in captions]
    assert changed.names() == manifest.names()
    assert changed.fingerprint != manifest.fingerprint


def test_segments_tell_manifests_and_maps_apart(tmp_path: Path) -> None:
    """What maps depend on changes with every bound; a source changes neither clips nor maps."""
    bounds = [None, (0, 20), (20, 40), (0, 21), (1, 20)]
    rows = [replace(make_video(), segment=segment) for segment in bounds]
    manifest = written(tmp_path, rows)
    for columns in ((), ("captions",)):
        assert len(set(digest_videos(manifest, *columns))) == len(rows)
    alone = [written(tmp_path, [row]) for row in rows]
    assert [digest_videos(one) for one in alone] == [[digest] for digest in digest_videos(manifest)]
    assert len({one.fingerprint for one in alone}) == len(rows)
    captions = tuple(Caption(caption.text, "other") for caption in rows[1].captions)
    other = written(tmp_path, [replace(rows[1], captions=captions)])
    assert other.captions() != alone[1].captions()
    assert other.fingerprint == alone[1].fingerprint
    assert digest_videos(other, "captions") == digest_videos(alone[1], "captions")


def test_a_segment_of_the_whole_file_is_its_row(tmp_path: Path) -> None:
    manifest = written(tmp_path, [make_video(segment=(0, 40))])
    assert manifest[0] == make_video()
    assert manifest.names() == ["walk/a.mp4"]


@pytest.mark.parametrize(("start", "end"), [(-1, 20), (20, 20), (30, 20), (20, 41), (40, 41)])
def test_segments_outside_the_file_are_refused(tmp_path: Path, start: int, end: int) -> None:
    """In a file; in memory a `Video` refuses them."""
    written(tmp_path, SEGMENTED)
    path = rewritten(tmp_path / "manifest.parquet", start_frame=[0, start, 0, 39], end_frame=[20, end, 40, 40])
    message = (
        rf"manifest\.parquet: row 1, walk/a\.mp4: frames {start} to {end} are not a segment of a file of 40 frames; "
        "make it again with: tgmae-data index"
    )
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


def test_videos_without_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"walk/a\.mp4 has no frames"):
        write_manifest(tmp_path / "manifest.parquet", [make_video(num_frames=0)], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sources", [["csv"], ["csv", "csv", "csv"], []])
def test_every_caption_needs_a_source(tmp_path: Path, sources: list[str]) -> None:
    """Never the first captions alone, as if there were no others."""
    manifest = written(tmp_path, SEGMENTED)
    path = rewritten(tmp_path / "manifest.parquet", caption_sources=[sources, [""], ["csv", "csv"], []])
    with pytest.raises(ValueError, match=r"row 0, walk/a\.mp4: captions .*he sits.* have sources .* one source each"):
        read_manifest(path)
    column = pa.array([sources, [""], ["csv", "csv"], []], pa.list_(pa.string()))
    place = manifest.table.schema.get_field_index("caption_sources")
    wrong = Manifest(manifest.table.set_column(place, "caption_sources", column), manifest.root)
    with pytest.raises(ValueError, match="zip"):
        wrong.captions()
    with pytest.raises(ValueError, match="zip"):
        wrong[0]


def test_two_rows_of_one_name_are_refused(tmp_path: Path) -> None:
    """Maps and compacted files are told apart by names. Overlapping segments have different ones."""
    twice = [make_video(segment=(3, 9)), make_video(segment=(3, 9), captions=("a second caption",))]
    message = r"one row per video or segment, got several for walk/a\.mp4#3-9; a row may have several captions"
    with pytest.raises(ValueError, match=message):
        write_manifest(tmp_path / "manifest.parquet", twice, tmp_path)
    assert not list(tmp_path.iterdir())
    written(tmp_path, [make_video(segment=(3, 9)), make_video(segment=(3, 10))])
    path = rewritten(tmp_path / "manifest.parquet", end_frame=[9, 9])
    with pytest.raises(ValueError, match=rf"manifest\.parquet: expected {message}"):
        read_manifest(path)


@pytest.mark.parametrize(("choice", "words"), [("error", "has no caption"), ("label", "neither caption nor label")])
def test_segments_without_captions_are_named(tmp_path: Path, choice: Literal["error", "label"], words: str) -> None:
    bare = make_video(segment=(3, 9), captions=(Caption(" ", "csv"),), label="")
    manifest = written(tmp_path, [*SEGMENTED[:2], bare])
    with pytest.raises(ValueError, match=rf"{words}, such as walk/a\.mp4#3-9[.;]"):
        require_captions(manifest, choice)
    kept, note = require_captions(manifest, "exclude")
    assert [kept[row] for row in range(len(kept))] == SEGMENTED[:2]
    assert note == "1 video without a caption is left out"


def test_the_summary_counts_frames_of_segments_and_bytes_of_files(tmp_path: Path) -> None:
    videos = [
        make_video(segment=(0, 10), num_bytes=2**20), make_video(segment=(10, 35), num_bytes=2**20),
        make_video(path="b.mp4", num_frames=9000, num_bytes=2**21),
    ]  # fmt: skip
    said = show(written(tmp_path, videos))
    assert "3 videos, segments of 2 files below" in said
    assert "6.0 min; frames 10 to 9000, median 25" in said
    assert "3.0 MiB" in said
    said = show(written(tmp_path, [make_video(), make_video(path="b.mp4")]))
    assert "2 videos below" in said
    assert "frames 40 to 40" in said


def show(manifest: Manifest) -> str:
    """Return the summary as text, its table's lines unwrapped."""
    console = Console(width=400, file=io.StringIO())
    with console.capture() as capture:
        console.print(_summary(manifest))
    return capture.get()


# Sampling

SAMPLINGS = [
    DataConfig(stride=1), DataConfig(stride=3), DataConfig(stride=4, repeat=2), DataConfig(sampling="uniform"),
]  # fmt: skip


@pytest.mark.parametrize("data", SAMPLINGS, ids=["dense 1", "dense 3", "dense 4", "uniform"])
@pytest.mark.parametrize("segment", [(0, 30), (7, 37), (10, 40), (5, 13), (5, 12), (8, 10), (39, 40), (0, 1)])
def test_clips_stay_in_their_segment(segment: tuple[int, int], data: DataConfig) -> None:
    """They reach its first and last frames, and are those of a file of its length, moved to its start."""
    video = make_video(segment=segment)
    short = make_video(num_frames=video.length)
    reached: set[int] = set()
    for seed in range(200):
        frames = sample_frames(np.random.default_rng(seed), video, data, 8)
        assert len(frames) == 8
        assert video.start <= frames[0]
        assert frames[-1] < video.end
        assert list(frames) == sorted(frames)
        moved = sample_frames(np.random.default_rng(seed), short, data, 8)
        assert frames == tuple(video.start + frame for frame in moved)
        reached.update(frames)
    assert min(reached) == video.start
    last = video.end - 1
    if data.sampling == "dense" and video.length < 7 * data.stride + 1:  # the last that the stride reaches
        last = video.start + (video.length - 1) // data.stride * data.stride
    assert max(reached) == last
    if data.stride == 1:
        assert reached == set(range(*segment))


def test_a_clip_must_fit_the_longest_segment(tmp_path: Path) -> None:
    manifest = written(tmp_path, [make_video(segment=(0, 10)), make_video(segment=(10, 22))])
    ClipSampler(manifest=manifest, data=DataConfig(stride=1), num_frames=12, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"a clip spans 13 frames .* longest video has 12"):
        ClipSampler(manifest=manifest, data=DataConfig(stride=1), num_frames=13, batch_size=2, seed=0)


@pytest.fixture
def three(tmp_path: Path) -> Manifest:
    """Whole files: turned, with one, two and no captions, and short."""
    return written(
        tmp_path,
        [
            make_video(),
            make_video(
                path="läuft/b 2.webm", codec="vp9", width=320, height=241, num_frames=9, captions=(), rotation=90,
                split="val",
            ),
            make_video(path="c.mkv", num_frames=300, num_bytes=2**40, captions=("日本語",)),
        ],
    )  # fmt: skip


# What commit c233382 drew, before there were segments: row, epoch, position, frames, crop, flip, caption, mask seed.
DENSE_8 = range(0, 16, 2)
DRAWN_DENSE = [
    (1, 0, 0, (0, 2, 4, 6, 8, 8, 8, 8), (40, 15, 159, 180), True, 0, 5454825374818000741),
    (1, 0, 1, (0, 2, 4, 6, 8, 8, 8, 8), (108, 0, 210, 241), True, 0, 2431215157194453399),
    (2, 0, 2, tuple(148 + step for step in DENSE_8), (39, 7, 105, 90), True, 0, 2153197827540383767),
    (2, 0, 3, tuple(148 + step for step in DENSE_8), (68, 40, 90, 79), False, 0, 7097877804336599430),
    (2, 4, 4, tuple(169 + step for step in DENSE_8), (60, 10, 79, 79), True, 0, 1807770854934874114),
    (2, 4, 5, tuple(169 + step for step in DENSE_8), (17, 10, 90, 79), True, 0, 5379694158465585388),
    (2, 5, 0, tuple(61 + step for step in DENSE_8), (20, 0, 120, 120), False, 0, 7933270048039352568),
    (2, 5, 1, tuple(61 + step for step in DENSE_8), (0, 0, 120, 120), True, 0, 1987984483207611413),
]
DRAWN_UNIFORM = [
    (2, 4, 0, (9, 61, 103, 170, 203, 270), (0, 12, 90, 105), False, 0, 6123376127040596697),
    (0, 4, 1, (5, 8, 17, 23, 32, 34), (39, 21, 105, 90), False, 0, 840961094898992460),
    (1, 4, 2, (0, 1, 3, 4, 6, 8), (76, 0, 241, 241), False, 0, 2934666314729252612),
    (0, 5, 0, (4, 8, 15, 20, 27, 36), (0, 12, 90, 105), False, 0, 4453909960860011412),
]


def as_tuple(r: ClipRequest) -> tuple[object, ...]:
    crop = (r.crop.x, r.crop.y, r.crop.width, r.crop.height)
    return r.row, r.epoch, r.position, r.frames, crop, r.flip, r.caption, r.mask_seed


def test_whole_files_are_drawn_as_before(three: Manifest) -> None:
    dense = ClipSampler(
        manifest=three, data=DataConfig(stride=2, flip=True, repeat=2), num_frames=8, batch_size=4, seed=5
    )
    assert [as_tuple(request) for batch in (0, 7) for request in dense(batch)] == DRAWN_DENSE
    uniform = ClipSampler(
        manifest=three, data=DataConfig(sampling="uniform", captions="first"), num_frames=6, batch_size=4, seed=0
    )
    assert [as_tuple(request) for request in uniform(3)] == DRAWN_UNIFORM


def test_augmentation_has_a_seed_of_its_own(three: Manifest) -> None:
    """Different in every clip of two epochs, also in clips that share a decode; the same in every run."""

    def draw(seed: int) -> list[int]:
        data = DataConfig(repeat=2)
        sampler = ClipSampler(manifest=three, data=data, num_frames=4, batch_size=6, seed=seed)
        requests = [*sampler(0), *sampler(1)]
        assert {request.epoch for request in requests} == {0, 1}
        assert not {request.mask_seed for request in requests} & {request.augment_seed for request in requests}
        return [request.augment_seed for request in requests]

    first = draw(3)
    assert len(set(first)) == len(first) == 12
    assert all(0 <= seed < 2**63 for seed in first)
    assert draw(3) == first
    assert not set(draw(4)) & set(first)


# Indexing


def test_indexing_over_segments_gives_whole_files(tmp_path: Path) -> None:
    """A segment may lack keyframes of its file, so the file is probed again."""
    write_numbered(tmp_path / "a.mp4", num_frames=20)
    out = tmp_path / "manifest.parquet"
    index_folder(tmp_path, out, num_workers=1)
    whole = read_manifest(out)[0]
    write_manifest(out, [replace(whole, segment=(2, 9)), replace(whole, segment=(9, 20))], tmp_path)
    result = index_folder(tmp_path, out, num_workers=1)
    assert (result.num_videos, result.num_reused) == (1, 0)
    assert read_manifest(out)[0] == whole


def test_an_old_journal_is_read(tmp_path: Path) -> None:
    """An earlier version was killed while it indexed: its captions are strings, and it knows no segments."""
    write_numbered(tmp_path / "a.mp4", num_frames=20)
    (tmp_path / "videos.csv").write_text("path,label,caption\na.mp4,count,a bar\n")
    out = tmp_path / "manifest.parquet"
    index_folder(tmp_path, out, csv_path=tmp_path / "videos.csv", num_workers=1)
    before = read_manifest(out)[0]
    assert before.captions == (Caption("a bar", "csv"),)
    out.unlink()
    old = {name: getattr(before, name) for name in Video.__slots__ if name != "segment"}
    old |= {"captions": ["a bar", "ab"]}
    out.with_name("manifest.parquet.journal").write_text(json.dumps(old) + "\n")
    result = index_folder(tmp_path, out, csv_path=tmp_path / "videos.csv", num_workers=1)
    assert (result.num_videos, result.num_reused) == (1, 1)
    assert read_manifest(out)[0] == before
