"""The lines of official lists, what is published about a data set, and how the two compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dali_pipelines.types import Caption
from tgmae.data.importers.official_files import FormatError, OfficialFiles
from tgmae.data.manifest import count_splits

_SHOWN = 3  # of what is wrong


@dataclass(frozen=True, slots=True)
class Sample:
    """A clip that an official list names."""

    video: str  # official name of its file without the suffix; a YouTube ID where copies differ in the rest
    label: str  # "" where it is not published
    split: str  # its splits, as in a manifest
    captions: tuple[Caption, ...] = ()
    span: tuple[float, float] | None = None  # seconds of the file; None for all of it
    clip_start: int | None = None  # second of the YouTube video at which the file begins, where that is known

    @property
    def name(self) -> str:
        """The clip, for messages."""
        if self.span is not None:
            return f"{self.video} {self.span[0]:.2f}-{self.span[1]:.2f} s"
        return self.video if self.clip_start is None else f"{self.video} from {self.clip_start} s"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A published data set: how its files are recognised and read, and how many clips it has.

    example      name of one of its videos
    stem         what its videos are called, without the suffix
    lists        pairs of patterns: the name of one of its annotation files, and what stands in its first bytes
    published    clips of each split
    num_classes  published number of labels
    source       who publishes these numbers
    read         makes the samples from its files; FormatError where these are not its own
    split_stem   parts the name of a video, without the suffix, into `Sample.video` and `Sample.clip_start`
    """

    title: str
    example: str
    stem: re.Pattern[str]
    lists: tuple[tuple[str, str], ...]
    published: Mapping[str, int]
    num_classes: int
    source: str
    read: Callable[[OfficialFiles], list[Sample]]
    split_stem: Callable[[str], tuple[str, int | None]] | None = None


def join_splits(sides: Mapping[int, str]) -> str:
    """Return the splits of a clip that several official splits name, from {1: "train", 2: "test"}.

    The first split, which papers mean where they name none, is also called plainly train and test.
    """
    names = [f"{side}{number}" for number, side in sorted(sides.items())]
    return ",".join([sides[1], *names] if 1 in sides else names)


def drop_repeats(samples: Sequence[Sample]) -> tuple[list[Sample], str]:
    """Return each clip once, with the captions of all lines that name it, and a note about them.

    Raises ValueError where two lines give it different labels or splits.
    """
    first: dict[tuple[str, int | None, tuple[float, float] | None], Sample] = {}
    repeated = []
    for sample in samples:
        key = sample.video, sample.clip_start, sample.span
        known = first.setdefault(key, sample)
        if known is sample:
            continue
        repeated.append(sample.name)
        for what, one, other in (("label", known.label, sample.label), ("split", known.split, sample.split)):
            if one != other:
                raise ValueError(
                    f"the lists name {sample.name} twice, with the {what}s {one!r} and {other!r}; delete one line"
                )
        others = tuple(caption for caption in sample.captions if caption not in known.captions)
        first[key] = replace(known, captions=known.captions + others)
    if not repeated:
        return list(first.values()), ""
    does = "lines repeat others, and count" if len(repeated) > 1 else "line repeats another, and counts"
    return list(first.values()), f"{len(repeated)} {does} once: {_some(repeated)}"


def check_labels(outside: Sequence[tuple[str, str]], classes: str) -> None:
    """Raise FormatError for labels that are not in a list of classes.

    outside  where each stands, and what it is
    classes  the list, for the message, such as "the 174 classes of labels.json"
    """
    if outside:
        some = _some(f"{label!r} ({where})" for where, label in outside)
        lines = "1 line has" if len(outside) == 1 else f"{len(outside)} lines have"
        raise FormatError(
            f"{lines} a label that is not among {classes}, such as {some}; the two must be of one release"
        )


def compare(dataset: Dataset, samples: Sequence[Sample]) -> str:
    """Say how many clips and classes the lists have, and how many are published."""
    counts = count_splits(sample.split for sample in samples)
    num_classes = len({sample.label for sample in samples if sample.label})
    found = ", ".join(f"{name or 'no split'} {counts[name]:,}" for name in sorted(counts, key=_order(dataset)))
    different = [f"{name} {number:,}" for name, number in dataset.published.items() if number != counts[name]]
    different += [f"{dataset.num_classes:,} classes"] * (num_classes != dataset.num_classes)
    verdict = f"published are {', '.join(different)}" if different else "as published"
    return f"{dataset.title}: {found}; {num_classes:,} classes; {verdict} ({dataset.source})"


def _order(dataset: Dataset) -> Callable[[str], int]:
    places = {name: place for place, name in enumerate(dataset.published)}
    return lambda name: places.get(name, len(places))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + ", …" * (len(listed) > _SHOWN)
