"""What the tiny CLIP learns from: crops of generated scenes, each with a caption of what the crop shows.

A crop is cut from a picture that went the way of a training clip: drawn, encoded by x264, decoded, cropped and resized
to 96². Sides run from one patch to the whole picture.

Dimensions: K scenes, B crops, H W pixels of a scene.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.stream import VideoStream
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tgmae.data.config import DataConfig
from tgmae.data.sampling import sample_crop
from tgmae.shapes.scenes import CODECS, FPS, HEIGHT, NUM_FRAMES, WIDTH, MovingShape, draw_scene

CLIP_SIZE, PATCH = 96, 16  # pixels; the demo's clips and patches
# Third number of the keys of all that is random here. A data set's clips have keys of two, which NumPy takes for a
# third number of 0, so no data set of any seed shows a scene of this stream.
_SCENES, _CROPS = 1, 2
_SIDES = (PATCH, 24, 32, 48, 48, 48, 64, CLIP_SIZE)
_PATCH_SHARE = 0.4  # of the crops that are single patches: what the scorer will ask about
_OBJECT_SHARE = 0.75  # of the crops that lie on an object, at least with one pixel
_BACKGROUND = (
    "a background", "the background", "background", "an empty background", "a blurred background", "a plain background",
    "a grey background", "a muted texture", "nothing", "nothing but background",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One decoded frame of a scene.

    pixels   uint8 [3, H, W]
    shares   uint8 [2, H, W], share of each pixel that shows object i, in 255ths; 0 where there is no second object
    objects  what the shares belong to
    """

    pixels: NDArray[np.uint8]
    shares: NDArray[np.uint8]
    objects: list[MovingShape]


def draw_picture(index: int, *, seed: int) -> Picture:
    """Scene `index` of the training stream: one or two objects, one frame as x264 leaves it."""
    generator = np.random.default_rng((seed, index, _SCENES))
    scene = draw_scene(generator, int(generator.integers(1, 3)))
    # The last of a few frames is a predicted one, which is compressed harder than the first.
    first, length = int(generator.integers(NUM_FRAMES - 3)), int(generator.integers(1, 4))
    frames = [scene.render(first + step) for step in range(length)]
    pixels = _compress(frames, crf=int(generator.integers(18, 27)))
    shares = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    hidden = np.zeros((HEIGHT, WIDTH))
    for number, thing in reversed(list(enumerate(scene.objects))):
        share = thing.coverage(first + length - 1)
        shares[number] = (255 * share * (1 - hidden)).round()
        hidden = np.maximum(hidden, share)
    return Picture(np.moveaxis(pixels, 2, 0).copy(), shares, scene.objects)


def draw_pictures(count: int, seed: int, pool: Executor) -> list[Picture]:
    work = pool.map(partial(draw_picture, seed=seed), range(count), chunksize=32)
    return list(tqdm(work, total=count, desc="drawing scenes", unit="scene"))


def make_crop_generator(seed: int) -> Generator:
    return np.random.default_rng((seed, 0, _CROPS))


@dataclass(frozen=True)
class Crops:
    """images: float32 [B, 3, size, size], pixels 0 … 1.    captions: B texts, one for each."""

    images: Tensor
    captions: list[str]


@dataclass(frozen=True)
class _Clip:
    """A picture after a training clip's crop and resize.

    planes   float32 [5, 96, 96], 0 … 255: red, green, blue, and the shares of both objects
    inside   the pixels of each object that is in sight: int64 [n, 2], row and column
    """

    planes: NDArray[np.float32]
    inside: list[NDArray[np.int64]]
    objects: list[MovingShape]


def draw_crops(generator: Generator, pictures: list[Picture], num_pictures: int, per_picture: int, size: int) -> Crops:
    """`per_picture` crops from each of `num_pictures` pictures drawn at random, resized to `size` pixels."""
    windows: dict[int, list[Tensor]] = defaultdict(list)  # by side, so that those of one side are resized together
    captions: dict[int, list[str]] = defaultdict(list)
    for number in generator.integers(len(pictures), size=num_pictures):
        clip = _cut_clip(generator, pictures[number])
        for _ in range(per_picture):
            side = PATCH if generator.random() < _PATCH_SHARE else _pick(generator, _SIDES)
            y, x = _place(generator, clip, side)
            window = clip.planes[:, y : y + side, x : x + side]
            windows[side].append(torch.from_numpy(window[:3]))
            captions[side].append(_describe(generator, clip, window))
    # As patches are resized for CLIP.
    images = [
        F.interpolate(torch.stack(group), (size, size), mode="bicubic", antialias=True) for group in windows.values()
    ]
    return Crops(torch.cat(images) / 255, [text for texts in captions.values() for text in texts])


