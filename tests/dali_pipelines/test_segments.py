"""Both pipelines return exactly the frames of a segment, whatever decodes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_pipelines.dali_pipeline import DaliPipeline
from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import ClipBatch, ClipPipeline, ClipRequest, CropBox
from dali_pipelines.video.decode import DecodeError, decode_whole_frames
from dali_pipelines.video.excerpt import cut_excerpt, why_no_excerpt
from dali_pipelines.video.motion import read_motion
from tests.support.requests import make_worker
from tests.support.segments import cut_segments
from tests.support.videos import read_number, write_numbered
from tgmae.config.data import DataConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.sampling import ClipSampler

SIZE, NUM_FRAMES = 64, 8
# Keyframes every 12 frames: from the start, across two keyframes, from a keyframe to the end, one frame, no keyframe
# inside. 5 and 1 frames are fewer than a clip has.
SEGMENTS = [None, (0, 10), (13, 29), (24, 40), (39, 40), (14, 19)]
VIDEOS = {
    "h264.mp4": dict(codec="libx264", g="12", keyint_min="12", sc_threshold="0", bf="2"),
    "mpeg4.avi": dict(codec="mpeg4", g="12"),  # no packet says its frame: decoded from the start
    "vp9.webm": dict(codec="libvpx-vp9", g="12", keyint_min="12"),
}


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Every segment of every numbered video."""
    folder = tmp_path_factory.mktemp("segments")
    for name, options in VIDEOS.items():
        write_numbered(folder / name, **options)  # type: ignore[arg-type]
    index_folder(folder, folder / "manifest.parquet", num_workers=1)
    files = read_manifest(folder / "manifest.parquet")
    assert [files[row].path for row in range(3)] == list(VIDEOS)
    for row in (0, 2):
        assert set(files[row].keyframes) >= {0, 12, 24, 36}
    rows = [(row, segment) for row in range(3) for segment in SEGMENTS]
    return cut_segments(files, folder / "segments.parquet", rows)


class Plan:
    """The clips that training draws, in two batches: dense, then uniform. Uncropped, so that numbers can be read."""

    def __init__(self, manifest: Manifest) -> None:
        self.requests = []
        for sampling, stride in (("dense", 2), ("uniform", 1)):
            data = DataConfig(sampling=sampling, stride=stride)  # type: ignore[arg-type]
            sampler = ClipSampler(manifest=manifest, data=data, num_frames=NUM_FRAMES, batch_size=len(manifest), seed=4)
            self.requests.append(tuple(replace(r, crop=whole_frame(manifest, r.row)) for r in sampler(0)))

    def __call__(self, batch: int) -> tuple[ClipRequest, ...]:
        return self.requests[batch % 2]


def whole_frame(manifest: Manifest, row: int) -> CropBox:
    return CropBox(x=0, y=0, width=manifest[row].width, height=manifest[row].height)


def take_two(pipeline: ClipPipeline) -> Iterator[ClipBatch]:
    try:
        yield pipeline.next_batch()
        yield pipeline.next_batch()
    finally:
        pipeline.close()


@pytest.mark.slow
def test_pipelines_return_the_frames_of_the_segment(segments: Manifest) -> None:
    plan = Plan(segments)
    fast = take_two(DaliPipeline(segments, plan, DataConfig(num_workers=2), SIZE))
    slow = take_two(PyavPipeline(segments, plan, SIZE))
    seen: dict[str, set[int]] = {}
    for dali, pyav in zip(fast, slow, strict=True):
        assert dali.skipped == pyav.skipped == ()
        assert dali.requests == pyav.requests
        assert dali.videos == pyav.videos == tuple(segments[request.row] for request in dali.requests)
        for place, (request, video) in enumerate(zip(dali.requests, dali.videos, strict=True)):
            for name, clips in (("dali", dali), ("pyav", pyav)):
                numbers = tuple(read_number(frame) for frame in clips.frames[place].numpy())
                assert numbers == request.frames, f"{name}, {video.name}"
                assert video.start <= min(numbers) <= max(numbers) < video.end
                seen.setdefault(video.name, set()).update(numbers)
        # The tolerance of test_pipelines.py.
        assert (dali.frames.float() - pyav.frames.float()).abs().mean() < 2
    assert {name for name, numbers in seen.items() if len(numbers) == 1} == {f"{name}#39-40" for name in VIDEOS}
    for name in VIDEOS:
        assert seen[f"{name}#14-19"] == set(range(14, 19))  # a short segment is read from its first frame to its last


