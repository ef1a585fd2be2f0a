"""The manifest: a Parquet file with one row per video, made by `tgmae-data index` and read by everything else.

A row may be a segment of a file: frames `start_frame` to `end_frame`, the latter excluded. Every caption has a source.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dali_pipelines.types import Caption, CodedFormat, Video
from engines.files import replacing

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("start_frame", pa.int32()),
        ("end_frame", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("pixel_format", pa.string()),
        ("rotation", pa.int32()),
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("keyframes", pa.list_(pa.int32())),
        ("keyframe_pts", pa.list_(pa.int64())),
        ("label", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("caption_sources", pa.list_(pa.string())),
        ("split", pa.string()),
        ("stream", pa.int32()),
        ("mirrored", pa.bool_()),
    ]
)
FORMAT = 3  # 1 had no segments and no caption sources, 2 no streams and no mirrored videos; both are still read
_ADDED_IN = {2: ("start_frame", "end_frame", "caption_sources"), 3: ("stream", "mirrored")}
# Parquet metadata: the folder that paths are relative to (absolute, or relative to the manifest's folder), and FORMAT.
ROOT_KEY, FORMAT_KEY = b"tgmae.root", b"tgmae.format"
_CACHED_VIDEOS = 4096  # rows kept as Python objects: a batch is planned, decoded and scored from the same rows


class Manifest:
    """Rows of a manifest, by number. Holds Arrow columns, not Python objects: 240,000 videos take about 50 MB.

    root   absolute folder that the rows' paths are relative to
    """

    def __init__(self, table: pa.Table, root: Path) -> None:
        self.table = table.combine_chunks()
        self.root = root
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
        values = {name: self.table.column(name)[row].as_py() for name in SCHEMA.names}
        segment = values.pop("start_frame"), values.pop("end_frame")
        values["captions"] = tuple(_pair(values["captions"], values.pop("caption_sources")))
        for name in ("keyframes", "keyframe_pts"):
            values[name] = tuple(values[name])
        return Video(**values, segment=segment)

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
        columns = ("path", "start_frame", "end_frame", "num_frames")
        rows = zip(*(self.table.column(name).to_pylist() for name in columns), strict=True)
        return [path if (start, end) == (0, count) else f"{path}#{start}-{end}" for path, start, end, count in rows]

    @cached_property
    def fingerprint(self) -> str:
        """Number of videos and a digest of names and captions, in order: whether two runs draw the same clips."""
        columns = [self.names(), self.table.column("captions").to_pylist()]
        return f"{len(self)} (paths and captions {hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:12]})"

    def select_split(self, split: str) -> Manifest:
        """Return the rows of one split; "" keeps all. Raises ValueError where none is left."""
        if not split:
            return self
        import pyarrow.compute as pc  # a tenth of a second, which decode workers do without

        rows = self.table.filter(pc.equal(self.table.column("split"), split))
        if not rows.num_rows:
            found = sorted(set(self.table.column("split").to_pylist()))
            raise ValueError(f"no video has split {split!r}; the manifest has {found}")
        return Manifest(rows, self.root)

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


def _pair(texts: Sequence[str], sources: Sequence[str]) -> list[Caption]:
    return [Caption(text, source) for text, source in zip(texts, sources, strict=True)]


def check_relative(path: str) -> None:
    """Raise ValueError for a path that would leave the manifest's root."""
    parts = PurePosixPath(path.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"path leaves the root: {path!r} (paths are relative to the root and hold no '..')")


def write_manifest(path: Path, videos: Sequence[Video], root: Path) -> None:
    """Write a manifest atomically.

    Raises ValueError for a path that leaves the root, a video without frames, and two rows of the same name.
    """
    for video in videos:
        check_relative(video.path)
        if not video.length:
            raise ValueError(f"{video.path} has no frames")
    _check_names([video.name for video in videos])
    folder = path.resolve().parent
    inside = folder == root.resolve() or folder in root.resolve().parents
    root_text = os.path.relpath(root.resolve(), folder) if inside else str(root.resolve())
    metadata = {ROOT_KEY: root_text.encode(), FORMAT_KEY: str(FORMAT).encode()}
    with replacing(path) as temporary:
        pq.write_table(_make_table(videos).replace_schema_metadata(metadata), temporary, compression="zstd")


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


