"""The manifest: a Parquet file with one row per video, made by `tgmae-data index` and read by everything else.

A row may be a segment of a file: frames `start_frame` to `end_frame`, the latter excluded. Every caption has a source.
A row may belong to several splits, whose names its cell separates by commas: train,train1,test2.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from dali_pipelines.types import Caption, CodedFormat, Video
from engines.files import replacing
from tgmae.data.columns import SCHEMA, cast_columns, check_names, check_relative, check_rows, has_column, name_rows
from tgmae.data.parquet_file import DamagedFileError, read_table, write_table

FORMAT = 4  # the first, and what each later one added; all are still read
_ADDED_IN = {2: ("start_frame", "end_frame", "caption_sources"), 3: ("stream", "mirrored"), 4: ("digest",)}
# Parquet metadata: the folder that paths are relative to (absolute, or relative to the manifest's folder), and FORMAT.
ROOT_KEY, FORMAT_KEY = b"tgmae.root", b"tgmae.format"
_LOOKED_FOR = 16  # files that must not all be missing
_CACHED_VIDEOS = 4096  # rows kept as Python objects: a batch is planned, decoded and scored from the same rows


class Manifest:
    """Rows of a manifest, by number. Holds Arrow columns, not Python objects: 240,000 videos take about 50 MB.

    root    absolute folder that the rows' paths are relative to
    format  of the file that the rows were read from
    """

    def __init__(self, table: pa.Table, root: Path, format: int = FORMAT) -> None:
        self.table = table.combine_chunks()
        self.root = root
        self.format = format
        self._videos: dict[int, Video] = {}

    @classmethod
    def of(cls, videos: Sequence[Video], root: Path) -> Manifest:
        """Make a manifest in memory."""
        return cls(_make_table(videos), root)

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.table, self.root)

    def __repr__(self) -> str:
        return f"Manifest({len(self)} videos below {self.root})"

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Video:
        video = self._videos.get(row)
        if video is None:
            if len(self._videos) >= _CACHED_VIDEOS:
                self._videos.clear()
            video = self._videos[row] = self._read(row)
        return video

    def _read(self, row: int) -> Video:
        return _make_video({name: self.table.column(name)[row].as_py() for name in SCHEMA.names})

    def rows(self) -> Iterator[Video]:
        """Yield all rows, without keeping them: ten times as fast as one by one."""
        for batch in self.table.select(SCHEMA.names).to_batches(max_chunksize=_CACHED_VIDEOS):
            yield from map(_make_video, batch.to_pylist())

    def file(self, row: int) -> str:
        """Return the absolute path of a row's video."""
        return os.path.join(self.root, self.table.column("path")[row].as_py())

    def coded(self) -> Iterator[CodedFormat]:
        """Yield `Video.coded` of every row, from the columns."""
        columns = ("codec", "pixel_format", "width", "height", "rotation")
        for codec, pixels, *size, rotation in zip(
            *(self.table.column(name).to_pylist() for name in columns), strict=True
        ):
            yield CodedFormat(codec, pixels, *(size[::-1] if rotation % 180 else size))

    def names(self) -> list[str]:
        """Return `Video.name` of every row, from the columns."""
        return name_rows(self.table)

    @cached_property
    def fingerprint(self) -> str:
        """Number of videos and a digest of names and captions, in order: whether two runs draw the same clips."""
        columns = [self.names(), self.table.column("captions").to_pylist()]
        return f"{len(self)} (paths and captions {hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:12]})"

    def splits(self) -> Counter[str]:
        """Return the number of rows in each split."""
        return count_splits(self.table.column("split").to_pylist())

    def select_split(self, split: str) -> Manifest:
        """Return the rows of one split; "" keeps all. Raises ValueError where none is left."""
        if not split:
            return self
        import pyarrow.compute as pc  # a tenth of a second, which decode workers do without

        column = self.table.column("split")
        cells = [cell for cell in set(column.to_pylist()) if split in split_names(cell)]
        if not cells:
            found = ", ".join(map(repr, sorted(self.splits())))
            raise ValueError(f"no video has split {split!r}, only {found}; a CSV gives splits (tgmae-data index --csv)")
        return Manifest(self.table.filter(pc.is_in(column, value_set=pa.array(cells, pa.string()))), self.root)

    def joined(self, other: Manifest) -> Manifest:
        """Return the rows of both, which lie under one root."""
        return Manifest(pa.concat_tables([self.table, other.table]), self.root)

    def with_captions(self, captions: Sequence[Sequence[Caption]]) -> Manifest:
        """Return the same rows with other captions, one list per row."""
        columns = {
            "captions": [[caption.text for caption in row] for row in captions],
            "caption_sources": [[caption.source for caption in row] for row in captions],
        }
        table = self.table
        for name, column in columns.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, pa.array(column, pa.list_(pa.string())))
        return Manifest(table, self.root)

    def captions(self) -> list[list[Caption]]:
        """Return the captions of every row, from the columns."""
        columns = (self.table.column(name).to_pylist() for name in ("captions", "caption_sources"))
        return [_pair(texts, sources) for texts, sources in zip(*columns, strict=True)]


