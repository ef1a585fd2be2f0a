"""Re-encode a data set for training, video by video, in several processes. A killed run resumes where it was.

Each video is written atomically. The journal in the new folder lists finished videos with the size and modification
time of their sources, and a second run with the same settings reuses them. The originals are only read.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dali_pipelines.types import Video, video_from_json
from dali_pipelines.video.decode import DecodeError
from dali_pipelines.video.opening import name_error
from dali_pipelines.workers.pool import Death, map_in_workers
from dali_pipelines.workers.team import ALONE, Team
from engines.files import (
    LONGEST_NAME,
    absorb_journals,
    journal_of,
    lock_file,
    open_line,
    replacing,
    seal_line,
    write_atomically,
)
from engines.progress import progress_bar
from tgmae.data.coders import CODERS, CompactConfig
from tgmae.data.listing import Entry
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.data.probing import Excluded, probe
from tgmae.data.transcode import choose_frames, transcode

__all__ = ["CompactConfig", "CompactResult", "compact"]

# First line: settings. Every other line: [source name, bytes, mtime_ns, result], a tab and the CRC-32 of that, which
# earlier versions did not write.
JOURNAL = "compact.journal"
_DRAWN_FROM = (b"seed", b"num_objects")  # metadata from which `shapes.truth` redraws the objects of the original clips


@dataclass(frozen=True, kw_only=True)
class CompactResult:
    manifest: Path
    rows: tuple[int, ...]  # for each row of the new manifest, its row in the source manifest
    num_reused: int  # rows that an earlier run had done
    excluded: list[Excluded]  # by the names of their sources
    report: Path  # lists `excluded`
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Job:
    row: int
    file: str
    source: Video
    out: Path
    name: str  # path of the result below `out`
    config: CompactConfig


def compact(
    manifest: Manifest, out: Path, config: CompactConfig, num_workers: int, team: Team = ALONE
) -> CompactResult:
    """Re-encode all videos of a manifest into `out`, with a new manifest and a list of the videos left out.

    A boxes.parquet at the manifest's root is converted to the new sizes and frames. Where nothing is left to do, no
    video and no manifest is written. The main process of a `team` calls this while the others call `help_compact`.

    Raises ValueError where `out` contains the originals, holds other files or was made with other settings, and where
    no video is usable; OSError where `out` cannot be written.
    """
    started = time.perf_counter()
    if num_workers < 1:
        raise ValueError(f"expected at least one worker, got {num_workers}")
    _check_out(manifest.root, out)
    out.mkdir(parents=True, exist_ok=True)
    sources = [manifest[row] for row in range(len(manifest))]
    names = name_results(sources, CODERS[config.codec].suffix)
    with lock_file(out / JOURNAL):
        for half_written in out.rglob("*.tmp"):
            half_written.unlink()
        settings = {"root": str(manifest.root), **asdict(config)}
        absorb_journals(out / JOURNAL)
        results = _find_done(manifest, sources, out, names, _read_journal(out / JOURNAL, settings))
        num_reused = len(results)
        jobs = [
            _Job(row=row, file=manifest.file(row), source=source, out=out, name=names[source.name], config=config)
            for row, source in enumerate(sources)
            if row not in results
        ]
        encoded = _run_shared(jobs, out, num_workers, team)
        absorb_journals(out / JOURNAL)
        excluded = {row: result for row, result in encoded if isinstance(result, Excluded)}
        results |= {row: result[1] for row, result in encoded if not isinstance(result, Excluded)}
        rows = tuple(sorted(results))
        left_out = [excluded[row] for row in sorted(excluded)]
        _write_tables(manifest.root, out, [(sources[row], results[row]) for row in rows], left_out, config)
    return CompactResult(
        manifest=out / "manifest.parquet", rows=rows, num_reused=num_reused, excluded=left_out,
        report=_report_path(out), seconds=time.perf_counter() - started,
    )  # fmt: skip


def help_compact(out: Path, num_workers: int, team: Team) -> None:
    """Re-encode this process's share of the videos of `compact`, which the main process of the team calls."""
    _run_shared([], out, num_workers, team)


