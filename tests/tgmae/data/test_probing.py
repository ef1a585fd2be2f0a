"""What probing makes of files in containers that know little about their frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from dali_pipelines.types import Video
from dali_pipelines.video.decode import decode_frames, to_rgb
from tests.support.videos import read_number, write_numbered
from tgmae.data.listing import Entry
from tgmae.data.probing import probe


@pytest.mark.parametrize(
    ("name", "codec"), [("a.h264", "libx264"), ("a.m2v", "mpeg2video"), ("a.mjpeg", "mjpeg"), ("a.y4m", "rawvideo")]
)
def test_raw_streams(tmp_path: Path, name: str, codec: str) -> None:
    """They have no index, and FFmpeg refuses to seek in some of them, even to the start."""
    file = write_numbered(tmp_path / name, codec=codec, g="12", pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p")
    video = probe(file, Entry(name, "", (), "train"), 1, False)
    assert isinstance(video, Video), video
    assert video.num_frames == 40
    found = [read_number(to_rgb(frame)) for _, frame in decode_frames(str(file), video, [3, 20, 37], seek=True)]
    assert found == [3, 20, 37]
