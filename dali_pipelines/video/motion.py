"""Read the codec's motion vectors with PyAV: how far each 16×16 block has moved since the frame before.

H.264 and MPEG-4 Part 2 carry them. FFmpeg's decoders of VP9, AV1 and HEVC export none. A vector says where a block's
pixels were copied from, in a frame that FFmpeg does not name. The nearest possible frame is assumed:

    vectors into the past     the last reference frame shown before, among those already decoded
    vectors into the future   the next reference frame shown after, among those already decoded
    frames without vectors    (I frames): the mean of the nearest frames before and after that have vectors
    blocks without vectors    (intra blocks): the mean of the neighbours that have vectors

H.264 marks its reference frames (nal_ref_idc), which resolves pyramids of B frames. MPEG-4's direct mode exports zeros
as vectors, so its B frames count as frames without vectors. Where an encoder uses more than one reference (x264's refs
above 1), some blocks seem faster than they are. On flat ground, blocks inherit their neighbours' motion.

Dimensions: F frames, Y X blocks of 16×16 pixels, rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from av.container import InputContainer
from av.sidedata.motionvectors import MotionVectors
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dali_pipelines.types import Video
from dali_pipelines.video.decode import check_format
from dali_pipelines.video.opening import DecodeError, open_video

BLOCK = 16  # pixels
UNIT = 0.25  # pixels per frame in one step of the stored int8; faster motion is clamped to ±31.75
CODECS = ("h264", "mpeg4")
_FARTHEST = 16  # frames searched for a reference; H.264 keeps no more


def read_motion(file: str, video: Video) -> NDArray[np.int8]:
    """Read the motion of every block of the upright frames.

    Returns int8 [F, 2, Y, X], right and down, in `UNIT` pixels per frame.
    motion[t] leads from frame t - 1 to frame t, counted from the start of the video's segment.

    Raises ValueError for a codec without vectors, DecodeError where the file cannot be read or its frames carry none.
    """
    if video.codec not in CODECS:
        raise ValueError(f"{video.codec} videos carry no motion vectors; {' and '.join(CODECS)} do")
    fields: list[NDArray[np.int8] | None] = []
    places: dict[int, _Place] = {}
    if video.codec == "h264":
        with open_video(file, video) as (container, stream):
            places = _read_order(container, stream)
    with open_video(file, video) as (container, stream):
        for field in _fields(container, stream, video, places):
            fields.append(None if field is None else np.clip(np.rint(field / UNIT), -127, 127).astype(np.int8))
    if len(fields) != video.num_frames:
        raise DecodeError(f"has {len(fields)} frames, but the manifest says {video.num_frames}")
    if all(field is None for field in fields):
        raise DecodeError("its frames carry no motion vectors")
    return _turn_upright(_fill_frames(fields)[video.start : video.end], video)


@dataclass(frozen=True)
class _Place:
    """A frame's positions in display order and in decoding order, and whether other frames may refer to it."""

    shown: int
    decoded: int
    is_reference: bool


def _read_order(container: InputContainer, stream: VideoStream) -> dict[int, _Place]:
    """Return the places of all H.264 frames by time stamp; empty where a packet has none (AVI, raw streams)."""
    packets = [
        (packet.pts, _may_be_referred_to(bytes(packet), stream)) for packet in container.demux(stream) if packet.size
    ]
    stamps = [pts for pts, _ in packets if pts is not None]
    if len(set(stamps)) != len(packets):
        return {}
    shown = {pts: number for number, pts in enumerate(sorted(stamps))}
    return {
        pts: _Place(shown[pts], decoded, reference)
        for decoded, (pts, reference) in enumerate(packets)
        if pts is not None
    }


def _may_be_referred_to(packet: bytes, stream: VideoStream) -> bool:
    """Return whether nal_ref_idc of a packet's first slice is set (ISO/IEC 14496-10, section 7.3.1)."""
    extradata = stream.codec_context.extradata or b""
    start = 0
    while start < len(packet):
        if extradata[:1] == b"\x01":  # avcC: a length precedes every unit
            width = (extradata[4] & 3) + 1
            header, following = start + width, start + width + int.from_bytes(packet[start : start + width], "big")
        else:  # Annex B: 00 00 01 precedes every unit
            found = packet.find(b"\0\0\1", start)
            header = following = len(packet) if found < 0 else found + 3
        if header < len(packet) and packet[header] & 31 in (1, 5):
            return packet[header] >> 5 & 3 > 0
        start = following
    return True


