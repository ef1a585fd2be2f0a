"""Sampling: a pure function of (seed, epoch, position) that shows every video once an epoch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dali_pipelines.types import ClipRequest, Video
from tests.support.videos import make_video
from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import ClipSampler, clip_span, sample_crop, sample_frames


def make_manifest(videos: list[Video]) -> Manifest:
    return Manifest.of(videos, Path("/nowhere"))


def make_sampler(num_videos: int = 10, data: DataConfig | None = None, **changes: Any) -> ClipSampler:
    lengths = [40 + 7 * number % 31 for number in range(num_videos)]
    manifest = make_manifest([make_video(path=f"{n}.mp4", num_frames=length) for n, length in enumerate(lengths)])
    options = {"num_frames": 8, "batch_size": 4, "seed": 3, **changes}
    return ClipSampler(manifest=manifest, data=data or DataConfig(flip=True), **options)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Purity


def test_two_samplers_agree_whatever_the_order_of_batches() -> None:
    forwards, backwards = make_sampler(), make_sampler()
    batches = list(range(12))  # 4.8 epochs
    expected = {batch: forwards(batch) for batch in batches}
    assert {batch: backwards(batch) for batch in [*batches[::-1], 5, 0, 5]} == expected


def test_seed_changes_everything_that_is_random() -> None:
    one, other = make_sampler(100, batch_size=100)(0), make_sampler(100, batch_size=100, seed=4)(0)
    for name in ("row", "frames", "crop", "flip", "caption", "mask_seed"):
        assert [getattr(r, name) for r in one] != [getattr(r, name) for r in other], name


def test_epochs_and_positions_draw_anew() -> None:
    """No two clips of three epochs share a mask seed, and each epoch has its own order."""
    sampler = make_sampler(20, batch_size=20)
    epochs = [sampler(batch) for batch in range(3)]
    assert len({request.mask_seed for epoch in epochs for request in epoch}) == 60
    assert len({tuple(request.row for request in epoch) for epoch in epochs}) == 3
    by_row = [{request.row: (request.frames, request.crop) for request in epoch} for epoch in epochs]
    assert sum(by_row[0][row] == by_row[1][row] for row in range(20)) <= 2


def test_requests_depend_on_the_place_in_the_stream_not_on_rank_or_batch_size() -> None:
    whole = [r for batch in range(6) for r in make_sampler(batch_size=8)(batch)]
    ranks = [make_sampler(batch_size=2, rank=rank, world_size=4) for rank in range(4)]
    assert [r for batch in range(6) for sampler in ranks for r in sampler(batch)] == whole


@pytest.mark.parametrize("repeat", [1, 3])
def test_a_batch_is_its_units(repeat: int) -> None:
    """What a worker plans for one decode is what the batch has there, in any order and without the rest."""
    for rank in range(2):
        sampler = make_sampler(7, DataConfig(repeat=repeat, flip=True), batch_size=4 * repeat, rank=rank, world_size=2)
        alone = make_sampler(7, DataConfig(repeat=repeat, flip=True), batch_size=4 * repeat, rank=rank, world_size=2)
        for batch in (5, 0, 2):
            units = {unit: alone.unit(batch, unit) for unit in (3, 0, 2, 1)}
            assert sampler(batch) == tuple(request for unit in range(4) for request in units[unit])
            assert all(len(unit) == repeat for unit in units.values())


# Epochs


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize(
    ("num_videos", "world_size", "batch_size"),
    [(12, 1, 4), (10, 1, 4), (7, 3, 2), (5, 2, 6), (3, 4, 8), (1, 2, 2), (13, 4, 6)],
)
def test_every_video_exactly_once_an_epoch(num_videos: int, world_size: int, batch_size: int, repeat: int) -> None:
    data = DataConfig(repeat=repeat)
    samplers = [
        make_sampler(num_videos, data, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    num_epochs = 4
    batches = -(-num_epochs * num_videos * repeat // (batch_size * world_size))
    seen: Counter[tuple[int, int]] = Counter()
    positions: dict[int, list[int]] = {}
    for batch in range(batches):
        for sampler in samplers:
            requests = sampler(batch)
            assert len(requests) == batch_size
            seen.update((request.epoch, request.row) for request in requests)
            for request in requests:
                positions.setdefault(request.epoch, []).append(request.position)
    for epoch in range(num_epochs):
        assert [seen[epoch, row] for row in range(num_videos)] == [repeat] * num_videos
        assert positions[epoch] == list(range(num_videos * repeat))  # in the order of the stream, over all ranks


def test_repeat_shares_frames_but_nothing_else() -> None:
    data = DataConfig(repeat=4, flip=True)
    requests = make_sampler(50, data, batch_size=200)(0)
    groups = [requests[first : first + 4] for first in range(0, 200, 4)]
    for group in groups:
        assert len({(r.row, r.frames, r.epoch) for r in group}) == 1  # one decode, so they must stand together
        assert len({r.mask_seed for r in group}) == 4
        assert len({r.position for r in group}) == 4
    assert sum(len({r.crop for r in group}) > 1 for group in groups) >= 49
    assert sum(len({r.flip for r in group}) > 1 for group in groups) > 30
    assert sum(len({r.caption for r in group}) > 1 for group in groups) > 30


# Frames


def test_dense_frames_are_a_stride_apart_and_reach_both_ends() -> None:
    data, video = DataConfig(stride=4), make_video(num_frames=40)
    draw = generator()
    clips = [sample_frames(draw, video, data, 8) for _ in range(400)]
    assert all(np.diff(clip).tolist() == [4] * 7 for clip in clips)
    assert {clip[0] for clip in clips} == set(range(40 - 29 + 1))
    assert clip_span(data, 8) == 29


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (29, (0, 4, 8, 12, 16, 20, 24, 28)),
        (28, (0, 4, 8, 12, 16, 20, 24, 24)),  # 28 does not exist; 24 is the last that the stride reaches
        (25, (0, 4, 8, 12, 16, 20, 24, 24)),
        (24, (0, 4, 8, 12, 16, 20, 20, 20)),
        (5, (0, 4, 4, 4, 4, 4, 4, 4)),
        (4, (0, 0, 0, 0, 0, 0, 0, 0)),
        (1, (0, 0, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_dense_repeats_the_last_reachable_frame(num_frames: int, expected: tuple[int, ...]) -> None:
    video = make_video(num_frames=num_frames)
    for seed in range(5):
        assert sample_frames(generator(seed), video, DataConfig(stride=4), 8) == expected


@pytest.mark.parametrize("num_frames", [16, 17, 31, 40, 250])
def test_uniform_takes_one_frame_of_each_segment(num_frames: int) -> None:
    data, video, draw = DataConfig(sampling="uniform"), make_video(num_frames=num_frames), generator()
    clips = np.array([sample_frames(draw, video, data, 16) for _ in range(2000)])
    covered: list[int] = []
    for segment in range(16):
        inside = range(segment * num_frames // 16, (segment + 1) * num_frames // 16)
        assert set(clips[:, segment].tolist()) == set(inside)
        covered.extend(inside)
    assert covered == list(range(num_frames))


def test_uniform_of_a_short_video() -> None:
    frames = sample_frames(generator(), make_video(num_frames=5), DataConfig(sampling="uniform"), 8)
    assert frames == (0, 1, 2, 3, 4, 4, 4, 4)


@pytest.mark.parametrize(
    ("data", "longest"), [(DataConfig(stride=4), 29), (DataConfig(sampling="uniform", stride=100), 8)]
)
def test_clip_longer_than_any_video(data: DataConfig, longest: int) -> None:
    def build(*lengths: int) -> ClipSampler:
        manifest = make_manifest([make_video(num_frames=length) for length in lengths])
        return ClipSampler(manifest, data, num_frames=8, batch_size=2, seed=0)

    build(3, longest)  # one long video is enough
    with pytest.raises(ValueError, match=f"spans {longest} frames .* longest video has {longest - 1}"):
        build(3, longest - 1)


# Crops, flips, captions

# GroupMultiScaleCrop.fill_fix_offset(more_fix_crop=True) of TSN and VideoMAE (video_transforms.py), in its order:
# multiples of w_step = (W - w) // 4 and h_step = (H - h) // 4.
PLACES = [
    (0, 0),  # upper left
    (4, 0),  # upper right
    (0, 4),  # lower left
    (4, 4),  # lower right
    (2, 2),  # center
    (0, 2),  # center left
    (4, 2),  # center right
    (2, 4),  # lower center
    (2, 0),  # upper center
    (1, 1),  # upper left quarter
    (3, 1),  # upper right quarter
    (1, 3),  # lower left quarter
    (3, 3),  # lower right quarter
]


def test_the_thirteen_places() -> None:
    """A crop of 3/4 of a 340×256 picture: steps (340 - 192) // 4 = 37 and (256 - 192) // 4 = 16."""
    draw = generator()
    boxes = Counter(sample_crop(draw, 340, 256, (0.75,)) for _ in range(2600))
    assert {(box.width, box.height) for box in boxes} == {(192, 192)}
    assert {(box.x, box.y) for box in boxes} == {(37 * x, 16 * y) for x, y in PLACES}
    assert min(boxes.values()) > 130  # 200 expected: no place is rare


