"""Write a folder of maps (`store.py`) part by part. Every video is kept as soon as it is done."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dali_pipelines.types import SkippedVideo
from dali_pipelines.workers.team import ALONE, Team
from engines.files import lock_file, replacing
from engines.progress import progress_bar
from tgmae.data.manifest import Manifest
from tgmae.masks.maps.records import (
    SCHEMA,
    Broken,
    Key,
    find_name,
    fits_key,
    is_whole,
    make_record,
    read_part,
    renew,
    schema_of,
)
from tgmae.masks.maps.store import part_path, write_key

PART_VIDEOS = 512  # rows per part; a process holds their maps in memory while it writes them
WRITING = "writing"  # name of the lock that a process, or the main one of several, holds
_STALE_S = 3600  # seconds after which no process can still be writing a temporary file

# Yields the maps of each of the given rows in order, those before a video breaks off, or the reason why there are none.
Compute = Callable[[list[int]], Iterator[NDArray[np.generic] | Broken | str]]


@dataclass(frozen=True)
class BuildResult:
    num_videos: int  # computed now
    num_reused: int  # found in parts written earlier
    skipped: list[SkippedVideo]
    num_bytes: int  # size of the parts
    seconds: float
    broken: list[SkippedVideo] = field(default_factory=list)  # computed up to where they break off


def write_maps(
    manifest: Manifest, digests: Sequence[str], out: Path, key: Key, command: str, compute: Compute,
    team: Team = ALONE,
) -> BuildResult:  # fmt: skip
    """Write the missing parts of a manifest's maps: of a team, each process takes every `team.size`-th.

    Maps of videos that are not in this manifest are kept. The main process returns the result of all of them.

    Raises ValueError where `out` holds maps that depend on something else, and where new ones contain NaN or infinity.
    """
    started = time.perf_counter()
    rows_names = manifest.names()
    names = list(zip(rows_names, digests, strict=True))
    parts = range(team.rank, -(-len(manifest) // PART_VIDEOS), team.size)
    rows_of = {part: range(part * PART_VIDEOS, min((part + 1) * PART_VIDEOS, len(manifest))) for part in parts}
    own = set(rows_names)
    skipped: list[SkippedVideo] = []
    broken: list[SkippedVideo] = []
    with contextlib.ExitStack() as held:
        with team.main_first():
            if out.exists() and not out.is_dir():
                raise ValueError(f"expected a folder to write maps into, got the file {out}")
            write_key(out, key, command)
            if team.is_main:
                held.enter_context(lock_file(out / WRITING))
        missing: dict[int, list[int]] = {}  # rows to compute, by part to be written
        for part in parts:
            _remove_stale(out, part)
            found = _read_records(out, part, key, say=True)
            for row in rows_of[part]:
                names[row] = find_name(found, names[row])
            missing[part] = [row for row in rows_of[part] if names[row] not in found]
            if not missing[part] and not _journals(out, part):
                del missing[part]
        rows = [row for part in missing.values() for row in part]
        results = compute(rows)
        bar = progress_bar(
            total=len(rows), desc=team.describe(command.split()[-1]), unit="video", disable=not (rows and team.is_main)
        )
        for part in missing:
            found = _read_records(out, part, key)
            with _Journal(part_path(out, part), key) as journal:
                for row in missing[part]:
                    maps = next(results)
                    if isinstance(maps, str):
                        skipped.append(SkippedVideo(row=row, path=rows_names[row], reason=maps))
                        record = make_record(*names[row], None, key)
                    else:
                        if isinstance(maps, Broken):
                            broken.append(SkippedVideo(row=row, path=rows_names[row], reason=maps.reason))
                        _check_finite(rows_names[row], maps)
                        record = make_record(*names[row], maps, key)
                        journal.write(record)
                    found[names[row]] = record
                    bar.update()
            # Videos of other manifests, or of another split, keep their maps.
            others = [record for name, record in found.items() if name[0] not in own]
            _write_part(out, part, key, [found[names[row]] for row in rows_of[part]] + others)
        bar.close()
        num_bytes = sum(part_path(out, part).stat().st_size for part in parts)
        reused = sum(len(rows_of[part]) for part in parts) - len(rows)
        seconds = time.perf_counter() - started
        result = BuildResult(len(rows) - len(skipped), reused, skipped, num_bytes, seconds, broken)
        return _sum_up(team.collect([result]))


def _sum_up(results: Sequence[BuildResult]) -> BuildResult:
    """Return the result of several processes, with videos in the order of the manifest."""
    skipped, broken = (
        sorted((video for videos in listed for video in videos), key=lambda video: video.row)
        for listed in ([result.skipped for result in results], [result.broken for result in results])
    )
    return BuildResult(
        sum(result.num_videos for result in results), sum(result.num_reused for result in results), skipped,
        sum(result.num_bytes for result in results), max(result.seconds for result in results), broken,
    )  # fmt: skip


def _check_finite(name: str, maps: NDArray[np.generic] | Broken) -> None:
    values = maps.maps if isinstance(maps, Broken) else maps
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"the maps computed for {name} contain NaN or infinity, and were not written")


def _journals(folder: Path, part: int) -> list[Path]:
    return list(folder.glob(f"{part_path(folder, part).name}.*.journal"))


def _remove_stale(folder: Path, part: int) -> None:
    """Remove half-written parts that a killed run left behind."""
    for half_written in folder.glob(f"{part_path(folder, part).name}.*.tmp"):
        if time.time() - half_written.stat().st_mtime > _STALE_S:
            half_written.unlink()


def _read_records(folder: Path, part: int, key: Key, say: bool = False) -> dict[tuple[str, str], pa.RecordBatch]:
    """Return the records of a part and of the journals of interrupted runs, by name and digest, of readable videos.

    Damaged ones are left out, and so computed again.
    """
    batches: list[pa.RecordBatch] = []
    path = part_path(folder, part)
    with contextlib.suppress(FileNotFoundError, ValueError):
        table = read_part(path, has_checksums=False)
        batches += table.to_batches() if fits_key(table.schema, key) else []
    for journal in _journals(folder, part):
        with contextlib.suppress(Exception):  # it may end in the middle of a record, and Arrow then raises anything
            stream = pa.ipc.open_stream(journal.read_bytes())
            while stream.schema.equals(SCHEMA):
                batch = stream.read_next_batch()
                batch.validate(full=True)
                batches.append(batch)
    records: dict[tuple[str, str], pa.RecordBatch] = {}
    for batch in batches:
        columns = (batch.column(name).to_pylist() for name in ("path", "digest", "shape"))
        for place, (name, digest, shape) in enumerate(zip(*columns, strict=True)):
            if not is_whole(batch, place):
                if say:
                    print(f"{path}: the checksum of {name} is another one; computing it again", file=sys.stderr)
            elif shape:
                records[name, digest] = renew(batch.slice(place, 1))
    return records


class _Journal:
    """Keeps each video's record on disk until its part is written: a killed run loses only the current video."""

    def __init__(self, part: Path, key: Key) -> None:
        # The name is random: the process number of a killed run may recur, and what that run left is still wanted.
        self.path = part.with_name(f"{part.name}.{uuid.uuid4().hex[:12]}.journal")
        self.schema = schema_of(key)

    def __enter__(self) -> _Journal:
        self.file = pa.OSFile(str(self.path), "wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        return self

    def write(self, record: pa.RecordBatch) -> None:
        with _naming(self.path):
            self.stream.write_batch(record)

    def __exit__(self, *raised: object) -> None:
        # The end of a stream cannot be written either where the disk is full, which must not hide the first error.
        with contextlib.suppress(OSError) if raised[0] else _naming(self.path), self.file:
            self.stream.close()


def _write_part(folder: Path, part: int, key: Key, records: list[pa.RecordBatch]) -> None:
    path = part_path(folder, part)
    with _naming(path), replacing(path) as temporary, pa.ipc.new_file(temporary, schema_of(key)) as writer:
        for record in records:
            writer.write_batch(record)
    for journal in _journals(folder, part):
        journal.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in Arrow's errors, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"{path} could not be written: {reason}; the same command resumes from there") from error
