"""The travelling types: segments and their names, JSON journals, and what a batch checks and shows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from dali_pipelines.types import Caption, ClipBatch, ClipRequest, CropBox, SkippedVideo, Video, video_from_json
from tests.support.videos import make_video

REQUEST = ClipRequest(
    row=0, epoch=0, position=0, frames=(0, 1), crop=CropBox(x=0, y=0, width=4, height=4), flip=False, caption=0,
    mask_seed=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("segment", "start", "end", "name"),
    [
        (None, 0, 40, "walk/a.mp4"),
        ((0, 39), 0, 39, "walk/a.mp4#0-39"),
        ((12, 30), 12, 30, "walk/a.mp4#12-30"),
        ((39, 40), 39, 40, "walk/a.mp4#39-40"),
    ],
)
def test_segment(segment: tuple[int, int] | None, start: int, end: int, name: str) -> None:
    video = make_video(segment=segment)
    assert (video.start, video.end, video.length, video.name) == (start, end, end - start, name)
    assert (video.path, video.num_frames) == ("walk/a.mp4", 40)  # of the file


def test_rows_of_one_file_have_different_names() -> None:
    segments = [None, (0, 10), (10, 20), (0, 20), (1, 10)]
    assert len({make_video(segment=segment).name for segment in segments}) == len(segments)


def test_a_segment_of_all_frames_is_the_whole_file() -> None:
    whole = make_video(segment=(0, 40))
    assert whole == make_video()
    assert (whole.segment, whole.name) == (None, "walk/a.mp4")
    assert replace(make_video(segment=(3, 9)), segment=(0, 40)) == make_video()


@pytest.mark.parametrize("segment", [(-1, 5), (5, 5), (9, 3), (0, 41), (40, 41)])
def test_a_segment_outside_its_file_is_refused(segment: tuple[int, int]) -> None:
    message = rf"within the 40 frames of walk/a\.mp4, got frames {segment[0]} to {segment[1]}, the last one excluded"
    with pytest.raises(ValueError, match=message):
        make_video(segment=segment)


# JSON, as journals hold it


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"segment": (12, 30)},
        {"captions": (Caption("日本語", "whisper"), Caption("ab", ""), Caption("a man", "csv"))},
        {"captions": (), "keyframes": (0,), "keyframe_pts": (-(2**40),), "fps": 29.97, "rotation": 270},
    ],
)
def test_json_gives_the_same_video(changes: dict[str, Any]) -> None:
    video = make_video(**changes)
    again = video_from_json(json.loads(json.dumps(asdict(video))))
    assert again == video
    assert all(isinstance(caption, Caption) for caption in again.captions)
    assert [type(getattr(again, name)) for name in ("keyframes", "keyframe_pts", "captions")] == [tuple] * 3
    assert isinstance(again.segment, tuple) == (video.segment is not None)


def test_json_without_sources_and_segments() -> None:
    """A journal that an earlier version left: two-letter captions must not be taken for a text and its source."""
    old = json.loads(json.dumps(asdict(make_video()))) | {"captions": ["a man walks", "hi", ""]}
    del old["segment"]
    assert video_from_json(old) == make_video(captions=(Caption("a man walks", ""), Caption("hi", ""), Caption("", "")))


def test_other_json_is_refused() -> None:
    whole = asdict(make_video())
    with pytest.raises(KeyError):
        video_from_json({name: value for name, value in whole.items() if name != "captions"})
    with pytest.raises(TypeError):
        video_from_json({name: value for name, value in whole.items() if name != "fps"})
    with pytest.raises(TypeError):
        video_from_json(whole | {"seconds": 1.6})


# Batches


def frames(count: int = 2) -> torch.Tensor:
    return torch.zeros(count, 2, 8, 6, 3, dtype=torch.uint8)


def batch(videos: tuple[Video, ...] = (make_video(),) * 2, **changes: Any) -> ClipBatch:
    return ClipBatch(**{"frames": frames(), "requests": (REQUEST,) * 2, "videos": videos, **changes})


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (frames().float(), r"torch\.float32 \[2, 2, 8, 6, 3\]"),
        (frames()[0], r"torch\.uint8 \[2, 8, 6, 3\]"),
        (frames().permute(0, 1, 4, 2, 3), r"torch\.uint8 \[2, 2, 3, 8, 6\]"),
    ],
)
def test_frames_of_another_kind_are_refused(wrong: torch.Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=rf"expected uint8 frames \[B, T, H, W, 3\], got {got}"):
        batch(frames=wrong)


@pytest.mark.parametrize("name", ["requests", "videos"])
def test_each_clip_has_a_request_and_a_video(name: str) -> None:
    for count in (1, 3):
        one = {"requests": REQUEST, "videos": make_video()}[name]
        with pytest.raises(ValueError, match=f"expected 2 {name}, one per clip, got {count}"):
            batch(**{name: (one,) * count})


def test_repr_shows_shapes_and_no_contents() -> None:
    assert repr(batch()) == "ClipBatch(frames uint8 [2, 2, 8, 6, 3] on cpu)"
    skipped = SkippedVideo(row=1, path="walk/a.mp4", reason="empty file")
    assert repr(batch(skipped=(skipped,))) == "ClipBatch(frames uint8 [2, 2, 8, 6, 3] on cpu, 1 skipped)"


def test_values_are_never_read() -> None:
    """Tensors on the device "meta" have none: whatever read one would raise."""
    clips = batch(frames=frames().to("meta"))
    assert repr(clips) == "ClipBatch(frames uint8 [2, 2, 8, 6, 3] on meta)"


def test_captions_are_those_that_were_drawn() -> None:
    videos = (make_video(), make_video(captions=()), make_video(captions=(Caption("a cat", "label"),)))
    requests = (replace(REQUEST, caption=1), REQUEST, REQUEST)
    clips = batch(videos, frames=frames(3), requests=requests)
    assert clips.captions() == ["someone is walking", "", "a cat"]
    assert [video.texts for video in clips.videos] == [("a man walks", "someone is walking"), (), ("a cat",)]


def test_requests_have_one_view_unless_told_otherwise() -> None:
    assert (REQUEST.augment_seed, REQUEST.view) == (0, 0)
    assert replace(REQUEST, view=3) != REQUEST
