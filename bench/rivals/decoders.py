"""The decoders that bench/decode.py compares. Each opens a file, seeks, and decodes a window into whole RGB frames.

Dimensions: T frames, H W pixels.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.workloads.window import Window
from dali_pipelines.video.decode import decode_frames
from dali_pipelines.video.excerpt import cut_excerpt

_PREFETCHED = 2  # batches that a DALI pipeline has ready or under way before it is asked for one
INSTALL = {
    "decord": "pip install decord==0.6.0",
    "torchcodec": "pip install --no-deps torchcodec==0.11.1 and FFmpeg's libraries, apt install ffmpeg",
}


def pyav_rgb(window: Window) -> NDArray[np.uint8]:
    """Decode with PyAV and the manifest's keyframes: uint8 [T, H, W, 3]."""
    # By default PyAV converts every frame on new threads, which costs parallel workers dearly.
    found = {
        number: frame.to_ndarray(format="rgb24", threads=1)
        for number, frame in decode_frames(window.file, window.video, window.frames, seek=True)
    }
    return np.stack([found[number] for number in window.frames])


def pyav_yuv(window: Window) -> None:
    """Decode with PyAV, without the conversion to RGB."""
    for _ in decode_frames(window.file, window.video, window.frames, seek=True):
        pass


def decord_rgb(window: Window) -> NDArray[np.uint8]:
    """Decode with decord: uint8 [T, H, W, 3]."""
    decord = importlib.import_module("decord")
    frames: NDArray[np.uint8] = decord.VideoReader(window.file, num_threads=1).get_batch(list(window.frames)).asnumpy()
    return frames


def torchcodec_rgb(window: Window) -> NDArray[np.uint8]:
    """Decode with torchcodec, seeking approximately: uint8 [T, H, W, 3]."""
    import torch  # no other decoder's worker process needs it

    torch.set_num_threads(1)
    decoders = importlib.import_module("torchcodec.decoders")
    reader = decoders.VideoDecoder(window.file, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="approximate")
    frames: NDArray[np.uint8] = reader.get_frames_at(list(window.frames)).data.numpy()
    return frames


DECODERS: dict[str, Callable[[Window], object]] = {
    "PyAV": pyav_rgb, "PyAV, YUV": pyav_yuv, "decord": decord_rgb, "torchcodec": torchcodec_rgb,
}  # fmt: skip


def decode_share(decoder: str, windows: Sequence[Window], seconds: float) -> tuple[int, float, float]:
    """Decode one worker's windows again and again for at least `seconds`, in whole passes.

    Returns the number of windows, and the start and end on the clock that all processes share.
    """
    decode, passes, started = DECODERS[decoder], 0, time.perf_counter()
    while not passes or time.perf_counter() - started < seconds:
        for window in windows:
            decode(window)
        passes += 1
    return passes * len(windows), started, time.perf_counter()


def rate_in_workers(
    decoder: str, windows: Sequence[Window], pool: ProcessPoolExecutor, seconds: float, num_workers: int
) -> float:
    """Return the clips/s of workers with a share each, from the first one's start to the last one's end."""
    shares = [windows[worker::num_workers] for worker in range(min(num_workers, len(windows)))]
    waiting = [pool.submit(decode_share, decoder, share, seconds) for share in shares]
    counts, starts, ends = zip(*(done.result() for done in waiting), strict=True)
    return float(sum(counts) / (max(ends) - min(starts)))


@cache
def cut_for_dali(window: Window) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return what training's workers hand to DALI: an excerpt of the file, and the frame numbers within it."""
    frames = sorted(set(window.frames))
    excerpt = cut_excerpt(window.file, window.video, frames)
    return excerpt.encoded, np.array(frames, np.int32) - excerpt.first


def dali_pipeline(windows: Sequence[Window], batch: int, num_threads: int, on_gpu: bool) -> Any:
    """Build a DALI pipeline that decodes the windows in turn, endlessly, and does nothing else."""
    from nvidia.dali import Pipeline, fn, types

    cut = [cut_for_dali(window) for window in windows]

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
    """Return the clips of a batch, over which DALI spreads its threads.

    On a GPU it is training's 64, but smaller with few threads, which would take seconds for it.
    """
    return min(64, 16 * num_threads) if on_gpu else max(8, 2 * num_threads)


def rate_of_dali(
    windows: Sequence[Window],
    on_gpu: bool,
    seconds: float,
    num_threads: int,
    num_pipelines: int = 1,
    begin: Callable[[], None] = lambda: None,
    batch: int | None = None,
) -> float:
    """Return the clips/s of several pipelines at once, each with its own threads and CUDA stream, as in training.

    Each decodes its share of the windows again and again for at least `seconds`, in whole passes. Batches that were
    decoded before the clock starts are discarded.

    num_threads   of each pipeline
    begin         is called before the clock starts, once every pipeline has delivered a batch
    batch         clips; by default `choose_batch` decides
    """
    batch = batch or choose_batch(num_threads, on_gpu)
    ready = Barrier(num_pipelines, begin)
    share = -(-len(windows) // num_pipelines)
    # Each thread drops its pipeline when it returns, which stops the decoding.
    with ThreadPoolExecutor(num_pipelines) as threads:
        running = [
            threads.submit(
                _run_dali, [*windows[place:], *windows[:place]], batch, num_threads, on_gpu, -(-share // batch),
                seconds, ready,
            )
            for place in range(0, share * num_pipelines, share)
        ]  # fmt: skip
    for error in filter(None, (done.exception() for done in running)):
        if not isinstance(error, BrokenBarrierError):  # the others raise it when one fails
            raise error
    return sum(done.result() for done in running)


def _run_dali(
    windows: Sequence[Window], batch: int, num_threads: int, on_gpu: bool, one_pass: int, seconds: float,
    ready: Barrier,
) -> float:  # fmt: skip
    """Return the clips/s of one pipeline, in passes of `one_pass` batches.

    It decodes ahead before its clock starts and after it stops, so that no other pipeline ever runs alone.
    """
    try:
        pipeline = dali_pipeline(windows, batch, num_threads, on_gpu)
        pipeline.run()
        ready.wait()
    except Exception:
        ready.abort()  # otherwise the others would wait for this one
        raise
    for _ in range(_PREFETCHED):  # decoded while the others got ready
        pipeline.run()
    count, started = 0, time.perf_counter()
    while not count or time.perf_counter() - started < seconds:
        for _ in range(one_pass):
            pipeline.run()  # without a stream, it returns when the frames are there
        count += one_pass
    return batch * count / (time.perf_counter() - started)


def import_decoder(name: str) -> None:
    """Import a decoder in a worker process. Raises whatever the import raises."""
    importlib.import_module("torchcodec.decoders" if name == "torchcodec" else name)