def _check_out(root: Path, out: Path) -> None:
    inner, outer = root.resolve(), out.resolve()
    if outer == inner or outer in inner.parents:
        raise ValueError(f"expected a folder apart from the originals, got {out}, in which {root} lies")
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder, got the file {out}")
    # Another process that has just started leaves the lock alone.
    found = set(os.listdir(out)) if out.exists() else set()
    if found and not found & {JOURNAL, f"{JOURNAL}.lock"}:
        raise ValueError(f"expected an empty folder or one made by tgmae-data compact, got {out}, which holds files")


def name_results(sources: Sequence[Video], suffix: str) -> dict[str, str]:
    """Return the path of each result by the name of its source.

    The new suffix replaces the old one, or follows it where two results would have the same name. A segment becomes a
    file of its own, with its frames in the name. A name too long for a file ends in a digest instead.
    """
    names = {}
    for source in sources:
        path = PurePosixPath(source.path).with_suffix("").as_posix()
        frames = "" if source.segment is None else f"-{source.start}-{source.end}"
        names[source.name] = _shorten(path + frames, suffix)
    while clashes := [path for path, count in Counter(names.values()).items() if count > 1]:
        names.update({name: _shorten(name, suffix) for name, result in names.items() if result in clashes})
    return names


def _shorten(path: str, suffix: str) -> str:
    """Append the suffix, and shorten the file's name to what file systems take."""
    folder, slash, name = path.rpartition("/")
    if len((name + suffix).encode()) > LONGEST_NAME:
        end = f"-{hashlib.sha256(path.encode()).hexdigest()[:12]}"
        name = name.encode()[: LONGEST_NAME - len(end + suffix)].decode(errors="ignore") + end
    return folder + slash + name + suffix


def _read_journal(journal: Path, settings: dict[str, Any]) -> dict[str, tuple[int, int, Video]]:
    """Return, by source name, its bytes, its modification time and the result. Raises ValueError for other settings."""
    if not journal.exists():
        write_atomically(journal, json.dumps(settings).encode())
        return {}
    first, *lines = journal.read_bytes().split(b"\n")
    try:
        made_with = {**json.loads(first)}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{journal} is damaged: its first line is not the settings; use another folder") from error
    differing = [
        f"{name} {made_with.get(name)} (now {now})" for name, now in settings.items() if made_with.get(name) != now
    ]
    if differing:
        raise ValueError(
            f"{journal.parent} was made with {', '.join(differing)}; use another folder, or the "
            "settings it was made with"
        )
    done = {}
    for line in lines:
        if (text := open_line(line)) is None:  # the video is encoded again
            continue
        try:
            path, num_bytes, mtime_ns, row = json.loads(text)
        except ValueError:  # cut off by a kill, or empty
            continue
        done[path] = (num_bytes, mtime_ns, video_from_json(row))
    return done


def _find_done(
    manifest: Manifest, sources: list[Video], out: Path, names: dict[str, str], done: dict[str, tuple[int, int, Video]]
) -> dict[int, Video]:
    """Return the results of an earlier run, by row, where neither they nor their sources have changed since."""
    found = {}
    for row, source in enumerate(sources):
        if source.name in done:
            num_bytes, mtime_ns, result = done[source.name]
            is_same = replace(source, num_bytes=num_bytes, mtime_ns=mtime_ns).is_file(manifest.file(row))
            if is_same and result.path == names[source.name] and result.is_file(out / result.path):
                found[row] = replace(result, label=source.label, captions=source.captions, split=source.split)
    return found


_Done = tuple[tuple[int, int], Video]  # bytes and modification time of the source, and the result


def _run_shared(jobs: list[_Job], out: Path, num_workers: int, team: Team) -> list[tuple[int, _Done | Excluded]]:
    """Run jobs, divided among the team, and note them in journals. The main process gets the results of all, by row."""
    share = team.divide(jobs)
    sources = {job.row: job.source.name for job in share}
    results = []
    with journal_of(out / JOURNAL, team.rank).open("a", encoding="utf-8") as journal:
        for row, result in _run_jobs(share, num_workers, team):
            results.append((row, result))
            if isinstance(result, Excluded):
                continue
            stat, video = result
            # The newline first: it ends a line that a kill cut off.
            text = json.dumps([sources[row], *stat, asdict(video)])
            journal.write("\n" + seal_line(text.encode()).decode())
            journal.flush()
    return team.collect(results)


