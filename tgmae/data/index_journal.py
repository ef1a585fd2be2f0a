"""The journal of an index: the videos that were probed, so that an interrupted run resumes.

The first line names the indexed folder. Every other line is a video as JSON, a tab, and the CRC-32 of the JSON. Lines
of earlier versions have no CRC, and their journals no first line.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dali_pipelines.types import Video, video_from_json
from engines.files import naming_errors, open_line, seal_line


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