def _check_names(names: Sequence[str]) -> None:
    """Raise ValueError where two rows have the same name: maps and compacted files are told apart by it."""
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise ValueError(
            f"expected one row per video or segment, got several for {', '.join(twice[:3])}; a row may have several "
            "captions"
        )


def count_videos(count: int) -> str:
    """Return "1 video" or "2 videos", for messages."""
    return f"{count} video{'s' * (count != 1)}"


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest, of this format or an earlier one.

    Raises FileNotFoundError where there is none. Raises ValueError where the file is not a manifest, was written by a
    later version or holds no video, and where rows cannot be used: paths that leave the root, segments outside their
    file, captions without a source, two rows of the same name.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give its manifest, such as {path / 'manifest.parquet'}")
    is_csv = path.suffix.lower() == ".csv"
    if not path.is_file():
        out = path.with_suffix(".parquet") if is_csv else path
        raise FileNotFoundError(f"no manifest at {path}; make one with: tgmae-data index FOLDER --out {out}")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        if is_csv:
            remake = f"tgmae-data index FOLDER --csv {path} --out {path.with_suffix('.parquet')}"
            raise ValueError(
                f"{path} is a CSV file, but a manifest is a Parquet file; make one with: {remake}"
            ) from error
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    metadata = table.schema.metadata or {}
    remake = f"make it again with: tgmae-data index FOLDER --out {path} (and the --csv it was made with)"
    found = metadata.get(FORMAT_KEY, b"1").decode()
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
    with_nulls = [name for name in expected if table.column(name).null_count]
    if with_nulls:
        raise ValueError(f"{path} has empty cells in the columns {with_nulls}; {remake}")
    table = _upgrade(table, later)
    root = metadata.get(ROOT_KEY, b".").decode()
    manifest = Manifest(table.select(SCHEMA.names), (path.resolve().parent / root).resolve())
    try:
        _check_rows(manifest)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remake}") from error
    return manifest


def _check_rows(manifest: Manifest) -> None:
    """Raise ValueError for rows that nothing can be made of, naming the first."""
    for video_path in manifest.table.column("path").to_pylist():
        check_relative(video_path)
    import pyarrow.compute as pc

    start, end, count = (manifest.table.column(name) for name in ("start_frame", "end_frame", "num_frames"))
    lengths = [pc.list_value_length(manifest.table.column(name)) for name in ("captions", "caption_sources")]
    is_outside = pc.or_(pc.or_(pc.less(start, 0), pc.greater(end, count)), pc.less_equal(end, start))
    for wrong, reason in (
        (is_outside, "frames {start_frame} to {end_frame} are not a segment of a file of {num_frames} frames"),
        (pc.not_equal(*lengths), "captions {captions} have sources {caption_sources}; expected one source each"),
    ):
        if (row := pc.index(wrong, True).as_py()) >= 0:
            values = {name: manifest.table.column(name)[row].as_py() for name in SCHEMA.names}
            raise ValueError(f"row {row}, {values['path']}: " + reason.format(**values))
    _check_names(manifest.names())


def _upgrade(table: pa.Table, later: Sequence[str]) -> pa.Table:
    """Add the columns that an older format has not: whole files, captions from unknown sources, the first stream."""
    sources = [[""] * len(texts) for texts in table.column("captions").to_pylist()]
    values = {
        "start_frame": [0] * table.num_rows,
        "end_frame": table.column("num_frames").to_pylist(),
        "caption_sources": sources,
        "stream": [0] * table.num_rows,
        "mirrored": [False] * table.num_rows,
    }
    for name in later:
        if name in table.column_names:  # a foreign column of that name
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array(values[name], SCHEMA.field(name).type))
    return table
