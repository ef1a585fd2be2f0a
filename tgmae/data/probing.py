"""Probe one video for the manifest.

Probing decodes the first frame of a video and reads its packets. They give the frame count, the keyframes and their
time stamps, so that a loader can jump to any frame exactly.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dali_pipelines.types import CodedFormat, Video
from dali_pipelines.video.decode import seek_keyframe
from dali_pipelines.video.geometry import read_rotation
from dali_pipelines.video.headers import is_shown_once, keeps_format
from dali_pipelines.video.opening import DecodeError, choose_stream, digest_file, name_error, open_file
from tgmae.data.listing import Entry
from tgmae.data.manifest import Manifest, count_videos

_SPLIT = "split it there, or re-encode it to one size"
_ENTRY_STEP = 12  # frames from one keyframe to the next, at least: trying a keyframe costs a jump
_FAR = 600  # frames from one keyframe to the next; decoding them takes a few tenths of a second


@dataclass(frozen=True, slots=True)
class Excluded:
    """A file that was left out, and why."""

    path: str
    reason: str


class _UnusableError(ValueError):
    """A video that decodes but cannot be trained on. The message is the reason."""


def probe(file: Path, entry: Entry, min_frames: int, decode_all: bool) -> Video | Excluded:
    """Probe one video for the manifest. Never raises for a bad file: the reason is returned."""
    try:
        return _probe(file, entry, min_frames, decode_all)
    except (_UnusableError, DecodeError) as error:
        return Excluded(entry.path, str(error))
    except StopIteration:
        return Excluded(entry.path, "no decodable frame")
    except (av.FFmpegError, OSError, ValueError) as error:
        return Excluded(entry.path, name_error(error))


def _probe(file: Path, entry: Entry, min_frames: int, decode_all: bool) -> Video:
    stat = file.stat()
    if not stat.st_size:
        raise _UnusableError("empty file")
    with open_file(str(file)) as container:
        if not container.streams.video:
            raise _UnusableError("no video stream")
        number = choose_stream(container)
        stream = container.streams.video[number]
        # PyAV's types promise a codec context, but a codec FFmpeg does not know has none.
        if getattr(stream, "codec_context", None) is None:
            raise _UnusableError("a codec that FFmpeg cannot decode")
        fps, codec = float(stream.average_rate or stream.guessed_rate or 0), stream.codec.canonical_name
        first = next(container.decode(stream))
        coded = CodedFormat(codec, first.format.name, first.width, first.height)
        scanned = _scan_packets(container, stream, coded)
    num_frames, keyframes = scanned or (0, {})
    if decode_all or scanned is None:
        with open_file(str(file)) as container:  # opened again: a raw stream cannot be read from its start otherwise
            stream = container.streams.video[number]
            decoded = _decode_all(container, stream, coded, refuse_corrupt=decode_all)
            if len(decoded) != num_frames:  # otherwise the packets were right, and they give the keyframes
                num_frames, keyframes = len(decoded), _find_entries(container, stream, decoded)
    if num_frames < min_frames:
        raise _UnusableError(f"{num_frames} frames, fewer than {min_frames}")
    rotation, mirrored = read_rotation(first)
    if rotation % 90:
        raise _UnusableError(f"rotated by {rotation} degrees, which is not a multiple of 90")
    width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    return Video(
        path=entry.path, num_frames=num_frames, fps=fps, width=width, height=height, codec=codec,
        pixel_format=first.format.name, rotation=rotation, num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns,
        keyframes=tuple(keyframes), keyframe_pts=tuple(keyframes.values()), label=entry.label, captions=entry.captions,
        split=entry.split, stream=number, mirrored=mirrored, digest=digest_file(file),
    )  # fmt: skip


def _scan_packets(
    container: InputContainer, stream: VideoStream, coded: CodedFormat
) -> tuple[int, dict[int, int]] | None:
    """Return the frame count and keyframes {frame number: time stamp} from the packets; None where they are unreliable.

    MP4 and Matroska store a time stamp per packet. AVI does not, and its first packets may decode to nothing (as in all
    of UT-Interaction). VP8 and VP9 packets also say where frames change their format: raises _UnusableError.
    """
    if not {"mp4", "matroska"} & set(container.format.name.split(",")):
        return None
    container.seek(0)
    packets: list[tuple[int | None, bool]] = []
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        # A packet of several VP9 frames may hold smaller ones that are not shown.
        is_plain = coded.codec in ("vp8", "vp9") and is_shown_once(packet, stream)
        if is_plain and not keeps_format(packet, stream, coded):
            raise _UnusableError(f"changes its size or pixel format at frame {len(packets)}; {_SPLIT}")
        packets.append((packet.pts, packet.is_keyframe))
    ordered = sorted((pts, is_keyframe) for pts, is_keyframe in packets if pts is not None)
    if len(ordered) < len(packets):
        return None
    keyframes = {number: pts for number, (pts, is_keyframe) in enumerate(ordered) if is_keyframe}
    return (len(ordered), keyframes) if 0 in keyframes else None


class _Decoded(NamedTuple):
    """A frame's time stamp, and a checksum of its first plane where it is a keyframe."""

    pts: int | None
    checksum: int | None


