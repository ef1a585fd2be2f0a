"""A row's file is opened only if it is the one that was indexed: whatever its name, at the stream that was indexed."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from dali_pipelines.pyav_pipeline import read_clip
from dali_pipelines.types import ClipRequest, CropBox, Video
from dali_pipelines.video import opening
from dali_pipelines.video.decode import DecodeError, decode_clips, decode_frames, decode_whole_frames
from dali_pipelines.video.excerpt import cut_excerpt
from dali_pipelines.video.motion import BLOCK, read_motion
from dali_pipelines.video.opening import digest_file, open_video
from tests.support.requests import prepare
from tests.support.videos import draw_number, read_number, stamp, write_numbered
from tgmae.data.coders import CompactConfig
from tgmae.data.listing import Entry
from tgmae.data.manifest import Manifest
from tgmae.data.probing import Excluded, probe
from tgmae.data.transcode import transcode

FRAMES = (3, 9, 14)


def index(file: Path) -> Video:
    video = probe(file, Entry(file.name, "", (), ""), 2, False)
    assert isinstance(video, Video), video
    return video


def whole(video: Video, frames: tuple[int, ...] = FRAMES) -> ClipRequest:
    box = CropBox(x=0, y=0, width=video.width, height=video.height)
    return ClipRequest(row=0, epoch=0, position=0, frames=frames, crop=box, flip=False, caption=0, mask_seed=0)


PATHS: dict[str, Callable[[str, Video], object]] = {
    "excerpt": lambda file, video: cut_excerpt(file, video, FRAMES),
    "worker": lambda file, video: decode_clips(file, video, [whole(video)], 32),
    "pyav": lambda file, video: read_clip(file, video, whole(video), 32),
    "score maps": lambda file, video: list(decode_whole_frames(file, video, FRAMES, 32, 32)),
    "contact sheet": lambda file, video: list(decode_frames(file, video, FRAMES, seek=True)),
    "compact": lambda file, video: transcode(file, video, Path(file + ".out.mp4"), CompactConfig()),
    "compact by rate": lambda file, video: transcode(file, video, Path(file + ".out.mp4"), CompactConfig(fps=5)),
}


def replace_content(file: Path, how: str) -> None:
    """Put another video of the same picture size in place of one, as a second download or an export does."""
    before = file.stat()
    options = {"num_frames": 60} if how == "longer" else {}
    write_numbered(file, "libvpx-vp9", g="30" if how == "other bytes" else "12", **options)
    if how == "same size":
        content = bytearray(file.read_bytes()[: before.st_size])
        file.write_bytes(bytes(content.ljust(before.st_size, b"\0")))
    if how in ("other bytes", "longer"):  # rsync --times, cp -p
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["other bytes", "longer", "same size"])
def test_a_replaced_file_is_refused_on_every_path(tmp_path: Path, how: str) -> None:
    file = write_numbered(tmp_path / "a.webm", "libvpx-vp9", g="12")
    video = index(file)
    for path in PATHS.values():
        path(str(file), video)
    replace_content(file, how)
    for path in PATHS.values():
        with pytest.raises(DecodeError, match=r"^changed since it was indexed .*; run tgmae-data index again$"):
            path(str(file), video)


def test_a_copy_without_its_date_is_recognised_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content is read once; a manifest made before contents were known goes by the date alone."""
    file = write_numbered(tmp_path / "a.webm", "libvpx-vp9", g="12")
    video = index(file)
    os.utime(file, ns=(0, video.mtime_ns + 1))
    read: list[str] = []
    monkeypatch.setattr(opening, "digest_file", lambda name: read.append(name) or video.digest)
    for path in PATHS.values():
        path(str(file), video)
        with pytest.raises(DecodeError, match=r"^changed since it was indexed \(its size or date differs"):
            path(str(file), replace(video, digest=""))
    assert read == [str(file)]