def _fields(
    container: InputContainer, stream: VideoStream, video: Video, order: dict[int, _Place]
) -> Iterator[NDArray[np.float32] | None]:
    """Yield the motion of each frame in pixels per frame, [2, Y, X]; None where the frame carries none.

    Raises DecodeError for a corrupt frame, and for one of another format than the manifest says.
    """
    stream.codec_context.options = {"flags2": "+export_mvs"}
    stream.thread_type = "NONE"
    places = sorted(order.values(), key=lambda place: place.shown)
    last_reference = 0
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise DecodeError(f"frame {number} is corrupt")
        check_format(number, frame, video)
        is_b = frame.pict_type == PictureType.B
        # A damaged file may begin with a frame that refers to earlier ones.
        past, future = max(number - last_reference, 1), 1
        if frame.pts in order:
            past, future = (_distance(places, order[frame.pts], step) for step in (-1, 1))
        sides: list[object] = list(frame.side_data)  # PyAV's stubs call them strings
        vectors = next((data for data in sides if isinstance(data, MotionVectors)), None)
        yield None if vectors is None or (is_b and video.codec != "h264") else _field(frame, vectors, past, future)
        if not is_b:
            last_reference = number


def _distance(places: list[_Place], here: _Place, step: int) -> int:
    """Return the distance to the nearest decoded reference shown before (step -1) or after (step 1) a frame."""
    for distance in range(1, _FARTHEST + 1):
        shown = here.shown + step * distance
        if not 0 <= shown < len(places):
            break
        place = places[shown]
        if place.is_reference and place.decoded < here.decoded:
            return distance
    return 1


def _field(frame: VideoFrame, vectors: MotionVectors, past: int, future: int) -> NDArray[np.float32] | None:
    """Return the mean motion of the vectors within each block, weighted by the area each vector covers."""
    rows, columns = -(-frame.height // BLOCK), -(-frame.width // BLOCK)
    found = vectors.to_ndarray()
    found = found[found["motion_scale"] > 0]
    if not len(found):
        return None
    # A block copied from the past has moved against its vector. A block found again in the future will move along it.
    per_frame = np.where(found["source"] < 0, -1.0 / past, 1.0 / future) / found["motion_scale"]
    area = found["w"].astype(np.float32) * found["h"]
    # dst is the centre of the area that the vector covers, which is never larger than a block.
    block = np.clip(found["dst_y"] // BLOCK, 0, rows - 1) * columns + np.clip(found["dst_x"] // BLOCK, 0, columns - 1)
    weight = np.bincount(block, area, rows * columns)
    sums = [np.bincount(block, area * per_frame * found[name], rows * columns) for name in ("motion_x", "motion_y")]
    with np.errstate(invalid="ignore"):
        motion = (np.stack(sums) / weight).reshape(2, rows, columns).astype(np.float32)
    return _fill_blocks(motion)


def _fill_blocks(motion: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill blocks without motion (NaN) with the mean of the blocks around them, ring by ring."""
    while (empty := np.isnan(motion[0])).any():
        padded = np.pad(motion, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
        around = np.stack(
            [padded[:, y : y + empty.shape[0], x : x + empty.shape[1]] for y in range(3) for x in range(3)]
        )
        known = ~np.isnan(around[:, 0])
        count = known.sum(0)
        mean = np.where(known[:, None], around, 0).sum(0) / np.maximum(count, 1)
        motion = np.where(empty & (count > 0), mean, motion).astype(np.float32)
    return motion


def _fill_frames(fields: list[NDArray[np.int8] | None]) -> NDArray[np.int8]:
    """Fill frames without motion with the mean of the nearest frames before and after that have motion."""
    known = [number for number, field in enumerate(fields) if field is not None]
    filled = []
    for number, field in enumerate(fields):
        if field is None:
            place = int(np.searchsorted(known, number))
            around = [fields[k] for k in known[max(place - 1, 0) : place + 1]]
            field = np.rint(np.mean([x for x in around if x is not None], axis=0)).astype(np.int8)
        filled.append(field)
    return np.stack(filled)


def _turn_upright(motion: NDArray[np.int8], video: Video) -> NDArray[np.int8]:
    """Turn the grid clockwise, then mirror it, and the vectors with it: a quarter turn maps right to down and down to
    left, mirroring right to left.
    """
    for _ in range(video.rotation // 90):
        motion = np.rot90(motion, -1, axes=(2, 3))
        motion = np.stack([-motion[:, 1], motion[:, 0]], axis=1)
    if video.mirrored:
        motion = motion[..., ::-1] * np.array([-1, 1], np.int8)[:, None, None]
    return np.ascontiguousarray(motion)
