"""An excerpt holds the frames that were asked for, from a keyframe on, and is refused where that is unclear."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.packet import Packet
from nvidia.dali import Pipeline, fn, types

from dali_pipelines.types import Video
from dali_pipelines.video import excerpt
from dali_pipelines.video.decode import DecodeError
from dali_pipelines.video.excerpt import NoExcerpt, cut_excerpt
from tests.support.videos import read_number, stamp, write_numbered
from tgmae.data.listing import Entry
from tgmae.data.probing import probe

KINDS = {
    "h264.mp4": dict(codec="libx264", g="12", bf="2"),
    "h264.mkv": dict(codec="libx264", g="12", bf="3"),
    "hevc.mp4": dict(codec="libx265", g="12"),
    "hevc.mkv": dict(codec="libx265", g="12", bf="0"),
    "vp8.webm": dict(codec="libvpx", g="12"),
    "vp9.webm": dict(codec="libvpx-vp9", g="12"),
    "vp9.mp4": dict(codec="libvpx-vp9", g="12"),
}
WINDOWS = ((0,), (3, 9), (11, 12), (40, 43, 46), (75, 79))


def index(file: Path) -> Video:
    video = probe(file, Entry(file.name, "", (), ""), 2, False)
    assert isinstance(video, Video)
    return video


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_frames_keep_their_pictures(tmp_path: Path, name: str) -> None:
    """With B frames too; and no more is handed over than the frames need."""
    file = write_numbered(tmp_path / name, num_frames=80, **KINDS[name])  # type: ignore[arg-type]
    video = index(file)
    assert len(video.keyframes) > 5
    for frames in WINDOWS:
        encoded, first, _ = cut_excerpt(str(file), video, frames)
        assert first == max(key for key in video.keyframes if key <= frames[0])
        with av.open(io.BytesIO(encoded.tobytes()), "r") as container:
            pictures = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
        numbers = [read_number(picture.astype(np.uint8)) for picture in pictures]
        assert numbers[: frames[-1] - first + 1] == list(range(first, frames[-1] + 1))
        assert len(numbers) <= frames[-1] - first + 5  # those that B frames refer to


def test_dali_finds_the_frames(tmp_path: Path) -> None:
    """Of VP8 and VP9, which it decodes on a CPU."""
    for name in ("vp8.webm", "vp9.webm", "vp9.mp4"):
        file = write_numbered(tmp_path / name, num_frames=80, **KINDS[name])  # type: ignore[arg-type]
        encoded, first, _ = cut_excerpt(str(file), index(file), (40, 43, 46))
        sample = [encoded], [np.array((40, 43, 46), np.int32) - first]
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
        with pipeline:
            outputs = fn.external_source(lambda: sample, num_outputs=2, dtype=[types.UINT8, types.INT32])  # noqa: B023 - this turn's
            pipeline.set_outputs(fn.decoders.video(outputs[0], frames=outputs[1]))
        (video,) = pipeline.run()
        assert [read_number(picture) for picture in np.asarray(video.at(0))] == [40, 43, 46]


def test_an_open_group_is_decoded_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keyframes are no IDR pictures, at which alone NVDEC begins."""
    options: dict[str, Any] = {"x264-params": "open-gop=1:bframes=3:b-adapt=0", "flags": "-cgop"}
    file = write_numbered(tmp_path / "open.mp4", num_frames=60, g="12", **options)
    video = index(file)
    assert len(video.keyframes) > 3
    assert cut_excerpt(str(file), video, (40, 43)).first == 0
    monkeypatch.setattr(excerpt, "_MOST_FRAMES", 43)
    assert cut_excerpt(str(file), video, (38, 42)).first == 0
    with pytest.raises(NoExcerpt, match="cannot start at a nearby keyframe"):
        cut_excerpt(str(file), video, (40, 43))


