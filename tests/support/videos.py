"""Videos for tests: every frame carries its own number, so that a test sees which frame it was handed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.types import Caption, ClipBatch, ClipRequest, Video
from tgmae.data.manifest import Manifest

NUM_BITS = 8


def draw_number(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """RGB [H, W, 3]: bit b of `number` as block b, left to right, of the top half; below it a smooth gradient.

    The gradient does not move: red grows from left to right, green from top to bottom.
    """
    picture = np.empty((height, width, 3), np.uint8)
    bit = np.arange(width) * NUM_BITS // width
    picture[: height // 2] = np.where((number >> bit) & 1, 255, 0).astype(np.uint8)[:, None]
    bottom = picture[height // 2 :]
    bottom[..., 0] = np.linspace(40, 215, width).round()
    bottom[..., 1] = np.linspace(40, 215, len(bottom)).round()[:, None]
    bottom[..., 2] = 128
    return picture


def read_number(picture: NDArray[np.uint8]) -> int:
    """The number in an RGB picture [H, W, 3] of any size that shows the whole of what was drawn."""
    height, width = picture.shape[:2]
    rows = picture[height // 8 : max(height * 3 // 8, height // 8 + 1)].mean(axis=(0, 2))
    centres = (2 * np.arange(NUM_BITS) + 1) * width // (2 * NUM_BITS)
    reach = width // (4 * NUM_BITS)
    means = [rows[centre - reach : centre + reach + 1].mean() for centre in centres]
    return sum(1 << bit for bit, mean in enumerate(means) if mean > 127)


def write_numbered(
    path: Path,
    codec: str = "libx264",
    num_frames: int = 40,
    width: int = 160,
    height: int = 120,
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    mirrored: bool = False,
    rate: int = 25,
    **options: str,
) -> Path:
    """Write a video whose frame i shows the number i (below 256); returns `path`.

    rotation   clockwise degrees that turn the coded picture upright, stored in the container. `width` and `height` are
               of the upright picture, and the upright picture is the same whatever the rotation.
    mirrored   whether the container says that the turned picture must then be flipped left to right
    options    the encoder's, as strings: g="12", bf="2"
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"libx264": {"preset": "veryfast"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}
    defaults["libx265"] = {"preset": "ultrafast", "x265-params": "log-level=none"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={**defaults.get(codec, {}), **options})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = (height, width) if rotation % 180 else (width, height)
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if rotation or mirrored:
            stream.set_display_rotation(-rotation, hflip=mirrored)  # FFmpeg counts anticlockwise
        for number in range(num_frames):
            # rot90 turns anticlockwise, which is what a clockwise turn undoes.
            upright = draw_number(number, width, height)
            coded = np.ascontiguousarray(np.rot90(upright[:, ::-1] if mirrored else upright, rotation // 90))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(coded, format="rgb24")))
        container.mux(stream.encode())
    return path


def make_video(**changes: Any) -> Video:
    """A row of a manifest with the given fields changed; no file stands behind it."""
    row: dict[str, Any] = {
        "path": "walk/a.mp4", "num_frames": 40, "fps": 25.0, "width": 160, "height": 120, "codec": "h264",
        "pixel_format": "yuv420p",
        "rotation": 0, "num_bytes": 1234, "mtime_ns": 1_700_000_000_123_456_789,
        "keyframes": (0, 12, 24), "keyframe_pts": (0, 480, 960),
        "label": "walk", "captions": ("a man walks", "someone is walking"), "split": "train",
    }  # fmt: skip
    row |= changes
    if "keyframes" not in changes:  # those that a shorter video still has
        row["keyframes"] = tuple(number for number in row["keyframes"] if number < row["num_frames"])
        row["keyframe_pts"] = row["keyframe_pts"][: len(row["keyframes"])]
    row["captions"] = tuple(Caption(text, "csv") if isinstance(text, str) else text for text in row["captions"])
    return Video(**row)


def stamp(video: Video, file: Path) -> Video:
    """Return the row as if `file` were what was indexed."""
    stat = file.stat()
    return replace(video, num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)


def clip_batch(
    frames: Tensor, requests: Sequence[ClipRequest], videos: Manifest | Sequence[Video] | None = None
) -> ClipBatch:
    """Make a batch from frames. Its videos come from a manifest or a list, by row, or are `make_video()`."""
    chosen = tuple(make_video() if videos is None else videos[request.row] for request in requests)
    return ClipBatch(frames=frames, requests=tuple(requests), videos=chosen)


def real_data_folder() -> Path | None:
    """Folder of real videos: $TGMAE_REAL_DATA, or shared/data beside the checkout; None where there is neither."""
    named = os.environ.get("TGMAE_REAL_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None
