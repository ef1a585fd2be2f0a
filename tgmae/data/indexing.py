"""Index a folder of videos: list the files, probe them in several processes, write the manifest."""

from __future__ import annotations

import csv
import errno
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dali_pipelines.types import Video
from dali_pipelines.workers.pool import Death, map_in_workers
from dali_pipelines.workers.team import ALONE, Team
from engines.files import absorb_journals, claim_file, journal_of, replacing
from engines.progress import progress_bar
from tgmae.data.columns import check_relative
from tgmae.data.csv_list import list_csv
from tgmae.data.earlier_index import (
    DEFAULT_SPLIT,
    EarlierIndex,
    KnownFiles,
    check_losses,
    count,
    open_journal,
    read_earlier,
    read_journal,
)  # fmt: skip
from tgmae.data.listing import SUFFIXES, Entry, Listing, list_folder, make_printable
from tgmae.data.manifest import count_splits, count_videos, write_manifest
from tgmae.data.probing import Excluded, probe


@dataclass(frozen=True, slots=True)
class IndexResult:
    num_videos: int
    num_reused: int  # rows taken over from the existing manifest
    excluded: list[Excluded]
    report: Path
    num_gone: int = 0  # files of the existing manifest that are not listed any more
    num_cut: int = 0  # segments that were to last longer than their file
    others: str = ""  # files of the folder that are not videos, in words
    table: str = ""  # labels and captions that a CSV gave, in words; "" without one

    def describe(self, out: Path, seconds: float) -> str:
        """Summarise the result in one line; `out` is the manifest that was written."""
        missing = sum(video.reason == os.strerror(errno.ENOENT) for video in self.excluded)
        not_there = f"{missing} of them not there; " if missing else ""
        reasons = f" ({not_there}{self.report} says why)" if self.excluded else ""
        gone = f"{self.num_gone} no longer listed, " if self.num_gone else ""
        cut = f"{count(self.num_cut, 'segment')} cut where the file ends, " if self.num_cut else ""
        others = f"{self.others} not taken, " if self.others else ""
        return (
            f"{out}: {count_videos(self.num_videos)} ({self.num_reused} unchanged), "
            f"{len(self.excluded)} left out{reasons}, {gone}{cut}{others}{seconds:.1f} s"
        )


def index_folder(
    root: Path,
    out: Path,
    *,
    csv_path: Path | None = None,
    caption_source: str = "csv",
    split: str = DEFAULT_SPLIT,
    min_frames: int = 16,
    decode_all: bool = False,
    num_workers: int = 2,
    team: Team = ALONE,
) -> IndexResult:
    """Write the manifest of `root` to `out`, and the list of files left out to `out` + ".excluded.csv".

    caption_source   the source of the captions in the CSV
    team             whose main process calls this while the others call `help_index`

    Videos whose size and modification time match the existing manifest are not opened again, even where their folder
    has moved. An interrupted run resumes from its journal. Raises ValueError where no usable video is found and where
    captions, labels or splits of the existing manifest would be lost, BlockingIOError where another process writes
    `out`.
    """
    check_paths(root, out, csv_path)
    listing = list_csv(csv_path, root, split, caption_source) if csv_path else list_folder(root, split, out)
    if not listing.entries:
        raise ValueError(_describe_nothing(listing, root, csv_path))
    return index_listing(
        root, out, listing, origin=csv_path, min_frames=min_frames, decode_all=decode_all, num_workers=num_workers,
        team=team,
    )  # fmt: skip