def test_vp9_segments_go_to_dalis_own_decoder(segments: Manifest) -> None:
    worker = make_worker(segments, Plan(segments), None)
    for row in range(len(segments)):
        assert worker.is_native(row) == (segments[row].path == "vp9.webm")


@pytest.mark.parametrize(("segment", "first"), [((0, 10), 0), ((13, 29), 12), ((24, 40), 24), ((39, 40), 36)])
def test_excerpts_begin_at_the_keyframe_before_the_segment(
    segments: Manifest, segment: tuple[int, int], first: int
) -> None:
    rows = [row for row in range(len(segments)) if segments[row].segment == segment]
    for row in rows:
        video, file = segments[row], segments.file(row)
        if video.path == "mpeg4.avi":
            assert "avi does not number the frames" in why_no_excerpt(file, video, NUM_FRAMES)
        else:
            assert cut_excerpt(file, video, range(*segment)).first == first
            assert why_no_excerpt(file, video, NUM_FRAMES) == ""
    assert len(rows) == 3


def test_whole_frames_of_a_segment(segments: Manifest) -> None:
    """The frames for score maps, which jump to the segment."""
    for row in range(len(segments)):
        video = segments[row]
        numbers = range(video.start, video.end, 3)
        decoded = decode_whole_frames(segments.file(row), video, numbers, 60, 80)
        assert [read_number(frame) for frame in decoded] == list(numbers), video.name


def test_a_file_that_ends_within_its_segment(segments: Manifest) -> None:
    """The reference names the segment and its reason; the batch keeps its size."""
    cut = replace(segments[2], num_frames=60, segment=(30, 60))

    class Videos(Manifest):
        def __getitem__(self, row: int) -> object:  # type: ignore[override]
            return cut if row == 2 else super().__getitem__(row)

    videos = Videos(segments.table, segments.root)
    crop = whole_frame(segments, 0)
    requests = tuple(
        ClipRequest(
            row=row, epoch=0, position=row, frames=frames, crop=crop, flip=False, caption=0, mask_seed=row
        )
        for row, frames in ((2, (38, 41)), (1, (3, 4)))
    )  # fmt: skip
    batch = PyavPipeline(videos, lambda _: requests, SIZE).next_batch()  # type: ignore[arg-type]
    [skipped] = batch.skipped
    assert (skipped.row, skipped.path) == (2, "h264.mp4#30-60")
    assert skipped.reason == "ends before frame 41; the manifest says it has 60 frames"
    assert [video.name for video in batch.videos] == ["h264.mp4#0-10"] * 2
    assert torch.equal(batch.frames[0], batch.frames[1])


def test_motion_of_a_segment_is_a_part_of_the_files(shapes: Path) -> None:
    """In H.264 with B frames; frame 0 of the maps is the first of the segment."""
    manifest = read_manifest(shapes)
    video, file = manifest[0], manifest.file(0)
    whole = read_motion(file, video)
    assert len(whole) == video.num_frames
    for start, end in ((0, 12), (7, 31), (video.num_frames - 1, video.num_frames)):
        part = read_motion(file, replace(video, segment=(start, end)))
        np.testing.assert_array_equal(part, whole[start:end])
    assert np.abs(np.diff(whole[7:31].astype(int), axis=0)).max() > 0  # a shift by a frame would show


def test_motion_of_a_turned_segment(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4", rotation=90)
    index_folder(tmp_path, tmp_path / "manifest.parquet", num_workers=1)
    manifest = read_manifest(tmp_path / "manifest.parquet")
    whole = read_motion(manifest.file(0), manifest[0])
    part = read_motion(manifest.file(0), replace(manifest[0], segment=(5, 20)))
    np.testing.assert_array_equal(part, whole[5:20])


def test_motion_of_a_file_with_other_frames_is_refused(segments: Manifest) -> None:
    wrong = replace(segments[2], num_frames=41)
    with pytest.raises(DecodeError, match="has 40 frames, but the manifest says 41"):
        read_motion(segments.file(2), wrong)