def caption_object(generator: Generator, thing: MovingShape) -> str:
    """A caption that names all or some of an object's colour, shape and motion; the data set's own in four of ten."""
    if generator.random() < 0.4:
        return thing.caption
    color, shape, motion = thing.color, thing.shape, thing.caption.split(" ", 3)[3]
    named = _pick(generator, (f"{color} {shape}", shape, f"{color} shape", f"{color} object", "shape", color))
    if named == color:
        return color
    article = "an" if named[0] in "aeiou" else "a"
    start = _pick(generator, ("", "the ", f"{article} "))
    end = f" {motion}" if generator.random() < 0.3 else ""
    return f"{start}{named}{end}"


def _describe(generator: Generator, clip: _Clip, window: NDArray[np.float32]) -> str:
    """A caption for what a crop shows: an object, both, or background.

    An object counts by the share of the crop that it fills, and in crops larger than a patch also by the share of it
    that the crop holds. What is named is drawn by these weights, so that likeness grows with what is seen.
    """
    side = window.shape[-1]
    filled = window[3:].mean(axis=(1, 2)) / 255
    weights = _ramp(filled, 0.1, 0.7)
    if side > PATCH:
        held = window[3:].sum(axis=(1, 2)) / np.maximum(clip.planes[3:].sum(axis=(1, 2)), 1)
        weights = np.maximum(weights, _ramp(held, 0.3, 0.8) * (filled > 0.03))
    seen = [thing for thing, weight in zip(clip.objects, weights, strict=False) if generator.random() < weight]
    if not seen:
        return _pick(generator, _BACKGROUND)
    if len(seen) == 2 and generator.random() < 0.2:
        return " and ".join(caption_object(generator, seen[number]) for number in generator.permutation(2))
    return caption_object(generator, _pick(generator, seen))


def _ramp(value: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    ramp: NDArray[np.float32] = ((value - low) / (high - low)).clip(0, 1)
    return ramp


def _cut_clip(generator: Generator, picture: Picture) -> _Clip:
    box = sample_crop(generator, WIDTH, HEIGHT, DataConfig().crop_scales)
    planes = torch.from_numpy(np.concatenate([picture.pixels, picture.shares]))
    planes = planes[:, box.y : box.y + box.height, box.x : box.x + box.width].float()
    cut = F.interpolate(planes[None], (CLIP_SIZE, CLIP_SIZE), mode="bilinear", antialias=True)[0].round().numpy()
    inside = [np.argwhere(share > 127) for share in cut[3:]]
    return _Clip(cut, [pixels for pixels in inside if len(pixels)], picture.objects)


def _place(generator: Generator, clip: _Clip, side: int) -> tuple[int, int]:
    """Top and left of a crop: most hold a pixel of an object, at a random place in the crop; the rest lie anywhere."""
    last = CLIP_SIZE - side
    if clip.inside and generator.random() < _OBJECT_SHARE:
        pixels = _pick(generator, clip.inside)
        y, x = pixels[int(generator.integers(len(pixels)))] - generator.integers(side, size=2)
        return min(max(int(y), 0), last), min(max(int(x), 0), last)
    return int(generator.integers(last + 1)), int(generator.integers(last + 1))


_T = TypeVar("_T")


def _pick(generator: Generator, options: Sequence[_T]) -> _T:
    # Generator.choice makes an array of the options first, at five times the cost.
    return options[int(generator.integers(len(options)))]


def _compress(frames: list[NDArray[np.uint8]], crf: int) -> NDArray[np.uint8]:
    """The last of some frames [H, W, 3] after encoding and decoding, with the encoder that writes the data sets."""
    _, encoder, options = CODECS["h264"]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=FPS, options={**options, "crf": str(crf)})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as encoded:
        [*_, last] = encoded.decode(video=0)
    decoded: NDArray[np.uint8] = last.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return decoded
