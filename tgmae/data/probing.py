"""Probe one video for the manifest.

Probing decodes the first frame of a video and reads its packets. They give the frame count, the keyframes and their
time stamps, so that a loader can jump to any frame exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from dali_pipelines.types import Video
from tgmae.data.listing import Entry


@dataclass(frozen=True, slots=True)
class Excluded:
    """A file that was left out, and why."""

    path: str
    reason: str


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