def _decode_all(
    container: InputContainer, stream: VideoStream, coded: CodedFormat, refuse_corrupt: bool
) -> list[_Decoded]:
    """Decode all frames. Raises _UnusableError where they change their size or pixel format, or one is corrupt."""
    decoded: list[_Decoded] = []
    for frame in container.decode(stream):
        if frame.is_corrupt and refuse_corrupt:
            raise _UnusableError(f"frame {len(decoded)} is corrupt")
        if (frame.format.name, frame.width, frame.height) != coded[1:]:
            raise _UnusableError(
                f"changes at frame {len(decoded)} from {coded.width}×{coded.height} in {coded.pixel_format} to "
                f"{frame.width}×{frame.height} in {frame.format.name}; {_SPLIT}"
            )
        decoded.append(_Decoded(frame.pts, _checksum(frame) if frame.key_frame else None))
    return decoded


def _checksum(frame: VideoFrame) -> int:
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    return zlib.crc32(rows[:, : plane.width].tobytes())  # without the padding, which holds anything


def _find_entries(container: InputContainer, stream: VideoStream, decoded: list[_Decoded]) -> dict[int, int]:
    """Return {frame number: time stamp} of those keyframes to which a decoder can jump: they then look as before."""
    stamps = [frame.pts for frame in decoded]
    entries = {0: (stamps[0] or 0) if stamps else 0}
    if not all(a is not None and b is not None and a < b for a, b in pairwise(stamps)):
        return entries  # a time stamp does not say which frame it is
    last, previous = 0, entries[0]
    for number, (pts, checksum) in enumerate(decoded):
        if number >= last + _ENTRY_STEP and pts is not None and checksum is not None:
            found = seek_keyframe(container, stream, previous, pts)
            if found is not None and _checksum(found[0]) == checksum:
                last, previous = number, pts
                entries[number] = pts
    return entries


def describe_far_keyframes(manifest: Manifest) -> str:
    """Say which videos are slow to read in the middle for want of keyframes to start from; "" for none."""
    table = manifest.table
    keyframes = table.column("keyframes").combine_chunks()
    first = keyframes.offsets.to_numpy()[:-1] - keyframes.offsets[0].as_py()  # of each row, which has one at least
    numbers = keyframes.flatten().to_numpy()
    last = np.append(first[1:], len(numbers)) - 1
    ends = np.append(numbers[1:], 0)  # of the frames that are decoded from each keyframe
    ends[last] = table.column("end_frame").to_numpy()
    # A segment's keyframes leave out those far before it, which no clip needs.
    starts = np.repeat(table.column("start_frame").to_numpy(), last - first + 1)
    longest = np.maximum.reduceat(np.where(ends > starts, ends - numbers, 0), first)
    if not (far := np.flatnonzero(longest > _FAR).tolist()):
        return ""
    listed = ", ".join(f"{manifest[row].name} ({longest[row]:,} frames)" for row in far[:3])
    return (
        f"{count_videos(len(far))} can only be read from far ahead of a clip, which is slow: decoders find no keyframe "
        f"to start from for more than {_FAR} frames, as in {listed}; tgmae-data compact gives them keyframes"
    )
