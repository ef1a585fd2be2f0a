"""List the videos to index: a folder, or the rows of a CSV."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from dali_pipelines.types import Caption
from tgmae.data.manifest import check_relative

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .3gp .ogv".split()  # noqa: SIM905 - one to a line reads worse
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A listed file, with the label, captions and split that its folder or a CSV gives it."""

    path: str
    label: str
    captions: tuple[Caption, ...]
    split: str


def list_folder(root: Path, split: str) -> list[Entry]:
    """List every video below `root`, sorted. Its label is the name of its folder ("" in root itself)."""
    entries = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder that was visited
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        label = "" if Path(folder) == root else Path(folder).name
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES:
                path = (Path(folder) / name).relative_to(root).as_posix()
                entries.append(Entry(path, label, (), split))
    return entries


def list_csv(csv_path: Path, split: str, source: str = "csv") -> list[Entry]:
    """Read a CSV with the columns `path`, `label`, `split` (optional) and any that start with `caption`.

    source   the source of the captions

    Paths are relative to the indexed folder. Rows with the same path are one video with several captions. Raises
    ValueError, with the line, for a missing column, too many fields, contradictory rows, and a path that leaves the
    root.
    """
    entries: dict[str, Entry] = {}
    try:
        lines = csv_path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{csv_path} is not UTF-8 ({error}); save it as UTF-8") from error
    reader = csv.reader(lines, skipinitialspace=True)
    columns = [name.strip().lower() for name in next(reader, [])]
    if "path" not in columns:
        raise ValueError(
            f"{csv_path} needs a first line that names a column 'path', separated by commas; got {columns}"
        )
    for values in reader:
        where = f"{csv_path} line {reader.line_num}"
        if not any(values):
            continue
        if len(values) > len(columns):
            raise ValueError(
                f"{where}: {len(values)} fields for {len(columns)} columns; put text with commas in quotes"
            )
        row = dict(zip_longest(columns, (value.strip() for value in values), fillvalue=""))
        path = _clean_path(row["path"], where)
        texts = (text for name, text in row.items() if name.startswith("caption") and text)
        captions = tuple(Caption(text, source) for text in texts)
        entry = Entry(path, row.get("label", ""), captions, row.get("split") or split)
        if (known := entries.setdefault(path, entry)) is not entry:
            if (known.label, known.split) != (entry.label, entry.split):
                raise ValueError(f"{where}: {path} has another label or split here than in a line above")
            entries[path] = replace(known, captions=known.captions + captions)
    return list(entries.values())


def _clean_path(path: str, where: str) -> str:
    if not path:
        raise ValueError(f"{where}: no path")
    try:
        check_relative(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return PurePosixPath(path.replace("\\", "/")).as_posix()  # ./a.mp4 and a.mp4 are one video