def index_listing(
    root: Path, out: Path, listing: Listing, *, origin: Path | None, min_frames: int, decode_all: bool,
    num_workers: int, team: Team,
) -> IndexResult:  # fmt: skip
    """Write the manifest of listed files, as `index_folder` does. Entries of one file are segments of it.

    origin   where labels, captions and splits come from; None where it is the folder itself, which may not replace a
             manifest that knows more
    """
    if num_workers < 1:
        raise ValueError(f"expected at least one worker, got {num_workers}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with claim_file(out):
        for half_written in out.parent.glob(f"{glob.escape(out.name)}*.tmp"):  # of a process that was killed
            half_written.unlink()
        before = read_earlier(out, root)
        if origin is None:
            check_losses(before, listing, out)
        return _write_index(root, out, listing, before, origin, min_frames, decode_all, num_workers, team)


def _write_index(
    root: Path, out: Path, listing: Listing, before: EarlierIndex, origin: Path | None, min_frames: int,
    decode_all: bool, num_workers: int, team: Team,
) -> IndexResult:  # fmt: skip
    journal = _journal(out, decode_all)
    absorb_journals(journal)
    reusable = before.rows if before.are_of_root and before.are_current and not decode_all else []
    known = KnownFiles([*reusable, *read_journal(journal, root)], root, min_frames)

    files: dict[str, list[Entry]] = {}
    for entry in listing.entries:
        files.setdefault(entry.path, []).append(entry)
    excluded = [Excluded(make_printable(path), reason) for path, reason in listing.unreadable]
    rows: dict[str, list[Video | str]] = {}  # of each file; in place of a row the reason why there is none
    todo: list[Entry] = []
    for path, entries in files.items():
        if reason := _find_fault(path):
            excluded.append(Excluded(make_printable(path), reason))
        elif (found := known.find(entries)) is not None:
            rows[path] = found
        else:
            todo.append(entries[0])
    num_reused = sum(isinstance(row, Video) for found in rows.values() for row in found)

    probed = _probe_shared(root, out, todo, min_frames, decode_all, num_workers, team)
    by_path = {result.path: result for result in probed}
    for path in (entry.path for entry in todo):  # in this order, whichever was finished first
        result = by_path[path]
        if isinstance(result, Video):
            rows[path] = [entry.cut(result) for entry in files[path]]
        else:
            more = f" ({len(files[path])} segments)" * (len(files[path]) > 1)
            excluded.append(Excluded(path, result.reason + more))
    pairs = [pair for path in files if path in rows for pair in zip(files[path], rows[path], strict=True)]
    videos: list[Video] = []
    names: set[str] = set()
    for entry, row in pairs:
        if isinstance(row, str):
            excluded.append(Excluded(_name_span(entry), row))
        elif row.name in names:
            excluded.append(Excluded(_name_span(entry), f"shows the same frames as another segment, {row.name}"))
        else:
            names.add(row.name)
            videos.append(row)

    report = out.with_name(out.name + ".excluded.csv")
    with replacing(report) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "reason"), *((e.path, e.reason) for e in excluded)])
    absorb_journals(journal)
    if not videos:
        journal.unlink()
        listed = "\n".join(f"  {e.path}: {e.reason}" for e in excluded[:5])
        raise ValueError(f"none of {len(listing.entries)} files is usable; {report} lists why:\n{listed}")
    write_manifest(out, videos, root)
    journal.unlink()
    return IndexResult(
        num_videos=len(videos), num_reused=num_reused, excluded=excluded, report=report,
        num_gone=len({video.path for video in before.rows} - files.keys()) if before.are_of_root else 0,
        num_cut=sum(entry.outlasts(row) for entry, row in pairs if isinstance(row, Video)),
        others=make_printable(listing.describe_others()),
        table=_describe_table(origin, videos, listing) if origin else "",
    )  # fmt: skip


def help_index(root: Path, out: Path, *, min_frames: int, decode_all: bool, num_workers: int, team: Team) -> None:
    """Probe this process's share of the files of `index_folder`, which the main process of the team calls."""
    _probe_shared(root, out, [], min_frames, decode_all, num_workers, team)


def _journal(out: Path, decode_all: bool) -> Path:
    # Videos accepted by a quick run must still be decoded by a run that decodes everything.
    return out.with_name(out.name + (".decoded.journal" if decode_all else ".journal"))


