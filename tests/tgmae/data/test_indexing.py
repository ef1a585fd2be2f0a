"""Indexing: real files of many kinds, whole, odd and broken, become rows or reasons."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
from av.audio.frame import AudioFrame

from dali_pipelines.types import Caption, Video
from dali_pipelines.video.decode import DecodeError, decode_frames
from tests.support.videos import draw_number, make_video, read_number, real_data_folder, write_numbered
from tgmae.data.csv_list import list_csv
from tgmae.data.indexing import index_folder
from tgmae.data.listing import Entry, list_folder
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.probing import Excluded, describe_far_keyframes, probe

REPOSITORY = Path(__file__).resolve().parents[3]

# Name of the file → encoder and its options. 40 frames each, a keyframe every 12.
CODED: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"g": "12", "bf": "2", "sc_threshold": "0"}),
    "h264.mkv": ("libx264", {"g": "12", "bf": "2", "sc_threshold": "0"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12"}),
    "mpeg4.avi": ("mpeg4", {"g": "12"}),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=3:open-gop=0"}),
    "hevc_open.mkv": ("libx265", {"x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=3:open-gop=1"}),
    "mjpeg.avi": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "h264.ts": ("libx264", {"g": "12", "bf": "2", "sc_threshold": "0"}),
}
CODECS = {"h264": "h264", "hevc": "hevc", "vp9": "vp9", "mpeg4": "mpeg4", "mjpeg": "mjpeg"}
ROTATIONS = (90, 180, 270)


def rows(manifest: Manifest) -> dict[str, Video]:
    return {manifest[row].path: manifest[row] for row in range(len(manifest))}


def index(root: Path, out: Path | None = None, **options: object) -> dict[str, Video]:
    out = out or root / "manifest.parquet"
    index_folder(root, out, **options)  # type: ignore[arg-type]
    return rows(read_manifest(out))


def probe_one(file: Path, *, decode_all: bool = False, min_frames: int = 16) -> Video | Excluded:
    return probe(file, Entry(file.name, "", (), ""), min_frames, decode_all)


def damage(file: Path) -> Path:
    """Blank 2 kB in the middle of a file."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    file.write_bytes(content)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coded")
    for name, (codec, options) in CODED.items():
        write_numbered(root / name, codec, **options)  # type: ignore[arg-type]
    for rotation in ROTATIONS:
        suffix = "mov" if rotation == 270 else "mp4"
        write_numbered(root / "turned" / f"{rotation}.{suffix}", rotation=rotation, g="12")
    return root


@pytest.fixture(scope="module")
def coded(folder: Path) -> dict[str, Video]:
    return index(folder)


# What is read from a whole file


@pytest.mark.slow
@pytest.mark.parametrize("name", CODED)
def test_what_is_said_of_a_video(folder: Path, coded: dict[str, Video], name: str) -> None:
    video, stat = coded[name], (folder / name).stat()
    assert (video.num_frames, video.fps, video.width, video.height) == (40, 25.0, 160, 120)
    assert video.codec == CODECS[name.split(".")[0].split("_")[0]]
    assert (video.rotation, video.num_bytes, video.mtime_ns) == (0, stat.st_size, stat.st_mtime_ns)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CODED if name.endswith((".mp4", ".mkv", ".webm"))])
def test_keyframes_are_those_the_decoder_sees(folder: Path, coded: dict[str, Video], name: str) -> None:
    with av.open(str(folder / name)) as container:
        decoded = list(container.decode(video=0))
    expected = {number: frame.pts for number, frame in enumerate(decoded) if frame.key_frame}
    video = coded[name]
    assert dict(zip(video.keyframes, video.keyframe_pts, strict=True)) == expected
    assert video.keyframes == (0, 12, 24, 36)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODED)
def test_seeking_gives_the_same_frames(folder: Path, coded: dict[str, Video], name: str) -> None:
    """From every frame of the video, and for clips that run past the next keyframe."""
    file, video = str(folder / name), coded[name]
    straight = dict(decode_frames(file, video, range(40), seek=False))
    pictures = {number: frame.to_ndarray(format="rgb24") for number, frame in straight.items()}
    assert [read_number(pictures[number]) for number in range(40)] == list(range(40))
    for first in range(40):
        wanted = sorted({first, min(first + 5, 39), min(first + 14, 39)})
        got = [
            (number, frame.to_ndarray(format="rgb24"))
            for number, frame in decode_frames(file, video, wanted, seek=True)
        ]
        assert [number for number, _ in got] == wanted
        for number, picture in got:
            np.testing.assert_array_equal(picture, pictures[number])


