"""Keyframes of videos, decoded ahead by worker processes.

Workers leave frames in shared memory, so that they go on while the model is at work and nobody listens to them. They
import this module, so it does without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.types import Video
from dali_pipelines.video.decode import DecodeError, decode_frames, decode_whole_frames, to_rgb
from dali_pipelines.video.geometry import turn_upright
from dali_pipelines.workers.pool import Death, WorkerPool
from tgmae.config.captions import spread
from tgmae.data.manifest import Manifest

_AHEAD = 3  # videos for each worker that are decoded and not yet taken, or being decoded
_SLOW_S = 300.0  # without any frames, after which the videos that workers have are named

Frames = list[NDArray[np.uint8]]


def choose_frames(video: Video, count: int) -> list[int]:
    """Return the numbers of `count` uniformly spaced frames: the middles of equal parts of the video or segment.

    One is the centre frame, and the second of three is the same. A video with fewer frames gives each of them once.
    """
    return [video.start + place for place in spread(video.length, count)]


def fit_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Return width and height with the longer side at most `max_side` pixels; frames are never enlarged."""
    scale = min(1.0, max_side / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def read_frames(
    manifest: Manifest, rows: Sequence[int], count: int, max_side: int, num_workers: int
) -> Iterator[tuple[int, Frames, str]]:
    """Yield row, its keyframes in order (`choose_frames`), and why there are fewer, "" where there are not.

    Rows come in the order in which they are finished. Frames are upright, uint8 [H, W, 3]. With no workers, they are
    decoded in this process.
    """
    if not num_workers or not rows:
        yield from ((row, *_read(manifest, count, max_side, row)) for row in rows)
        return
    num_workers = min(num_workers, len(rows))
    slots, slot_bytes = _AHEAD * num_workers, _find_most_bytes(manifest, rows, count, max_side)
    work = partial(_read_into, manifest, rows, count, max_side, slots, slot_bytes)
    # A task is a place in `rows` and a slot of the shared memory that is free for it.
    pool = WorkerPool(
        work, num_workers, lambda task: manifest[rows[task // slots]].name, slots * slot_bytes, stall_s=_SLOW_S
    )
    try:
        for place in range(min(slots, len(rows))):
            pool.submit(place * slots + place)
        waiting = iter(range(slots, len(rows)))
        for _ in rows:
            task, result = pool.take()
            place, slot = divmod(task, slots)
            shapes, reason = ([], str(result)) if isinstance(result, Death) else result
            frames = _copy_out(pool.room[slot * slot_bytes : (slot + 1) * slot_bytes], shapes)
            if (following := next(waiting, None)) is not None:
                pool.submit(following * slots + slot)
            yield rows[place], frames, reason
    finally:
        pool.close()


def _find_most_bytes(manifest: Manifest, rows: Sequence[int], count: int, max_side: int) -> int:
    """Return the bytes of the frames of the row that has most of them."""
    columns = (manifest.table.column(name).to_numpy()[list(rows)] for name in ("width", "height"))
    sizes = {fit_size(int(width), int(height), max_side) for width, height in zip(*columns, strict=True)}
    return count * 3 * max(width * height for width, height in sizes)


def _read_into(
    manifest: Manifest, rows: Sequence[int], count: int, max_side: int, slots: int, slot_bytes: int, task: int,
    room: memoryview,
) -> tuple[list[tuple[int, ...]], str]:  # fmt: skip
    """Read frames into a slot of the shared memory; return their shapes and what `_read` says."""
    place, slot = divmod(task, slots)
    frames, reason = _read(manifest, count, max_side, rows[place])
    first = slot * slot_bytes
    for frame in frames:
        np.frombuffer(room, np.uint8, frame.size, first)[:] = frame.reshape(-1)
        first += frame.size
    return [frame.shape for frame in frames], reason


def _copy_out(room: memoryview, shapes: Sequence[tuple[int, ...]]) -> Frames:
    frames, first = Frames(), 0
    for shape in shapes:
        size = int(np.prod(shape))
        frames.append(np.frombuffer(room, np.uint8, size, first).reshape(shape).copy())
        first += size
    return frames


def _read(manifest: Manifest, count: int, max_side: int, row: int) -> tuple[Frames, str]:
    video, file = manifest[row], manifest.file(row)
    numbers, (width, height) = choose_frames(video, count), fit_size(video.width, video.height, max_side)
    frames: Frames = []
    try:
        if (width, height) == (video.width, video.height):
            for _, frame in decode_frames(file, video, numbers, seek=True, jump=True):
                frames.append(np.ascontiguousarray(turn_upright(to_rgb(frame), video)))
        else:
            for smaller in decode_whole_frames(file, video, numbers, height, width, jump=True):
                frames.append(np.ascontiguousarray(smaller))
    except DecodeError as error:  # the frames before a break are worth a caption
        return frames, str(error)
    return frames, ""