def _run_jobs(jobs: list[_Job], num_workers: int, team: Team = ALONE) -> Iterator[tuple[int, _Done | Excluded]]:
    """Yield results by row as they are finished. A video that keeps killing its process is left out."""
    found = map_in_workers(_run_job, jobs, num_workers, lambda job: job.source.name, ordered=False, finish=True)
    silent = not (jobs and team.is_main)
    for job, result in progress_bar(
        found, total=len(jobs), desc=team.describe("compacting"), unit="video", disable=silent
    ):
        yield job.row, Excluded(job.source.name, str(result)) if isinstance(result, Death) else result


def _run_job(job: _Job) -> _Done | Excluded:
    """Write one video atomically. Returns why a source is bad; raises OSError where nothing can be written."""
    source, target = job.source, job.out / job.name
    try:
        stat = os.stat(job.file)
    except OSError as error:
        return Excluded(source.name, name_error(error))
    if source.length < 1:
        return Excluded(source.name, "no frame")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target) as temporary:
            num_frames = transcode(job.file, source, temporary, job.config)
            result = probe(temporary, Entry(job.name, source.label, source.captions, source.split), 1, False)
            if isinstance(result, Excluded):
                raise DecodeError(f"the result cannot be read: {result.reason}")
            if result.num_frames != num_frames:
                raise DecodeError(f"the result has {result.num_frames} frames in place of {num_frames}")
    except DecodeError as error:
        return Excluded(source.name, str(error))
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # a full disk is not this video's fault
            raise OSError(error.errno, error.strerror, str(target)) from None
        return Excluded(source.name, f"cannot be encoded: {error.strerror}")
    return (stat.st_size, stat.st_mtime_ns), result


def _report_path(out: Path) -> Path:
    return out / "manifest.parquet.excluded.csv"


def _write_tables(
    root: Path, out: Path, pairs: list[tuple[Video, Video]], excluded: list[Excluded], config: CompactConfig
) -> None:
    """Write the files beside the videos, the manifest last; where it is there and right, write nothing else."""
    manifest, videos = out / "manifest.parquet", [video for _, video in pairs]
    with replacing(_report_path(out)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "reason"), *((e.path, e.reason) for e in excluded)])
    if not videos:
        listed = "\n".join(f"  {e.path}: {e.reason}" for e in excluded[:5])
        raise ValueError(f"none of {len(excluded)} videos is usable; {_report_path(out)} lists why:\n{listed}")
    if manifest.exists():
        before = read_manifest(manifest)
        if [before[row] for row in range(len(before))] == videos:
            return
    if (root / "boxes.parquet").exists():
        _write_boxes(root, out / "boxes.parquet", pairs, config)
    write_manifest(manifest, videos, out)


def _write_boxes(root: Path, target: Path, pairs: list[tuple[Video, Video]], config: CompactConfig) -> None:
    """Convert the boxes of the kept frames to the new pixels, rounded outwards. Raises ValueError for other tables."""
    table = pq.read_table(root / "boxes.parquet")
    if not {"path", "boxes"} <= set(table.column_names):
        raise ValueError(f"expected columns path and boxes in {root / 'boxes.parquet'}, got {table.column_names}")
    by_path: dict[str, list[tuple[Video, Video]]] = {}
    for before, after in pairs:
        by_path.setdefault(before.path, []).append((before, after))
    rows, is_same = [], True
    # The boxes are of a whole file; each of its segments takes those of its own frames.
    tracks = [(track, pair) for track in table.to_pylist() for pair in by_path.get(track["path"], ())]
    for row, (before, after) in tracks:
        frames, _ = choose_frames(str(root / before.path), before, config)
        boxes = np.array(row["boxes"], np.int64)
        if boxes.shape != (before.num_frames, 4):
            raise ValueError(f"expected {before.num_frames} boxes of 4 sides for {before.path}, got {boxes.shape}")
        old, new = np.array([before.width, before.height]), np.array([after.width, after.height])
        corners = np.concatenate([boxes[frames, :2] * new // old, -(-boxes[frames, 2:] * new // old)], axis=1)
        rows.append({**row, "path": after.path, "boxes": corners.tolist()})
        is_same &= (*old, len(boxes)) == (*new, len(frames))
    kept = {name: value for name, value in (table.schema.metadata or {}).items() if is_same or name not in _DRAWN_FROM}
    with replacing(target) as temporary:
        pq.write_table(
            pa.Table.from_pylist(rows, schema=table.schema.with_metadata(kept)), temporary, compression="zstd"
        )
