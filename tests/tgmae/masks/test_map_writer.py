"""Writing maps of whole videos: kept video by video, whatever happens to the run."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dali_pipelines.workers.team import ALONE, Team
from tests.support.videos import make_video
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.masks.maps import writer as map_writer
from tgmae.masks.maps.store import Key, MapFolder, digest_videos
from tgmae.masks.maps.writer import write_maps

REPOSITORY = Path(__file__).parents[3]
COUNT, PART = 10, 4
KEY: Key = {"dtype": "int8", "compression": "zstd", "maps": "test"}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    videos = [make_video(path=f"{number}.mp4", num_frames=20 + number) for number in range(COUNT)]
    write_manifest(tmp_path / "manifest.parquet", videos, tmp_path)
    return read_manifest(tmp_path / "manifest.parquet")


def content(row: int) -> NDArray[np.int8]:
    return np.random.default_rng(row).integers(-3, 3, (row + 1, 2, 5)).astype(np.int8)


def write(
    manifest: Manifest,
    out: Path,
    *,
    broken: tuple[int, ...] = (),
    key: Key = KEY,
    stop_before: int | None = None,
    team: Team = ALONE,
) -> tuple[map_writer.BuildResult, list[int]]:
    """Returns the result and the rows that were computed; the process kills itself before row `stop_before`."""
    computed: list[int] = []

    def compute(rows: list[int]) -> Iterator[NDArray[np.int8] | str]:
        for row in rows:
            if row == stop_before:
                signal.raise_signal(signal.SIGKILL)
            computed.append(row)
            yield "broken" if row in broken else content(row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_writer, "PART_VIDEOS", PART)
        return write_maps(manifest, digest_videos(manifest), out, key, "tgmae-data test", compute, team), computed


def assert_whole(manifest: Manifest, out: Path, without: tuple[int, ...] = ()) -> None:
    maps = MapFolder(out, "tgmae-data test")
    assert maps.unreadable == {f"{row}.mp4" for row in without}
    for row in set(range(COUNT)) - set(without):
        np.testing.assert_array_equal(maps.read(manifest[row].path), content(row))


@pytest.mark.parametrize("key", [KEY, {"dtype": "int8"}], ids=["zstd", "plain"])
def test_what_is_written_is_read(manifest: Manifest, tmp_path: Path, key: Key) -> None:
    result, computed = write(manifest, tmp_path / "maps", key=key)
    assert (result.num_videos, result.num_reused, computed) == (COUNT, 0, list(range(COUNT)))
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [
        "maps.json", "part-00000.arrow", "part-00001.arrow", "part-00002.arrow", "writing.lock",
    ]  # fmt: skip
    assert_whole(manifest, tmp_path / "maps")


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 1, 200])
def test_kill_9_loses_only_the_video_at_work(manifest: Manifest, tmp_path: Path, cut: int) -> None:
    """Killed in the middle of the second part, by and by; a record cut short is computed again, no other."""
    program = (
        "from pathlib import Path; from tests.tgmae.masks.test_map_writer import write\n"
        "from tgmae.data.manifest import read_manifest\n"
        "write(read_manifest(Path({!r})), Path({!r}), stop_before={})"
    )
    out = tmp_path / "maps"
    for stop in (6, 7):
        text = program.format(str(tmp_path / "manifest.parquet"), str(out), stop)
        done = subprocess.run([sys.executable, "-c", text], cwd=REPOSITORY, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    journals = sorted(out.glob("part-00001.arrow.*.journal"), key=lambda path: path.stat().st_mtime_ns)
    assert len(journals) == 2
    whole = journals[1].read_bytes()
    journals[1].write_bytes(whole[: len(whole) - cut])
    result, computed = write(manifest, out)
    assert computed == ([7, 8, 9] if cut < 1 else [6, 7, 8, 9])
    assert (result.num_videos, result.num_reused) == (len(computed), COUNT - len(computed))
    assert not list(out.glob("*.journal"))
    assert_whole(manifest, out)
    assert write(manifest, out)[1] == []


def test_maps_belong_to_the_content_of_a_file(manifest: Manifest, tmp_path: Path) -> None:
    """Where it is known: a file replaced by one of equal size and length is computed again once it is indexed again.

    Maps of manifests that did not know it stay valid.
    """
    out = tmp_path / "maps"

    def indexed(*contents: str) -> Manifest:
        videos = [manifest[row] for row in range(COUNT)]
        known = [replace(video, digest=content) for video, content in zip(videos, contents, strict=False)]
        return Manifest.of([*known, *videos[len(known) :]], tmp_path)

    assert len(write(manifest, out)[1]) == COUNT
    assert write(indexed("aa", "bb"), out)[1] == []
    assert_whole(indexed("aa", "bb"), out)
    fresh = tmp_path / "fresh"
    assert len(write(indexed("aa", "bb"), fresh)[1]) == COUNT
    assert write(indexed("aa", "cc"), fresh)[1] == [1]
    with pytest.raises(ValueError, match=r"maps of other videos .* for 1 of 10 videos, such as 0\.mp4"):
        MapFolder(fresh, "tgmae-data test").check_videos(indexed("dd", "cc"), digest_videos(indexed("dd", "cc")))


def test_a_full_disk_is_said_with_the_file_and_loses_nothing(manifest: Manifest, tmp_path: Path) -> None:
    """A limit of this process stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"part-00000\.arrow\S* could not be written: File too large; the same comm"):
            write(manifest, tmp_path / "maps")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "maps").glob("part-*.tmp"))
    _, computed = write(manifest, tmp_path / "maps")
    assert 0 < len(computed) < COUNT  # the first ones are in the journal
    assert_whole(manifest, tmp_path / "maps")