def _make_video(values: dict[str, Any]) -> Video:
    segment = values.pop("start_frame"), values.pop("end_frame")
    values["captions"] = tuple(_pair(values["captions"], values.pop("caption_sources")))
    for name in ("keyframes", "keyframe_pts"):
        values[name] = tuple(values[name])
    return Video(**values, segment=segment)


def split_names(cell: str) -> list[str]:
    """Return the names of the splits that a row belongs to; [""] where it belongs to none."""
    return [name.strip() for name in cell.split(",")]


def count_splits(cells: Iterable[str]) -> Counter[str]:
    """Return the number of rows in each split, in the order in which they are met."""
    counts: Counter[str] = Counter()
    for cell, number in Counter(cells).items():
        for name in split_names(cell):
            counts[name] += number
    return counts


def _pair(texts: Sequence[str], sources: Sequence[str]) -> list[Caption]:
    return [Caption(text, source) for text, source in zip(texts, sources, strict=True)]


def write_manifest(path: Path, videos: Sequence[Video], root: Path) -> None:
    """Write a manifest atomically.

    Raises ValueError for a path that leaves the root, a video without frames, and two rows of the same name.
    """
    for video in videos:
        check_relative(video.path)
        if not video.length:
            raise ValueError(f"{video.path} has no frames")
    check_names([video.name for video in videos])
    folder = path.resolve().parent
    inside = folder == root.resolve() or folder in root.resolve().parents
    root_text = os.path.relpath(root.resolve(), folder) if inside else str(root.resolve())
    metadata = {ROOT_KEY: os.fsencode(root_text), FORMAT_KEY: str(FORMAT).encode()}
    with replacing(path) as temporary:
        write_table(_make_table(videos).replace_schema_metadata(metadata), temporary)


def _make_table(videos: Sequence[Video]) -> pa.Table:
    return pa.table({name: [_cell(video, name) for video in videos] for name in SCHEMA.names}, schema=SCHEMA)


def _cell(video: Video, name: str) -> Any:
    match name:
        case "start_frame":
            return video.start
        case "end_frame":
            return video.end
        case "captions":
            return [caption.text for caption in video.captions]
        case "caption_sources":
            return [caption.source for caption in video.captions]
    return getattr(video, name)


def count_videos(count: int) -> str:
    """Return "1 video" or "2 videos", for messages."""
    return f"{count} video{'s' * (count != 1)}"


