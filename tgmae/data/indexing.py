"""Index a folder of videos: list the files, probe them in several processes, write the manifest."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dali_pipelines.types import Video, video_from_json
from dali_pipelines.workers.pool import Death, map_in_workers
from engines.files import replacing
from tgmae.data.listing import SUFFIXES, Entry, list_csv, list_folder
from tgmae.data.manifest import count_videos, read_manifest, write_manifest
from tgmae.data.probing import Excluded, probe


@dataclass(frozen=True, slots=True)
class IndexResult:
    num_videos: int
    num_reused: int  # rows taken over from the existing manifest
    excluded: list[Excluded]
    report: Path

    def describe(self, out: Path, seconds: float) -> str:
        """Summarise the result in one line; `out` is the manifest that was written."""
        reasons = f" ({self.report} says why)" if self.excluded else ""
        return (
            f"{out}: {count_videos(self.num_videos)} ({self.num_reused} unchanged), "
            f"{len(self.excluded)} left out{reasons}, {seconds:.1f} s"
        )


def index_folder(
    root: Path,
    out: Path,
    *,
    csv_path: Path | None = None,
    caption_source: str = "csv",
    split: str = "train",
    min_frames: int = 16,
    decode_all: bool = False,
    num_workers: int = 2,
) -> IndexResult:
    """Write the manifest of `root` to `out`, and the list of files left out to `out` + ".excluded.csv".

    caption_source   the source of the captions in the CSV

    Videos whose size and modification time match the existing manifest are not opened again. An interrupted run resumes
    from its journal. Raises ValueError where no usable video is found.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is {'a file' if root.exists() else 'not there'}; give a folder of videos")
    if csv_path is not None and not csv_path.is_file():
        raise FileNotFoundError(f"no CSV file {csv_path}")
    if num_workers < 1:
        raise ValueError(f"expected at least one worker, got {num_workers}")
    entries = list_csv(csv_path, split, caption_source) if csv_path else list_folder(root, split)
    if not entries:
        where = f"rows in {csv_path}" if csv_path else f"videos below {root} (looked for {' '.join(sorted(SUFFIXES))})"
        raise ValueError(f"found no {where}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Videos accepted by a quick run must still be decoded by a run that decodes everything.
    journal = out.with_name(out.name + (".decoded.journal" if decode_all else ".journal"))
    before = [] if decode_all else _read_known(out, root)
    known = {video.path: video for video in [*before, *_read_journal(journal)]}

    videos: dict[str, Video] = {}
    excluded: list[Excluded] = []
    todo: list[Entry] = []
    for entry in entries:
        if (printable := entry.path.encode(errors="backslashreplace").decode()) != entry.path:
            excluded.append(Excluded(printable, "the file name is not UTF-8"))
            continue
        video = known.get(entry.path)
        if video is not None and video.is_file(root / entry.path) and video.num_frames >= min_frames:
            # The manifest that was there may hold segments; this one holds whole files.
            videos[entry.path] = replace(
                video, label=entry.label, captions=entry.captions, split=entry.split, segment=None
            )
        else:
            todo.append(entry)
    num_reused = len(videos)

    with journal.open("a", encoding="utf-8") as journal_file:
        if journal_file.tell():  # ends a line that an interruption cut off
            journal_file.write("\n")
        for result in _probe_all(root, todo, min_frames, decode_all, num_workers):
            if isinstance(result, Excluded):
                excluded.append(result)
            else:
                videos[result.path] = result
                journal_file.write(json.dumps(asdict(result)) + "\n")
                journal_file.flush()

    report = out.with_name(out.name + ".excluded.csv")
    with replacing(report) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "reason"), *((e.path, e.reason) for e in excluded)])
    if not videos:
        journal.unlink()
        listed = "\n".join(f"  {e.path}: {e.reason}" for e in excluded[:5])
        raise ValueError(f"none of {len(entries)} files is usable; {report} lists why:\n{listed}")
    write_manifest(out, [videos[entry.path] for entry in entries if entry.path in videos], root)
    journal.unlink()
    return IndexResult(len(videos), num_reused, excluded, report)


def _probe_all(
    root: Path, todo: list[Entry], min_frames: int, decode_all: bool, num_workers: int
) -> Iterator[Video | Excluded]:
    work = partial(_probe_entry, root, min_frames, decode_all)
    found = map_in_workers(work, todo, num_workers, lambda entry: entry.path, ordered=False, finish=True)
    for entry, result in tqdm(found, total=len(todo), desc="indexing", unit="video", disable=not todo):
        yield Excluded(entry.path, str(result)) if isinstance(result, Death) else result


def _probe_entry(root: Path, min_frames: int, decode_all: bool, entry: Entry) -> Video | Excluded:
    return probe(root / entry.path, entry, min_frames, decode_all)


def _read_known(out: Path, root: Path) -> list[Video]:
    """Return the rows of the manifest that is about to be replaced; none for another root or an unreadable file."""
    try:
        manifest = read_manifest(out)
    except (FileNotFoundError, ValueError):
        return []
    return [manifest[row] for row in range(len(manifest))] if manifest.root == root.resolve() else []


def _read_journal(journal: Path) -> list[Video]:
    """Return the videos that an interrupted run had probed. A line cut off by the interruption is dropped."""
    videos = []
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            videos.append(video_from_json(row))
    return videos
