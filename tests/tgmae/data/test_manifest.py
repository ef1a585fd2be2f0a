"""The manifest: what is written is read back, and what is no manifest is refused in words."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.videos import make_video
from tgmae.data.manifest import FORMAT_KEY, ROOT_KEY, Manifest, read_manifest, write_manifest


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    videos = [
        make_video(),
        make_video(path="läuft/b 2.webm", fps=29.97, rotation=270, captions=(), label="", split="val"),
        make_video(path="c.mkv", num_bytes=2**40, keyframes=(0,), keyframe_pts=(-(2**40),), captions=("日本語",)),
    ]
    write_manifest(tmp_path / "manifest.parquet", videos, tmp_path)

    manifest = read_manifest(tmp_path / "manifest.parquet")

    assert [manifest[row] for row in range(len(manifest))] == videos
    assert manifest.file(1) == str(tmp_path.resolve() / "läuft" / "b 2.webm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.parquet"]  # no temporary file stays behind


_COUNT_THREADS = """
import os, sys
from pathlib import Path
from tgmae.data.manifest import read_manifest

before = set(os.listdir("/proc/self/task"))
read_manifest(Path(sys.argv[1]))
print(len(set(os.listdir("/proc/self/task")) - before))
"""


def test_reading_starts_no_threads(tmp_path: Path) -> None:
    # Arrow's could end a command that had nothing left to do with "terminate called without an active exception".
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [make_video()], tmp_path)
    counting = [sys.executable, "-c", _COUNT_THREADS, str(path)]
    assert subprocess.run(counting, capture_output=True, text=True, check=True).stdout.strip() == "0"


def test_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [make_video()], tmp_path)
    before = path.read_bytes()
    with pytest.raises((pa.ArrowException, OverflowError)):
        write_manifest(path, [make_video(), make_video(path="b.mp4", num_frames=2**40)], tmp_path)
    assert path.read_bytes() == before


def test_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tgmae-data index .*--out .*none\.parquet"):
        read_manifest(tmp_path / "none.parquet")


@pytest.mark.parametrize("content", [b"", b"path,label\na.mp4,walk\n", b"PAR1 but not really PAR1"])
def test_not_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.parquet is not a Parquet file"):
        read_manifest(path)


def test_a_csv_is_not_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("path,caption\na.mp4,a cat\n")
    with pytest.raises(
        ValueError, match=r"is a CSV file, .*tgmae-data index FOLDER --csv .*captions\.csv --out .*\.parquet$"
    ):
        read_manifest(path)


def test_cut_off_parquet(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [make_video()], tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a Parquet file"):
        read_manifest(path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [make_video()], tmp_path)
    pq.write_table(pq.read_table(path).drop(["keyframe_pts", "rotation"]), path)
    with pytest.raises(ValueError, match=r"\['rotation', 'keyframe_pts'\] are missing"):
        read_manifest(path)


def test_empty_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [], tmp_path)
    with pytest.raises(ValueError, match="lists no usable video"):
        read_manifest(path)


@pytest.mark.parametrize(
    "video_path", ["/etc/passwd", "../a.mp4", "walk/../../a.mp4", "walk\\..\\..\\a.mp4", "\\a.mp4"]
)
def test_paths_that_leave_the_root(tmp_path: Path, video_path: str) -> None:
    path = tmp_path / "manifest.parquet"
    with pytest.raises(ValueError, match="leaves the root"):
        write_manifest(path, [make_video(), make_video(path=video_path)], tmp_path)
    assert not path.exists()

    table = Manifest.of([make_video(path=video_path)], tmp_path).table
    pq.write_table(table.replace_schema_metadata({ROOT_KEY: b".", FORMAT_KEY: b"2"}), path)
    with pytest.raises(ValueError, match="leaves the root"):
        read_manifest(path)


def test_dots_inside_a_name_are_no_escape(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [make_video(path="a..b/..c.mp4")], tmp_path)
    assert read_manifest(path)[0].path == "a..b/..c.mp4"


def test_select_split(tmp_path: Path) -> None:
    splits = ("train", "val", "train", "test")
    videos = [make_video(path=f"{number}.mp4", split=split) for number, split in enumerate(splits)]
    write_manifest(tmp_path / "manifest.parquet", videos, tmp_path)
    manifest = read_manifest(tmp_path / "manifest.parquet")

    train = manifest.select_split("train")
    assert [train[row].path for row in range(len(train))] == ["0.mp4", "2.mp4"]
    assert train.file(1) == manifest.file(2)
    assert len(manifest.select_split("")) == 4
    with pytest.raises(ValueError, match="'tarin', only 'test', 'train', 'val';"):
        manifest.select_split("tarin")


def test_a_row_may_belong_to_several_splits(tmp_path: Path) -> None:
    cells = ["train,train1,test2", "test, test1,train2", "test2", "train10", "", "tr,ain"]
    videos = [make_video(path=f"{number}.mp4", split=cell) for number, cell in enumerate(cells)]
    write_manifest(tmp_path / "m.parquet", videos, tmp_path)
    manifest = read_manifest(tmp_path / "m.parquet")

    def select(split: str) -> list[str]:
        return [video.path for video in manifest.select_split(split).rows()]

    assert select("train") == select("train1") == ["0.mp4"]
    assert select("test2") == ["0.mp4", "2.mp4"]
    assert select("test1") == ["1.mp4"]
    assert len(select("")) == 6
    with pytest.raises(ValueError, match=r"no video has split 'val', only '', 'ain', 'test', 'test1', 'test2', 'tr', "):
        manifest.select_split("val")
    assert manifest.splits() == {
        "train": 1, "train1": 1, "test2": 2, "test": 1, "test1": 1, "train2": 1, "train10": 1, "": 1, "tr": 1, "ain": 1,
    }  # fmt: skip
    assert list(manifest.rows()) == [manifest[row] for row in range(6)]


@pytest.mark.parametrize("place", ["videos/manifest.parquet", "manifest.parquet"])
def test_a_moved_folder_keeps_working(tmp_path: Path, place: str) -> None:
    """With the manifest in the root of the videos or above it, nothing absolute is stored."""
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "videos" / "walk").mkdir(parents=True)
    (old / "videos" / "walk" / "a.mp4").write_bytes(b"video")
    write_manifest(old / place, [make_video()], old / "videos")
    assert read_manifest(old / place).root == old.resolve() / "videos"

    old.rename(new)

    manifest = read_manifest(new / place)
    assert Path(manifest.file(0)).read_bytes() == b"video"


def test_manifest_outside_the_root_can_be_moved_alone(tmp_path: Path) -> None:
    """A manifest written elsewhere (say, of a read-only folder) still finds the videos when it is moved."""
    for folder in ("videos/walk", "here", "there/deeper"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "videos" / "walk" / "a.mp4").write_bytes(b"video")
    write_manifest(tmp_path / "here" / "manifest.parquet", [make_video()], tmp_path / "videos")
    moved = (tmp_path / "here" / "manifest.parquet").rename(tmp_path / "there" / "deeper" / "m.parquet")
    assert Path(read_manifest(moved).file(0)).read_bytes() == b"video"


def test_is_file_notices_another_size_or_time(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(b"12345")
    stat = file.stat()
    video = make_video(num_bytes=5, mtime_ns=stat.st_mtime_ns)
    assert video.is_file(file)
    assert not make_video(num_bytes=6, mtime_ns=stat.st_mtime_ns).is_file(file)
    assert not make_video(num_bytes=5, mtime_ns=stat.st_mtime_ns + 1).is_file(file)
    assert not video.is_file(tmp_path / "b.mp4")
