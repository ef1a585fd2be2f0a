"""Tags that FFmpeg's converter refuses: their videos come out as they did before it refused them, on every path."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from numpy.typing import NDArray

from dali_pipelines.pyav_pipeline import read_clip
from dali_pipelines.types import ClipRequest, CropBox, Video
from dali_pipelines.video.colours import colour_matrix, use_known_tags
from dali_pipelines.video.decode import _crop_and_resize, decode_clips, decode_frames
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
