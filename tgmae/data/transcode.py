"""One video into a smaller one for training: which frames, what size, which encoder.

Every frame but the keyframes is coded from the one before, so that frames are decoded in the order in which they are
shown and a motion vector always spans one frame; keyframes come in even steps, so that a seek costs the same anywhere.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dali_pipelines.types import Video
from dali_pipelines.video.decode import decode_frames
from dali_pipelines.video.geometry import orientation
from dali_pipelines.video.opening import open_video
from tgmae.data.coders import CODERS, CompactConfig

_UNKNOWN_FPS = 25.0  # of a source that names no frame rate
_FULL_RANGE, _LIMITED_RANGE, _BT601 = 2, 1, 6  # FFmpeg's AVColorRange and AVColorSpace
_UNSPECIFIED = 2  # of matrix, primaries and transfer alike


def choose_frames(file: str, video: Video, config: CompactConfig) -> tuple[list[int], Fraction]:
    """Numbers of the frames to keep, ascending, and the frame rate they are shown at. Raises DecodeError."""
    source_fps = _as_rate(video.fps or _UNKNOWN_FPS)
    if config.fps is None:
        return list(range(video.start, video.end, config.stride)), source_fps / config.stride
    times = _read_times(file, video, float(source_fps))[video.start : video.end]
    frames, rate = choose_nearest(times, config.fps, source_fps)
    return [video.start + frame for frame in frames], rate


def choose_nearest(times: NDArray[np.float64], fps: float, source_fps: Fraction) -> tuple[list[int], Fraction]:
    """The frames, each once, nearest to 0, 1/fps, 2/fps, … seconds after the first.

    times   seconds, ascending, [frames]

    The rate is `fps`, or the source's where all frames stay, or the average where the source has gaps.
    """
    if len(times) < 2:
        return list(range(len(times))), source_fps
    # The grid ends where a next frame would be nearer than the last. Half a millionth of a second keeps ties, which
    # 25 to 10 frames a second has, from falling as the rounding goes.
    length = times[-1] - times[0] + (times[-1] - times[-2]) / 2 - 5e-7
    grid = times[0] + np.arange(max(math.ceil(length * fps), 1)) / fps
    after = np.searchsorted(times, grid).clip(1, len(times) - 1)
    is_after = times[after] - grid + 1e-6 < grid - times[after - 1]
    chosen = np.unique(np.where(is_after, after, after - 1))
    rate = _as_rate(fps)
    if len(chosen) == len(times):
        rate = source_fps
    elif len(chosen) < len(grid):
        rate = _as_rate((len(chosen) - 1) / (times[chosen[-1]] - times[chosen[0]]))
    return chosen.tolist(), rate


def _as_rate(fps: float) -> Fraction:
    """Television's rates have denominator 1001; nothing is shown more slowly than a frame in 1001 seconds."""
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))


def _read_times(file: str, video: Video, fps: float) -> NDArray[np.float64]:
    """When each frame is shown, seconds: from the packets, or by counting where they do not say (AVI)."""
    with open_video(file, video) as (container, stream):
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        ordered = sorted({pts for pts in stamps if pts is not None})
        if len(ordered) == video.num_frames and stream.time_base:
            return np.array(ordered, np.float64) * float(stream.time_base)
    return np.arange(video.num_frames) / fps


def compact_size(video: Video, config: CompactConfig) -> tuple[int, int]:
    """Width and height of the upright result: multiples of `config.align`. Unless `config.grow` says so, no side is
    scaled up but to the nearest one.
    """
    shorter = min(video.width, video.height)
    target = config.short_side or shorter
    if not config.grow:
        target = min(target, shorter)
    width, height = (
        max(config.align * math.floor(side * target / shorter / config.align + 0.5), config.align)
        for side in (video.width, video.height)
    )
    return width, height


def transcode(file: str, video: Video, target: Path, config: CompactConfig) -> int:
    """Write the chosen frames of a video, upright, without sound; returns how many.

    Colours keep their tags: matrix, primaries, transfer and range are those of the source, and no value is converted
    between them. Pictures in RGB become BT.601 in limited range.

    Raises dali_pipelines.video.decode.DecodeError where the source breaks off, av.FFmpegError where it cannot be
    encoded.
    """
    frames, rate = choose_frames(file, video, config)
    coder, graph = CODERS[config.codec], None
    quality = coder.quality if config.quality is None else config.quality
    options = {name: text.format(gop=config.gop, quality=quality) for name, text in coder.options.items()}
    # Bit-exact: Matroska would draw random numbers into the file.
    with av.open(f"file:{target}", "w", format=coder.container, options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(coder.encoder, rate=rate, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = compact_size(video, config)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for place, (_, frame) in enumerate(decode_frames(file, video, frames, seek=video.segment is not None)):
            if graph is None:
                graph = _make_filters(frame, video, stream.width, stream.height)
                _tag_colours(stream, frame)
            if not frame.format.is_rgb:
                # The filters would convert from what is tagged to what they take for the standard.
                frame.colorspace = frame.color_primaries = frame.color_trc = _UNSPECIFIED
            graph.vpush(frame)
            picture = graph.vpull()
            picture.pts, picture.time_base = place, 1 / rate
            picture.pict_type = 0  # the encoder would take the source's types for orders
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return len(frames)


def _make_filters(frame: VideoFrame, video: Video, width: int, height: int) -> Graph:
    """FFmpeg filters: resize to yuv420p, then turn upright; width and height are of the upright picture."""
    turn = orientation(video, flip=False)
    if turn.transpose:
        width, height = height, width
    source = "full" if _is_full_range(frame) else "limited"
    target = "limited" if frame.format.is_rgb else source
    ranges = f"out_range={target}" if frame.format.is_rgb else f"in_range={source}:out_range={target}"
    matrix = ":out_color_matrix=smpte170m" if frame.format.is_rgb else ""
    graph = Graph()
    graph.threads = 1  # there is a worker a core
    # Without accurate_rnd swscale rounds down: pictures darken by about a level.
    chain = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
        graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd:{ranges}{matrix}"),
        graph.add("format", "pix_fmts=yuv420p"),
    ]
    if turn.transpose:
        chain.append(graph.add("transpose", "dir=cclock_flip"))
    if turn.flip_vertical:
        chain.append(graph.add("vflip"))
    if turn.flip_horizontal:
        chain.append(graph.add("hflip"))
    chain.append(graph.add("buffersink"))
    for left, right in pairwise(chain):
        left.link_to(right)
    graph.configure()
    return graph


def _is_full_range(frame: VideoFrame) -> bool:
    """Some formats are of full range whether or not the file says so."""
    return frame.color_range == _FULL_RANGE or frame.format.name.startswith(("yuvj", "gray"))


def _tag_colours(stream: VideoStream, frame: VideoFrame) -> None:
    context = stream.codec_context
    context.color_range = _FULL_RANGE if _is_full_range(frame) else frame.color_range
    context.colorspace = frame.colorspace
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    if frame.format.is_rgb:
        context.color_range, context.colorspace = _LIMITED_RANGE, _BT601
