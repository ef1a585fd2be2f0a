"""Training data for the tiny CLIP: crops of generated scenes, each with a caption of what the crop shows.

A crop is cut from a frame that was treated like those of a training clip: drawn, encoded by x264, decoded, cropped and
resized to 96². The side of a crop is anything from one patch to the whole frame.

Dimensions: B crops, H W pixels of a scene.
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
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from engines.progress import progress_bar
from tgmae.config.data import DataConfig
from tgmae.data.sampling import sample_crop
from tgmae.shapes.scenes import HEIGHT, NUM_FRAMES, WIDTH, MovingShape, encode_frames, sample_scene

CLIP_SIZE, PATCH = 96, 16  # pixels; the demo's clips and patches
# All random generators here have keys of three numbers, and this is the third. The keys of a data set's clips have two,
# which to NumPy is the same as a third number of 0: so no data set of any seed shows a scene of this stream.
_SCENES, _CROPS = 1, 2
_SIDES = (PATCH, 24, 32, 48, 48, 48, 64, CLIP_SIZE)
_PATCH_SHARE = 0.4  # share of the crops that are single patches, which is what the scorer will ask about
_OBJECT_SHARE = 0.75  # share of the crops that are placed on an object, by at least one pixel
_BACKGROUND = (
    "a background", "the background", "background", "an empty background", "a blurred background", "a plain background",
    "a grey background", "a muted texture", "nothing", "nothing but background",
)  # fmt: skip


@dataclass(frozen=True)
class SceneFrame:
    """One decoded frame of a scene.

    pixels   uint8 [3, H, W]
    shares   uint8 [2, H, W], share of each pixel that shows object i, in 255ths; 0 if there is no second object
    objects  the one or two objects
    """

    pixels: NDArray[np.uint8]
    shares: NDArray[np.uint8]
    objects: list[MovingShape]

    def __repr__(self) -> str:
        return f"SceneFrame(pixels {self.pixels.dtype} {list(self.pixels.shape)}, {len(self.objects)} objects)"


def make_frame(index: int, *, seed: int) -> SceneFrame:
    """Draw scene `index` of the training stream, with one or two objects: one frame as x264 leaves it."""
    generator = np.random.default_rng((seed, index, _SCENES))
    scene = sample_scene(generator, int(generator.integers(1, 3)))
    # Take the last of a few frames: unless it is also the first, it is a predicted one, which is compressed harder.
    first, length = int(generator.integers(NUM_FRAMES - 3)), int(generator.integers(1, 4))
    frames = [scene.render(first + step) for step in range(length)]
    pixels = _compress(frames, crf=int(generator.integers(18, 27)))
    # From the front object to the back one, each hides what lies behind it.
    shares = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    hidden = np.zeros((HEIGHT, WIDTH))
    for number, obj in reversed(list(enumerate(scene.objects))):
        share = obj.coverage(first + length - 1)
        shares[number] = (255 * share * (1 - hidden)).round()
        hidden = np.maximum(hidden, share)
    return SceneFrame(np.moveaxis(pixels, 2, 0).copy(), shares, scene.objects)


def make_frames(count: int, seed: int, pool: Executor) -> list[SceneFrame]:
    """Draw scenes 0 … `count` - 1 of the training stream in the processes of `pool`."""
    work = pool.map(partial(make_frame, seed=seed), range(count), chunksize=32)
    return list(progress_bar(work, total=count, desc="drawing scenes", unit="scene"))


def make_crop_generator(seed: int) -> Generator:
    """Return the generator of the crops, whose stream is apart from that of the scenes."""
    return np.random.default_rng((seed, 0, _CROPS))


@dataclass(frozen=True)
class Crops:
    """Crops and their captions.

    images    float32 [B, 3, size, size], pixels in 0 … 1 up to what bicubic resizing overshoots
    captions  B texts
    """

    images: Tensor
    captions: list[str]

    def __repr__(self) -> str:
        return f"Crops(images float32 {list(self.images.shape)}, {len(self.captions)} captions, {self.images.device})"


@dataclass(frozen=True)
class _Clip:
    """A scene's frame after a training clip's crop and resize.

    planes   float32 [5, 96, 96] in 0 … 255: red, green, blue, and the shares of both objects
    inside   the pixels of each visible object: int64 [n, 2], row and column
    """

    planes: NDArray[np.float32]
    inside: list[NDArray[np.int64]]
    objects: list[MovingShape]


def sample_crops(generator: Generator, frames: list[SceneFrame], num_frames: int, per_frame: int, size: int) -> Crops:
    """Take `per_frame` crops from each of `num_frames` frames, all at random, and resize them to `size` pixels."""
    windows: dict[int, list[Tensor]] = defaultdict(list)  # by side, so that crops of one side are resized together
    captions: dict[int, list[str]] = defaultdict(list)
    for number in generator.integers(len(frames), size=num_frames):
        clip = _cut_clip(generator, frames[number])
        for _ in range(per_frame):
            side = PATCH if generator.random() < _PATCH_SHARE else _pick(generator, _SIDES)
            y, x = _place(generator, clip, side)
            window = clip.planes[:, y : y + side, x : x + side]
            windows[side].append(torch.from_numpy(window[:3]))
            captions[side].append(_describe(generator, clip, window))
    # Resize as the scorer resizes patches for CLIP.
    images = [
        F.interpolate(torch.stack(group), (size, size), mode="bicubic", antialias=True) for group in windows.values()
    ]
    return Crops(torch.cat(images) / 255, [text for texts in captions.values() for text in texts])


def caption_object(generator: Generator, obj: MovingShape) -> str:
    """Write a caption that names some of an object's colour, shape and motion.

    Four in ten are the data set's own caption, which names all three.
    """
    if generator.random() < 0.4:
        return obj.caption
    color, shape, motion = obj.color, obj.shape, obj.caption.split(" ", 3)[3]
    named = _pick(generator, (f"{color} {shape}", shape, f"{color} shape", f"{color} object", "shape", color))
    if named == color:
        return color
    article = "an" if named[0] in "aeiou" else "a"
    start = _pick(generator, ("", "the ", f"{article} "))
    end = f" {motion}" if generator.random() < 0.3 else ""
    return f"{start}{named}{end}"


def _describe(generator: Generator, clip: _Clip, window: NDArray[np.float32]) -> str:
    """Write a caption for what a crop shows: one object, both, or background.

    An object is named with a probability that grows with the share of the crop it fills and, in crops larger than a
    patch, with the share of the object that the crop holds. So the similarity learned grows with what is seen.
    """
    side = window.shape[-1]
    filled = window[3:].mean(axis=(1, 2)) / 255
    weights = _ramp(filled, 0.1, 0.7)
    if side > PATCH:
        held = window[3:].sum(axis=(1, 2)) / np.maximum(clip.planes[3:].sum(axis=(1, 2)), 1)
        weights = np.maximum(weights, _ramp(held, 0.3, 0.8) * (filled > 0.03))
    seen = [obj for obj, weight in zip(clip.objects, weights, strict=False) if generator.random() < weight]
    if not seen:
        return _pick(generator, _BACKGROUND)
    if len(seen) == 2 and generator.random() < 0.2:
        return " and ".join(caption_object(generator, seen[number]) for number in generator.permutation(2))
    return caption_object(generator, _pick(generator, seen))


def _ramp(value: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """Rise linearly from 0 at `low` to 1 at `high`, and stay there."""
    ramp: NDArray[np.float32] = ((value - low) / (high - low)).clip(0, 1)
    return ramp


def _cut_clip(generator: Generator, frame: SceneFrame) -> _Clip:
    """Crop and resize a frame as training does."""
    box = sample_crop(generator, WIDTH, HEIGHT, DataConfig().crop_scales)
    planes = torch.from_numpy(np.concatenate([frame.pixels, frame.shares]))
    planes = planes[:, box.y : box.y + box.height, box.x : box.x + box.width].float()
    cut = F.interpolate(planes[None], (CLIP_SIZE, CLIP_SIZE), mode="bilinear", antialias=True)[0].round().numpy()
    inside = [np.argwhere(share > 127) for share in cut[3:]]
    return _Clip(cut, [pixels for pixels in inside if len(pixels)], frame.objects)


def _place(generator: Generator, clip: _Clip, side: int) -> tuple[int, int]:
    """Choose the top and left of a crop.

    Most crops hold a pixel of an object at a random place in the crop; the rest lie anywhere.
    """
    last = CLIP_SIZE - side
    if clip.inside and generator.random() < _OBJECT_SHARE:
        pixels = _pick(generator, clip.inside)
        y, x = pixels[int(generator.integers(len(pixels)))] - generator.integers(side, size=2)
        return min(max(int(y), 0), last), min(max(int(x), 0), last)
    return int(generator.integers(last + 1)), int(generator.integers(last + 1))


_T = TypeVar("_T")


def _pick(generator: Generator, options: Sequence[_T]) -> _T:
    # Generator.choice turns the options into an array first, at five times the cost.
    return options[int(generator.integers(len(options)))]


def _compress(frames: list[NDArray[np.uint8]], crf: int) -> NDArray[np.uint8]:
    """Encode and decode frames [H, W, 3] with the encoder of the data sets, and return the last one."""
    buffer = io.BytesIO()
    encode_frames(buffer, frames, "h264", crf=str(crf))
    buffer.seek(0)
    with av.open(buffer, "r") as encoded:
        [*_, last] = encoded.decode(video=0)
    decoded: NDArray[np.uint8] = last.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return decoded
