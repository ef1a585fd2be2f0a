"""Re-encoding one video: what the encoders write, which frames, in what colours."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from dali_pipelines.types import Video
from dali_pipelines.video.decode import decode_frames
from tests.support.videos import draw_number, make_video, read_number, write_numbered
from tgmae.data.listing import Entry
from tgmae.data.probing import probe
from tgmae.data.transcode import CODERS, CompactConfig, choose_nearest, compact_size, transcode

SMALL = CompactConfig(short_side=64)


def look_at(file: Path) -> Video:
    video = probe(file, Entry(file.name, "", (), ""), 1, False)
    assert isinstance(video, Video)
    return video


def compact_one(file: Path, config: CompactConfig) -> tuple[str, Video]:
    """One video compacted, without a worker: file and row."""
    target = file.with_name(f"compact.{config.codec}{CODERS[config.codec].suffix}")
    video = look_at(file)
    num_frames = transcode(str(file), video, target, config)
    made = look_at(target)
    assert made.num_frames == num_frames
    return str(target), made


def read_pictures(file: str, video: Video) -> list[NDArray[np.uint8]]:
    """All frames as RGB."""
    numbered = decode_frames(file, video, range(video.num_frames), seek=False)
    return [frame.to_ndarray(format="rgb24") for _, frame in numbered]


def read_numbers(file: str, video: Video) -> list[int]:
    return [read_number(picture) for picture in read_pictures(file, video)]


# Encoders


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_frames_and_keyframes_of_every_codec(tmp_path: Path, codec: Any) -> None:
    """All frames in order, no B frame, a keyframe exactly every gop frames, each of which can be sought."""
    source = write_numbered(tmp_path / "in" / "a.mp4", num_frames=43, g="30", bf="2", rate=30)
    file, video = compact_one(source, CompactConfig(short_side=64, codec=codec, gop=10))
    assert (video.codec, video.num_frames, video.rotation) == (codec, 43, 0)
    assert (video.width, video.height) == (80, 64)
    assert video.fps == pytest.approx(30, abs=0.01)
    assert Path(file).suffix == (".webm" if codec == "vp9" else ".mp4")
    assert video.keyframes == (0, 10, 20, 30, 40)
    assert read_numbers(file, video) == list(range(43))

    with av.open(file) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        packets = [packet for packet in container.demux(video=0) if packet.size]
        stamps = [packet.pts for packet in packets]
        assert len(packets) == 43
        assert stamps == [packet.dts for packet in packets]
        assert stamps == sorted(set(stamps))  # type: ignore[type-var]
    with av.open(file) as container:
        frames = list(container.decode(video=0))
        assert {frame.format.name for frame in frames} == {"yuv420p"}
        assert container.streams.video[0].codec_context.has_b_frames == 0
        if codec != "vp9":  # FFmpeg names no types of VP9's frames
            assert "".join(av.video.frame.PictureType(f.pict_type).name for f in frames) == ("I" + 9 * "P") * 4 + "IPP"

    straight = {n: f.to_ndarray() for n, f in decode_frames(file, video, range(43), seek=False)}
    for keyframe, pts in zip(video.keyframes, video.keyframe_pts, strict=True):
        for wanted in {keyframe, min(keyframe + 3, 42)}:
            [(_, frame)] = decode_frames(file, video, [wanted], seek=True)
            np.testing.assert_array_equal(frame.to_ndarray(), straight[wanted])
            assert wanted != keyframe or frame.pts == pts


def test_what_the_encoder_says_of_itself(tmp_path: Path) -> None:
    """x264 writes its settings into the stream: one reference frame, no weighted prediction."""
    content = Path(compact_one(write_numbered(tmp_path / "a.mp4", num_frames=14), SMALL)[0]).read_bytes()
    for words in (b"ref=1 ", b"bframes=0", b"weightp=0", b"keyint=12 ", b"scenecut=0", b"threads=1 ", b"mbtree=0"):
        assert words in content


def test_quality_and_noise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_numbered(tmp_path / "in" / "a.mp4", num_frames=12)
    sizes = [compact_one(source, CompactConfig(quality=quality, codec="hevc"))[1].num_bytes for quality in (15, 40)]
    assert sizes[0] > sizes[1]
    assert "x265" not in "".join(capfd.readouterr())


# Sizes, rotation, colours


@pytest.mark.parametrize(
    ("size", "short_side", "align", "expected"),
    [
        ((1920, 1080), 256, 16, (448, 256)), ((1080, 1920), 256, 16, (256, 448)), ((340, 256), 256, 16, (336, 256)),
        ((320, 240), 256, 16, (320, 240)), ((321, 241), 256, 16, (320, 240)), ((255, 247), 256, 16, (256, 240)),
        ((160, 120), None, 16, (160, 128)), ((1000, 2), 256, 16, (1008, 16)), ((640, 360), 100, 16, (176, 96)),
        ((1920, 1080), 256, 2, (456, 256)), ((321, 241), 256, 2, (322, 242)), ((640, 257), 256, 2, (638, 256)),
        ((1000, 2), 256, 2, (1000, 2)), ((1920, 1080), 256, 32, (448, 256)),
    ],
)  # fmt: skip
def test_sizes(size: tuple[int, int], short_side: int | None, align: int, expected: tuple[int, int]) -> None:
    video = make_video(width=size[0], height=size[1])
    assert compact_size(video, CompactConfig(short_side=short_side, align=align)) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [((160, 120), (336, 256)), ((120, 160), (256, 336)), ((1920, 1080), (448, 256))]
)
def test_small_pictures_grow_where_they_are_told_to(size: tuple[int, int], expected: tuple[int, int]) -> None:
    video = make_video(width=size[0], height=size[1])
    assert compact_size(video, CompactConfig(grow=True)) == expected
    assert compact_size(video, CompactConfig(grow=True, short_side=None)) == compact_size(
        video, CompactConfig(short_side=None)
    )


def test_aspect_changes_by_a_few_per_cent_at_most() -> None:
    """By default, where pictures are large enough: the short side is exact, the long one moves by at most 8 pixels."""
    worst = 0.0
    for long in range(256, 1400):
        width, height = compact_size(make_video(width=long, height=256), CompactConfig())
        assert height == 256
        assert width % 16 == 0
        worst = max(worst, abs(width / long - 1))
    assert 0.025 < worst <= 8 / 256


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_turned_videos_come_out_upright(tmp_path: Path, rotation: int, mirrored: bool) -> None:
    source = write_numbered(tmp_path / "in" / "a.mp4", num_frames=14, rotation=rotation, mirrored=mirrored)
    file, video = compact_one(source, CompactConfig(short_side=96))
    assert (video.rotation, video.mirrored, video.width, video.height) == (0, False, 128, 96)
    pictures = read_pictures(file, video)
    assert [read_number(picture) for picture in pictures] == list(range(14))
    expected = draw_number(5, 128, 96).astype(float)
    assert np.abs(pictures[5][52:] - expected[52:]).mean() < 4  # the gradient tells a mirrored picture


def tag_of(file: str) -> tuple[int, int, int, int]:
    with av.open(file) as container:
        frame = next(container.decode(container.streams.video[0]))
    return frame.color_range, frame.colorspace, frame.color_primaries, frame.color_trc


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
@pytest.mark.parametrize(
    ("pix_fmt", "tags"),
    [
        ("yuv420p", {}),
        ("yuv420p", {"color_range": "tv", "colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}),
        ("yuv420p", {"color_range": "tv", "colorspace": "smpte170m"}),
        ("yuvj420p", {"color_range": "pc", "colorspace": "bt709"}),
        ("yuv420p10le", {"color_range": "tv", "colorspace": "bt709"}),
        ("yuv444p", {}),
        ("gray", {}),
    ],
)
def test_colours_stay(tmp_path: Path, codec: Any, pix_fmt: str, tags: dict[str, str]) -> None:
    """Tags are kept, and the mean of each colour over every eighth of the picture."""
    source = write_numbered(tmp_path / "in" / "a.mp4", num_frames=2, pix_fmt=pix_fmt, crf="10", **tags)
    before = look_at(source)
    file, after = compact_one(source, CompactConfig(short_side=80, codec=codec, quality=10))
    for old, new in zip(read_pictures(str(source), before), read_pictures(file, after), strict=True):
        for part in range(8):
            blocks = [
                picture[picture.shape[0] // 2 :, slice(*(np.array([part, part + 1]) * picture.shape[1] // 8))]
                for picture in (old, new)
            ]
            means = [block.mean(axis=(0, 1)) for block in blocks]
            np.testing.assert_allclose(means[1], means[0], atol=3)
    if pix_fmt != "gray":
        known, found = tag_of(str(source)), tag_of(file)
        assert known[0] in (0, found[0])  # VP9 always states a range
        assert known[1:] == found[1:]


# Frames


def test_frames_nearest_to_a_grid() -> None:
    even = np.arange(40) / 25
    assert choose_nearest(even, 10, Fraction(25)) == ([n * 5 // 2 for n in range(16)], 10)
    assert choose_nearest(even, 12.5, Fraction(25)) == (list(range(0, 40, 2)), Fraction(25, 2))
    for fps in (25, 30, 100):
        assert choose_nearest(even, fps, Fraction(25)) == (list(range(40)), 25)
    frames, rate = choose_nearest(even, 24, Fraction(25))
    assert (frames, rate) == ([*range(13), *range(14, 38), 39], 24)
    assert choose_nearest(even[:1], 1, Fraction(25)) == ([0], 25)
    assert choose_nearest(even, 0.01, Fraction(25)) == ([0], Fraction(1, 100))
    # Ten frames a second for a second, a gap of one, then fifty a second: no frame twice, and the gap lowers the rate.
    uneven = np.concatenate([np.arange(10) / 10, 2 + np.arange(50) / 50])
    frames, rate = choose_nearest(uneven, 10, Fraction(20))
    assert frames == [*range(10), *range(10, 60, 5)]
    assert rate == Fraction(19 / 2.9).limit_denominator(1001)


def test_frames_of_variable_rate_videos(tmp_path: Path) -> None:
    """Time stamps decide, not numbers: the second half of this video has twice the frames a second."""
    source = tmp_path / "in" / "a.mkv"
    source.parent.mkdir()
    stamps = [*range(0, 1000, 100), *range(1000, 2000, 50)]
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"  # type: ignore[union-attr]
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, pts in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(draw_number(number, 160, 120), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))  # type: ignore[union-attr]
        container.mux(stream.encode())  # type: ignore[union-attr]
    file, video = compact_one(source, replace(SMALL, fps=10))
    assert read_numbers(file, video) == [*range(10), *range(10, 30, 2)]
    assert video.fps == pytest.approx(10)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
@pytest.mark.parametrize(
    ("options", "expected", "rate"),
    [
        ({"stride": 3}, list(range(0, 40, 3)), 25 / 3),
        ({"stride": 100}, [0], None),
        ({"fps": 10.0}, [n * 5 // 2 for n in range(16)], 10),
        ({"fps": 60.0}, list(range(40)), 25),
    ],
)
def test_chosen_frames(
    tmp_path: Path, name: str, options: dict[str, Any], expected: list[int], rate: float | None
) -> None:
    source = write_numbered(tmp_path / "in" / name, "mpeg4" if name == "a.avi" else "libx264", num_frames=40)
    file, video = compact_one(source, replace(SMALL, **options))
    assert read_numbers(file, video) == expected
    assert rate is None or video.fps == pytest.approx(rate, rel=1e-3)


# Settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 2, "fps": 10.0}, r"^--fps and --stride exclude each other, got 10.0 and 2"),
        ({"stride": 0}, "--stride and --gop must be at least 1, got 0"),
        ({"gop": 0}, "--stride and --gop must be at least 1, got 1 and 0"),
        ({"fps": 0.0}, "--fps must be above 0"),
        ({"fps": math.inf}, "--fps must be above 0"),
        ({"short_side": 255}, "--short-side must be even and at least 16 pixels, got 255"),
        ({"align": 0}, "--align must be even and at least 2 pixels, got 0"),
        ({"align": 15}, "--align must be even and at least 2 pixels, got 15"),
        ({"quality": 52}, "--quality must lie between 0 and 51 for --codec h264, got 52"),
        ({"codec": "av1"}, "--codec must be one of h264, hevc, vp9, got av1"),
    ],
)
def test_settings_that_mean_nothing(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CompactConfig(**options)
    CompactConfig(codec="vp9", quality=63, short_side=None)
