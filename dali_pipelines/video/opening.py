"""Open a video file for reading. Every path that decodes a row of a manifest passes `open_video`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from dali_pipelines.types import Video

# Seconds for opening a file, and for finding the next packet. FFmpeg searches 50 MiB of zeros a second for one, and
# waits without end for a file server that is gone.
PATIENCE = 30.0
# What is read of a file for its digest: up to this many blocks, so that a file of up to 8 MiB is read whole.
_BLOCKS, _BLOCK_BYTES = 128, 65536
# FFmpeg's formats that are no videos, whatever a file is called: lists of other files, and text that it draws. Formats
# of single pictures end in _pipe. The protocol keeps the lists from reaching the network while they are opened.
_NO_VIDEOS = frozenset(
    ("concat", "hls", "dash", "imf", "webm_dash_manifest", "sdp", "rtsp", "tty", "bin", "xbin", "adf", "idf", "ico")
)
_OPTIONS = {"protocol_whitelist": "file"}
_DEFAULT_BONUS = 5_000_000  # pixels: FFmpeg's map_auto_video (fftools/ffmpeg_mux_init.c)


class DecodeError(Exception):
    """A video could not be read. The message is the reason, without the path."""


def open_file(file: str) -> InputContainer:
    """Open a file, whatever its name: without the prefix, FFmpeg takes what precedes a colon for a protocol.

    Raises DecodeError where its content is no video, and FFmpeg's errors.
    """
    container = av.open(f"file:{file}", timeout=PATIENCE, options=_OPTIONS)
    kind = container.format
    if kind.name in _NO_VIDEOS or kind.name.endswith("_pipe"):
        container.close()
        raise DecodeError(f"not a video, but what FFmpeg calls {kind.long_name}")
    return container


@contextmanager
def open_video(file: str, video: Video) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a row's file and give its container and its stream; FFmpeg's errors in the block become DecodeError.

    Raises DecodeError where the file is missing or broken, or is not the one that was indexed.
    """
    try:
        if not video.is_file(file) and not _is_copy(file, video):
            raise DecodeError(
                f"changed since it was indexed (its size or {'content' if video.digest else 'date'} differs from the "
                "manifest's); run tgmae-data index again"
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


def digest_file(file: str | Path) -> str:
    """Return 16 digits that tell a file's content: its size, and blocks of it, of which a small file has no others.

    Of more than 8 MiB, blocks at equal distances are read, the first and the last among them. A difference that lies
    between them is not seen.
    """
    with open(file, "rb", buffering=0) as opened:
        size = opened.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(str(size).encode(), digest_size=8)
        blocks = min(-(-size // _BLOCK_BYTES), _BLOCKS)
        for block in range(blocks):
            # Blocks of a small file follow each other; its last one then overlaps the one before.
            opened.seek(block * max(size - _BLOCK_BYTES, 0) // max(blocks - 1, 1))
            digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _is_copy(file: str, video: Video) -> bool:
    """Return whether a file of another date is the one that was indexed. Raises OSError where it is missing."""
    stat = os.stat(file)
    return (
        bool(video.digest) and stat.st_size == video.num_bytes and _digest_once(file, stat.st_mtime_ns) == video.digest
    )


@lru_cache(maxsize=2**17)
def _digest_once(file: str, mtime_ns: int) -> str:
    return digest_file(file)


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
    """Return the text of an error of FFmpeg's or the system's, without the path that it begins with."""
    if isinstance(error, av.ExitError):
        return f"no video data within {PATIENCE:g} s of reading"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