def test_multi_scale_sides() -> None:
    """VideoMAE's default scales on 340×256: 256, 224, 192, 168, and pairs at most one step apart."""
    draw = generator()
    boxes = [sample_crop(draw, 340, 256, (1.0, 0.875, 0.75, 0.66)) for _ in range(2000)]
    expected = {
        (256, 256), (256, 224), (224, 256), (224, 224), (224, 192), (192, 224), (192, 192), (192, 168), (168, 192),
        (168, 168),
    }  # fmt: skip
    counts = Counter((box.width, box.height) for box in boxes)
    assert set(counts) == expected
    assert min(counts.values()) > 130  # 200 expected


@pytest.mark.parametrize(
    ("width", "height"), [(160, 120), (121, 97), (97, 121), (1920, 1080), (3, 2), (2, 7), (1, 1), (320, 5), (33, 33)]
)
@pytest.mark.parametrize("scales", [(1.0, 0.875, 0.75, 0.66), (1.0,), (0.1, 0.05)])
def test_crops_lie_inside_the_picture(width: int, height: int, scales: tuple[float, ...]) -> None:
    draw = generator()
    for _ in range(200):
        box = sample_crop(draw, width, height, scales)
        assert min(box.x, box.y) >= 0
        assert min(box.width, box.height) >= 1
        assert box.x + box.width <= width
        assert box.y + box.height <= height