def _probe_shared(
    root: Path, out: Path, todo: list[Entry], min_frames: int, decode_all: bool, num_workers: int, team: Team
) -> list[Video | Excluded]:
    """Probe files, divided among the team, and note videos in journals. The main process gets the results of all."""
    share = team.divide(todo)
    results = []
    with open_journal(journal_of(_journal(out, decode_all), team.rank), root) as note:
        for result in _probe_all(root, share, min_frames, decode_all, num_workers, team):
            results.append(result)
            if isinstance(result, Video):
                note(result)
    return team.collect(results)


def _probe_all(
    root: Path, todo: list[Entry], min_frames: int, decode_all: bool, num_workers: int, team: Team
) -> Iterator[Video | Excluded]:
    work = partial(_probe_entry, root, min_frames, decode_all)
    found = map_in_workers(work, todo, num_workers, lambda entry: entry.path, ordered=False, finish=True)
    silent = not (todo and team.is_main)
    for entry, result in progress_bar(
        found, total=len(todo), desc=team.describe("indexing"), unit="video", disable=silent
    ):
        yield Excluded(entry.path, str(result)) if isinstance(result, Death) else result


def _probe_entry(root: Path, min_frames: int, decode_all: bool, entry: Entry) -> Video | Excluded:
    return probe(root / entry.path, entry, min_frames, decode_all)


def check_paths(root: Path, out: Path, csv_path: Path | None) -> None:
    """Raise before any work is done where the input is missing or the output would destroy something."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is {'a file' if root.exists() else 'not there'}; give a folder of videos")
    if csv_path is not None and not csv_path.is_file():
        raise FileNotFoundError(f"no CSV file {csv_path}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the manifest a name, such as --out {out / 'manifest.parquet'}")
    if out.is_file():
        with out.open("rb") as file:
            start = file.read(4)
        if start not in (b"", b"PAR1"):
            raise ValueError(f"{out} is there and is not a manifest; choose another place with --out, or delete it")


def _name_span(entry: Entry) -> str:
    start, end = entry.span or (0, 0)
    return f"{entry.path} {start:.2f}-{end:.2f} s"


def _find_fault(path: str) -> str:
    """Return why a manifest cannot hold a path; "" where it can."""
    if make_printable(path) != path:
        return "the file name is not UTF-8"
    try:
        check_relative(path)
    except ValueError as error:
        return str(error)
    return ""


def _describe_nothing(listing: Listing, root: Path, csv_path: Path | None) -> str:
    if csv_path is not None:
        return f"found no rows in {csv_path}"
    there = [f"{make_printable(path)} cannot be read ({reason})" for path, reason in listing.unreadable[:3]]
    there += [others] if (others := make_printable(listing.describe_others())) else []
    return (
        f"found no videos below {root}{': ' * bool(there)}{', '.join(there)} "
        f"(looked for {' '.join(sorted(SUFFIXES))}, and files without a suffix)"
    )


def _describe_table(origin: Path, videos: Sequence[Video], listing: Listing) -> str:
    """Say in one line what the manifest has from a CSV, and in another what may be wrong with it."""
    labels, splits = {video.label for video in videos if video.label}, count_splits(video.split for video in videos)
    bare = sum(not video.captions for video in videos)
    return (
        f"{origin} gave {count(len(labels), 'label')} and "
        f"{count(sum(len(video.captions) for video in videos), 'caption')}"
        + (f" ({count_videos(bare)} without any)" if bare else "")
        + "; splits "
        + ", ".join(f"{name or 'none'} {number}" for name, number in splits.items())
        + (f"; ignored columns: {', '.join(listing.ignored)}" if listing.ignored else "")
        + _describe_doubts(listing.doubtful)
    )


def _describe_doubts(lines: Sequence[int], shown: int = 5) -> str:
    if not lines:
        return ""
    listed = ", ".join(map(str, lines[:shown])) + ", …" * (len(lines) > shown)
    return (
        f"\nthe text in quotes on line{'s' * (len(lines) > 1)} {listed} goes on over lines that look like rows; where "
        "they are, close the quote: their videos are missing"
    )