def test_a_digest_tells_contents_apart(tmp_path: Path) -> None:
    """Every byte of a file of up to 8 MiB; of a larger one what its blocks show, among them both ends."""
    file = tmp_path / "a.y4m"
    digests = set[str]()
    block = opening._BLOCK_BYTES
    for size in (0, 1, block, block + 1, 3 * block - 1, 128 * block):
        whole = bytes(size)
        for place in [None, *sorted({0, size // 3, size // 2, max(size - 1, 0)})][: size + 1]:
            changed = bytearray(whole)
            if place is not None:
                changed[place] ^= 1
            file.write_bytes(changed)
            digests.add(digest_file(file))
    assert len(digests) == 1 + 2 + 4 * 5
    with file.open("wb") as opened:
        opened.truncate(2**34)  # 16 GiB of which nothing is on the disk
    before = digest_file(file)
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"1")
    assert digest_file(file) != before


@pytest.mark.parametrize("name", ["a.webm", "a.mp4"])
def test_a_worker_says_that_a_file_was_replaced(tmp_path: Path, name: str) -> None:
    """Whether DALI or the worker would decode it."""
    file = write_numbered(tmp_path / name, "libvpx-vp9" if name == "a.webm" else "libx264", g="12")
    manifest = Manifest.of([index(file)], tmp_path)
    request = whole(manifest[0])
    prepared, _ = prepare(manifest, request)
    assert (prepared.is_native, prepared.error) == (name == "a.webm", "")
    replace_content(file, "same size")
    prepared, clip = prepare(manifest, request)
    assert not prepared.is_native
    assert prepared.error.startswith("changed since it was indexed")
    assert not clip.any()


NAMES = ("2024-01-01T12:30:00.mp4", "concat:x.mp4", "http:x.mp4", "-lead.mp4", "100%d %05d.mp4", "a#b?c=1&d|e.mp4")


@pytest.mark.parametrize("name", [*NAMES, "x" * 251 + ".mp4"])
def test_names_mean_nothing_to_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Standing in the folder, too, where no slash precedes a colon."""
    shutil.move(write_numbered(tmp_path / "plain.mp4", num_frames=20), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    video = index(Path(name))
    [(_, frame)] = decode_frames(name, video, [13], seek=True)
    assert read_number(frame.to_ndarray(format="rgb24").astype(np.uint8)) == 13
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert transcode(str(tmp_path / name), video, Path(name), CompactConfig()) == 20
    assert index(Path(name)).num_frames == 20


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.ts", b"ffconcat version 1.0\nfile b.mp4\n", "Virtual concatenation script"),
        (
            "a.m3u8",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nb.mp4\n#EXT-X-ENDLIST\n",
            "Apple HTTP Live Streaming",
        ),
        ("a.nfo", b"a long story\n" * 40, "Tele-typewriter"),
        ("a.mp4", None, "piped png sequence"),
    ],
)
def test_lists_texts_and_pictures_are_no_videos(tmp_path: Path, name: str, content: bytes | None, kind: str) -> None:
    """FFmpeg goes by what is in a file, and reads other files where a list names them."""
    video = index(write_numbered(tmp_path / "b.mp4"))
    if content is None:
        content = b"".join(_to_png(number) for number in range(20))
    file = tmp_path / name
    file.write_bytes(content)
    excluded = probe(file, Entry(name, "", (), ""), 2, True)
    assert excluded == Excluded(name, f"not a video, but what FFmpeg calls {kind}")
    with pytest.raises(DecodeError, match=rf"^not a video, .* {kind}$"), open_video(str(file), stamp(video, file)):
        pass


def _to_png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw_number(number, 160, 120)).save(buffer, "png")
    return buffer.getvalue()


def test_a_stream_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = write_numbered(tmp_path / "a.mp4")
    video = replace(index(file), stream=2)
    for path in PATHS.values():
        with pytest.raises(DecodeError, match=r"^has 1 video stream, but the manifest says number 2"):
            path(str(file), video)


def test_a_file_that_gives_no_packets_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg searches a long tail of zeros, as an interrupted download leaves it, byte by byte."""
    file = write_numbered(tmp_path / "a.avi", "mpeg4")
    with file.open("r+b") as tail:
        tail.truncate(2**31)
    monkeypatch.setattr(opening, "PATIENCE", 0.5)
    found = probe(file, Entry("a.avi", "", (), ""), 2, False)
    assert found == Excluded("a.avi", "no video data within 0.5 s of reading")


# Files of several video streams

SIZES = {(64, 48): 100, (160, 120): 0}  # and what is added to the numbers in them, which tells streams apart


def write_streams(file: Path, streams: list[tuple[int, int, bool]], num_frames: int = 20) -> Path:
    """Write several video streams: width, height, and whether each is marked as default."""
    with av.open(str(file), "w") as container:
        made = []
        for width, height, is_default in streams:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "6"})
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = Disposition.default if is_default else Disposition(0)
            made.append(stream)
        for number in range(num_frames):
            for stream in made:
                shown = number + SIZES[stream.width, stream.height]
                picture = draw_number(shown, stream.width, stream.height)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in made:
            container.mux(stream.encode())
    return file


