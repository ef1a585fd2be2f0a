"""Every decoder that bench/decode.py compares: one clip, opened, sought and decoded into whole RGB frames.

Dimensions: T frames, H W pixels.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_pipelines.types import Video
from dali_pipelines.video.decode import decode_frames
from dali_pipelines.video.excerpt import cut_excerpt

_PREFETCHED = 2  # batches that a DALI pipeline has ready or under way before it is asked for them
INSTALL = {
    "decord": "pip install decord==0.6.0",
    "torchcodec": "pip install --no-deps torchcodec==0.11.1 and FFmpeg's libraries, apt install ffmpeg",
}


@dataclass(frozen=True)
class Clip:
    """One decode: a file and the frames wanted of it."""

    file: str
    video: Video
    frames: tuple[int, ...]

    @property
    def frames_passed(self) -> int:
        """Frames from the keyframe before the window to its end."""
        return self.frames[-1] + 1 - max(key for key in self.video.keyframes if key <= self.frames[0])


def pyav_rgb(clip: Clip) -> NDArray[np.uint8]:
    # Left to itself, PyAV converts every frame on new threads, which workers side by side pay for dearly.
    found = {
        number: frame.to_ndarray(format="rgb24", threads=1)
        for number, frame in decode_frames(clip.file, clip.video, clip.frames, seek=True)
    }
    return np.stack([found[number] for number in clip.frames])


def pyav_yuv(clip: Clip) -> None:
    for _ in decode_frames(clip.file, clip.video, clip.frames, seek=True):
        pass


def decord_rgb(clip: Clip) -> NDArray[np.uint8]:
    decord = importlib.import_module("decord")
    frames: NDArray[np.uint8] = decord.VideoReader(clip.file, num_threads=1).get_batch(list(clip.frames)).asnumpy()
    return frames


def torchcodec_rgb(clip: Clip) -> NDArray[np.uint8]:
    import torch  # worker processes do without, but for this

    torch.set_num_threads(1)
    decoders = importlib.import_module("torchcodec.decoders")
    reader = decoders.VideoDecoder(clip.file, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="approximate")
    frames: NDArray[np.uint8] = reader.get_frames_at(list(clip.frames)).data.numpy()
    return frames


DECODERS: dict[str, Callable[[Clip], object]] = {
    "PyAV": pyav_rgb, "PyAV, YUV": pyav_yuv, "decord": decord_rgb, "torchcodec": torchcodec_rgb,
}  # fmt: skip


def decode_share(decoder: str, clips: Sequence[Clip], seconds: float) -> tuple[int, float, float]:
    """What one worker does: its clips again and again for at least so long, in whole passes.

    Returns how many clips, and when it began and ended on the clock that all processes share.
    """
    decode, passes, started = DECODERS[decoder], 0, time.perf_counter()
    while not passes or time.perf_counter() - started < seconds:
        for clip in clips:
            decode(clip)
        passes += 1
    return passes * len(clips), started, time.perf_counter()


def rate_in_workers(
    decoder: str, clips: Sequence[Clip], pool: ProcessPoolExecutor, seconds: float, num_workers: int
) -> float:
    """Clips a second of so many workers, each with its share, from the first one's start to the last one's end."""
    shares = [clips[worker::num_workers] for worker in range(min(num_workers, len(clips)))]
    waiting = [pool.submit(decode_share, decoder, share, seconds) for share in shares]
    counts, starts, ends = zip(*(done.result() for done in waiting), strict=True)
    return float(sum(counts) / (max(ends) - min(starts)))


@cache
def cut_for_dali(clip: Clip) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """What training's workers hand to DALI."""
    frames = sorted(set(clip.frames))
    excerpt = cut_excerpt(clip.file, clip.video, frames)
    return excerpt.encoded, np.array(frames, np.int32) - excerpt.first


def dali_pipeline(clips: Sequence[Clip], batch: int, num_threads: int, on_gpu: bool) -> Any:
    """A DALI pipeline that decodes the clips in turn, endlessly, and does nothing else."""
    from nvidia.dali import Pipeline, fn, types

    cut = [cut_for_dali(clip) for clip in clips]

    def source(iteration: int) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.int32]]]:
        chosen = [cut[(iteration * batch + place) % len(cut)] for place in range(batch)]
        return [encoded for encoded, _ in chosen], [frames for _, frames in chosen]

    pipeline = Pipeline(
        batch_size=batch, num_threads=num_threads, device_id=0 if on_gpu else None, prefetch_queue_depth=_PREFETCHED
    )
    with pipeline:
        encoded, frames = fn.external_source(source=source, num_outputs=2, dtype=[types.UINT8, types.INT32])
        pipeline.set_outputs(fn.decoders.video(encoded, frames=frames, device="mixed" if on_gpu else "cpu"))
    pipeline.build()
    return pipeline


def choose_batch(num_threads: int, on_gpu: bool) -> int:
    """Clips of a batch, over which DALI spreads its threads: on a GPU training's 64, but few for few threads, which
    would take seconds.
    """
    return min(64, 16 * num_threads) if on_gpu else max(8, 2 * num_threads)


def rate_of_dali(
    clips: Sequence[Clip],
    on_gpu: bool,
    seconds: float,
    num_threads: int,
    num_pipelines: int = 1,
    begin: Callable[[], None] = lambda: None,
    batch: int | None = None,
) -> float:
    """Clips a second of so many pipelines at once, each with its own threads and CUDA stream, as in training.

    Each decodes its share of the clips again and again for at least `seconds`, in whole passes. What it has ready
    before the clock starts is thrown away.
    begin   is called when all have delivered a batch, before the clock starts
    batch   clips; by default as `choose_batch` says
    """
    batch = batch or choose_batch(num_threads, on_gpu)
    ready = Barrier(num_pipelines, begin)
    share = -(-len(clips) // num_pipelines)  # clips
    # A pipeline that is no longer referred to ends: it would decode on.
    with ThreadPoolExecutor(num_pipelines) as threads:
        running = [
            threads.submit(
                _run_dali, [*clips[place:], *clips[:place]], batch, num_threads, on_gpu, -(-share // batch), seconds,
                ready,
            )
            for place in range(0, share * num_pipelines, share)
        ]  # fmt: skip
    for error in filter(None, (done.exception() for done in running)):
        if not isinstance(error, BrokenBarrierError):  # which others raise when one fails
            raise error
    return sum(done.result() for done in running)


def _run_dali(
    clips: Sequence[Clip], batch: int, num_threads: int, on_gpu: bool, one_pass: int, seconds: float, ready: Barrier
) -> float:
    """Clips a second of one pipeline, in passes of `one_pass` batches.

    It has batches under way before its clock starts and after it stops, so that the others are never alone.
    """
    try:
        pipeline = dali_pipeline(clips, batch, num_threads, on_gpu)
        pipeline.run()
        ready.wait()
    except Exception:
        ready.abort()  # or the others would wait for this one
        raise
    for _ in range(_PREFETCHED):  # decoded while others got ready
        pipeline.run()
    count, started = 0, time.perf_counter()
    while not count or time.perf_counter() - started < seconds:
        for _ in range(one_pass):
            pipeline.run()  # without a stream: its frames are there when this returns
        count += one_pass
    return batch * count / (time.perf_counter() - started)


def import_decoder(name: str) -> None:
    """In a worker. Raises whatever the decoder raises."""
    importlib.import_module("torchcodec.decoders" if name == "torchcodec" else name)
