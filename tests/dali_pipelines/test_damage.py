"""A frame that FFmpeg calls corrupt costs the clips that need it, and is named; the others are as good as ever."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet

from dali_pipelines.pyav_pipeline import read_clip
from dali_pipelines.types import ClipRequest, CropBox, Video
from dali_pipelines.video.decode import DecodeError, decode_clips, decode_frames, decode_whole_frames
from dali_pipelines.video.motion import read_motion
from tests.support.requests import prepare
from tests.support.videos import read_number, real_data_folder, write_numbered
from tgmae.data.coders import CompactConfig
from tgmae.data.compact import compact
from tgmae.data.listing import Entry
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.data.probing import Excluded, probe

GOP, DAMAGED = 12, 15  # the second group of frames, 12 to 23, has a damaged one


def probe_one(file: Path, decode_all: bool = False) -> Video | Excluded:
    return probe(file, Entry(file.name, "", (), ""), 2, decode_all)


def write_damaged(folder: Path, seed: int) -> Path:
    """Change a few bytes within the slice of one P frame."""
    whole = write_numbered(folder / "whole.mp4", num_frames=36, g=str(GOP), bf="0", crf="1", refs="1")
    damaged, random = folder / f"damaged{seed}.mp4", np.random.default_rng(seed)
    with av.open(str(whole)) as source, av.open(str(damaged), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for place, packet in enumerate(source.demux(video=0)):
            if packet.size:
                content = bytearray(packet)
                if place == DAMAGED:
                    middle = len(content) // 2
                    content[middle : middle + 4] = random.bytes(4)
                copy = Packet(bytes(content))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                target.mux(copy)
    return damaged


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that decodes without an error, to frames of which FFmpeg says that one is corrupt."""
    folder = tmp_path_factory.mktemp("damaged")
    for seed in range(20):
        file = write_damaged(folder, seed)
        try:
            with av.open(str(file)) as container:
                corrupt = [number for number, frame in enumerate(container.decode(video=0)) if frame.is_corrupt]
        except av.FFmpegError:
            continue
        if corrupt == [DAMAGED]:
            return file
    pytest.fail("no change of bytes left a file that decodes")


def request(*frames: int) -> ClipRequest:
    box = CropBox(x=0, y=0, width=160, height=120)
    return ClipRequest(row=0, epoch=0, position=0, frames=frames, crop=box, flip=False, caption=0, mask_seed=0)


@pytest.mark.parametrize("frames", [(DAMAGED,), (13, 20), (20,), (3, 22), (3, 30), (23, 35)])
def test_clips_that_need_the_frame_are_refused(damaged: Path, frames: tuple[int, ...]) -> None:
    """It need not be shown itself: the frames after it, up to the next keyframe, are made from it."""
    file, video = str(damaged), probe_one(damaged)
    assert isinstance(video, Video)
    for seek in (False, True):
        with pytest.raises(DecodeError, match=rf"^frame {DAMAGED} is corrupt$"):
            list(decode_frames(file, video, frames, seek=seek))
    for decode in (
        lambda: decode_clips(file, video, [request(*frames)], 32),
        lambda: read_clip(file, video, request(*frames), 32),
        lambda: list(decode_whole_frames(file, video, frames, 32, 32)),
    ):
        with pytest.raises(DecodeError, match=rf"^frame {DAMAGED} is corrupt$"):
            decode()


@pytest.mark.parametrize("frames", [(0, 11), (13, 14), (24, 35)])
def test_clips_that_do_not_need_it_are_not(damaged: Path, frames: tuple[int, ...]) -> None:
    video = probe_one(damaged)
    assert isinstance(video, Video)
    for seek in (False, True):
        found = list(decode_frames(str(damaged), video, frames, seek=seek))
        assert tuple(read_number(frame.to_ndarray(format="rgb24").astype(np.uint8)) for _, frame in found) == frames


def test_a_worker_names_the_frame(damaged: Path) -> None:
    video = probe_one(damaged)
    assert isinstance(video, Video)
    manifest = Manifest.of([video], damaged.parent)
    prepared, _ = prepare(manifest, request(14, 16, 18))
    assert prepared.error == f"frame {DAMAGED} is corrupt"


def test_no_motion_is_read_from_it(damaged: Path) -> None:
    video = probe_one(damaged)
    assert isinstance(video, Video)
    with pytest.raises(DecodeError, match=f"frame {DAMAGED} is corrupt"):
        read_motion(str(damaged), video)


def test_indexing_by_decoding_leaves_it_out(damaged: Path) -> None:
    assert isinstance(probe_one(damaged), Video)
    assert probe_one(damaged, decode_all=True) == Excluded(damaged.name, f"frame {DAMAGED} is corrupt")


@pytest.mark.slow
def test_compact_leaves_it_out(damaged: Path, tmp_path: Path) -> None:
    whole, broken = probe_one(damaged.with_name("whole.mp4")), probe_one(damaged)
    assert isinstance(whole, Video)
    assert isinstance(broken, Video)
    write_manifest(tmp_path / "m.parquet", [whole, broken], damaged.parent)
    result = compact(read_manifest(tmp_path / "m.parquet"), tmp_path / "out", CompactConfig(), 1)
    assert result.excluded == [Excluded(damaged.name, f"frame {DAMAGED} is corrupt")]
    assert result.rows == (0,)


def test_a_jump_into_an_intra_refresh_shows_the_same_frames(tmp_path: Path) -> None:
    """FFmpeg shows no frame until every block has been refreshed, so that decoding must start further back."""
    file = write_numbered(
        tmp_path / "a.mkv", num_frames=60, g="12", bf="0", refs="1", **{"x264-params": "intra-refresh=1:keyint=12"}
    )  # type: ignore[arg-type]  # fmt: skip
    video = probe_one(file)
    assert isinstance(video, Video)
    assert len(video.keyframes) == 5
    straight = {n: f.to_ndarray(format="rgb24") for n, f in decode_frames(str(file), video, range(60), seek=False)}
    for first in range(0, 57, 4):
        for number, frame in decode_frames(str(file), video, (first, first + 3), seek=True):
            np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), straight[number], err_msg=str(number))


@pytest.mark.slow
def test_real_videos_are_not_called_corrupt() -> None:
    """Every tenth; more than a hundred were looked at when the check was made."""
    data = real_data_folder()
    if data is None:
        pytest.skip("no real videos: set TGMAE_REAL_DATA")
    files = sorted(file for file in (data / "videos").rglob("*") if file.suffix in (".mp4", ".avi", ".mkv", ".mov"))
    files = [file for file in files if file.stat().st_size < 2**21 and file.name != "corrupted.mp4"][::10]
    assert len(files) > 40
    for file in files:
        found = probe_one(file, decode_all=True)
        assert isinstance(found, Video), found
