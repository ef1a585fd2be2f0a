"""Cut the part of a video file that a clip needs into a small file of its own.

`fn.decoders.video` of DALI 2.4 does not seek: it decodes from the first frame of the file, whatever build_index says.
It also counts every frame that comes out of NVDEC. It is therefore given only the packets from the keyframe before the
clip to the last frame of the clip. Where a file cannot be cut and counted like that, PyAV decodes it.

An excerpt is made in three steps: find the keyframe from which NVDEC can start (`_find_packets`), collect the packets
from there on in decoding order (`_collect`), and mux them into a file whose frames are numbered from 0 (`_write`).
"""

from __future__ import annotations

import io
from bisect import insort
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dali_pipelines.types import Video
from dali_pipelines.video.headers import has_idr, is_shown_once, keeps_format
from dali_pipelines.video.opening import DecodeError, name_error, open_video

_FRAMES_PER_SECOND = 25  # of every excerpt: DALI only sorts by time
# Longer excerpts go to PyAV, which can start at any keyframe.
_MOST_FRAMES = 300
LARGEST = 64 * 2**20  # bytes: excerpts of several batches are in memory at once


class NoExcerpt(Exception):
    """DALI would not decode the right frames of this file. The message is the reason."""


class Excerpt(NamedTuple):
    """A small video file in memory: uint8 bytes of an MP4 (for VP8, of a Matroska file)."""

    encoded: NDArray[np.uint8]
    first: int  # number of its first frame in the original file
    colour_space: int  # FFmpeg's AVColorSpace


def cut_excerpt(file: str, video: Video, frames: Sequence[int]) -> Excerpt:
    """Cut an excerpt that holds the given frames, which must be distinct and ascending.

    Raises NoExcerpt where DALI would decode the wrong frames, DecodeError where the file is missing or broken.
    """
    with open_video(file, video) as (container, stream):
        first, packets = _find_packets(container, stream, video, frames)
        return Excerpt(_write(packets, stream), first, stream.codec_context.colorspace)


def why_no_excerpt(file: str, video: Video, num_frames: int) -> str:
    """Return why the middle `num_frames` frames of a video cannot be cut out.

    Returns "" where they can, and where the file cannot be read at all.
    """
    first = video.start + max((video.length - num_frames) // 2, 0)
    try:
        cut_excerpt(file, video, range(first, min(first + num_frames, video.end)))
    except NoExcerpt as reason:
        return str(reason)
    except DecodeError:
        pass
    return ""


def _find_packets(
    container: InputContainer, stream: VideoStream, video: Video, frames: Sequence[int]
) -> tuple[int, list[Packet[VideoStream]]]:
    """Return the frame to start from, and the packets that a decoder needs from there to the last of `frames`.

    Keyframes are tried backwards from the clip until one works. Raises NoExcerpt.
    """
    if not {"mp4", "matroska"} & set(container.format.name.split(",")):  # whose packets were counted
        raise NoExcerpt(f"{container.format.name} does not number the frames in its packets")
    index = int(np.searchsorted(video.keyframes, frames[0], side="right")) - 1
    for start in range(index, -1, -1):
        count = frames[-1] - video.keyframes[start] + 1
        if count > _MOST_FRAMES and start < index:
            raise NoExcerpt("NVDEC cannot start at a nearby keyframe")
        if packets := _collect(container, stream, video.keyframe_pts[start], count):
            if not all(is_shown_once(packet, stream) for packet in packets):
                raise NoExcerpt("holds frames that are not shown, or fields")
            if not all(keeps_format(packet, stream, video.coded) for packet in packets):
                raise NoExcerpt("changes its size or pixel format")
            return video.keyframes[start], packets
    raise NoExcerpt("its packets do not number their frames")


def _collect(container: InputContainer, stream: VideoStream, pts: int, count: int) -> list[Packet[VideoStream]]:
    """Return the packets that the first `count` frames after a keyframe need, in decoding order.

    Returns nothing where no decoder can start there, or where that is unclear. Raises NoExcerpt where it is too much.
    """
    packets: list[Packet[VideoStream]] = []
    shown: list[int] = []  # their presentation time stamps, ascending
    size = 0
    container.seek(pts, stream=stream)
    for packet in container.demux(stream):
        # Packets come in decoding order, and no packet is shown before it is decoded. Once a decoding time passes the
        # last wanted presentation time, nothing that is still to come can be shown earlier.
        if len(shown) >= count and packet.dts is not None and shown[count - 1] <= packet.dts:
            break
        if not packet.size:
            continue
        if packet.pts is None or packet.is_discard:
            return []
        if not packets and not (packet.is_keyframe and packet.pts == pts):
            if packet.pts > pts and packet.is_keyframe:
                return []
            continue
        # Containers mark other frames too, at which NVDEC cannot start.
        if not packets and stream.codec.canonical_name == "h264" and not has_idr(packet, stream):
            return []
        if packet.pts >= pts:  # otherwise it is shown before the keyframe, and may refer to frames that were cut off
            packets.append(packet)
            insort(shown, packet.pts)
            size += packet.size
            if size > LARGEST:
                raise NoExcerpt(f"needs more than {LARGEST >> 20} MiB")
    return packets if len(shown) >= count and len(set(shown)) == len(shown) else []


def _write(packets: Sequence[Packet[VideoStream]], stream: VideoStream) -> NDArray[np.uint8]:
    """Mux the packets into a file whose frames are numbered from 0. Raises NoExcerpt."""
    ranks = {pts: rank for rank, pts in enumerate(sorted(packet.pts or 0 for packet in packets))}
    shown = [ranks[packet.pts or 0] for packet in packets]
    delay = max(place - rank for place, rank in enumerate(shown))
    target = io.BytesIO()
    # Bit-exact: otherwise Matroska writes random numbers into the file.
    form = "matroska" if stream.codec.canonical_name == "vp8" else "mp4"
    try:
        with av.open(target, "w", format=form, options={"fflags": "+bitexact"}) as container:
            out = container.add_stream_from_template(stream, opaque=True)
            for place, (packet, rank) in enumerate(zip(packets, shown, strict=True)):
                packet.stream, packet.time_base = out, Fraction(1, _FRAMES_PER_SECOND)
                packet.pts, packet.dts, packet.duration = rank + delay, place, 1
                container.mux(packet)
    except av.FFmpegError as error:
        raise NoExcerpt(f"cannot be written as {form}: {name_error(error)}") from error
    return np.frombuffer(target.getbuffer(), np.uint8)
