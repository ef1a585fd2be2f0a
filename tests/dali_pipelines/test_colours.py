"""Tags that FFmpeg's converter refuses: their videos come out as they did before it refused them, on every path."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from numpy.typing import NDArray

from dali_pipelines.pyav_pipeline import read_clip
from dali_pipelines.types import ClipRequest, CropBox, Video
from dali_pipelines.video.colours import colour_matrix, use_known_tags
from dali_pipelines.video.decode import _crop_and_resize, _Resizer, decode_clips, decode_frames
from tests.support.videos import write_numbered
from tgmae.data.coders import CompactConfig
from tgmae.data.listing import Entry
from tgmae.data.probing import probe
from tgmae.data.transcode import transcode

BOX = CropBox(x=0, y=0, width=160, height=120)
REQUEST = ClipRequest(row=0, epoch=0, position=0, frames=(2, 5), crop=BOX, flip=False, caption=0, mask_seed=0)
UNTAGGED, BT2020 = 2, 9


def write_tagged(file: Path, matrix: int) -> Path:
    """Write H.264 whose sequence parameter set names a matrix (ITU-T H.273, table 4)."""
    plain = write_numbered(file.with_name("plain.mp4"), num_frames=8, crf="5")
    with av.open(str(plain)) as source, av.open(str(file), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        tag = BitStreamFilterContext(f"h264_metadata=matrix_coefficients={matrix}", source.streams.video[0], stream)
        for packet in source.demux(video=0):
            for tagged in tag.filter(packet if packet.size else None):
                tagged.stream = stream
                target.mux(tagged)
    return file


def read(file: Path) -> tuple[Video, NDArray[np.uint8], NDArray[np.uint8]]:
    video = probe(file, Entry(file.name, "", (), ""), 2, True)
    assert isinstance(video, Video), video
    path = str(file)
    return video, decode_clips(path, video, [REQUEST], 48)[0], read_clip(path, video, REQUEST, 48).numpy()


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Video, NDArray[np.uint8], NDArray[np.uint8]]]:
    folder = tmp_path_factory.mktemp("known")
    return {matrix: read(write_tagged(folder / f"{matrix}.mp4", matrix)) for matrix in (1, UNTAGGED, BT2020)}


@pytest.mark.parametrize("matrix", [0, 3, 8, 10, 11, 12, 13, 14, 15, 16, 200])
def test_odd_matrices_are_read_as_others(
    tmp_path: Path, known: dict[int, tuple[Video, NDArray[np.uint8], NDArray[np.uint8]]], matrix: int
) -> None:
    """BT.2020 with constant luminance is read as the one without, all others as if they had no tag."""
    file = write_tagged(tmp_path / "a.mp4", matrix)
    video, *clips = read(file)
    with av.open(str(file)) as container:
        assert next(container.decode(video=0)).colorspace == (matrix if matrix in (0, *range(8, 17)) else UNTAGGED)
    _, *expected = known[BT2020 if matrix == 10 else UNTAGGED]
    for found, wanted in zip(clips, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert transcode(str(file), video, tmp_path / "out.mp4", CompactConfig(short_side=None)) == 8
    # The result says what was assumed.
    [(_, made)] = decode_frames(str(tmp_path / "out.mp4"), read(tmp_path / "out.mp4")[0], [5], seek=True)
    assert made.colorspace == {0: 0, 10: BT2020}.get(matrix, UNTAGGED)


def test_matrices_differ(known: dict[int, tuple[Video, NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
    """Otherwise the tests above would say nothing."""
    for place in (1, 2):
        for other in (1, BT2020):
            assert np.abs(known[other][place].astype(int) - known[UNTAGGED][place]).max() > 10


def test_dali_is_corrected_in_the_same_way() -> None:
    constant, usual = colour_matrix(10), colour_matrix(BT2020)
    assert constant is not None
    assert usual is not None
    np.testing.assert_array_equal(constant, usual)
    assert all(colour_matrix(matrix) is None for matrix in (0, 2, 3, 5, 6, 8, *range(11, 20)))


@pytest.mark.parametrize("name", ["colorspace", "color_primaries", "color_trc"])
def test_every_tag_can_be_converted(name: str) -> None:
    """Containers name primaries and transfer functions too, which FFmpeg refuses in its filters."""
    picture = np.full((96, 128, 3), 90, np.uint8)
    for value in range(32):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        setattr(frame, name, value)
        use_known_tags(frame)
        graph = _crop_and_resize(frame, CropBox(x=0, y=0, width=128, height=96), 32, 32)
        graph.push(frame)
        for rgb in (graph.pull().to_ndarray(), frame.to_ndarray(format="rgb24")):
            assert np.abs(rgb.astype(int) - 90).max() <= 6, (name, value)


# Weights of red and blue in luma (ITU-T H.273, table 4), by AVColorSpace.
WEIGHTS = {UNTAGGED: (0.299, 0.114), 1: (0.2126, 0.0722), 6: (0.299, 0.114), BT2020: (0.2627, 0.0593)}


def flat_frames(
    space: int, full: bool, pixel_format: str, width: int, height: int
) -> Iterator[tuple[av.VideoFrame, NDArray[np.float64]]]:
    """Yield frames of one colour each, and the RGB that their YUV means in float64 (H.273, equations 20 to 50)."""
    scale = 4 if pixel_format.endswith("10le") else 1
    top, dtype = (256 * scale - 1, np.uint16 if scale > 1 else np.uint8)
    black, luma, chroma = (0, top, top) if full else (16 * scale, 219 * scale, 224 * scale)
    red, blue = WEIGHTS[space]
    for rgb in np.random.default_rng(0).uniform(0.1, 0.9, (12, 3)):
        y = rgb @ [red, 1 - red - blue, blue]
        differences = np.array([(rgb[2] - y) / (2 - 2 * blue), (rgb[0] - y) / (2 - 2 * red)])
        coded = np.round([black + luma * y, *(128 * scale + chroma * differences)])
        y, u, v = (coded - [black, 128 * scale, 128 * scale]) / [luma, chroma, chroma]
        r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
        frame = av.VideoFrame(width, height, pixel_format)
        for plane, value in zip(frame.planes, coded, strict=True):
            plane.update(np.full(plane.buffer_size // dtype().itemsize, value, dtype))
        frame.time_base, frame.colorspace, frame.color_range = Fraction(1, 25), space, 2 if full else 1
        yield frame, 255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b])


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", WEIGHTS)
def test_no_tag_darkens(space: int, full: bool, pixel_format: str) -> None:
    """swscale rounds down, about a level and a quarter; converting tagged frames twice cost another one."""
    for width, height, crop in ((340, 256, CropBox(x=41, y=13, width=224, height=211)), (161, 121, BOX)):
        error = [
            _Resizer(crop, 96, 224)(frame).mean((0, 1)) - truth
            for frame, truth in flat_frames(space, full, pixel_format, width, height)
        ]
        assert -1.4 < np.mean(error) < 0
        assert np.abs(error).max() < 3.5


def test_a_matrix_that_changes_is_followed() -> None:
    """Files that were joined may be tagged in parts."""
    resize = _Resizer(BOX, 48, 48)
    frames = [next(flat_frames(space, False, "yuv420p", 160, 120)) for space in (UNTAGGED, 1, BT2020, UNTAGGED)]
    for frame, truth in frames:
        assert np.abs(resize(frame).mean((0, 1)) - truth).max() < 2.5
