"""What a run says about each of its data sets."""

from __future__ import annotations

from collections.abc import Set

from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest, count_videos
from tgmae.data.mixing.joined import DataSet, data_sets
from tgmae.data.mixing.weighted_order import WeightedOrder


class SetFigures:
    """Counts of each data set, for metrics whose names end with that of the data set; a run of one has none."""

    def __init__(self, manifest: Manifest, data: DataConfig, seed: int) -> None:
        self.sets = data_sets(manifest)
        self.order = order_by_weight(self.sets, data, seed)

    def epochs(self, videos: int) -> dict[str, float]:
        """Return how often each data set was gone through when so many videos of the stream were drawn."""
        if self.order is None:
            return {}  # that of the run
        counts = zip(self.sets, self.order.count(videos), strict=True)
        return {f"epoch/{one.name}": count / len(one) for one, count in counts}

    def skipped(self, rows: Set[int]) -> dict[str, float]:
        """Return how many of some rows of the run's manifest are of each data set."""
        if len(self.sets) == 1:
            return {}
        return {f"skipped_videos/{one.name}": len(one.rows_of(rows)) for one in self.sets}

    def find_broken(self, skipped: Set[int], most: float) -> DataSet | None:
        """Return a data set of which more than a share of the videos was skipped, and more than one; None for none."""
        broken = (one for one in self.sets if len(one.rows_of(skipped)) > max(1, most * len(one)))
        return next(broken, None)


def order_by_weight(sets: list[DataSet], data: DataConfig, seed: int) -> WeightedOrder | None:
    """Return the order in which weights deal the videos; None where every video comes once an epoch."""
    if data.weights is None:
        return None
    assert len(sets) == len(data.weights)
    return WeightedOrder(tuple(map(len, sets)), data.weights, seed)


def describe_videos(manifest: Manifest, data: DataConfig) -> str:
    """Say how many videos a run trains on, and where they are listed."""
    sets = data_sets(manifest)
    return f"{count_videos(len(manifest))} {f'of {len(sets)} data sets' if len(sets) > 1 else f'from {data.manifest}'}"


def describe_sets(manifest: Manifest, data: DataConfig) -> list[str]:
    """Say what each of several data sets is, and which share of the clips it gives."""
    sets = data_sets(manifest)
    if len(sets) == 1:
        return []
    weights = data.weights or tuple(map(len, sets))
    lines = []
    for one, path, weight in zip(sets, data.manifests, weights, strict=True):
        share = weight / sum(weights)
        often = f", each video {share * len(manifest) / len(one):.2f} times an epoch" if data.weights else ""
        lines.append(f"{one.name}: {count_videos(len(one))} from {path}, {share:.1%} of the clips{often}")
    return lines