def test_seeking_does_not_decode_what_lies_before(tmp_path: Path) -> None:
    """A file broken in the middle shows it: what comes after can only be reached by a jump over the damage."""
    file = damage(write_numbered(tmp_path / "a.mp4", num_frames=120, g="12", crf="10"))
    video = probe_one(file)
    assert isinstance(video, Video)
    [(_, frame)] = decode_frames(str(file), video, [115], seek=True)
    assert read_number(frame.to_ndarray(format="rgb24")) == 115
    with pytest.raises(DecodeError):
        list(decode_frames(str(file), video, [115], seek=False))


WITHOUT_INDEX: dict[str, tuple[str, dict[str, str]]] = {
    "h264.ts": ("libx264", {"g": "25", "bf": "3", "sc_threshold": "0"}),
    "open.ts": (
        "libx264",
        {"x264-params": "open-gop=1:bframes=3:keyint=25:min-keyint=25:scenecut=0", "flags": "-cgop"},
    ),
    "hevc.ts": ("libx265", {"x265-params": "log-level=none:keyint=25:min-keyint=25:bframes=3:open-gop=1"}),
    "mpeg2.ts": ("mpeg2video", {"g": "25", "bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "25", "bf": "2"}),
    "mpeg1.mpg": ("mpeg1video", {"g": "25"}),
    "h264.flv": ("libx264", {"g": "25", "bf": "2", "sc_threshold": "0"}),
    "mpeg4.avi": ("mpeg4", {"g": "25"}),
    "h264.avi": ("libx264", {"g": "25", "bf": "2", "sc_threshold": "0"}),
    "mjpeg.avi": ("mjpeg", {"pix_fmt": "yuvj420p"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_INDEX)
def test_files_without_an_index(tmp_path: Path, name: str) -> None:
    """Decoders jump to the keyframes that indexing met, except where time stamps do not tell frames apart."""
    codec, options = WITHOUT_INDEX[name]
    file = write_numbered(tmp_path / name, codec, num_frames=200, **options)  # type: ignore[arg-type]
    video = probe_one(file)
    assert isinstance(video, Video)
    assert video.num_frames == 200
    straight = {n: f.to_ndarray() for n, f in decode_frames(str(file), video, range(200), seek=False)}
    for key in video.keyframes:
        for number in range(max(key - 1, 0), min(key + 3, 200)):
            [(_, frame)] = decode_frames(str(file), video, [number], seek=True)
            np.testing.assert_array_equal(frame.to_ndarray(), straight[number], err_msg=f"frame {number}")
    if name not in ("mpeg1.mpg", "h264.avi"):  # whose time stamps do not tell frames apart
        gaps = np.diff([*video.keyframes, 200])
        assert gaps.max() <= 27, video.keyframes
        assert gaps[:-1].min() >= 12


def test_videos_without_near_keyframes_are_named() -> None:
    """Wherever the gap is: before the last keyframe, after it, or in a whole video of one."""
    videos = [
        make_video(path=name, num_frames=count, keyframes=keyframes, keyframe_pts=keyframes)
        for name, count, keyframes in (
            ("fine.mp4", 1800, (0, 600, 1200)), ("end.mp4", 1801, (0, 600, 1200)), ("short.mp4", 600, (0,)),
            ("middle.mp4", 1300, (0, 601, 1200)), ("one.avi", 45000, (0,)), ("last.mp4", 10, (0, 9)),
        )
    ]  # fmt: skip
    notice = describe_far_keyframes(Manifest.of(videos, Path()))
    assert notice.startswith("3 videos can only be read from far ahead of a clip")
    assert (
        "more than 600 frames, as in end.mp4 (601 frames), middle.mp4 (601 frames), one.avi (45,000 frames)" in notice
    )
    assert notice.endswith("tgmae-data compact gives them keyframes")
    assert describe_far_keyframes(Manifest.of([videos[0], videos[2]], Path())) == ""


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotation(folder: Path, coded: dict[str, Video], rotation: int) -> None:
    path = next(path for path in coded if path.startswith(f"turned/{rotation}."))
    video = coded[path]
    assert (video.rotation, video.width, video.height) == (rotation, 160, 120)
    [(_, frame)] = decode_frames(str(folder / path), video, [21], seek=True)
    upright = np.rot90(frame.to_ndarray(format="rgb24"), -rotation // 90)
    assert read_number(upright) == 21
    assert np.abs(upright.astype(int) - draw_number(21, 160, 120)).mean() < 4  # a mirrored gradient is off by far more


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm"])
def test_decode_all_keeps_the_keyframes(folder: Path, coded: dict[str, Video], name: str) -> None:
    video = probe_one(folder / name, decode_all=True)
    assert isinstance(video, Video)
    assert (video.keyframes, video.keyframe_pts) == (coded[name].keyframes, coded[name].keyframe_pts)


# Lists: folders and CSVs


def test_labels_are_the_folders(tmp_path: Path) -> None:
    for path in ("walk/a.mp4", "walk/b.WEBM", "run/fast/c.mkv", "top.avi", "walk/notes.txt", "walk/a.mp4.part"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert list_folder(tmp_path, "train").entries == [
        Entry("top.avi", "", (), "train"),
        Entry("run/fast/c.mkv", "fast", (), "train"),
        Entry("walk/a.mp4", "walk", (), "train"),
        Entry("walk/b.WEBM", "walk", (), "train"),
    ]


def csv_captions(*texts: str) -> tuple[Caption, ...]:
    return tuple(Caption(text, "csv") for text in texts)


def test_csv_with_captions_and_splits(tmp_path: Path) -> None:
    text = (
        "\ufeffpath,label,split,caption,caption_2,note\n"  # with the byte order mark that Excel writes
        'a.mp4,walk,val,"one, with a comma",un,x\n'
        "dir\\b.mp4,run,,two,,x\n"
        "a.mp4,walk,val,three, ,x\n"
        "c.mp4,,test\n"
    )
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    assert list_csv(tmp_path / "list.csv", tmp_path, "train").entries == [
        Entry("a.mp4", "walk", csv_captions("one, with a comma", "un", "three"), "val"),
        Entry("dir/b.mp4", "run", csv_captions("two"), "train"),
        Entry("c.mp4", "", (), "test"),
    ]


@pytest.mark.parametrize("path", ["../secret.mp4", "/etc/secret.mp4", "walk/../../secret.mp4"])
def test_csv_path_that_leaves_the_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "list.csv").write_text(f"path,label\na.mp4,walk\n{path},walk\n")
    with pytest.raises(ValueError, match=r"list\.csv line 3: path leaves the root"):
        index_folder(tmp_path, tmp_path / "manifest.parquet", csv_path=tmp_path / "list.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.csv"]


def test_csv_that_would_lose_something_is_refused(tmp_path: Path) -> None:
    """Spaces after commas are harmless; a comma too many, two labels for one path, another encoding are not."""
    listed = tmp_path / "list.csv"
    listed.write_text("Path, label, caption\n./a.mp4, walk, a man walks\n")
    assert list_csv(listed, tmp_path, "train").entries == [Entry("a.mp4", "walk", csv_captions("a man walks"), "train")]
    for text, words in (
        ("path,caption\na.mp4,a man, walking\n", r"line 2: 3 fields for 2 columns; put text with commas in quotes"),
        ("path,label\na.mp4,walk\na.mp4,run\n", r"line 3: a\.mp4 has another label or split"),
        ("path,label\n,walk\n", r"line 2: no path"),
    ):
        listed.write_text(text)
        with pytest.raises(ValueError, match=words):
            list_csv(listed, tmp_path, "train")
    listed.write_bytes("path,caption\na.mp4,grün\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        list_csv(listed, tmp_path, "train")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_of_spreadsheets_with_another_separator(separator: str, tmp_path: Path) -> None:
    """As they are saved where commas are for decimals; commas are then text, and quotes are as ever."""
    listed = tmp_path / "list.csv"
    rows = [["path", "label", "caption"], ["a.mp4", "walk", "a man, walking"], ["b.mp4", "", f'"one{separator} two"']]
    listed.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8-sig")
    assert list_csv(listed, tmp_path, "train").entries == [
        Entry("a.mp4", "walk", csv_captions("a man, walking"), "train"),
        Entry("b.mp4", "", csv_captions(f"one{separator} two"), "train"),
    ]
    listed.write_text(separator.join(["path", "caption"]) + f'\na.mp4{separator}"open\nb.mp4{separator}x"\n')
    (tmp_path / "b.mp4").touch()
    with pytest.raises(ValueError, match=r"line 2: a text in quotes that begins here takes in the row of b\.mp4"):
        list_csv(listed, tmp_path, "train")


def test_csv_without_a_path_column(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,label\na.mp4,walk\n")
    with pytest.raises(ValueError, match=r"column 'path', separated by commas; got \['file', 'label'\]"):
        list_csv(tmp_path / "list.csv", tmp_path, "train")


def test_csv_reaches_the_manifest(tmp_path: Path) -> None:
    """In the order of the CSV; what it does not name stays out; what is not there is left out with a reason."""
    for name in ("b.mp4", "a.mp4", "unlisted.mp4"):
        write_numbered(tmp_path / name, num_frames=16)
    (tmp_path / "list.csv").write_text(
        "path,label,split,caption\nb.mp4,x,val,first\ngone.mp4,x,,\na.mp4,y,,\nb.mp4,x,val,second\n"
    )
    result = index_folder(
        tmp_path, tmp_path / "manifest.parquet", csv_path=tmp_path / "list.csv", split="test", num_workers=1
    )
    videos = rows(read_manifest(tmp_path / "manifest.parquet"))
    assert [(v.path, v.label, v.split, v.texts) for v in videos.values()] == [
        ("b.mp4", "x", "val", ("first", "second")),
        ("a.mp4", "y", "test", ()),
    ]
    assert [excluded.path for excluded in result.excluded] == ["gone.mp4"]
    assert "No such file" in result.excluded[0].reason


# Files that cannot be trained on


def write_sound(file: Path) -> Path:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    return file


def test_bad_files_are_listed_with_reasons(tmp_path: Path) -> None:
    """One run over every kind of bad file and one good one; nothing raises, each is in the report."""
    whole = write_numbered(tmp_path / "good.mp4", g="12")
    reasons = {
        "cut.mp4": "Invalid data",  # the moov box is at the end
        "empty.mp4": "empty file",
        "folder.mp4": "directory",
        "short.mp4": "15 frames, fewer than 16",
        "sound.mp4": "no video stream",
        "text.mp4": "Invalid data",
    }
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    write_numbered(tmp_path / "short.mp4", num_frames=15)
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "list.csv").write_text("\n".join(["path", "good.mp4", *reasons]))
    out = tmp_path / "out" / "deep" / "manifest.parquet"

    result = index_folder(tmp_path, out, csv_path=tmp_path / "list.csv", num_workers=1)

    assert list(rows(read_manifest(out))) == ["good.mp4"]
    assert (result.num_videos, result.num_reused) == (1, 0)
    assert {excluded.path for excluded in result.excluded} == set(reasons)
    for excluded in result.excluded:
        assert reasons[excluded.path].lower() in excluded.reason.lower()
        assert str(tmp_path) not in excluded.reason
    with result.report.open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], *([e.path, e.reason] for e in result.excluded)]


def test_shortest_video_that_is_kept(tmp_path: Path) -> None:
    file = write_numbered(tmp_path / "a.mp4", num_frames=16)
    assert isinstance(probe_one(file, min_frames=16), Video)
    assert probe_one(file, min_frames=17) == Excluded("a.mp4", "16 frames, fewer than 17")


def test_no_usable_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    out = tmp_path / "manifest.parquet"
    with pytest.raises(ValueError, match=r"none of 1 files is usable; .*excluded\.csv lists why:\n  text\.mp4: "):
        index_folder(tmp_path, out, num_workers=1)
    assert not out.exists()
    assert "text.mp4" in out.with_name("manifest.parquet.excluded.csv").read_text()


def test_no_video_at_all(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"found no videos below .*\.mp4"):
        index_folder(tmp_path, tmp_path / "manifest.parquet")
    with pytest.raises(FileNotFoundError, match="nowhere is not there; give a folder"):
        index_folder(tmp_path / "nowhere", tmp_path / "manifest.parquet")


def test_unknown_codec(tmp_path: Path) -> None:
    file = write_numbered(tmp_path / "a.mp4")
    file.write_bytes(file.read_bytes().replace(b"avc1", b"zzzz"))
    assert isinstance(probe_one(file), Excluded)


def test_decode_all_finds_a_file_broken_in_the_middle(tmp_path: Path) -> None:
    file = damage(write_numbered(tmp_path / "a.mp4", num_frames=120, g="12", crf="10"))
    video = probe_one(file)
    assert isinstance(video, Video)
    assert video.num_frames == 120
    assert isinstance(probe_one(file, decode_all=True), Excluded)


def test_decode_all_after_a_quick_run(tmp_path: Path) -> None:
    write_numbered(tmp_path / "good.mp4")
    damage(write_numbered(tmp_path / "broken.mp4", num_frames=120, g="12", crf="10"))
    assert len(index(tmp_path, num_workers=1)) == 2
    assert list(index(tmp_path, decode_all=True, num_workers=1)) == ["good.mp4"]


# Second runs


def replace_unseen(file: Path) -> None:
    """Other bytes, but the same size and time of change."""
    stat = file.stat()
    file.write_bytes(b"x" * stat.st_size)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.slow
def test_second_run_opens_only_what_changed(tmp_path: Path) -> None:
    root, out = tmp_path / "videos", tmp_path / "manifest.parquet"
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_numbered(root / name, num_frames=20)
    before = index(root, out, num_workers=1)

    for name in ("a.mp4", "b.mp4"):
        replace_unseen(root / name)  # to open it again would show: it is no video any more
    result = index_folder(root, out, num_workers=1)
    assert (result.num_videos, result.num_reused, result.excluded) == (3, 3, [])
    assert rows(read_manifest(out)) == before

    write_numbered(root / "c.mp4", num_frames=30)
    write_numbered(root / "d.mp4", num_frames=25)
    (root / "b.mp4").unlink()
    (tmp_path / "list.csv").write_text("path,label,split,caption\na.mp4,new,val,a caption\nc.mp4,,,\nd.mp4,,,\n")
    result = index_folder(root, out, csv_path=tmp_path / "list.csv", num_workers=1)
    assert (result.num_videos, result.num_reused, result.excluded) == (3, 1, [])
    after = rows(read_manifest(out))
    assert {path: video.num_frames for path, video in after.items()} == {"a.mp4": 20, "c.mp4": 30, "d.mp4": 25}
    assert (after["a.mp4"].label, after["a.mp4"].split, after["a.mp4"].texts) == ("new", "val", ("a caption",))


def test_second_run_asks_for_longer_videos(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", num_frames=20)
    write_numbered(tmp_path / "b.mp4", num_frames=40)
    assert len(index(tmp_path, num_workers=1)) == 2
    assert list(index(tmp_path, min_frames=30, num_workers=1)) == ["b.mp4"]


def test_rows_of_another_root_are_not_taken_over(tmp_path: Path) -> None:
    """Two folders may hold files of the same name; their manifests may be asked to be written to the same place."""
    for root, frames in (("one", 20), ("two", 30)):
        write_numbered(tmp_path / root / "a.mp4", num_frames=frames)
    files = [tmp_path / root / "a.mp4" for root in ("one", "two")]
    missing = files[1].stat().st_size - files[0].stat().st_size
    assert missing >= 8
    with files[0].open("ab") as file:
        file.write(missing.to_bytes(4, "big") + b"free" + bytes(missing - 8))  # an empty box: now both are of one size
    for file_path in files:
        os.utime(file_path, ns=(10**18, 10**18))
    out = tmp_path / "manifest.parquet"
    assert index(tmp_path / "one", out, num_workers=1)["a.mp4"].num_frames == 20
    result = index_folder(tmp_path / "two", out, num_workers=1)
    assert result.num_reused == 0
    assert read_manifest(out)[0].num_frames == 30


# Interruptions


def journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def test_half_written_journal_line_is_ignored(tmp_path: Path) -> None:
    root, out = tmp_path / "videos", tmp_path / "manifest.parquet"
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_numbered(root / name, num_frames=20)
    before = index(root, out, num_workers=1)
    assert not journal_of(out).exists()
    out.unlink()
    lines = [json.dumps(asdict(video)) for video in before.values()]
    journal_of(out).write_text("\n".join(lines)[:-30])
    replace_unseen(root / "a.mp4")
    replace_unseen(root / "b.mp4")

    result = index_folder(root, out, num_workers=1)

    assert (result.num_videos, result.num_reused) == (3, 2)
    assert rows(read_manifest(out)) == before
    assert not journal_of(out).exists()


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twelve")
    for number in range(12):
        write_numbered(root / f"{number:02}.mp4", num_frames=16)
    return root


KILLED_AT_THE_NINTH = """
import os, signal, sys
import tgmae.data.indexing as indexing
from tgmae.cli.data import main
probe_all = indexing._probe_all
def probe_eight(*given):
    for number, result in enumerate(probe_all(*given)):
        if number == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        yield result
indexing._probe_all = probe_eight
sys.argv[0] = "tgmae-data"
main()
"""


def interrupt(root: Path, out: Path) -> None:
    """tgmae-data index in a process of its own that is killed when it has seen eight videos and a ninth comes."""
    flags = ["index", str(root), "--out", str(out), "--decode-all", "--workers", "1"]
    command = [sys.executable, "-c", KILLED_AT_THE_NINTH, *flags]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        assert process.wait(timeout=120) == -signal.SIGKILL
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers


@pytest.mark.slow
def test_killed_run_resumes_from_the_journal(twelve: Path, tmp_path: Path) -> None:
    out = tmp_path / "manifest.parquet"
    interrupt(twelve, out)
    assert not out.exists()

    result = index_folder(twelve, out, decode_all=True, num_workers=1)

    assert (result.num_videos, result.num_reused, result.excluded) == (12, 8, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.parquet", "manifest.parquet.excluded.csv"]
    fresh = index(twelve, tmp_path / "fresh.parquet", num_workers=1)
    assert rows(read_manifest(out)) == fresh


@pytest.mark.slow
def test_run_killed_twice_loses_nothing_after_a_half_written_line(twelve: Path, tmp_path: Path) -> None:
    out = tmp_path / "manifest.parquet"
    out.with_name(out.name + ".decoded.journal").write_text('{"path": "00.mp4", "num_fra')  # what an earlier kill left
    interrupt(twelve, out)
    assert index_folder(twelve, out, decode_all=True, num_workers=1).num_reused == 8


# Real files


@pytest.mark.slow
def test_real_videos(tmp_path: Path) -> None:
    """AV1, HEVC, 10 bit, full range, rotated and corrupted files: frame counts, sizes and codecs as listed by hand."""
    data = real_data_folder()
    if data is None:
        pytest.skip("no real videos: set TGMAE_REAL_DATA")
    root = data / "videos" / "misc"
    videos = index(root, tmp_path / "manifest.parquet", min_frames=1)
    with (data / "videos.csv").open(newline="") as file:
        listed = {
            row["path"].removeprefix("misc/"): row for row in csv.DictReader(file) if row["path"].startswith("misc/")
        }
    assert len(videos) == 20
    assert set(videos) - set(listed) == {"decord/corrupted.mp4"}
    # The list is of the first video stream, a smaller version of the default one, which ffmpeg takes.
    nasa = videos["torchcodec/nasa_13013.mp4"]
    assert (nasa.stream, nasa.num_frames, nasa.width, nasa.height) == (1, 390, 480, 270)
    del listed["torchcodec/nasa_13013.mp4"]
    for path, row in listed.items():
        video = videos[path]
        assert (video.stream, video.mirrored) == (0, False), path
        assert video.num_frames == int(row["frames"]), path
        coded = (video.height, video.width) if video.rotation % 180 else (video.width, video.height)
        assert coded == (int(row["width"]), int(row["height"])), path
        assert video.codec == row["codec"].replace("libdav1d", "av1"), path
        assert abs(video.fps - float(row["fps"])) < 0.01, path
    assert {path: video.rotation for path, video in videos.items() if video.rotation} == {
        "decord/video_90.mov": 90,
        "decord/video_180.mov": 180,
        "decord/video_270.mov": 270,
    }
    # 16 frames at least: the four .mov of 3 frames and one HEVC of 10 go.
    result = index_folder(root, tmp_path / "manifest.parquet")
    assert (result.num_videos, result.num_reused, len(result.excluded)) == (15, 15, 5)

    for path, video in videos.items():
        if len(video.keyframes) > 1 and video.width <= 426:
            file = str(root / path)
            wanted = sorted({max(k + shift, 0) for k in video.keyframes[1:4] for shift in (-1, 0, 1)})
            straight = {n: frame.to_ndarray() for n, frame in decode_frames(file, video, wanted, seek=False)}
            for number in wanted:
                [(_, frame)] = decode_frames(file, video, [number], seek=True)
                np.testing.assert_array_equal(frame.to_ndarray(), straight[number], err_msg=f"{path} frame {number}")


def test_real_corrupted_video() -> None:
    data = real_data_folder()
    if data is None:
        pytest.skip("no real videos: set TGMAE_REAL_DATA")
    file = data / "videos" / "misc" / "decord" / "corrupted.mp4"
    assert isinstance(probe_one(file), Video)  # its packets look whole
    assert isinstance(probe_one(file, decode_all=True), Excluded)
