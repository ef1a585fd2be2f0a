"""What an index knows before it begins: the manifest that it replaces, and the journal of an interrupted run.

The journal's first line names the indexed folder. Every other line is a video as JSON, a tab, and the CRC-32 of the
JSON. Lines of earlier versions have no CRC, and their journals no first line.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dali_pipelines.types import Video, video_from_json
from engines.files import naming_errors, open_line, seal_line
from tgmae.data.listing import Entry, Listing
from tgmae.data.manifest import FORMAT, read_manifest

DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class EarlierIndex:
    """The rows of the manifest that is about to be replaced."""

    rows: list[Video] = field(default_factory=list)
    are_of_root: bool = False  # they describe the files that are indexed now
    are_current: bool = False  # they know all that this version knows about a file


def read_earlier(out: Path, root: Path) -> EarlierIndex:
    """Read the manifest that is about to be replaced. One that cannot be read counts as none, and a line says so."""
    try:
        manifest = read_manifest(out)
    except FileNotFoundError:
        return EarlierIndex()
    except ValueError as error:
        print(f"the manifest that was there is not taken into account, nor its captions and labels: {error}")
        return EarlierIndex()
    # A folder that is gone has moved. Where it is still there, its files are others, whatever their names.
    are_of_root = manifest.root == root.resolve() or not manifest.root.exists()
    return EarlierIndex(list(manifest.rows()), are_of_root, manifest.format == FORMAT)


def check_losses(before: EarlierIndex, listing: Listing, out: Path) -> None:
    """Raise ValueError where the manifest that is there knows more about its videos than their folder does."""
    labels = {entry.path: entry.label for entry in listing.entries}
    given = {entry.split for entry in listing.entries}
    num_captions = sum(len(video.captions) for video in before.rows)
    num_labels = sum(labels.get(video.path, video.label) != video.label != "" for video in before.rows)
    splits = sorted({video.split for video in before.rows})
    lost = [count(num_captions, "caption")] if num_captions else []
    lost += [f"{count(num_labels, 'label')} other than the names of folders"] if num_labels else []
    # The default's name says nothing: any other was given by a CSV or --split.
    if len(splits) > 1 or not set(splits) <= {*given, DEFAULT_SPLIT}:
        lost.append(f"the split{'s' * (len(splits) > 1)} {', '.join(splits)}")
    if lost:
        raise ValueError(
            f"{out} holds {' and '.join(lost)}, which an index without a CSV would drop; give the CSV again with "
            f"--csv, write elsewhere with --out, or delete {out} first"
        )


def count(number: int, name: str) -> str:
    """Return "1 label" or "2,000 labels", for messages."""
    return f"{number} {name}{'s' * (number != 1)}"


class KnownFiles:
    """Rows for the entries of a listing, as far as their files are known and have not changed."""

    def __init__(self, videos: Sequence[Video], root: Path, min_frames: int) -> None:
        self._root, self._min_frames = root, min_frames
        self._whole = {video.path: video for video in videos if video.segment is None}
        # A segment has the keyframes that its own clips need, so it stands for itself and not for its file.
        self._segments: dict[str, dict[tuple[int, int], Video]] = {}
        for video in videos:
            if video.segment is not None:
                self._segments.setdefault(video.path, {})[video.segment] = video

    def find(self, entries: Sequence[Entry]) -> list[Video | str] | None:
        """Return what `Entry.cut` makes of each entry of one file; None where the file must be probed."""
        path = entries[0].path
        whole, segments = self._whole.get(path), self._segments.get(path, {})
        known = whole or next(iter(segments.values()), None)
        if known is None or known.num_frames < self._min_frames or not known.is_file(os.path.join(self._root, path)):
            return None
        found: list[Video | str] = []
        for entry in entries:
            segment = entry.find_segment(known)
            video = whole or (segments.get(segment) if isinstance(segment, tuple) else known)
            if video is None:
                return None
            found.append(entry.cut(video))
        return found


@contextlib.contextmanager
def open_journal(journal: Path, root: Path) -> Iterator[Callable[[Video], None]]:
    """Open a journal to continue it, and yield the function that notes a video."""
    with journal.open("ab", buffering=0) as file:

        def write(row: dict[str, Any], before: bytes = b"") -> None:
            left = before + seal_line(json.dumps(row).encode()) + b"\n"
            with naming_errors(journal):
                while left:  # a disk that is filling takes a part
                    left = left[file.write(left) :]

        # The newline ends a line that an interruption cut off.
        write({"root": str(root.resolve())}, before=b"\n" if file.tell() else b"")
        yield lambda video: write(asdict(video))


def read_journal(journal: Path, root: Path) -> list[Video]:
    """Return the videos of `root` that an interrupted run had probed.

    Lines that are cut off or damaged are dropped, and so are those of a version that knew less about a video: their
    files are probed again.
    """
    videos: list[Video] = []
    if not journal.exists():
        return videos
    is_of_root = True
    for line in journal.read_bytes().split(b"\n"):
        if (text := open_line(line)) is None:
            continue
        try:
            row = json.loads(text)
            if set(row) == {"root"}:
                # As for a manifest: a folder that is gone has moved.
                is_of_root = row["root"] == str(root.resolve()) or not Path(row["root"]).exists()
            elif is_of_root and {"stream", "mirrored", "digest"} <= set(row):
                videos.append(video_from_json(row))
        except (ValueError, TypeError, KeyError):
            continue
    return videos
