"""Captions that people wrote, from a CSV or JSON file that names videos."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dali_pipelines.types import Caption
from tgmae.data.csv_list import CAPTION, read_records
from tgmae.data.manifest import Manifest

_Named = tuple[str, str, list[str]]  # where it stands, what the file calls the video, its texts


@dataclass(frozen=True)
class Matched:
    """The captions of each row of a manifest (None for one that is not named), and names of videos that it has not."""

    captions: list[list[Caption] | None]
    num_entries: int
    unknown: list[str]  # their names, and where they stand

    def describe_unknown(self, path: Path) -> str:
        """Say in one line how many entries of the file name no video; "" for none."""
        if not self.unknown:
            return ""
        return f"{path}: {len(self.unknown)} of {self.num_entries} entries name no video, such as {self.unknown[0]}"


def read_human(
    path: Path, manifest: Manifest, source: str, path_column: str, caption_column: str | None, under: str = ""
) -> Matched:
    """Read a file of captions and find the rows that it means.

    path            .csv (or .tsv): a table whose first line names columns, as for `list_csv`. .json or .jsonl: a list
                    of objects with these fields, one on each line, or one object {path: caption or captions}
    caption_column  column of the captions; None for all called caption, captions, caption_2, …
    under           folder, below the manifest's root, that names are relative to

    A name is a path, with or without its suffix, or a file's name where only one file has it. All segments of a file
    have its captions, unless the name ends in their frames (`Video.name`). Raises ValueError, naming file and line, for
    what cannot be read, and where no name fits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a CSV or JSON file with captions")
    if path.suffix.lower() in (".json", ".jsonl"):
        named = list(_read_json(path, path_column, caption_column))
    else:
        named = list(_read_table(path, manifest.root, path_column, caption_column))
    find = _Finder(manifest.names(), manifest.table.column("path").to_pylist())
    captions: list[list[Caption] | None] = [None] * len(manifest)
    unknown: list[str] = []
    for where, name, texts in named:
        rows = find(f"{under.strip('/')}/{name}" if under else name)
        if not rows:
            unknown.append(f"{name!r} in {where}")
        for row in rows:
            texts_of_row = [*(captions[row] or []), *(Caption(text, source) for text in texts if text)]
            captions[row] = list(dict.fromkeys(texts_of_row))
    if not any(captions):
        shown = ", ".join(repr(name) for _, name, _ in named[:3]) or "nothing"
        raise ValueError(
            f"{path} has captions for none of the videos: it names {shown}, the manifest {manifest.names()[0]!r}; "
            "--path-column says which column holds names, --under which folder they are relative to"
        )
    return Matched(captions, len(named), unknown)


def _read_table(path: Path, root: Path, path_column: str, caption_column: str | None) -> Iterator[_Named]:
    records, _ = read_records(path, root)
    header = [name.strip().lower() for name in records[0][1]] if records else []
    place, texts = _find_columns(path, header, path_column, caption_column)
    for line, cells in records[1:]:
        cells = [cell.strip() for cell in [*cells, *[""] * len(header)]]
        if cells[place]:
            yield f"line {line}", cells[place], [cells[column] for column in texts]


def _find_columns(
    path: Path, header: Sequence[str], path_column: str, caption_column: str | None
) -> tuple[int, list[int]]:
    """Return the place of the names, and those of the captions."""
    wanted = caption_column.strip().lower() if caption_column else None
    texts = [place for place, name in enumerate(header) if (name == wanted if wanted else CAPTION.fullmatch(name))]
    name = path_column.strip().lower()
    if name not in header or not texts:
        missing = f"no column {path_column!r}" if name not in header else f"no column {caption_column or 'caption'!r}"
        raise ValueError(
            f"{path} has {missing}; its first line names {', '.join(map(repr, header)) or 'nothing'}. --path-column "
            "and --caption-column say which to read"
        )
    return header.index(name), texts


def _read_json(path: Path, path_field: str, caption_field: str | None) -> Iterator[_Named]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    try:
        if path.suffix.lower() == ".jsonl":
            found: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(found, dict):
        found = [{path_field: name, caption_field or "captions": texts} for name, texts in found.items()]
    if not isinstance(found, list):
        raise ValueError(f"{path} must hold a list of objects, or one object {{path: caption}}")
    for number, row in enumerate(found):
        where = f"entry {number}"
        if not isinstance(row, dict) or path_field not in row:
            raise ValueError(
                f"{path} {where} has no field {path_field!r}, got {str(row)[:80]}; --path-column says which it is"
            )
        keys = [key for key in row if (key == caption_field if caption_field else CAPTION.fullmatch(key.lower()))]
        texts = [text for key in keys for text in (row[key] if isinstance(row[key], list) else [row[key]])]
        if not keys or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{path} {where} must have texts in {caption_field or 'caption or captions'!r}, got {str(row)[:80]}; "
                "--caption-column says which field it is"
            )
        yield where, str(row[path_field]).strip(), [text.strip() for text in texts]


class _Finder:
    """Finds the rows that a name means: by row, by path, by path without suffix, by name of the file alone."""

    def __init__(self, names: Sequence[str], paths: Sequence[str]) -> None:
        self.known: dict[str, list[int]] = {}
        alone: dict[str, set[str]] = {}
        levels: list[dict[str, list[int]]] = [{}, {}, {}, {}]
        for row, (name, path) in enumerate(zip(names, paths, strict=True)):
            pure = PurePosixPath(path)
            for level, form in enumerate((name, path, str(pure.with_suffix("")), pure.stem)):
                levels[level].setdefault(_normalise(form), []).append(row)
            for form in (pure.stem, pure.name):
                alone.setdefault(_normalise(form), set()).add(path)
            levels[3].setdefault(_normalise(pure.name), []).append(row)
        for level, found in enumerate(levels):
            for form, rows in found.items():
                if level < 3 or len(alone[form]) == 1:
                    self.known.setdefault(form, rows)

    def __call__(self, name: str) -> list[int]:
        return self.known.get(_normalise(PurePosixPath(name.replace("\\", "/")).as_posix()), [])


def _normalise(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()