def test_only_unreadable_videos_are_tried_again(manifest: Manifest, tmp_path: Path) -> None:
    result, _ = write(manifest, tmp_path / "maps", broken=(1, 9))
    assert [video.path for video in result.skipped] == ["1.mp4", "9.mp4"]
    assert_whole(manifest, tmp_path / "maps", without=(1, 9))
    result, computed = write(manifest, tmp_path / "maps", broken=(9,))
    assert (computed, [video.path for video in result.skipped]) == ([1, 9], ["9.mp4"])
    assert_whole(manifest, tmp_path / "maps", without=(9,))


def test_a_changed_video_is_computed_again_and_no_other(manifest: Manifest, tmp_path: Path) -> None:
    write(manifest, tmp_path / "maps")
    videos = [manifest[row] for row in range(COUNT)]
    videos[5] = make_video(path="5.mp4", num_frames=99)
    write_manifest(tmp_path / "changed.parquet", videos, tmp_path)
    assert write(read_manifest(tmp_path / "changed.parquet"), tmp_path / "maps")[1] == [5]


def part_of(manifest: Manifest, tmp_path: Path, rows: range) -> Manifest:
    write_manifest(tmp_path / "some.parquet", [manifest[row] for row in rows], tmp_path)
    return read_manifest(tmp_path / "some.parquet")


def test_two_splits_share_a_folder(manifest: Manifest, tmp_path: Path) -> None:
    """The second one's parts take the places of the first one's, and keep what is in them."""
    first, second = part_of(manifest, tmp_path, range(6)), part_of(manifest, tmp_path, range(6, COUNT))
    write(first, tmp_path / "maps")
    result, computed = write(second, tmp_path / "maps")
    assert (result.num_videos, len(computed)) == (4, 4)
    for some, count in ((first, 6), (second, 4)):
        maps = MapFolder(tmp_path / "maps", "tgmae-data test")
        assert maps.check_videos(some, digest_videos(some)) == ""
        found = [maps.read(some[row].path) for row in range(count)]
        # `content` was computed by row of the manifest that was given.
        for row, array in enumerate(found):
            np.testing.assert_array_equal(array, content(row))
    assert write(first, tmp_path / "maps")[1] == []


def test_what_an_old_part_says_does_not_hide_what_is_new(manifest: Manifest, tmp_path: Path) -> None:
    """Of a manifest that became shorter the last parts stay behind, with digests of old."""
    write(manifest, tmp_path / "maps")
    moved = [manifest[row] for row in (9, 0, 1)]
    moved[0] = make_video(path="9.mp4", num_frames=77)
    write_manifest(tmp_path / "short.parquet", moved, tmp_path)
    short = read_manifest(tmp_path / "short.parquet")
    assert write(short, tmp_path / "maps")[1] == [0]
    maps = MapFolder(tmp_path / "maps", "tgmae-data test")
    assert maps.check_videos(short, digest_videos(short)) == ""
    np.testing.assert_array_equal(maps.read("9.mp4"), content(0))
