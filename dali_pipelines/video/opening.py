"""Open a video file for reading. Every path that decodes a row of a manifest passes `open_video`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from dali_pipelines.types import Video

# Seconds for opening a file, and for finding the next packet. FFmpeg searches 50 MiB of zeros a second for one, and
# waits without end for a file server that is gone.
PATIENCE = 30.0
_DEFAULT_BONUS = 5_000_000  # pixels: FFmpeg's map_auto_video (fftools/ffmpeg_mux_init.c)


class DecodeError(Exception):
    """A video could not be read. The message is the reason, without the path."""


def open_file(file: str) -> InputContainer:
    """Open a file, whatever its name: without the prefix, FFmpeg takes what precedes a colon for a protocol."""
    return av.open(f"file:{file}", timeout=PATIENCE)


@contextmanager
def open_video(file: str, video: Video) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a row's file and give its container and its stream; FFmpeg's errors in the block become DecodeError.

    Raises DecodeError where the file is missing or broken, or is not the one that was indexed.
    """
    try:
        if not video.is_file(file):
            os.stat(file)  # a missing file has a reason of its own
            raise DecodeError(
                "changed since it was indexed (its size or date differs from the manifest's); run tgmae-data index "
                "again"
            )
        with open_file(file) as container:
            streams = container.streams.video
            if video.stream >= len(streams):
                raise DecodeError(
                    f"has {len(streams)} video stream{'s' * (len(streams) != 1)}, but the manifest says number "
                    f"{video.stream}, counted from 0"
                )
            yield container, streams[video.stream]
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(name_error(error)) from error


def choose_stream(container: InputContainer) -> int:
    """Return the number, among the video streams, of the one that the ffmpeg command would take.

    That is the one with the most pixels; being marked as default counts for five million. Cover art comes last
    (FFmpeg's manual, "Automatic stream selection"), and so do still pictures in a track of their own. The container
    must have a video stream.
    """

    def score(stream: VideoStream) -> int:
        # PyAV's types promise a codec context, but a codec that FFmpeg does not know has none.
        if getattr(stream, "codec_context", None) is None:
            return 0
        if stream.disposition & Disposition.attached_pic or stream.frames == 1:
            return 1
        is_default = bool(stream.disposition & Disposition.default)
        return stream.codec_context.width * stream.codec_context.height + _DEFAULT_BONUS * is_default

    scores = [score(stream) for stream in container.streams.video]
    return scores.index(max(scores))


def name_error(error: Exception) -> str:
    """Return the text of one of FFmpeg's errors, without the path that it begins with."""
    if isinstance(error, av.ExitError):
        return f"no video data within {PATIENCE:g} s of reading"
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
