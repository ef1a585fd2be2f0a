"""List the videos of a folder. A CSV that names them instead is read by `csv_list`."""

from __future__ import annotations

import bisect
import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from dali_pipelines.types import Caption, Video

# What FFmpeg's demuxers of moving pictures are called for, and what cameras and recorders call such files. Pictures,
# sound, subtitles and playlists are not among them.
SUFFIXES = frozenset(
    """
    .mp4 .m4v .mpg4 .mov .qt .3gp .3gpp .3gp2 .3g2 .f4v .ismv .mj2 .insv .360 .mkv .mk3d .webm .avi .divx .xvid
    .mpg .mpeg .mpe .mpv .m1v .m2v .m2p .mp2v .mpv2 .ts .mts .m2t .m2ts .trp .tp .tod .mod .vob .vro .evo .ps
    .wmv .asf .wm .wtv .dvr-ms .flv .kux .ogv .ogm .ogx .mxf .gxf .lxf .nut .rm .rmvb .rv .ivr .dv .dif .gif .apng
    .y4m .ivf .h261 .h263 .h264 .264 .h26l .avc .h265 .265 .hevc .h266 .266 .vvc .av1 .obu .evc .apv .vc1 .rcv .avs2
    .avs3 .m4e .mjpeg .mjpg .mxg .amv .mve .mvi .bik .smk .roq .fli .flc .flm .nsv .nuv .viv .dav .ifv .ty .usm
    .moflex .mods .ser .swf .xmv .cdxl .drc .pmp .yop .anm
    """.split()  # noqa: SIM905 - one to a line reads worse
)
_TEXT_PROBE = 512  # bytes of a file without a suffix that are looked at
_ROUNDING = 1e-3  # frames by which a product of seconds and frames per second may be too large


@dataclass(frozen=True, slots=True)
class Entry:
    """A listed file or a segment of one, with the label, captions and split that its folder or a table gives it."""

    path: str
    label: str
    captions: tuple[Caption, ...]
    split: str
    span: tuple[float, float] | None = None  # first and last second of the segment; None for the whole file

    def find_segment(self, video: Video) -> tuple[int, int] | str:
        """Return the frames of its file that are shown within the span, the last one excluded, or why there is none.

        A span that lasts longer than the file ends with it.
        """
        if self.span is None:
            return 0, video.num_frames
        if not video.fps:
            return "its frame rate is unknown, so that seconds name no frames"
        start, end = (math.ceil(seconds * video.fps - _ROUNDING) for seconds in self.span)
        if start >= video.num_frames:
            return f"begins at {self.span[0]:.2f} s, and the file ends at {video.num_frames / video.fps:.2f} s"
        if end <= start:
            return f"holds no frame at {video.fps:.4g} frames a second"
        return start, min(end, video.num_frames)

    def outlasts(self, video: Video) -> bool:
        """Return whether the span ends more than a frame after its file."""
        return self.span is not None and self.span[1] * video.fps > video.num_frames + 1

    def cut(self, video: Video) -> Video | str:
        """Make the row of this entry from that of its file; return the reason where there is none.

        A segment keeps the keyframes that its clips start from: those of an hour in each of a hundred rows would fill
        the memory. They are the first of the file, by which frames are counted where all else fails, those within the
        segment, the last one before it and, for files that are searched inexactly, the one before that.
        """
        segment = self.find_segment(video)
        if isinstance(segment, str):
            return segment
        row = replace(video, label=self.label, captions=self.captions, split=self.split, segment=segment)
        if self.span is None:
            return row
        first = max(bisect.bisect_right(video.keyframes, segment[0]) - 2, 0)
        kept = sorted({0, *range(first, bisect.bisect_left(video.keyframes, segment[1]))})
        keyframes, stamps = (tuple(values[at] for at in kept) for values in (video.keyframes, video.keyframe_pts))
        return replace(row, keyframes=keyframes, keyframe_pts=stamps)


@dataclass(frozen=True, slots=True)
class Listing:
    """The videos of a folder or a CSV, and what is there and is not taken."""

    entries: list[Entry]
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # folders that cannot be listed, and why
    others: Counter[str] = field(default_factory=Counter)  # files that are not videos, by suffix
    ignored: list[str] = field(default_factory=list)  # columns of a CSV that mean nothing here
    doubtful: list[int] = field(default_factory=list)  # lines of a CSV where a text begins that may hold further rows

    def describe_others(self, shown: int = 6) -> str:
        """Return "14 other files (.txt 12, .srt 2)", or "" where there is none."""
        if not (count := self.others.total()):
            return ""
        names = [f"{name or 'no suffix'} {number}" for name, number in self.others.most_common(shown)]
        more = ", …" * (len(self.others) > shown)
        return f"{count} other file{'s' * (count != 1)} ({', '.join(names)}{more})"


def list_folder(root: Path, split: str, out: Path | None = None) -> Listing:
    """List every video below `root`, sorted. Its label is the name of its folder ("" in root itself).

    out   the manifest that is made; neither it nor what lies beside it in its name counts as another file

    Two links to one folder are two folders; only a link to a folder around itself is not followed. Files without a
    suffix are listed where they are not text. Raises OSError where `root` cannot be read.
    """
    os.listdir(root)
    listing = Listing([])

    def note_unreadable(error: OSError) -> None:
        path = Path(error.filename).relative_to(root).as_posix()
        listing.unreadable.append((path, error.strerror or str(error)))

    # The real paths of a folder and of those around it.
    around: dict[str, frozenset[str]] = {}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=note_unreadable):
        real, outer = os.path.realpath(folder), around.get(os.path.dirname(folder), frozenset())
        if real in outer:
            subfolders.clear()
            continue
        around[folder] = outer | {real}
        subfolders.sort()
        relative = Path(folder).relative_to(root)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            path = (relative / name).as_posix()
            if suffix in SUFFIXES or not (suffix or is_hidden or name.startswith(".") or _is_text(root / path)):
                listing.entries.append(Entry(path, relative.name, (), split))
            elif not _is_ours(Path(folder) / name, out):
                listing.others[Path(name).suffix] += 1
    return listing


def make_printable(name: str) -> str:
    """Return a name with what is not UTF-8 in it escaped."""
    return name.encode(errors="backslashreplace").decode()


def _is_text(file: Path) -> bool:
    """Return whether a file begins as text does. A file that cannot be read is not text: indexing it says why."""
    try:
        if not file.is_file():
            return False
        with file.open("rb") as opened:
            head = opened.read(_TEXT_PROBE)
    except OSError:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > _TEXT_PROBE - 4  # a character that the end of the head cuts
    return b"\0" not in head


def _is_ours(file: Path, out: Path | None) -> bool:
    """Return whether tgmae writes such a file beside videos."""
    if file.suffix in (".parquet", ".journal", ".lock", ".arrow") or file.name in ("compact.json", "maps.json"):
        return True
    return file.name.endswith((".parquet.excluded.csv", ".parquet.missing.csv", ".tmp")) or (
        out is not None and file == out.with_suffix(".png")
    )
