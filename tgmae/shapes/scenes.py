"""The demo data set: textured shapes that move over textured, drifting backgrounds, with captions and true boxes.

The label is the motion. The caption names colour, shape and motion ("a red circle moving left"). The box of every
object in every frame is stored, so that a mask can be compared with the ground truth. Everything about clip i is a
function of (seed, i).

Dimensions: T frames, H W pixels.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.stream import VideoStream
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dali_pipelines.workers.pool import Death, WorkersFailed, map_in_workers
from engines.progress import progress_bar
from tgmae.data.indexing import IndexResult, index_folder

WIDTH, HEIGHT, FPS, NUM_FRAMES = 160, 120, 25, 40
COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (45, 90, 220),
    "yellow": (240, 200, 40),
    "purple": (150, 60, 190),
    "orange": (245, 130, 30),
    "pink": (245, 130, 190),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
Camera = Literal["drifting", "still", "panning"]
MOTIONS = ("left", "right", "up", "down", "growing", "shrinking", "spinning", "circling")
CODECS = {
    # With x264's macroblock tree the bits differ from run to run, even on one thread.
    "h264": (".mp4", "libx264", {"preset": "veryfast", "crf": "20", "g": "12", "mbtree": "0"}),
    "vp9": (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0", "g": "12"}),
}


@dataclass(frozen=True, kw_only=True)
class MovingShape:
    """One object, with its state in each of the T frames of a clip. Lengths are in pixels, angles in radians."""

    color: str
    shape: str
    motion: str
    texture: tuple[float, float, float]  # stripes: number per pixel, angle, strength from 0 to 1
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    radius: NDArray[np.float64]
    angle: NDArray[np.float64]

    @property
    def caption(self) -> str:
        verb = "moving " if self.motion in ("left", "right", "up", "down") else ""
        article = "an" if self.color == "orange" else "a"
        return f"{article} {self.color} {self.shape} {verb}{self.motion}"

    def corners(self, frame: int) -> NDArray[np.float64]:
        """Return the corners of the outline, [corners, 2], x and y."""
        angles, radii = _outline(self.shape)
        angles = angles + self.angle[frame]
        points = self.radius[frame] * np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
        moved: NDArray[np.float64] = points + np.array([self.x[frame], self.y[frame]])
        return moved

    def box(self, frame: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom (the last two exclusive) of the part inside the frame."""
        corners = self.corners(frame)
        left, top = np.floor(corners.min(axis=0)).astype(int)
        right, bottom = np.ceil(corners.max(axis=0)).astype(int)
        return max(left, 0), max(top, 0), min(right, WIDTH), min(bottom, HEIGHT)

    def coverage(self, frame: int) -> NDArray[np.float64]:
        """Return the share of each pixel inside the outline, [H, W], drawn at three times the size and averaged."""
        large = Image.new("L", (3 * WIDTH, 3 * HEIGHT))
        ImageDraw.Draw(large).polygon([(3 * float(x), 3 * float(y)) for x, y in self.corners(frame)], fill=255)
        return np.asarray(large.reduce(3), np.float64) / 255


