"""Keyframes are the ones that were chosen, upright, of their segment, however the decoder gets to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from dali_pipelines.types import Video
from dali_pipelines.video import decode
from dali_pipelines.video.decode import decode_frames, to_rgb
from tests.support.segments import cut_segments
from tests.support.videos import make_video, read_number, stamp, write_numbered
from tgmae.captions.generate.frames import choose_frames, fit_size, read_frames
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest

CODECS = {
    "h264.mp4": {"codec": "libx264", "g": "12", "bf": "2"},
    "long.mp4": {"codec": "libx264", "g": "250"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "30"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "20"},
    "turned.mp4": {"codec": "libx264", "rotation": 90},
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("numbered")
    for name, options in CODECS.items():
        write_numbered(folder / name, num_frames=200, **options)  # type: ignore[arg-type]
    index_folder(folder, folder / "m.parquet", num_workers=1)
    return read_manifest(folder / "m.parquet")


def video_of(manifest: Manifest, name: str) -> tuple[str, Video]:
    row = manifest.names().index(name)
    return manifest.file(row), manifest[row]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 16, 299])
def test_keyframes_are_uniform_within_the_segment(length: int) -> None:
    video = make_video(num_frames=400, segment=(50, 50 + length), keyframes=(0,), keyframe_pts=(0,))
    for count in (1, 2, 3, 5):
        frames = choose_frames(video, count)
        assert frames == sorted(set(frames))
        assert len(frames) == min(count, length) or length < count
        assert all(50 <= frame < 50 + length for frame in frames)
    assert choose_frames(video, 1) == [50 + length // 2]
    assert 50 + length // 2 in choose_frames(video, 3)  # the centre is the second of three


def test_three_frames_divide_a_video_evenly() -> None:
    assert choose_frames(make_video(num_frames=60, keyframes=(0,), keyframe_pts=(0,)), 3) == [10, 30, 50]


@pytest.mark.parametrize("name", CODECS)
def test_jumping_between_frames_gives_the_frames_of_decoding_all(
    name: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, video = video_of(manifest, name)
    wanted = [3, 4, 61, 62, 100, 150, 199]
    expected = {number: to_rgb(frame) for number, frame in decode_frames(file, video, wanted, seek=False)}
    assert list(expected) == wanted
    for worth in (0, 12):  # 0 jumps to every keyframe that comes
        monkeypatch.setattr(decode, "_WORTH_A_SEEK", worth)
        found = {number: to_rgb(frame) for number, frame in decode_frames(file, video, wanted, seek=True, jump=True)}
        assert list(found) == wanted
        assert all(np.array_equal(found[number], expected[number]) for number in wanted)


def test_frames_are_those_of_a_plain_loop_over_the_file(manifest: Manifest) -> None:
    """Numbers as drawn, colours as PyAV converts them; none of the file is read twice for a frame."""
    for row, frames, reason in read_frames(manifest, range(len(manifest)), 5, 768, num_workers=0):
        video = manifest[row]
        assert reason == ""
        assert [read_number(frame) for frame in frames] == choose_frames(video, 5)
        assert all(frame.shape == (video.height, video.width, 3) for frame in frames)
        if not video.rotation:
            with av.open(manifest.file(row)) as container:
                plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            for number, frame in zip(choose_frames(video, 5), frames, strict=True):
                difference = np.abs(frame.astype(int) - plain[number].astype(int))
                assert difference.mean() < 2  # chroma is upsampled in another way


def test_segments_never_show_frames_of_their_neighbours(manifest: Manifest, tmp_path: Path) -> None:
    segments = [(row, (start, start + 7)) for row in range(len(manifest)) for start in (0, 93, 193)]
    cut = cut_segments(manifest, tmp_path / "cut.parquet", segments)  # the last ones end with the stream
    for row, frames, reason in read_frames(cut, range(len(cut)), 7, 768, num_workers=0):
        assert reason == ""
        assert [read_number(frame) for frame in frames] == list(range(cut[row].start, cut[row].end))


def test_what_comes_before_a_break_is_kept(tmp_path: Path) -> None:
    """A manifest that promises more frames than the stream has; a file that is no video; one that is gone."""
    write_numbered(tmp_path / "a.mp4", num_frames=40)
    (tmp_path / "b.mp4").write_bytes(b"not a video" * 100)
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    whole = read_manifest(tmp_path / "m.parquet")[0]
    videos = [
        replace(whole, num_frames=60), stamp(replace(whole, path="b.mp4"), tmp_path / "b.mp4"),
        replace(whole, path="gone.mp4"),
    ]  # fmt: skip
    found = list(read_frames(Manifest.of(videos, tmp_path), range(3), 3, 768, num_workers=0))
    assert [[read_number(frame) for frame in frames] for _, frames, _ in found] == [[10, 30], [], []]
    assert found[0][2].startswith("ends before frame 50")
    assert found[2][2] == "No such file or directory"
    assert all(reason for _, _, reason in found)


def test_large_frames_become_smaller_and_small_ones_stay() -> None:
    assert fit_size(1920, 1080, 768) == (768, 432)
    assert fit_size(240, 427, 768) == (240, 427)
    assert fit_size(3, 3000, 768) == (1, 768)


def test_workers_read_what_one_process_reads(manifest: Manifest) -> None:
    """With few slots of shared memory, each is used again and again, and none before its frames were taken."""
    rows = [*range(len(manifest))] * 4
    for max_side in (64, 768):
        alone = list(read_frames(manifest, rows, 2, max_side, num_workers=0))
        together = list(read_frames(manifest, rows, 2, max_side, num_workers=1))
        assert [row for row, _, _ in together] == rows
        for (_, one, _), (_, other, _) in zip(alone, together, strict=True):
            assert len(one) == len(other) == 2
            assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_what_workers_cannot_read_takes_no_slot_for_good(tmp_path: Path) -> None:
    for number in range(8):
        write_numbered(tmp_path / f"{number}.mp4", num_frames=20)
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    for number in (0, 3, 4, 5):
        (tmp_path / f"{number}.mp4").unlink()
    found = list(read_frames(read_manifest(tmp_path / "m.parquet"), range(8), 3, 768, num_workers=1))
    gone = "No such file or directory"
    assert [(row, len(frames), reason) for row, frames, reason in found] == [
        (row, 0, gone) if row in (0, 3, 4, 5) else (row, 3, "") for row in range(8)
    ]
