"""Frames of a video by number, decoded with PyAV (FFmpeg) on the CPU.

Both pipelines rest on `decode_frames`. `decode_clips` crops and resizes inside FFmpeg's YUV → RGB conversion, so that
no pixel is converted that the crop discards, and none is moved that the resize discards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import av
import numpy as np
import nvtx
from av.container import InputContainer
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dali_pipelines.types import ClipRequest, CropBox, Video
from dali_pipelines.video.colours import SWSCALE_MATRICES, use_known_tags
from dali_pipelines.video.geometry import coded_crop, turn_upright
from dali_pipelines.video.opening import DecodeError as DecodeError  # also for those who decode frames
from dali_pipelines.video.opening import open_video

__all__ = [
    "DecodeError",
    "check_format",
    "decode_clips",
    "decode_frames",
    "decode_whole_frames",
    "seek_keyframe",
    "to_rgb",
]

# Pixel formats that FFmpeg crops correctly at every x. With two bytes per sample, or interleaved chroma (nv12), it
# would read chroma at an odd x from the middle of a sample. Frames in those formats are converted first; most videos
# are not.
_CROPPED = (
    "yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "yuv410p", "yuv411p", "gray", "gbrp", "rgb24",
    "bgr24",
)  # fmt: skip

_WORTH_A_SEEK = 12  # frames to the keyframe before the next wanted one, from which on jumping there is faster


def decode_frames(
    file: str, video: Video, frames: Sequence[int], *, seek: bool, jump: bool = False
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (number, frame) once for each distinct number in `frames`, ascending.

    seek   jump to the last keyframe before the first frame; otherwise decode from frame 0. Both give the same frames.
    jump   do so again where much lies between two wanted frames, for frames that are not a clip: what lies between them
           is then neither decoded nor found to be corrupt

    Raises DecodeError where the file is missing, broken or not the one that was indexed, where a frame that a wanted
    one may depend on is corrupt, where wanted frames have another size or pixel format than the manifest says, and
    where the file ends before the last frame.
    """
    wanted = sorted(set(frames))
    # Opening decodes a few frames to learn how far B frames are reordered. That takes milliseconds, but with
    # skip_frame=all the first frame of some streams got lost, and every number after it was wrong.
    with open_video(file, video) as (container, stream):
        # Parallelism comes from the workers: threads within a decoder would only add latency.
        stream.thread_type = "NONE"
        keyframe = video.keyframes[_last_keyframe(video, wanted[0])]  # no wanted frame depends on earlier ones
        number, decoded = 0, container.decode(stream)
        if seek:
            number, decoded = _seek(container, stream, video, wanted[0])
        while (frame := next(decoded, None)) is not None:
            if frame.is_corrupt and number >= keyframe:
                raise DecodeError(f"frame {number} is corrupt")
            if number == wanted[0]:
                check_format(number, frame, video)
                use_known_tags(frame)
                yield wanted.pop(0), frame
                if not wanted:
                    return
                ahead = video.keyframes[_last_keyframe(video, wanted[0])]
                if jump and ahead - number > _WORTH_A_SEEK:
                    keyframe, (number, decoded) = ahead, _seek(container, stream, video, wanted[0])
                    continue
            number += 1
    raise DecodeError(f"ends before frame {wanted[0]}; the manifest says it has {video.num_frames} frames")


def check_format(number: int, frame: VideoFrame, video: Video) -> None:
    """Raise DecodeError where a frame has another size or pixel format than the manifest says."""
    coded = video.coded
    if (frame.width, frame.height, frame.format.name) != (coded.width, coded.height, coded.pixel_format):
        raise DecodeError(
            f"frame {number} has {frame.width}×{frame.height} pixels in {frame.format.name}, but the manifest says "
            f"{coded.width}×{coded.height} in {coded.pixel_format}"
        )


def to_rgb(frame: VideoFrame) -> NDArray[np.uint8]:
    """Convert a frame to uint8 [H, W, 3]. Raises DecodeError where FFmpeg cannot."""
    try:
        # One thread: more are slower than the work they share as soon as the cores are busy.
        return np.asarray(frame.to_ndarray(format="rgb24", threads=1), np.uint8)
    except av.FFmpegError as error:
        raise DecodeError(f"cannot convert frames in {frame.format.name} to RGB: {error.strerror}") from error


def _last_keyframe(video: Video, frame: int) -> int:
    """Return the place in `video.keyframes` of the last one at or before a frame."""
    return max(int(np.searchsorted(video.keyframes, frame, side="right")) - 1, 0)


def _seek(container: InputContainer, stream: VideoStream, video: Video, first: int) -> tuple[int, Iterator[VideoFrame]]:
    """Start decoding at the last keyframe at or before frame `first`; return its number and the frames from there."""
    if index := _last_keyframe(video, first):
        found = seek_keyframe(container, stream, *video.keyframe_pts[index - 1 : index + 1])
        if found is not None:
            return video.keyframes[index], _chain(*found)
        container.seek(0)  # the keyframe did not turn up: count from the start
    return 0, container.decode(stream)


