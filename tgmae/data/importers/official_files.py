"""Find the official annotation files below a folder, and read them as they are met in the field."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DEPTH = 2  # folders below the one that is given
_HEAD = 4096  # bytes by which a file is recognised
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class FormatError(ValueError):
    """An annotation file is not one of the data set that was named, or is damaged."""


class NoListError(FormatError):
    """An annotation file that must be there is not."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table, by its columns."""

    where: str  # file and line, for messages
    cells: dict[str, str]


class OfficialFiles:
    """The files of a folder of annotations.

    notes  what was odd about those that were read
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            kind = "a file" if folder.exists() else "not there"
            raise FileNotFoundError(
                f"--annotations {folder} is {kind}; give the folder of the official annotation files"
            )
        self.folder = folder
        self.notes: list[str] = []
        self._paths = sorted(_walk(folder, _DEPTH))

    def find_all(self, pattern: str) -> list[tuple[re.Match[str], Path]]:
        """Return the files whose whole name matches, with what was matched.

        Raises FormatError where two have the same name in different folders.
        """
        matches = [(re.fullmatch(pattern, path.name, flags=re.IGNORECASE), path) for path in self._paths]
        found = [(match, path) for match, path in matches if match]
        names: dict[str, Path] = {}
        for _, path in found:
            if (other := names.setdefault(path.name, path)) is not path:
                raise FormatError(f"{path.name} is there twice, as {other} and {path}; give --annotations one folder")
        return found

    def find(self, pattern: str, what: str) -> Path:
        """Return the only file whose name matches; `what` describes it in the NoListError where there is none."""
        if (path := self.find_optional(pattern)) is None:
            raise NoListError(f"{self.folder} holds no {what}")
        return path

    def find_optional(self, pattern: str) -> Path | None:
        """Return the only file whose name matches, None where there is none. Raises FormatError for several."""
        found = [path for _, path in self.find_all(pattern)]
        if len(found) > 1:
            raise FormatError(f"{found[0]} and {found[1]} are two files for one; remove the one that is not official")
        return found[0] if found else None

    def describe(self, shown: int = 3) -> str:
        """Say what is in the folder."""
        if not self._paths:
            return "it holds no files"
        some = ", ".join(path.name for path in self._paths[:shown]) + ", …" * (len(self._paths) > shown)
        return f"it holds {len(self._paths)} file{'s' * (len(self._paths) != 1)} ({some})"

    def shows(self, pattern: str, content: str) -> str:
        """Return the name of a file whose name matches, and whose first bytes hold `content`; "" without one."""
        for path in self._paths:
            if re.fullmatch(pattern, path.name, flags=re.IGNORECASE):
                with path.open("rb") as file:
                    if content.encode() in file.read(_HEAD):
                        return path.name
        return ""

    def read_lines(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yield where each line that is not empty stands, for messages, and what is on it."""
        for number, line in enumerate(re.split(r"\r\n|\r|\n", self._read_text(path)), 1):
            if line.strip():
                yield f"{path.name} line {number}", line.strip()

    def read_json(self, path: Path, kind: type, what: str) -> Any:
        """Read a JSON file that holds a `kind`, which `what` describes. Raises FormatError for anything else."""
        try:
            value = json.loads(self._read_text(path))
        except json.JSONDecodeError as error:
            raise FormatError(
                f"{path} is not JSON: {error.msg} on line {error.lineno}, column {error.colno}; it may have been cut "
                "off in a download"
            ) from error
        if not isinstance(value, kind):
            raise FormatError(f"{path}: expected {what}, got a {_JSON_NAMES.get(type(value), 'single value')}")
        return value

    def read_records(self, path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Read a JSON list of objects that have these keys."""
        what = f"a list of objects with {', '.join(keys)}"
        records: list[dict[str, Any]] = self.read_json(path, list, what)
        for number, record in enumerate(records):
            if not isinstance(record, dict) or any(key not in record for key in keys):
                shown = json.dumps(record, ensure_ascii=False)[:80]
                raise FormatError(f"{path}: expected {what}, got {shown} at place {number}")
        return records

    def read_table(self, path: Path, columns: Sequence[str]) -> Iterator[Row]:
        """Read a CSV with at least these columns, separated by commas, semicolons or tabs; quotes as in any CSV."""
        lines = io.StringIO(self._read_text(path), newline="")
        first = lines.readline()
        for delimiter in _DELIMITERS:
            names = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
            if set(columns) <= set(names):
                break
        else:
            raise FormatError(f"{path}: expected a first line with {', '.join(columns)}, got {first.strip()[:100]!r}")
        if delimiter != ",":
            self.notes.append(f"{path.name} is separated by {_DELIMITERS[delimiter]}, and read so")
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        begins = 2
        try:
            for values in reader:
                where, begins = f"{path.name} line {begins}", reader.line_num + 2
                if not any(value.strip() for value in values):
                    continue
                if len(values) != len(names):
                    raise FormatError(f"{path.parent / where}: {len(values)} fields for {len(names)} columns")
                yield Row(where, dict(zip(names, (value.strip() for value in values), strict=True)))
        except csv.Error as error:
            raise FormatError(f"{path} line {begins}: the quotes that begin here do not end as they should") from error

    def _read_text(self, path: Path) -> str:
        """Return the text of a file, with a note where it is in an encoding other than UTF-8."""
        data = path.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self.notes.append(f"{path.name} is UTF-16, and read so")
            return data.decode("utf-16")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            text = data.decode("latin-1")
            shown = text.split("\n")[line - 1].strip()[:60]
            self.notes.append(f"{path.name} is not UTF-8, and read as Latin-1: line {line} is {shown!r}")
            return text


_JSON_NAMES = {dict: "JSON object", list: "JSON list", str: "text", int: "number", float: "number"}


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if depth:
                yield from _walk(Path(entry.path), depth - 1)
        else:
            yield Path(entry.path)