def read_manifest(path: Path, root: Path | None = None) -> Manifest:
    """Read and check a manifest, of this format or an earlier one, or a table that another program has written.

    root   folder that the paths are relative to, in place of the one that the file names

    Raises FileNotFoundError where there is none. Raises ValueError where the file is damaged, is not a manifest, was
    written by a later version or holds no video, and, with the row, where a column has another type or a value that
    nothing can be made of.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give its manifest, such as {path / 'manifest.parquet'}")
    is_csv = path.suffix.lower() == ".csv"
    if not path.is_file():
        out = path.with_suffix(".parquet") if is_csv else path
        raise FileNotFoundError(f"no manifest at {path}; make one with: tgmae-data index FOLDER --out {out}")
    remake = f"make it again with: tgmae-data index FOLDER --out {path} (and the --csv it was made with)"
    try:
        table = read_table(path)
    except DamagedFileError as error:
        raise ValueError(f"{error}; {remake}") from error
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        if is_csv:
            remake = f"tgmae-data index FOLDER --csv {path} --out {path.with_suffix('.parquet')}"
            raise ValueError(
                f"{path} is a CSV file, but a manifest is a Parquet file; make one with: {remake}"
            ) from error
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a Parquet file, or is damaged: {reason}; {remake}") from error
    if twice := sorted({name for name in SCHEMA.names if table.column_names.count(name) > 1}):
        raise ValueError(f"{path} has the columns {twice} twice; {remake}")
    metadata = table.schema.metadata or {}
    found = _read_format(table, metadata)
    if not found.isdecimal() or not 1 <= int(found) <= FORMAT:
        raise ValueError(
            f"{path} has manifest format {found}, but this version of tgmae reads formats up to {FORMAT}; update "
            f"tgmae, or {remake}"
        )
    later = [name for added, names in _ADDED_IN.items() if added > int(found) for name in names]
    expected = [name for name in SCHEMA.names if name not in later]
    missing = [name for name in expected if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} is not a tgmae manifest: columns {missing} are missing; {remake}")
    if not table.num_rows:
        raise ValueError(f"{path} lists no usable video; the report beside it says why each file was left out")
    try:
        table = _upgrade(cast_columns(table, expected), later)
        check_rows(table)
        if root is None:
            root = path.resolve().parent / os.fsdecode(metadata.get(ROOT_KEY, b"."))
        return Manifest(table, root.resolve(), int(found))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remake}") from error


def open_manifest(path: Path, root: Path | None = None, flag: str = "--root") -> Manifest:
    """Read a manifest whose videos are about to be opened; `root` as in `read_manifest`.

    flag   how the command calls `root`, for the message

    Raises FileNotFoundError where their folder is not there, or does not hold any of some of them.
    """
    manifest = read_manifest(path, root)
    places = range(0, len(manifest), max(1, len(manifest) // _LOOKED_FOR))
    if not manifest.root.is_dir():
        missing = f"the folder of the videos in {path} is not there: {manifest.root}"
    elif not any(os.path.lexists(manifest.file(row)) for row in places):
        missing = f"the videos in {path} are not there: {manifest.file(0)} and {len(places) - 1} others looked for"
    else:
        return manifest
    raise FileNotFoundError(f"{missing}; say where they are now with {flag} FOLDER, or index them again")


def _read_format(table: pa.Table, metadata: dict[bytes, bytes]) -> str:
    """Return the format that a file states, or that its columns show where a program rewrote it without metadata.

    An earlier format would give up what the later columns say of segments, streams and mirrored videos. So one of them
    is enough, and the others are then missing.
    """
    if FORMAT_KEY in metadata:
        return metadata[FORMAT_KEY].decode(errors="replace")
    return str(
        max([1, *(added for added, names in _ADDED_IN.items() if any(has_column(table, name) for name in names))])
    )


def _upgrade(table: pa.Table, later: Sequence[str]) -> pa.Table:
    """Add the columns that an older format has not: whole files, the first stream, nothing known of other things."""
    if not later:
        return table
    sources = [[""] * len(texts) for texts in table.column("captions").to_pylist()]
    values = {
        "start_frame": [0] * table.num_rows,
        "end_frame": table.column("num_frames").to_pylist(),
        "caption_sources": sources,
        "stream": [0] * table.num_rows,
        "mirrored": [False] * table.num_rows,
        "digest": [""] * table.num_rows,
    }
    for name in later:
        table = table.append_column(name, pa.array(values[name], SCHEMA.field(name).type))
    return table.select(SCHEMA.names)