def sample_object(generator: Generator, motion: str, color: str, shape: str) -> MovingShape:
    """Draw the size, place, speed and texture of an object at random. It stays inside the frame."""
    time = np.linspace(0, 1, NUM_FRAMES)
    radius = np.full(NUM_FRAMES, generator.uniform(16, 26))
    angle = np.full(NUM_FRAMES, generator.uniform(0, 2 * np.pi))
    if motion in ("growing", "shrinking"):
        radius = np.linspace(12, generator.uniform(28, 36), NUM_FRAMES)
        radius = radius if motion == "growing" else radius[::-1].copy()
    reach = float(radius.max())
    x = np.full(NUM_FRAMES, generator.uniform(reach, WIDTH - reach))
    y = np.full(NUM_FRAMES, generator.uniform(reach, HEIGHT - reach))
    if motion in ("left", "right"):
        path = np.linspace(reach, WIDTH - reach, NUM_FRAMES)
        x = path if motion == "right" else path[::-1].copy()
    elif motion in ("up", "down"):
        path = np.linspace(reach, HEIGHT - reach, NUM_FRAMES)
        y = path if motion == "down" else path[::-1].copy()
    elif motion == "spinning":
        angle = angle + generator.choice([-1, 1]) * 2 * np.pi * time
    elif motion == "circling":
        orbit = min(HEIGHT / 2 - reach, 30.0)
        x = np.clip(x, reach + orbit, WIDTH - reach - orbit) + orbit * np.cos(2 * np.pi * time)
        y = np.clip(y, reach + orbit, HEIGHT - reach - orbit) + orbit * np.sin(2 * np.pi * time)
    texture = (generator.uniform(0.08, 0.16), generator.uniform(0, np.pi), generator.uniform(0.15, 0.35))
    return MovingShape(color=color, shape=shape, motion=motion, texture=texture, x=x, y=y, radius=radius, angle=angle)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything a clip shows: its objects, the last one on top, and the background that drifts behind them."""

    objects: list[MovingShape]
    background: Image.Image
    drift: NDArray[np.float64]  # [2], x and y, pixels per frame

    def render(self, frame: int) -> NDArray[np.uint8]:
        """Draw one frame, uint8 [H, W, 3]."""
        left = WIDTH / 2 + self.drift[0] * (frame - NUM_FRAMES / 2)
        top = HEIGHT / 2 + self.drift[1] * (frame - NUM_FRAMES / 2)
        window = (1, 0, float(left), 0, 1, float(top))
        view = self.background.transform((WIDTH, HEIGHT), Image.Transform.AFFINE, window, Image.Resampling.BILINEAR)
        pixels = np.asarray(view, np.float32)
        grid_y, grid_x = np.mgrid[:HEIGHT, :WIDTH]
        for obj in self.objects:
            coverage = obj.coverage(frame)[..., None]
            per_pixel, direction, strength = obj.texture
            direction = direction + obj.angle[frame]
            along = (grid_x - obj.x[frame]) * np.cos(direction) + (grid_y - obj.y[frame]) * np.sin(direction)
            shade = 1 - strength * (0.5 + 0.5 * np.sin(2 * np.pi * per_pixel * along))
            pixels = pixels * (1 - coverage) + coverage * (shade[..., None] * COLORS[obj.color])
        rendered: NDArray[np.uint8] = np.clip(pixels, 0, 255).round().astype(np.uint8)
        return rendered


def sample_objects(generator: Generator, num_objects: int) -> list[MovingShape]:
    """Draw the objects of a clip at random. No two share a colour or a shape."""
    colors = generator.permutation(list(COLORS))[:num_objects]
    shapes = generator.permutation(SHAPES)[:num_objects]
    motions = generator.choice(MOTIONS, num_objects)
    return [sample_object(generator, str(m), str(c), str(s)) for m, c, s in zip(motions, colors, shapes, strict=True)]


def sample_scene(generator: Generator, num_objects: int, camera: Camera = "drifting") -> Scene:
    """Draw a scene at random. One state of the generator gives the same objects and background to every camera."""
    objects = sample_objects(generator, num_objects)
    background = _sample_background(generator, 2 * WIDTH, 2 * HEIGHT)
    drift = generator.uniform(-1.2, 1.2, 2)
    if camera == "still":
        drift = np.zeros(2)
    elif camera == "panning":  # as fast as most objects: 2.5 to 3.5 pixels per frame to one side
        drift = np.array([np.copysign(3 + drift[0] % 1 - 0.5, drift[0]), drift[1] / 4])
    return Scene(objects=objects, background=background, drift=drift)


def render_clip(
    generator: Generator, num_objects: int, camera: Camera = "drifting"
) -> tuple[NDArray[np.uint8], list[MovingShape]]:
    """Return the frames uint8 [T, H, W, 3] of a random scene, and its objects."""
    scene = sample_scene(generator, num_objects, camera)
    return np.stack([scene.render(frame) for frame in range(NUM_FRAMES)]), scene.objects


def regenerate_objects(seed: int, index: int, num_objects: int) -> list[MovingShape]:
    """Return the objects of clip `index` of the data set generated from `seed`, without drawing a frame."""
    return sample_objects(_generator(seed, index), num_objects)


def write_clip(
    index: int,
    *,
    out: Path,
    seed: int,
    codec: Literal["h264", "vp9"],
    num_objects: int,
    camera: Camera = "drifting",
) -> list[MovingShape]:
    """Draw and encode clip `index` as out/videos/<index><suffix>. Returns its objects."""
    frames, objects = render_clip(_generator(seed, index), num_objects, camera)
    encode_frames(str(out / clip_path(index, codec)), frames, codec)
    return objects


def encode_frames(
    file: str | BinaryIO, frames: Iterable[NDArray[np.uint8]], codec: Literal["h264", "vp9"], **options: str
) -> None:
    """Encode frames uint8 [H, W, 3] as the data set's videos are, on one thread; `options` override the encoder's."""
    suffix, encoder, defaults = CODECS[codec]
    with av.open(file, "w", format=suffix.removeprefix(".")) as container:
        stream = container.add_stream(encoder, rate=FPS, options={**defaults, **options})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def clip_path(index: int, codec: str) -> str:
    return f"videos/{index:05d}{CODECS[codec][0]}"


def make_shapes(
    out: Path, *, count: int, seed: int, codec: Literal["h264", "vp9"], num_objects: int, num_workers: int,
    camera: Camera = "drifting",
) -> IndexResult:  # fmt: skip
    """Write `count` clips, captions.csv, boxes.parquet and manifest.parquet into `out`.

    Every fifth clip belongs to the split "val", the others to "train". With one seed, data sets of different cameras
    show the same objects in front of the same backgrounds. Raises ValueError for impossible counts.
    """
    if count < 1 or num_objects not in (1, 2):
        raise ValueError(f"expected at least one clip and 1 or 2 objects, got {count} and {num_objects}")
    (out / "videos").mkdir(parents=True, exist_ok=True)
    work = partial(write_clip, out=out, seed=seed, codec=codec, num_objects=num_objects, camera=camera)
    found = map_in_workers(work, range(count), num_workers, lambda index: clip_path(index, codec))
    clips = []
    for _, objects in progress_bar(found, total=count, desc="drawing", unit="clip"):
        if isinstance(objects, Death):
            raise WorkersFailed(f"{out}: {objects}")
        clips.append(objects)

    with (out / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", *(f"caption{number}" for number in range(num_objects))])
        for index, objects in enumerate(clips):
            split = "val" if index % 5 == 4 else "train"
            writer.writerow([clip_path(index, codec), objects[0].motion, split, *(obj.caption for obj in objects)])
    rows = [
        {
            "path": clip_path(index, codec),
            "caption": number,  # number of the caption that names the object
            "color": obj.color,
            "shape": obj.shape,
            "motion": obj.motion,
            "boxes": [list(obj.box(frame)) for frame in range(NUM_FRAMES)],
        }
        for index, objects in enumerate(clips)
        for number, obj in enumerate(objects)
    ]
    schema = pa.schema(
        [(name, pa.string()) for name in ("path", "color", "shape", "motion")]
        + [("caption", pa.int32()), ("boxes", pa.list_(pa.list_(pa.int16(), 4)))],
        # `truth.read_objects` regenerates the objects from these.
        metadata={"seed": str(seed), "num_objects": str(num_objects)},
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out / "boxes.parquet", compression="zstd")
    return index_folder(
        out, out / "manifest.parquet", csv_path=out / "captions.csv", caption_source="shapes", num_workers=num_workers
    )


def _outline(shape: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the angles and radii of the corners of a shape of radius 1. A circle is a polygon of 48."""
    match shape:
        case "circle":
            return np.linspace(0, 2 * np.pi, 48, endpoint=False), np.ones(48)
        case "star":
            return np.linspace(0, 2 * np.pi, 10, endpoint=False), np.tile([1.0, 0.42], 5)
        case "cross":
            arm = np.arctan2(0.33, 1.0)
            offsets = np.array([-arm, arm, np.pi / 4])
            angles = (np.arange(4)[:, None] * np.pi / 2 + offsets).ravel()
            return angles, np.tile([1.0, 1.0, 0.33 * np.sqrt(2)], 4)
        case _:
            corners = {"triangle": 3, "square": 4}[shape]
            return np.linspace(0, 2 * np.pi, corners, endpoint=False), np.ones(corners)


def _generator(seed: int, index: int) -> Generator:
    """Return the generator of everything random in clip `index`. `sample_objects` must draw from it first."""
    return np.random.default_rng((seed, index))


def _sample_background(generator: Generator, width: int, height: int) -> Image.Image:
    """Draw a muted texture: noise with grain of three sizes around a randomly tinted grey."""
    total = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 90), (12, 14), (40, 6)):
        grain = generator.uniform(-1, 1, (cells * height // width + 1, cells, 3)).astype(np.float32)
        grain = 0.35 * grain + 0.65 * grain.mean(axis=2, keepdims=True)
        planes = [Image.fromarray(plane) for plane in np.moveaxis(grain, 2, 0)]
        smooth = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
        total += strength * np.stack(smooth, axis=2)
    tint = generator.uniform(85, 135) + generator.uniform(-12, 12, 3)
    return Image.fromarray(np.clip(total + tint, 0, 255).astype(np.uint8))
