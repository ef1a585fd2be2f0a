"""The data sets of a run as one manifest, which knows where each of them begins.

A name of a video (`Video.name`) is unique within its data set only. So whatever goes by names, or is a property of a
data set, is done for one after the other (`data_sets`, `for_each_set`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from dali_pipelines.types import Video
from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest, open_manifest


@dataclass(frozen=True)
class DataSet:
    """One data set of a run.

    name      for people, and for the names of metrics; "" where it is the only one
    first     row of the run's manifest at which it begins
    manifest  its own rows, under its own folder
    """

    number: int
    name: str
    first: int
    manifest: Manifest

    def __len__(self) -> int:
        return len(self.manifest)

    def rows_of(self, rows: Iterable[int]) -> set[int]:
        """Return those of some rows of the run's manifest that belong to this data set."""
        return {row for row in rows if self.first <= row < self.first + len(self)}


class JoinedManifest(Manifest):
    """The rows of several manifests, one after the other; rows of a data set stay together.

    names, roots, sizes   of each data set: a data set may have no row here
    """

    def __init__(self, table: pa.Table, names: Sequence[str], roots: Sequence[Path], sizes: Sequence[int]) -> None:
        super().__init__(table, roots[0])
        self.set_names, self.roots, self.sizes = tuple(names), tuple(roots), tuple(sizes)
        self._ends = list(accumulate(self.sizes))

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedManifest, (self.table, self.set_names, self.roots, self.sizes)

    def __repr__(self) -> str:
        return f"JoinedManifest({', '.join(map('{} {}'.format, self.sizes, self.set_names))})"

    def _read(self, row: int) -> Video:
        return replace(super()._read(row), data_set=self._number_of(row))

    def rows(self) -> Iterator[Video]:
        """Yield all rows, without keeping them."""
        for row, video in enumerate(super().rows()):
            yield replace(video, data_set=self._number_of(row))

    def _number_of(self, row: int) -> int:
        return next(number for number, end in enumerate(self._ends) if row < end)

    def file(self, row: int) -> str:
        """Return the absolute path of a row's video."""
        return str(self.roots[self._number_of(row)] / self.table.column("path")[row].as_py())

    @cached_property
    def fingerprint(self) -> str:
        """That of all rows, and where the data sets begin."""
        return f"{super().fingerprint} in data sets of {', '.join(map(str, self.sizes))}"

    def select_split(self, split: str) -> Manifest:
        """Return the rows of one split; "" keeps all. Raises ValueError for a data set of which none is left."""
        return for_each_set(self, lambda manifest: (manifest.select_split(split), ""))[0]

    def joined(self, other: Manifest) -> Manifest:
        """Return the rows of both, whose data sets are the same."""
        pairs = zip(data_sets(self), data_sets(other), strict=True)
        return join_sets(self.set_names, [one.manifest.joined(more.manifest) for one, more in pairs])


def join_sets(names: Sequence[str], parts: Sequence[Manifest]) -> Manifest:
    """Return the rows of several manifests as one; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    table = pa.concat_tables([part.table for part in parts])
    return JoinedManifest(table, names, [part.root for part in parts], [len(part) for part in parts])


def data_sets(manifest: Manifest) -> list[DataSet]:
    """Return the data sets of a run: one, without a name, where its manifest is not joined."""
    if not isinstance(manifest, JoinedManifest):
        return [DataSet(0, "", 0, manifest)]
    firsts = accumulate(manifest.sizes, initial=0)
    parts = zip(manifest.set_names, manifest.roots, manifest.sizes, firsts, strict=False)
    return [
        DataSet(number, name, first, Manifest(manifest.table.slice(first, size), root))
        for number, (name, root, size, first) in enumerate(parts)
    ]


def for_each_set(manifest: Manifest, step: Callable[[Manifest], tuple[Manifest, str]]) -> tuple[Manifest, str]:
    """Apply to each data set a function that returns rows of it and a note, and join both.

    Raises ValueError as the function does, with the name of the data set.
    """
    sets, parts, notes = data_sets(manifest), [], []
    for one in sets:
        with naming_set(one):
            part, note = step(one.manifest)
        parts.append(part)
        notes.append(f"{one.name}: {note}" if one.name and note else note)
    return join_sets([one.name for one in sets], parts), "\n".join(filter(None, notes))


@contextmanager
def naming_set(one: DataSet) -> Iterator[None]:
    """Put the name of a data set before the messages of ValueErrors."""
    try:
        yield
    except ValueError as error:
        if not one.name:
            raise
        raise ValueError(f"{one.name}: {error}") from error


def name_sets(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a short name for each manifest: its own, or its folder's if the file is called manifest.parquet.

    Names that would be equal get more of the path. They hold letters, digits, "_", "-" and "." only.
    """
    parts = [path.resolve().with_suffix("").parts[1:] for path in paths]
    parts = [folders[:-1] if folders[-1] == "manifest" and folders[:-1] else folders for folders in parts]
    names: list[str] = []
    for depth in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.-]", "_", "_".join(folders[-depth:])) for folders in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{number}_{name}" for number, name in enumerate(names, 1))


def open_data_sets(data: DataConfig) -> Manifest:
    """Read the manifests of a run, whose videos are about to be opened, as one. Raises errors as `open_manifest`."""
    paths = data.manifests
    roots = data.roots or (None,) * len(paths)
    parts = [open_manifest(path, root, "--data.root") for path, root in zip(paths, roots, strict=True)]
    return join_sets(name_sets(paths), parts)
