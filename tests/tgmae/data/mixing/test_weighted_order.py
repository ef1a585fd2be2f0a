"""Weights: exact shares, an endless stream for each data set, and the same order from any place and on any process."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from tests.support.videos import make_video
from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest
from tgmae.data.mixing.joined import join_sets
from tgmae.data.mixing.weighted_order import BLOCK, WeightedOrder
from tgmae.data.sampling import ClipSampler

SIZES = (7, 40, 3)


def order(weights: tuple[float, ...] = (1, 2, 4), sizes: tuple[int, ...] = SIZES, seed: int = 3) -> WeightedOrder:
    return WeightedOrder(sizes, weights, seed)


def make_sampler(weights: tuple[float, ...] | None, sizes: tuple[int, ...] = SIZES, **changes: int) -> ClipSampler:
    videos = [make_video(path=f"{number}.mp4", num_frames=40) for number in range(max(sizes))]
    names = [f"set{number}" for number in range(len(sizes))]
    manifest = join_sets(names, [Manifest.of(videos[:size], Path(f"/{name}")) for name, size in zip(names, sizes)])  # noqa: B905
    paths = tuple(Path(f"{name}.parquet") for name in names)
    data = DataConfig(manifest=paths, weights=weights, flip=True)
    options = {"num_frames": 8, "batch_size": 4, "seed": 3, **changes}
    return ClipSampler(manifest=manifest, data=data, **options)


@pytest.mark.parametrize(
    "weights", [(1, 2, 4), (0.1, 0.2, 0.7), (5, 0.001, 2), (1e-3, 1, 1e3), (3, 3, 3), (1e300, 1, 1)]
)
def test_shares_are_the_weights(weights: tuple[float, ...]) -> None:
    """Of any block within 2 clips, and of 5,000 blocks as well: rounding does not add up."""
    dealt = order(weights)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    before = [0] * 3
    for blocks in [*range(1, 40), 5000]:
        counts = dealt.count(blocks * BLOCK)
        assert sum(counts) == blocks * BLOCK
        assert all(abs(count - share * blocks * BLOCK) <= 2 for count, share in zip(counts, shares, strict=True))
        assert all(count >= was for count, was in zip(counts, before, strict=True))
        before = counts


def test_a_thousand_clips_one_to_three() -> None:
    dealt = order((1, 3), (5, 50))
    seen = [dealt.find(number)[0] for number in range(10 * BLOCK)]
    assert Counter(seen) == {0: 250, 1: 750}
    assert all(Counter(seen[first : first + BLOCK])[0] == 25 for first in range(0, 1000, BLOCK))
    assert len({tuple(seen[first : first + BLOCK]) for first in range(0, 1000, BLOCK)}) == 10  # each in its own order


def test_each_data_set_gives_every_video_once_before_any_comes_again() -> None:
    dealt = order()
    streams: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for number in range(7 * BLOCK):
        chosen, row = dealt.find(number)
        streams[chosen].append(row)
        if number % 33 == 0:
            assert dealt.count(number + 1) == [len(stream) for stream in streams.values()]
    for chosen, stream in streams.items():
        size = SIZES[chosen]
        rounds = [tuple(stream[first : first + size]) for first in range(0, len(stream) - size + 1, size)]
        assert all(sorted(one) == list(range(size)) for one in rounds)
        assert len(set(rounds)) > 1


def test_the_stream_of_a_data_set_does_not_depend_on_the_others() -> None:
    def stream(dealt: WeightedOrder) -> list[int]:
        found = map(dealt.find, range(3000))
        return [row for chosen, row in found if chosen == 1][:400]

    assert stream(order()) == stream(order((3, 1), (900, 40)))
    assert stream(order()) != stream(order(seed=4))


def test_any_place_is_found_without_those_before_it() -> None:
    forwards = order()
    expected = [forwards.find(number) for number in range(1000)]
    backwards = order()
    assert [backwards.find(number) for number in reversed(range(1000))] == expected[::-1]
    assert [order().find(number) for number in (999, 0, 500)] == [expected[number] for number in (999, 0, 500)]


# The sampler


def test_ranks_and_batch_sizes_share_one_stream() -> None:
    weights = (1.0, 2.0, 4.0)
    whole = [request for batch in range(30) for request in make_sampler(weights, batch_size=8)(batch)]
    ranks = [make_sampler(weights, batch_size=2, rank=rank, world_size=4) for rank in range(4)]
    assert [request for batch in range(30) for sampler in ranks for request in sampler(batch)] == whole
    assert len({request.mask_seed for request in whole}) == len(whole)
    assert [make_sampler(weights, batch_size=8)(29)] == [tuple(whole[-8:])]  # resumed there


def test_an_epoch_is_as_many_clips_as_all_videos_together() -> None:
    requests = [request for batch in range(25) for request in make_sampler((1.0, 2.0, 4.0))(batch)]
    assert [request.epoch for request in requests] == [0] * 50 + [1] * 50
    sets = Counter(0 if request.row < 7 else 1 if request.row < 47 else 2 for request in requests)
    assert sets == {0: 14, 1: 29, 2: 57}


def test_without_weights_every_video_comes_once_an_epoch_as_from_one_manifest() -> None:
    """The very requests that one manifest with the same rows gives."""
    mixed = make_sampler(None)
    videos = [make_video(path=f"{number}.mp4", num_frames=40) for number in range(50)]
    one = ClipSampler(
        manifest=Manifest.of(videos, Path("/all")), data=DataConfig(flip=True), num_frames=8, batch_size=4, seed=3
    )
    for batch in range(30):
        assert mixed(batch) == one(batch)


def test_a_data_set_whose_videos_are_too_short_is_named() -> None:
    short = Manifest.of([make_video(path="a.mp4", num_frames=9)], Path("/short"))
    long = Manifest.of([make_video(path="a.mp4", num_frames=90)], Path("/long"))
    data = DataConfig(manifest=(Path("long.parquet"), Path("short.parquet")), stride=2)
    with pytest.raises(ValueError, match=r"^short: a clip spans 15 frames .* but the longest video has 9; lower"):
        ClipSampler(manifest=join_sets(["long", "short"], [long, short]), data=data, num_frames=8, batch_size=1, seed=0)
