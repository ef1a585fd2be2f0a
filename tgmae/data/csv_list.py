"""List the videos that the rows of a CSV name, with their labels, captions and splits.

Fields are separated by commas, or by the semicolons or tabs of the first line where it has no comma.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from dali_pipelines.types import Caption
from tgmae.data.columns import check_relative
from tgmae.data.listing import SUFFIXES, Entry, Listing

CAPTION = re.compile(r"captions?[ _-]?\d*")
_LIST = re.compile(r"\[\s*(['\"].*['\"])?\s*\]", re.DOTALL)  # as Python or JSON writes a list of texts


def list_csv(csv_path: Path, root: Path, split: str, source: str = "csv") -> Listing:
    """Read a CSV with the columns `path`, `label`, `split` (optional), and `caption`, `caption_2`, `caption 3` …

    root     the folder that paths are relative to
    source   the source of the captions

    Rows with the same path are one video with several captions. A path is a file's whose name differs only in how its
    letters are composed (macOS) or in spaces around it. Raises ValueError, with the line, for a missing column, a
    column that is there twice, a quote that is not closed, too many fields, a list in place of a caption,
    contradictory rows, and a path that leaves the root.
    """
    records, doubtful = read_records(csv_path, root)
    names = [name.strip() for name in records[0][1]] if records else []
    columns = [name.lower() for name in names]
    if "path" not in columns:
        raise ValueError(
            f"{csv_path} needs a first line that names a column 'path', separated by commas; got {columns}"
        )
    for name in ("path", "label", "split"):
        if columns.count(name) > 1:
            raise ValueError(f"{csv_path} has {columns.count(name)} columns named {name!r}; keep one")
    places = [place for place, name in enumerate(columns) if CAPTION.fullmatch(name)]
    known_columns = {*places, *(place for place, name in enumerate(columns) if name in ("path", "label", "split"))}
    ignored = [name or "(unnamed)" for place, name in enumerate(names) if place not in known_columns]

    entries: dict[str, Entry] = {}
    folders: dict[str, dict[str, str]] = {}
    for line, values in records[1:]:
        where = f"{csv_path} line {line}"
        if len(values) > len(columns):
            raise ValueError(
                f"{where}: {len(values)} fields for {len(columns)} columns; put text with commas in quotes"
            )
        cells = [cell for _, cell in zip_longest(columns, (value.strip() for value in values), fillvalue="")]
        row = dict(zip(columns, cells, strict=True))
        path = _find_file(root, _clean_path(row["path"], where), folders)
        texts = [cells[place] for place in places if cells[place]]
        for text in texts:
            if _LIST.fullmatch(text):
                raise ValueError(
                    f"{where}: the caption is a list, {text[:60]}; give each caption a column (caption, caption_2, …) "
                    "or a row"
                )
        captions = tuple(Caption(text, source) for text in texts)
        entry = Entry(path, row.get("label", ""), captions, row.get("split") or split)
        if (known := entries.setdefault(path, entry)) is not entry:
            if (known.label, known.split) != (entry.label, entry.split):
                raise ValueError(f"{where}: {path} has another label or split here than in a line above")
            entries[path] = replace(known, captions=known.captions + captions)
    return Listing(list(entries.values()), ignored=ignored, doubtful=doubtful)


def read_records(csv_path: Path, root: Path) -> tuple[list[tuple[int, list[str]]], list[int]]:
    """Return the line on which each record begins, and its fields; and the lines of those that may hold others.

    Empty records are passed over.

    root   the folder of the videos, by whose names an open quote is recognised

    Lines end with \\n, \\r\\n or \\r and nothing else: captions may hold other characters that separate lines.
    """
    try:
        text = csv_path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{csv_path} is not UTF-8 ({error}); save it as UTF-8") from error
    lines = list(io.StringIO(text, newline=""))
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise ValueError(f"{csv_path} line {number} holds a NUL character; remove it")
    separator = find_separator(next((line for line in lines if line.strip()), ""))
    reader = csv.reader(lines, skipinitialspace=True, strict=True, delimiter=separator)
    records: list[tuple[int, list[str]]] = []
    doubtful: list[int] = []
    limit = csv.field_size_limit(max(len(text), 1))  # a field may be as long as it is; the limit is the module's
    try:
        first = 0
        for values in reader:
            if any(values):
                records.append((first + 1, values))
            if records and reader.line_num > first + 1:
                held, header = lines[first : reader.line_num], records[0][1]
                _check_quotes(held, header, root, separator, f"{csv_path} line {first + 1}")
                doubtful += [first + 1] * any(_looks_like_a_row(line, header, separator) for line in held[1:])
            first = reader.line_num
    except csv.Error as error:
        is_open = "end of data" in str(error)
        ending = (
            "is not closed"
            if is_open
            else f"is followed by something other than a comma where it closes, on line {reader.line_num}"
        )
        raise ValueError(
            f"{csv_path} line {first + 1}: a text in quotes that begins here {ending}; close it where it ends, and "
            "double the quotes inside it"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return records, doubtful


def find_separator(first_line: str) -> str:
    """Return what separates the fields of a table: a comma, or what spreadsheets use where commas are for decimals."""
    return next((mark for mark in ",;\t" if mark in first_line), ",")


def _looks_like_a_row(line: str, header: list[str], separator: str) -> bool:
    """Return whether a line within quotes has a row's number of fields, and one word for a path."""
    cells = next(csv.reader([line], skipinitialspace=True, delimiter=separator), [])
    place = _find_path(header)
    return len(cells) == len(header) > 1 and re.fullmatch(r"\S+", cells[place].strip()) is not None


def _find_path(header: list[str]) -> int:
    return next((place for place, name in enumerate(header) if name.strip().lower() == "path"), 0)


def _check_quotes(lines: list[str], header: list[str], root: Path, separator: str, where: str) -> None:
    """Raise ValueError where the lines of one record look like several: a quote took the next rows for its text."""
    place = _find_path(header)
    paths = []
    for line in lines:
        cells = [cell.strip().strip('"').strip() for cell in line.split(separator)]
        # A text with commas may stand before the path or after it.
        for at in {place, len(cells) - len(header) + place}:
            if 0 <= at < len(cells) and _is_video(cells[at], root):
                paths.append(cells[at])
                break
    if len(paths) > 1:
        raise ValueError(
            f"{where}: a text in quotes that begins here takes in the row of {paths[1]}; close it where it ends, and "
            "double the quotes inside it"
        )


def _is_video(path: str, root: Path) -> bool:
    is_called_so = PurePosixPath(path).suffix.lower() in SUFFIXES and not re.search(r"\s", path)
    return is_called_so or bool(path and os.path.isfile(root / path))


def _clean_path(path: str, where: str) -> str:
    if not path:
        raise ValueError(f"{where}: no path")
    try:
        check_relative(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return PurePosixPath(path.replace("\\", "/")).as_posix()  # ./a.mp4 and a.mp4 are one video


def _find_file(root: Path, path: str, folders: dict[str, dict[str, str]]) -> str:
    """Return the path of the file that `path` means: its own, or that of the only file with the same normal form.

    folders   names by their normal form, of the folders that were listed before
    """
    if os.path.exists(root / path):
        return path
    found = ""
    for part in PurePosixPath(path).parts:
        if found not in folders:
            folders[found] = _list_normal_forms(root / found)
        name = folders[found].get(_normalise(part))
        if name is None:
            return path
        found = os.path.join(found, name)
    return found


def _list_normal_forms(folder: Path) -> dict[str, str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    counts = Counter(map(_normalise, names))
    return {form: name for name in names if counts[form := _normalise(name)] == 1}


def _normalise(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()
