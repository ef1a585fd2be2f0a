"""The file of generated captions beside a manifest, and the journals that it is made of.

MANIFEST.captions-SOURCE.parquet has one row per caption: the video (or class), its frames, the text, what is wrong with
it, and the prompt, model and revision that it comes from. While a command runs, every answered video is a line of
MANIFEST.captions-SOURCE.journal; of several processes each has its own. Lines are sealed like an index journal's.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from engines.files import absorb_journals, journal_of, naming_errors, open_line, replacing, seal_line
from tgmae.captions.quality import Flag
from tgmae.data.parquet_file import read_table, write_table

Key = dict[str, str | int]  # what the captions of a file depend on besides the videos
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("digest", pa.string()),
        ("text", pa.string()),
        ("flag", pa.string()),
        ("prompt", pa.string()),
        ("frames", pa.list_(pa.int32())),
        ("model", pa.string()),
        ("revision", pa.string()),
    ]
)
_KEY = b"tgmae.captions"


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A text by a model, and what is wrong with it."""

    text: str
    flag: Flag
    prompt: str
    frames: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The captions of a video, or of a class.

    name    `Video.name`, or the class
    digest  tells the content of a video from another; "" for a class
    """

    name: str
    digest: str
    captions: tuple[Generated, ...]


@dataclass(frozen=True)
class Sidecar:
    """The captions of one source beside a manifest."""

    path: Path
    key: Key

    @classmethod
    def beside(cls, manifest: Path, source: str, key: Key) -> Sidecar:
        """Return that of a manifest and a source; nothing is read or written."""
        return cls(manifest.with_name(f"{manifest.stem}.captions-{source}.parquet"), key)

    @property
    def journal(self) -> Path:
        return self.path.with_suffix(".journal")

    def read(self) -> dict[str, Record]:
        """Return what is there, by name: the file's records and those of interrupted runs. Damaged lines are dropped.

        Journals of other processes are absorbed, so none may be writing. Raises ValueError where the file is damaged,
        and where file or journal was made with another key.
        """
        absorb_journals(self.journal)
        records = {record.name: record for record in _read_table(self.path, self.key)}
        return records | {record.name: record for record in self._read_journal()}

    def _read_journal(self) -> Iterator[Record]:
        lines = self.journal.read_bytes().split(b"\n") if self.journal.exists() else []
        for line in lines:
            if (text := open_line(line)) is None:
                continue
            try:
                row = json.loads(text)
                if "key" in row:
                    _check_key(row["key"], self.key, self.journal)
                    continue
                captions = [Generated(**{**made, "frames": tuple(made["frames"])}) for made in row["captions"]]
                record = Record(name=row["name"], digest=row["digest"], captions=tuple(captions))
            except (TypeError, KeyError, json.JSONDecodeError):
                continue
            yield record

    @contextlib.contextmanager
    def open_journal(self, rank: int) -> Iterator[Callable[[Record], None]]:
        """Open the journal of one process to continue it, and yield the function that notes a record."""
        journal = journal_of(self.journal, rank)
        with journal.open("ab", buffering=0) as file:

            def write(row: Mapping[str, Any], before: bytes = b"") -> None:
                left = before + seal_line(json.dumps(row, ensure_ascii=False).encode()) + b"\n"
                with naming_errors(journal):
                    while left:  # a disk that is filling takes a part
                        left = left[file.write(left) :]

            # The newline ends a line that an interruption cut off.
            write({"key": self.key}, before=b"\n" if file.tell() else b"")
            yield lambda record: write(asdict(record))

    def write(self, records: Iterable[Record]) -> None:
        """Write the file as a whole, and delete the journals, which it replaces."""
        about = {"model": str(self.key["model"]), "revision": str(self.key["revision"])}
        rows = [
            {"name": record.name, "digest": record.digest, **asdict(caption), **about}
            for record in records
            for caption in record.captions
        ]
        table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({_KEY: json.dumps(self.key).encode()}))
        with replacing(self.path) as temporary:
            write_table(table, temporary)
        absorb_journals(self.journal)
        self.journal.unlink(missing_ok=True)


def _read_table(path: Path, key: Key) -> Iterator[Record]:
    if not path.exists():
        return
    try:
        table = read_table(path)
        found = json.loads((table.schema.metadata or {})[_KEY])
        columns = [table.column(name).to_pylist() for name in SCHEMA.names[:6]]
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or holds no generated captions ({error}); delete it") from error
    _check_key(found, key, path)
    captions: dict[tuple[str, str], list[Generated]] = {}
    for name, digest, text, flag, prompt, frames in zip(*columns, strict=True):
        made = Generated(text=text, flag=flag, prompt=prompt, frames=tuple(frames))
        captions.setdefault((name, digest), []).append(made)
    for (name, digest), listed in captions.items():
        yield Record(name=name, digest=digest, captions=tuple(listed))


def _check_key(found: Key, wanted: Key, path: Path) -> None:
    """Raise ValueError, naming what differs, where captions were made in another way than is now asked for."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        told = "; ".join(f"{name} {found.get(name)!r}, now {wanted.get(name)!r}" for name in names)
        raise ValueError(
            f"{os.fspath(path)} holds captions made in another way ({told}); give the new ones another --source, or "
            "delete that file to replace them"
        )