def seek_keyframe(
    container: InputContainer, stream: VideoStream, before: int, pts: int
) -> tuple[VideoFrame, Iterator[VideoFrame]] | None:
    """Return the keyframe with the time stamp `pts`, and the frames after it; None where it does not turn up.

    before   time stamp of the keyframe before it. Containers without an index are searched by decoding times, which
             precede the time stamps of keyframes where there are B frames, so that the first attempt may come too late.
    """
    for target in (pts, before):
        try:
            container.seek(target, stream=stream)
            decoded = container.decode(stream)
            for frame in decoded:
                if frame.pts == pts:
                    return frame, decoded
                if frame.pts is None or frame.pts > pts:
                    break
        except av.FFmpegError:  # it cannot jump there, or starts with packets that need the ones before
            continue
    return None


def _chain(first: VideoFrame, rest: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    yield first
    yield from rest


def decode_clips(file: str, video: Video, requests: Sequence[ClipRequest], size: int) -> NDArray[np.uint8]:
    """Decode once, then crop and resize for each of R requests, which must share their frames.

    Returns uint8 [R, T, size, size, 3], not yet turned upright or flipped. Raises DecodeError.
    """
    frames = requests[0].frames
    clips = np.empty((len(requests), len(frames), size, size, 3), np.uint8)
    resizers = [_Resizer(coded_crop(video, request.crop), size, size) for request in requests]
    try:
        with nvtx.annotate("decode", domain="tgmae"):
            for number, frame in decode_frames(file, video, frames, seek=True):
                places = [place for place, wanted in enumerate(frames) if wanted == number]
                with nvtx.annotate("augment", domain="tgmae"):
                    for clip, resizer in zip(clips, resizers, strict=True):
                        clip[places] = resizer(frame)
    except av.FFmpegError as error:
        raise DecodeError(f"cannot crop frames of {video.width}×{video.height}: {error.strerror}") from error
    return clips


def decode_whole_frames(
    file: str, video: Video, frames: Sequence[int], height: int, width: int, *, jump: bool = False
) -> Iterator[NDArray[np.uint8]]:
    """Yield whole frames in order, upright and resized, uint8 [height, width, 3]: one for each distinct number.

    jump   as for `decode_frames`

    Raises DecodeError where it breaks off.
    """
    turned = video.rotation % 180 != 0
    whole = coded_crop(video, CropBox(x=0, y=0, width=video.width, height=video.height))
    coded_height, coded_width = (width, height) if turned else (height, width)
    resizer = _Resizer(whole, coded_height, coded_width)
    try:
        for _, frame in decode_frames(file, video, frames, seek=True, jump=jump):
            yield turn_upright(resizer(frame), video)
    except av.FFmpegError as error:
        raise DecodeError(f"cannot resize frames of {video.width}×{video.height}: {error.strerror}") from error


class _Resizer:
    """Crops and resizes the frames of a video with FFmpeg's filters, which are made again where the matrix changes."""

    def __init__(self, crop: CropBox, height: int, width: int) -> None:
        self.crop, self.height, self.width = crop, height, width
        self.graph: Graph | None = None
        self.space: int | None = None

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """Return the crop of a frame as uint8 [height, width, 3]. Raises av.FFmpegError."""
        if self.graph is None or frame.colorspace != self.space:
            self.graph = _crop_and_resize(frame, self.crop, self.height, self.width)
            self.space = frame.colorspace
        self.graph.push(frame)
        return np.asarray(self.graph.pull().to_ndarray(), np.uint8)


def _crop_and_resize(frame: VideoFrame, crop: CropBox, height: int, width: int) -> Graph:
    """Make the FFmpeg filters: crop, bilinear resize (over an area when it shrinks), conversion to RGB.

    Frames are resized as YUV and converted afterwards: swscale has vector code for each step, but not for both at once.
    A scale filter converts tagged frames even from YUV to YUV, which darkens them and takes as long again. So the
    matrix that `frame` is tagged with is taken off first and named in the conversion to RGB.
    """
    matrix = SWSCALE_MATRICES.get(frame.colorspace)
    graph = Graph()
    graph.threads = 1  # by default FFmpeg starts a thread per core for every frame, which costs more than the frame
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    chain = [
        source,
        *([graph.add("setparams", "colorspace=unknown")] if matrix else []),
        graph.add("format", f"pix_fmts={'|'.join(_CROPPED)}"),
        graph.add("crop", f"{crop.width}:{crop.height}:{crop.x}:{crop.y}:exact=1"),
        graph.add("scale", f"{width}:{height}:flags=bilinear"),
        graph.add("format", "pix_fmts=yuv422p"),
        graph.add("scale", "flags=bilinear" + (f":in_color_matrix={matrix}" if matrix else "")),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    ]
    for left, right in pairwise(chain):
        left.link_to(right)
    graph.configure()
    return graph