def test_crops_follow_the_upright_size_of_each_video() -> None:
    manifest = make_manifest(
        [make_video(path="a.mp4", width=64, height=200), make_video(path="b.mp4", width=200, height=50, rotation=90)]
    )
    sampler = ClipSampler(manifest, DataConfig(crop_scales=(1.0,)), num_frames=8, batch_size=64, seed=0)
    sides = {(request.row, request.crop.width, request.crop.height) for request in sampler(0)}
    assert sides == {(0, 64, 64), (1, 50, 50)}


def requests_of(data: DataConfig) -> tuple[ClipRequest, ...]:
    return make_sampler(data=data, batch_size=2000)(0)


def test_flip_share() -> None:
    flips = [request.flip for request in requests_of(DataConfig(flip=True))]
    assert 0.45 < np.mean(flips) < 0.55  # 4.5 standard deviations
    assert not any(request.flip for request in requests_of(DataConfig(flip=False)))


def test_every_caption_is_drawn_and_none_that_is_not_there() -> None:
    videos = [make_video(captions=("a", "b", "c")), make_video(captions=("d",)), make_video(captions=())]
    sampler = ClipSampler(make_manifest(videos), DataConfig(), num_frames=8, batch_size=600, seed=0)
    counts = Counter((request.row, request.caption) for request in sampler(0))
    assert set(counts) == {(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)}
    assert min(counts[0, caption] for caption in range(3)) > 40  # 67 expected


def test_first_caption_changes_nothing_but_the_caption() -> None:
    """So that runs with either choice see the same crops, flips and noise."""
    drawn, first = (requests_of(DataConfig(flip=True, captions=choice)) for choice in ("random", "first"))  # type: ignore[arg-type]
    assert {request.caption for request in first} == {0}
    assert {request.caption for request in drawn} == {0, 1}
    assert tuple(dataclasses.replace(request, caption=0) for request in drawn) == first


def test_requests_are_plain_python() -> None:
    """They are sent between processes and written to logs: no numpy scalar may hide in them."""

    def check(value: object) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                check(item)
        elif isinstance(value, dict):
            for item in value.values():
                check(item)
        else:
            assert type(value) in (int, bool), f"{value!r} is a {type(value)}"

    for data in (DataConfig(flip=True), DataConfig(sampling="uniform")):
        for request in make_sampler(data=data)(0):
            check(dataclasses.asdict(request))