STREAMS = [
    ([(64, 48, False), (160, 120, True)], 1),
    ([(64, 48, True), (160, 120, True)], 1),
    ([(64, 48, True), (160, 120, False)], 0),
    ([(160, 120, True), (64, 48, False)], 0),
    ([(160, 120, False), (160, 120, True)], 1),
    ([(64, 48, False), (160, 120, False)], 1),
    ([(160, 120, False), (160, 120, False)], 0),
]
# An MP4 marks its first stream where none is marked.
CASES = [(suffix, *case) for suffix, cases in (("mkv", STREAMS), ("mp4", STREAMS[:5])) for case in cases]


@pytest.mark.parametrize(("suffix", "streams", "expected"), CASES)
def test_the_stream_is_the_one_that_ffmpeg_takes(
    tmp_path: Path, suffix: str, streams: list[tuple[int, int, bool]], expected: int
) -> None:
    """On every path, and an excerpt holds no other."""
    file = write_streams(tmp_path / f"a.{suffix}", streams)
    video = index(file)
    width, height, _ = streams[expected]
    if shutil.which("ffmpeg"):
        one_frame = ("-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gray", "-")
        taken = subprocess.run(["ffmpeg", "-v", "error", "-i", str(file), *one_frame], check=True, capture_output=True)
        assert len(taken.stdout) == width * height
    assert (video.stream, video.width, video.height) == (expected, width, height)
    numbers = [number + SIZES[width, height] for number in FRAMES]
    clip = decode_clips(str(file), video, [whole(video)], 64)[0]
    assert [read_number(frame) for frame in clip] == numbers
    assert [read_number(frame) for frame in read_clip(str(file), video, whole(video), 64).numpy()] == numbers
    assert [read_number(frame) for frame in decode_whole_frames(str(file), video, FRAMES, 48, 64)] == numbers
    excerpt = cut_excerpt(str(file), video, FRAMES)
    (tmp_path / "excerpt.mp4").write_bytes(excerpt.encoded.tobytes())
    with av.open(str(tmp_path / "excerpt.mp4")) as container:
        assert len(container.streams) == 1
        assert container.streams.video[0].width == width
    assert read_motion(str(file), video).shape == (20, 2, -(-height // BLOCK), -(-width // BLOCK))
    transcode(str(file), video, tmp_path / "out.mp4", CompactConfig(short_side=None))
    assert (index(tmp_path / "out.mp4").width, index(tmp_path / "out.mp4").stream) == (width, 0)


def write_with_cover(file: Path, is_attached: bool) -> Path:
    """Put a still picture, larger than the video, in front of it, as cover art or in a track of its own."""
    with av.open(str(file), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        assert isinstance(cover, VideoStream)
        assert isinstance(stream, VideoStream)
        cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        if is_attached:
            cover.disposition = Disposition.attached_pic
        still = av.VideoFrame.from_ndarray(np.zeros((480, 640, 3), np.uint8), format="rgb24")
        still.pts, still.time_base = 0, Fraction(1, 1)
        container.mux(cover.encode(still))
        container.mux(cover.encode())
        for number in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_number(number, 160, 120), format="rgb24")))
        container.mux(stream.encode())
    return file


@pytest.mark.parametrize("is_attached", [True, False])
def test_a_still_picture_in_front_is_passed_over(tmp_path: Path, is_attached: bool) -> None:
    file = write_with_cover(tmp_path / "a.mp4", is_attached)
    video = index(file)
    assert (video.num_frames, video.width, video.height) == (20, 160, 120)
    with open_video(str(file), video) as (container, stream):
        assert stream.width == 160
        assert video.stream == container.streams.video.index(stream)
    clip = decode_clips(str(file), video, [whole(video)], 64)[0]
    assert [read_number(frame) for frame in clip] == list(FRAMES)
