"""Find the files of the clips that official lists name."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tgmae.data.importers.samples import Dataset, Sample
from tgmae.data.listing import Entry, make_printable


@dataclass(frozen=True, slots=True)
class Missing:
    """A clip that a list names and whose file is not there."""

    path: str  # what the list calls it
    split: str
    reason: str


@dataclass
class Matches:
    """What became of the lines of the lists and the files of the folder."""

    entries: list[Entry] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    doubles: list[tuple[str, str]] = field(default_factory=list)  # files that were taken, and others they might be
    unlisted: list[str] = field(default_factory=list)  # files that no list names


def match_videos(dataset: Dataset, samples: Sequence[Sample], paths: Sequence[str]) -> Matches:
    """Match clips and files by name, wherever below the folder a file lies."""
    found = Matches()
    files: dict[str, list[tuple[int | None, str]]] = defaultdict(list)
    for path in paths:
        video, start = _part(dataset, os.path.splitext(os.path.basename(path))[0])
        files[video].append((start, path))
    taken: set[str] = set()
    doubled: set[str] = set()
    for sample in samples:
        there = files.get(_normalise(dataset, sample.video), [])
        # The name with the right second is the surest; a name without one may be of any clip of its video.
        fitting = [path for start, path in there if start is not None and start == sample.clip_start]
        fitting += [path for start, path in there if start is None]
        free = [path for path in fitting if sample.span is not None or path not in taken]
        if not free:
            reason = f"only {there[0][1]} is there, another clip of that video" if there else "no file of that name"
            reason = f"{fitting[0]} is taken for another line" if fitting else reason
            found.missing.append(Missing(sample.name, sample.split, make_printable(reason)))
            continue
        path, *others = free
        taken.add(path)
        if others and path not in doubled:
            doubled.add(path)
            found.doubles.append((path, others[0]))
            taken.update(others)
        found.entries.append(Entry(path, sample.label, sample.captions, sample.split, sample.span))
    found.unlisted = [path for path in paths if path not in taken]
    return found


def _part(dataset: Dataset, stem: str) -> tuple[str, int | None]:
    return dataset.split_stem(stem) if dataset.split_stem else (_normalise(dataset, stem), None)


def _normalise(dataset: Dataset, name: str) -> str:
    """Return a name as it is compared. Capitals tell YouTube's IDs apart, and nothing else."""
    return name if dataset.split_stem else unicodedata.normalize("NFC", name).casefold()
