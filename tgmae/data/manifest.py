"""The manifest: a Parquet file with one row a video, made by `tgmae-data index` and read by everything else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dali_pipelines.types import CodedFormat
from dali_pipelines.types import Video

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
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
        ("split", pa.string()),
    ]
)
ROOT_KEY = b"tgmae.root"  # Parquet metadata: where the paths start, absolute or relative to the manifest's folder


class Manifest:
    """Rows of a manifest, by number. Holds Arrow columns, not Python objects: 240,000 videos take about 50 MB.

    root   absolute folder that the rows' paths are relative to
    """

    def __init__(self, table: pa.Table, root: Path) -> None:
        self.table = table.combine_chunks()
        self.root = root

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Video:
        values = {name: self.table.column(name)[row].as_py() for name in SCHEMA.names}
        for name in ("keyframes", "keyframe_pts", "captions"):
            values[name] = tuple(values[name])
        return Video(**values)

    def file(self, row: int) -> str:
        """Absolute path of a row's video."""
        return os.path.join(self.root, self.table.column("path")[row].as_py())

    def coded(self) -> Iterator[CodedFormat]:
        """`Video.coded` of every row, from the columns."""
        columns = ("codec", "pixel_format", "width", "height", "rotation")
        for codec, pixels, *size, rotation in zip(
            *(self.table.column(name).to_pylist() for name in columns), strict=True
        ):
            yield CodedFormat(codec, pixels, *(size[::-1] if rotation % 180 else size))

    @cached_property
    def fingerprint(self) -> str:
        """Number of videos and a digest of paths and captions in order: whether two runs draw the same clips."""
        columns = [self.table.column(name).to_pylist() for name in ("path", "captions")]
        return f"{len(self)} (paths and captions {hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:12]})"

    def select_split(self, split: str) -> Manifest:
        """The rows of one split; "" keeps all. Raises ValueError where that leaves none."""
        if not split:
            return self
        rows = self.table.filter(pc.equal(self.table.column("split"), split))
        if not rows.num_rows:
            found = sorted(set(self.table.column("split").to_pylist()))
            raise ValueError(f"no video has split {split!r}; the manifest has {found}")
        return Manifest(rows, self.root)


def check_relative(path: str) -> None:
    """Raise ValueError for a path that would leave the manifest's root."""
    parts = PurePosixPath(path.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"path leaves the root: {path!r} (paths are relative to the root and hold no '..')")


def write_manifest(path: Path, videos: Sequence[Video], root: Path) -> None:
    """Write a manifest whole or not at all."""
    for video in videos:
        check_relative(video.path)
    columns = {name: [getattr(video, name) for video in videos] for name in SCHEMA.names}
    folder = path.resolve().parent
    inside = folder == root.resolve() or folder in root.resolve().parents
    root_text = os.path.relpath(root.resolve(), folder) if inside else str(root.resolve())
    table = pa.table(columns, schema=SCHEMA.with_metadata({ROOT_KEY: root_text.encode()}))
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises FileNotFoundError where there is none, ValueError where it is no manifest, holds no video, or a path leaves
    the root.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give its manifest, such as {path / 'manifest.parquet'}")
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}; make one with: tgmae-data index FOLDER --out {path}")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path} is no tgmae manifest of this version: columns {missing} are missing; make it anew with: "
            f"tgmae-data index FOLDER --out {path} (and the --csv it was made with)"
        )
    if not table.num_rows:
        raise ValueError(f"{path} lists no usable video; the report beside it says why each file was left out")
    with_nulls = [name for name in SCHEMA.names if table.column(name).null_count]
    if with_nulls:
        raise ValueError(f"{path} has empty cells in the columns {with_nulls}; make it anew with tgmae-data index")
    for video_path in table.column("path").to_pylist():
        check_relative(video_path)
    root = (table.schema.metadata or {}).get(ROOT_KEY, b".").decode()
    return Manifest(table.select(SCHEMA.names), (path.resolve().parent / root).resolve())
