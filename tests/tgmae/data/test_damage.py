"""A flipped bit in what indexing writes is noticed, or changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dali_pipelines.types import Video
from tests.support.faults.flips import TryFlips, count_flips, flip_bits
from tests.support.videos import make_video, write_numbered
from tgmae.data.earlier_index import open_journal, read_journal
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import FORMAT_KEY, ROOT_KEY, Manifest, read_manifest, write_manifest

VIDEOS = [
    make_video(path=f"walk/{number}.mp4", label=("walk", "run")[number % 2], num_bytes=1000 + number)
    for number in range(40)
]
DAMAGED = r"manifest\.parquet is (damaged|not a Parquet file, or is damaged): .*; make it again with: tgmae-data index"


def read_or_refuse(path: Path) -> Manifest | str:
    """Return the manifest, or the message of the error that a user would see as one line."""
    try:
        return read_manifest(path)
    except ValueError as error:
        return str(error)


def rows(manifest: Manifest) -> list[Video]:
    return [manifest[row] for row in range(len(manifest))]


def test_flipped_bits_of_a_manifest(tmp_path: Path, try_flips: TryFlips) -> None:
    """None passes with other content; the few that pass hit the mark that stands before the digest."""
    path = tmp_path / "manifest.parquet"
    write_manifest(path, VIDEOS, tmp_path / "videos")

    def read() -> object:
        found = read_manifest(path)
        return rows(found), found.root

    flips = try_flips(path, read, few=600, all=20_000)
    assert flips.refused > 0.93 * flips.tried
    assert all(re.search(DAMAGED, message) for message in flips.messages)
    assert rows(read_manifest(path)) == VIDEOS


def test_every_bit_of_footer_and_digest(tmp_path: Path) -> None:
    """A random flip seldom hits what stands there: types, metadata, the root, the digest itself."""
    path = tmp_path / "manifest.parquet"
    write_manifest(path, VIDEOS[:1], tmp_path)
    whole, before = path.read_bytes(), read_manifest(path)
    place = whole.index(b"tgmae: SHA-256")
    for byte in [*range(place - 1, place + 80), *range(whole.index(ROOT_KEY, place), len(whole))]:
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << byte % 8
        path.write_bytes(damaged)
        found = read_or_refuse(path)
        if not isinstance(found, str):
            assert (rows(found), found.root) == (rows(before), before.root), byte


def test_a_manifest_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, VIDEOS, tmp_path)
    whole = path.read_bytes()
    for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=DAMAGED):
            read_manifest(path)


def test_every_reader_of_parquet_reads_a_manifest(tmp_path: Path) -> None:
    """The digest stands where Parquet has nothing to say, and does not outlive a program that writes the table anew."""
    path = tmp_path / "manifest.parquet"
    write_manifest(path, VIDEOS, tmp_path)
    table = pq.read_table(path)
    assert table.equals(Manifest.of(VIDEOS, tmp_path).table)
    assert pq.read_metadata(path).num_rows == len(VIDEOS)
    labels = pa.array(["other"] * len(VIDEOS))
    edited = table.set_column(table.schema.get_field_index("label"), "label", labels)
    pq.write_table(edited, path)
    assert rows(read_manifest(path)) == [replace(video, label="other") for video in VIDEOS]


def test_flipped_bits_of_a_manifest_without_a_digest(
    tmp_path: Path, repetitions: Callable[[int, int], int], record_counts: Callable[..., None]
) -> None:
    """Earlier versions wrote none: a flip may pass, but ends in no traceback."""
    path = tmp_path / "manifest.parquet"
    table = Manifest.of(VIDEOS, tmp_path).table
    pq.write_table(table.replace_schema_metadata({ROOT_KEY: b".", FORMAT_KEY: b"3"}), path)
    flips = count_flips(path, repetitions(300, 3000), lambda: rows(read_manifest(path)))
    assert all("manifest.parquet" in message for message in flips.messages)
    record_counts("manifest.parquet without a digest", tried=flips.tried, refused=flips.refused, silent=flips.silent)


# The journal of an interrupted run


def test_flipped_bits_of_a_journal(tmp_path: Path, try_flips: TryFlips) -> None:
    """A line that is hit is dropped: its video is probed again."""
    journal = tmp_path / "m.parquet.journal"
    with open_journal(journal, tmp_path) as note:
        for video in VIDEOS[:8]:
            note(video)
    assert read_journal(journal, tmp_path) == VIDEOS[:8]

    def read() -> list[Video]:
        found = read_journal(journal, tmp_path)
        if 6 <= len(found) < 8 and all(video in VIDEOS for video in found):
            raise ValueError("dropped")
        return found

    try_flips(journal, read)


def test_a_journal_of_another_folder_is_not_taken_over(tmp_path: Path) -> None:
    journal = tmp_path / "m.parquet.journal"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with open_journal(journal, tmp_path / "one") as note:
        note(VIDEOS[0])
    assert read_journal(journal, tmp_path / "two") == []
    with open_journal(journal, tmp_path / "two") as note:
        note(VIDEOS[1])
    assert read_journal(journal, tmp_path / "two") == [VIDEOS[1]]
    assert read_journal(journal, tmp_path / "one") == [VIDEOS[0]]
    (tmp_path / "one").rmdir()  # it has moved
    assert read_journal(journal, tmp_path / "two") == VIDEOS[:2]


def test_flipped_bits_of_the_list_of_files_left_out(tmp_path: Path) -> None:
    """It is for people: nothing reads it again."""
    write_numbered(tmp_path / "a.mp4", num_frames=16)
    (tmp_path / "b.mp4").touch()
    out = tmp_path / "m.parquet"
    report = index_folder(tmp_path, out, num_workers=1).report
    before = report.read_bytes()
    for _ in flip_bits(report, 3):
        assert index_folder(tmp_path, out, num_workers=1).num_reused == 1
        assert report.read_bytes() == before
