"""Index a folder of videos: list the files, probe them in several processes, write the manifest.

Probing decodes the first frame of a video and reads its packets. They give the frame count, the keyframes and their
time stamps, so that a loader can jump to any frame exactly.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path, PurePosixPath

import av
from av.container import InputContainer
from av.video.stream import VideoStream
from tqdm import tqdm

from dali_pipelines.processes import make_pool
from dali_pipelines.types import Caption, Video, video_from_json
from engines.files import replacing
from tgmae.data.manifest import check_relative, count_videos, read_manifest, write_manifest

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .3gp .ogv".split()  # noqa: SIM905 - one to a line reads worse
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A listed file, with the label, captions and split that its folder or a CSV gives it."""

    path: str
    label: str
    captions: tuple[Caption, ...]
    split: str


@dataclass(frozen=True, slots=True)
class Excluded:
    """A file that was left out, and why."""

    path: str
    reason: str


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


def list_folder(root: Path, split: str) -> list[Entry]:
    """List every video below `root`, sorted. Its label is the name of its folder ("" in root itself)."""
    entries = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder that was visited
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        label = "" if Path(folder) == root else Path(folder).name
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES:
                path = (Path(folder) / name).relative_to(root).as_posix()
                entries.append(Entry(path, label, (), split))
    return entries


def list_csv(csv_path: Path, split: str, source: str = "csv") -> list[Entry]:
    """Read a CSV with the columns `path`, `label`, `split` (optional) and any that start with `caption`.

    source   the source of the captions

    Paths are relative to the indexed folder. Rows with the same path are one video with several captions. Raises
    ValueError, with the line, for a missing column, too many fields, contradictory rows, and a path that leaves the
    root.
    """
    entries: dict[str, Entry] = {}
    try:
        lines = csv_path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{csv_path} is not UTF-8 ({error}); save it as UTF-8") from error
    reader = csv.reader(lines, skipinitialspace=True)
    columns = [name.strip().lower() for name in next(reader, [])]
    if "path" not in columns:
        raise ValueError(
            f"{csv_path} needs a first line that names a column 'path', separated by commas; got {columns}"
        )
    for values in reader:
        where = f"{csv_path} line {reader.line_num}"
        if not any(values):
            continue
        if len(values) > len(columns):
            raise ValueError(
                f"{where}: {len(values)} fields for {len(columns)} columns; put text with commas in quotes"
            )
        row = dict(zip_longest(columns, (value.strip() for value in values), fillvalue=""))
        path = _clean_path(row["path"], where)
        texts = (text for name, text in row.items() if name.startswith("caption") and text)
        captions = tuple(Caption(text, source) for text in texts)
        entry = Entry(path, row.get("label", ""), captions, row.get("split") or split)
        if (known := entries.setdefault(path, entry)) is not entry:
            if (known.label, known.split) != (entry.label, entry.split):
                raise ValueError(f"{where}: {path} has another label or split here than in a line above")
            entries[path] = replace(known, captions=known.captions + captions)
    return list(entries.values())


def _clean_path(path: str, where: str) -> str:
    if not path:
        raise ValueError(f"{where}: no path")
    try:
        check_relative(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return PurePosixPath(path.replace("\\", "/")).as_posix()  # ./a.mp4 and a.mp4 are one video


def probe(file: Path, entry: Entry, min_frames: int, decode_all: bool) -> Video | Excluded:
    """Probe one video for the manifest. Never raises for a bad file: the reason is returned."""
    try:
        stat = file.stat()
        if not stat.st_size:
            return Excluded(entry.path, "empty file")
        with av.open(str(file)) as container:
            if not container.streams.video:
                return Excluded(entry.path, "no video stream")
            stream = container.streams.video[0]
            # PyAV's types promise a codec context, but a codec FFmpeg does not know has none.
            if getattr(stream, "codec_context", None) is None:
                return Excluded(entry.path, "a codec that FFmpeg cannot decode")
            fps, codec = float(stream.average_rate or stream.guessed_rate or 0), stream.codec.canonical_name
            first = next(container.decode(stream))
            scanned = _scan_packets(container, stream)
            decoded = _count_decoded(container, stream) if decode_all or scanned is None else None
            if scanned and decoded and scanned[0] == decoded[0]:
                decoded = None  # the packets were right, and they give the keyframes
            num_frames, keyframes = decoded or scanned or (0, {})
    except (av.FFmpegError, OSError, StopIteration, ValueError) as error:
        reason = getattr(error, "strerror", None) or (
            "no decodable frame" if isinstance(error, StopIteration) else error
        )
        return Excluded(entry.path, f"{type(error).__name__}: {reason}")
    if num_frames < min_frames:
        return Excluded(entry.path, f"{num_frames} frames, fewer than {min_frames}")
    rotation = -first.rotation % 360  # FFmpeg counts anticlockwise
    if rotation % 90:
        return Excluded(entry.path, f"rotated by {rotation} degrees, which is not a multiple of 90")
    width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    return Video(
        path=entry.path, num_frames=num_frames, fps=fps, width=width, height=height, codec=codec,
        pixel_format=first.format.name, rotation=rotation, num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns,
        keyframes=tuple(keyframes), keyframe_pts=tuple(keyframes.values()), label=entry.label, captions=entry.captions,
        split=entry.split,
    )  # fmt: skip


def _scan_packets(container: InputContainer, stream: VideoStream) -> tuple[int, dict[int, int]] | None:
    """Return the frame count and keyframes {frame number: time stamp} from the packets; None where they are unreliable.

    MP4 and Matroska store a time stamp per packet. AVI does not, and its first packets may decode to nothing (as in all
    of UT-Interaction).
    """
    if not {"mp4", "matroska"} & set(container.format.name.split(",")):
        return None
    container.seek(0)
    packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
    ordered = sorted((pts, is_keyframe) for pts, is_keyframe in packets if pts is not None)
    if len(ordered) < len(packets):
        return None
    keyframes = {number: pts for number, (pts, is_keyframe) in enumerate(ordered) if is_keyframe}
    return (len(ordered), keyframes) if 0 in keyframes else None


def _count_decoded(container: InputContainer, stream: VideoStream) -> tuple[int, dict[int, int]]:
    """Count the frames by decoding them all. Frame 0 is then the only known keyframe."""
    container.seek(0)
    time_stamps = [frame.pts for frame in container.decode(stream)]
    return len(time_stamps), {0: (time_stamps[0] or 0) if time_stamps else 0}


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
    if not todo:
        return
    with make_pool(min(num_workers, len(todo))) as pool:
        files = [root / entry.path for entry in todo]
        results = pool.map(partial(probe, min_frames=min_frames, decode_all=decode_all), files, todo, chunksize=8)
        yield from tqdm(results, total=len(todo), desc="indexing", unit="video")


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
