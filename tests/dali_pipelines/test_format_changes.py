"""Videos that change their size or pixel format half way: no path decodes them to something else without a word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import pytest
from av.packet import Packet

from dali_pipelines.pyav_pipeline import read_clip
from dali_pipelines.types import ClipRequest, CropBox, Video
from dali_pipelines.video.decode import DecodeError, decode_clips, decode_frames
from dali_pipelines.video.excerpt import NoExcerpt, cut_excerpt
from dali_pipelines.video.headers import is_shown_once, keeps_format
from tests.support.requests import prepare
from tests.support.videos import write_numbered
from tgmae.data.listing import Entry
from tgmae.data.manifest import Manifest
from tgmae.data.probing import Excluded, probe

HALF = 20  # frames before the change, and after it


def write_joined(folder: Path, name: str, codec: str, *halves: dict[str, object]) -> Path:
    """Write the packets of several videos as if they were one, as a WebRTC recording or `cat` of streams does."""
    file, offset = folder / name, 0
    suffix = Path(name).suffix
    raw: dict[str, str] = {"flags": "-global_header"} if codec.startswith("libx26") else {}
    with av.open(str(file), "w") as target:
        stream = None
        for place, half in enumerate(halves):
            part = write_numbered(
                folder / f"part{place}{'.ts' if raw else suffix}", codec, num_frames=HALF, g="12", **raw,
                **{"width": 160, "height": 120, **half},
            )  # type: ignore[arg-type]  # fmt: skip
            with av.open(str(part)) as source:
                stream = stream or target.add_stream_from_template(source.streams.video[0])
                packets = [packet for packet in source.demux(video=0) if packet.size]
                start, step = min(packet.pts or 0 for packet in packets), packets[0].duration or 1
                for packet in packets:
                    copy = Packet(bytes(packet))
                    copy.pts = (packet.pts or 0) - start + offset
                    copy.dts = (packet.dts or 0) - start + offset
                    copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                    target.mux(copy)
                offset += HALF * step
    return file


def probe_one(file: Path, decode_all: bool = False) -> Video | Excluded:
    return probe(file, Entry(file.name, "", (), ""), 2, decode_all)


def as_indexed(file: Path, change: Path) -> Video:
    """Return the row that an earlier version, or a look at the packets alone, would have made of a joined file."""
    first = probe_one(change)
    assert isinstance(first, Video)
    with av.open(str(file)) as container:
        packets = sorted((p.pts or 0, p.is_keyframe) for p in container.demux(video=0) if p.size)
    keyframes = {number: pts for number, (pts, is_keyframe) in enumerate(packets) if is_keyframe}
    stat = file.stat()
    return replace(
        first, path=file.name, num_frames=2 * HALF, keyframes=tuple(keyframes), keyframe_pts=tuple(keyframes.values()),
        num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns,
    )  # fmt: skip


KINDS = {
    "smaller.webm": ("libvpx", {"width": 120, "height": 96}),
    "larger.mkv": ("libvpx", {"width": 320, "height": 240}),
    "smaller_vp9.webm": ("libvpx-vp9", {"width": 120, "height": 96}),
    "larger_vp9.mkv": ("libvpx-vp9", {"width": 320, "height": 240}),
    "turned_vp9.mp4": ("libvpx-vp9", {"width": 120, "height": 160}),
    "chroma_vp9.webm": ("libvpx-vp9", {"pix_fmt": "yuv444p"}),
    "h264.mkv": ("libx264", {"width": 120, "height": 96}),
    "chroma_h264.mkv": ("libx264", {"pix_fmt": "yuv444p"}),
    "hevc.mkv": ("libx265", {"width": 120, "height": 96}),
}


def request(frames: tuple[int, ...]) -> ClipRequest:
    box = CropBox(x=0, y=0, width=160, height=120)
    return ClipRequest(row=0, epoch=0, position=0, frames=frames, crop=box, flip=False, caption=0, mask_seed=0)


@pytest.mark.parametrize("name", KINDS)
def test_a_clip_over_the_change_is_refused(tmp_path: Path, name: str) -> None:
    """A clip of either path before the change is as good as ever; one after it is refused too."""
    codec, change = KINDS[name]
    file = write_joined(tmp_path, name, codec, {}, change)
    video = as_indexed(file, tmp_path / f"part0{'.ts' if codec.startswith('libx26') else Path(name).suffix}")
    early, late = (2, 9, 17), (HALF + 2, HALF + 9)
    assert len(list(decode_frames(str(file), video, early, seek=True))) == 3
    assert cut_excerpt(str(file), video, early).first == 0
    for frames in ((*early, *late), late):
        with pytest.raises(NoExcerpt, match="changes its size or pixel format"):
            cut_excerpt(str(file), video, frames)
        with pytest.raises(DecodeError, match=rf"^frame {HALF + 2} has .* but the manifest says 160×120 in yuv420p"):
            decode_clips(str(file), video, [request(frames)], 32)
        with pytest.raises(DecodeError, match=rf"^frame {HALF + 2} has"):
            read_clip(str(file), video, request(frames), 32)


def test_a_worker_names_the_change(tmp_path: Path) -> None:
    """DALI would decode the second half to garbage."""
    file = write_joined(tmp_path, "a.webm", "libvpx-vp9", {}, {"width": 120, "height": 96})
    manifest = Manifest.of([as_indexed(file, tmp_path / "part0.webm")], tmp_path)
    wanted = request((15, 18, 21, 24))
    prepared, clip = prepare(manifest, wanted)
    assert not prepared.is_native
    assert prepared.error == ("frame 21 has 120×96 pixels in yuv420p, but the manifest says 160×120 in yuv420p")
    assert not clip.any()


@pytest.mark.parametrize("name", KINDS)
def test_indexing_leaves_it_out(tmp_path: Path, name: str) -> None:
    """The packets of VP8 and VP9 say so; of others, decoding everything does."""
    codec, change = KINDS[name]
    file = write_joined(tmp_path, name, codec, {}, change)
    quick = probe_one(file)
    assert isinstance(quick, Excluded) == codec.startswith("libvpx")
    for found in (quick, probe_one(file, decode_all=True)):
        if isinstance(found, Excluded):
            assert found.reason.startswith(("changes its size or pixel format at frame 20", "changes at frame 20 from"))
            assert found.reason.endswith("; split it there, or re-encode it to one size")
    assert isinstance(probe_one(file, decode_all=True), Excluded)


@pytest.mark.parametrize("name", ["a.ts", "a.avi", "a.flv"])
def test_indexing_sees_it_where_it_decodes_anyway(tmp_path: Path, name: str) -> None:
    file = write_joined(tmp_path, name, "libx264", {}, {"width": 120, "height": 96})
    found = probe_one(file)
    assert isinstance(found, Excluded)
    assert found.reason.startswith("changes at frame 20 from 160×120 in yuv420p to 120×96 in yuv420p; split")


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libvpx", {}), ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "8"}), ("libvpx-vp9", {}),
        ("libvpx-vp9", {"pix_fmt": "yuv444p"}), ("libvpx-vp9", {"pix_fmt": "yuv440p"}),
        ("libvpx-vp9", {"pix_fmt": "yuv422p"}),
        ("libvpx-vp9", {"pix_fmt": "gbrp"}), ("libvpx-vp9", {"deadline": "good", "error-resilient": "1"}),
        ("libvpx-vp9", {"deadline": "good", "cpu-used": "4", "lag-in-frames": "8"}), ("libx264", {"bf": "2"}),
        ("libx265", {}),
    ],
)  # fmt: skip
def test_videos_that_do_not_change_pass(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    file = write_numbered(tmp_path / "a.mkv", codec, g="9", **options)  # type: ignore[arg-type]
    video = probe_one(file)
    assert isinstance(video, Video), video
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        plain = [
            keeps_format(packet, stream, video.coded)
            for packet in container.demux(stream)
            if packet.size and is_shown_once(packet, stream)
        ]
    assert len(plain) > 20
    assert all(plain)


def write_bits(*fields: tuple[int, int]) -> bytes:
    """Pack (value, number of bits) one after the other, the highest bit first."""
    text = "".join(f"{value:0{count}b}" for value, count in fields)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


SYNC, SIZE, OTHER = (0x498342, 24), ((159, 16), (119, 16)), ((119, 16), (95, 16))
INTER = ((2, 2), (0, 2), (0, 1), (1, 1), (1, 1), (0, 1), (0, 2), (0xFF, 8), *[(0, 4)] * 3)  # shown; profile 0
INTRA_ONLY = ((2, 2), (0, 2), (0, 1), (1, 1), (0, 1), (0, 1), (1, 1), (0, 2), SYNC, (0xFF, 8))
HEADERS = {
    "the size of a reference": ((*INTER, (0, 1), (1, 1)), True),
    "the same size, written out": ((*INTER, (0, 3), *SIZE), True),
    "another size between keyframes": ((*INTER, (0, 3), *OTHER), False),
    "an intra frame of the same size": ((*INTRA_ONLY, *SIZE), True),
    "an intra frame of another size": ((*INTRA_ONLY, *OTHER), False),
    "a frame shown again": (((2, 2), (0, 2), (1, 1), (3, 3)), True),
    "a keyframe without its sync code": (((2, 2), (0, 2), (0, 1), (0, 1), (1, 1), (0, 1), (0, 24), *SIZE), False),
}


@pytest.mark.parametrize("name", HEADERS)
def test_sizes_of_vp9_frames_between_keyframes(tmp_path: Path, name: str) -> None:
    """libvpx writes a size into other frames where it adapts to the bandwidth (bitstream specification, 6.2)."""
    fields, keeps = HEADERS[name]
    video = probe_one(write_numbered(tmp_path / "a.webm", "libvpx-vp9", num_frames=2))
    assert isinstance(video, Video)
    with av.open(str(tmp_path / "a.webm")) as container:
        packet = Packet(write_bits(*fields))
        assert keeps_format(packet, container.streams.video[0], video.coded) is keeps