def test_a_last_keyframe_may_be_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV would begin there too. What is too large is left to it."""
    file = write_numbered(tmp_path / "long.mp4", num_frames=60, g="60")
    video = index(file)
    monkeypatch.setattr(excerpt, "_MOST_FRAMES", 2)
    assert cut_excerpt(str(file), video, (40, 43)).first == max(key for key in video.keyframes if key <= 40)
    monkeypatch.setattr(excerpt, "LARGEST", 100)
    with pytest.raises(NoExcerpt, match="needs more than"):
        cut_excerpt(str(file), video, (40, 43))


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("h264.mp4", "vp8.webm"):
        file = write_numbered(tmp_path / name, **KINDS[name])  # type: ignore[arg-type]
        first, second = (cut_excerpt(str(file), index(file), (20, 22)).encoded for _ in range(2))
        assert np.array_equal(first, second)


def rewrite(file: Path, out: Path, change: dict[int, bytes]) -> Path:
    """A copy with other bytes in some packets, by their place."""
    with av.open(str(file)) as source, av.open(str(out), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for place, packet in enumerate(source.demux(video=0)):
            if packet.size:
                copy = Packet(change.get(place, bytes(packet)))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                target.mux(copy)
    return out


def test_pictures_that_are_not_shown_are_left_to_pyav(tmp_path: Path) -> None:
    """DALI would count them: two in a packet, one that is hidden, and one that shows another again."""
    for codec, name in (("libvpx-vp9", "vp9.webm"), ("libvpx", "vp8.webm")):
        file = write_numbered(tmp_path / name, codec=codec, g="60")
        video = index(file)
        with av.open(str(file)) as container:
            packets = [bytes(packet) for packet in container.demux(video=0)]
        hidden = bytes([packets[6][0] & ~(0x02 if name == "vp9.webm" else 0x10)]) + packets[6][1:]
        changes = [hidden]
        if name == "vp9.webm":
            lengths = len(hidden).to_bytes(2, "little") + len(packets[7]).to_bytes(2, "little")
            changes += [hidden + packets[7] + b"\xc9" + lengths + b"\xc9", bytes([0x88])]
        for place, packet in enumerate(changes):
            changed = rewrite(file, tmp_path / f"{place}-{name}", {6: packet})
            assert cut_excerpt(str(changed), stamp(video, changed), (2, 5)).first == 0
            with pytest.raises(NoExcerpt, match="not shown"):
                cut_excerpt(str(changed), stamp(video, changed), (2, 8))


def test_fields_are_left_to_pyav(tmp_path: Path) -> None:
    """Two first slices in a packet are two pictures."""
    file = write_numbered(tmp_path / "a.mp4", g="12", slices="2")
    video = index(file)
    assert cut_excerpt(str(file), video, (2, 8)).first == 0  # two slices are one picture
    with av.open(str(file)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0)]
    changed = rewrite(file, tmp_path / "twice.mp4", {6: packets[6] + packets[6]})
    with pytest.raises(NoExcerpt, match="fields"):
        cut_excerpt(str(changed), stamp(video, changed), (2, 8))


def test_what_cannot_be_counted_is_left_to_pyav(tmp_path: Path) -> None:
    for name in ("a.avi", "a.ts"):
        file = write_numbered(tmp_path / name, bf="0")
        with pytest.raises(NoExcerpt, match="does not number the frames"):
            cut_excerpt(str(file), index(file), (3, 4))
    file = write_numbered(tmp_path / "a.mp4", g="12")
    video = index(file)
    other = write_numbered(tmp_path / "other.mp4", g="12", rate=10, num_frames=20)
    with pytest.raises(NoExcerpt, match="do not number"):
        cut_excerpt(str(other), stamp(video, other), (30, 33))


def test_a_broken_file_is_a_decode_error(tmp_path: Path) -> None:
    file = write_numbered(tmp_path / "a.mp4", g="12")
    video = index(file)
    file.write_bytes(bytes(1000))
    with pytest.raises(DecodeError, match="Invalid data found"):
        cut_excerpt(str(file), stamp(video, file), (3, 4))
    file.unlink()
    with pytest.raises(DecodeError, match="No such file"):
        cut_excerpt(str(file), video, (3, 4))
