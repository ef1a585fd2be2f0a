"""Loops over videos that people write to caption keyframes, in PyAV and decord. Worker processes import this module."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

Frames = list[NDArray[np.uint8]]
INSTALL = {"decord": "pip install decord==0.6.0"}


@dataclass(frozen=True)
class Wanted:
    """A file, the numbers of its keyframes, ascending, and its frame rate."""

    file: str
    numbers: tuple[int, ...]
    fps: float


def decode_all(wanted: Wanted) -> Frames:
    """Decode from the first frame to the last wanted one, and convert the wanted ones: the loop of PyAV's examples."""
    frames: Frames = []
    with av.open(wanted.file) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted.numbers:
                frames.append(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))
            if number == wanted.numbers[-1]:
                break
    return frames


def seek_each(wanted: Wanted) -> Frames:
    """Seek to the time of each wanted frame, and decode up to it."""
    frames: Frames = []
    with av.open(wanted.file) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        for number in wanted.numbers:
            target = int(number / wanted.fps / stream.time_base) + (stream.start_time or 0)
            container.seek(target, stream=stream)
            frame = None
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= target:
                    break
            if frame is not None:
                frames.append(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))
    return frames


def decord_batch(wanted: Wanted) -> Frames:
    """Ask decord for the wanted frames."""
    decord = importlib.import_module("decord")
    return list(decord.VideoReader(wanted.file).get_batch(list(wanted.numbers)).asnumpy())


LOOPS: dict[str, Callable[[Wanted], Frames]] = {
    "PyAV, decoding from the start": decode_all, "PyAV, seeking": seek_each, "decord": decord_batch,
}  # fmt: skip
