"""How the clips of a batch move from frame to frame, from the motion vectors that `tgmae-data motion` keeps.

Dimensions: B clips, T frames, J video frames from one clip frame to the next, Y X cells, P points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.types import ClipBatch, ClipRequest, Video
from dali_pipelines.video.motion import BLOCK, CODECS, UNIT
from tgmae.data.manifest import Manifest, count_videos
from tgmae.masks.maps.store import Key, MapFolder, digest_videos

COMMAND = "tgmae-data motion"
MOTION_KEY: Key = {"dtype": "int8", "compression": "zstd", "maps": "motion vectors", "cell": BLOCK, "unit": str(UNIT)}
# video frames followed back from a clip frame: with uniform sampling, the previous one may be far away
_MOST_STEPS = 16


@dataclass(frozen=True)
class MotionField:
    """How far each place has moved since the previous clip frame, and where the crop of each clip lies.

    vectors  float32 [B, T, 2, Y, X], right and down, in pixels; the first frame looks back as far as the second
    steps    float32 [B, T], video frames since the previous clip frame
    moves    bool [B, T], false where the last frame of a short video is repeated: its vectors are those that led to
             it, and nothing moves any more
    grids    float32 [B, 2], columns and rows that hold the clip's motion; the rest is padding
    origin   float32 [B, 2], x and y of the centre of the first cell, in pixels
    cell     pixels from one cell's centre to the next
    crops    float32 [B, 4], x, y, width and height in pixels        flips  bool [B]
    """

    vectors: Tensor
    steps: Tensor
    moves: Tensor
    grids: Tensor
    origin: Tensor
    cell: float
    crops: Tensor
    flips: Tensor

    def points(self, side: int) -> Tensor:
        """Return side² points spread evenly over each clip's crop, in pixel order: float32 [B, side², 2]."""
        place = (torch.arange(side, device=self.crops.device) + 0.5) / side
        across = torch.where(self.flips[:, None], 1 - place, place) * self.crops[:, 2:3] + self.crops[:, 0:1]
        down = place * self.crops[:, 3:4] + self.crops[:, 1:2]
        shape = (len(self.crops), side, side)
        return torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], -1).flatten(1, 2)

    def at(self, frame: int | slice, points: Tensor) -> Tensor:
        """Read the vectors of some frames at points [B, P, 2] or [B, frames, P, 2]: float32 [B, frames, P, 2]."""
        chosen = self.vectors[:, frame] if isinstance(frame, slice) else self.vectors[:, frame : frame + 1]
        if points.dim() == 3:
            points = points[:, None].expand(-1, chosen.shape[1], -1, -1)
        places = (points - self.origin[:, None, None]) / self.cell
        places = torch.minimum(places, self.grids[:, None, None] - 1)
        return sample_cells(chosen.flatten(0, 1), places.flatten(0, 1)).view_as(places)


def sample_cells(cells: Tensor, places: Tensor) -> Tensor:
    """Interpolate cells [M, 2, Y, X] bilinearly at places [M, P, 2] (x, y in cells) → [M, P, 2]; the border is
    extended.

    torch's grid_sample rounds by the size of the grid. Here the values of a clip do not depend on how far the grids of
    its batch are padded.
    """
    rows, columns = cells.shape[2:]
    flat = cells.flatten(2).transpose(1, 2)  # [M, Y·X, 2]
    x, y = places[..., 0].clamp(0, columns - 1), places[..., 1].clamp(0, rows - 1)
    left, top = x.long(), y.long()
    right, below = (left + 1).clamp(max=columns - 1), (top + 1).clamp(max=rows - 1)

    def read(row: Tensor, column: Tensor) -> Tensor:
        return flat.gather(1, (row * columns + column)[..., None].expand(-1, -1, 2))

    across, down = (x - left)[..., None], (y - top)[..., None]
    upper, lower = (torch.lerp(read(row, left), read(row, right), across) for row in (top, below))
    return torch.lerp(upper, lower, down)


def compose(motion: Tensor, steps: Tensor) -> Tensor:
    """Follow every cell back over the frames between two clip frames, and add up how far it moved.

    motion  [B, T, J, 2, Y, X] in cells: [:, i, j] leads to the video frame j frames before clip frame i, from the frame
            before that        steps  [B, T], how many of the J lie since the previous clip frame

    Returns [B, T, 2, Y, X] in cells.
    """
    rows, columns = motion.shape[-2:]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    start = torch.stack([x, y], -1).view(1, -1, 2).to(motion)
    fields, count = motion.flatten(0, 1), steps.flatten()
    # The first step is read from the cell itself, the later ones between cells.
    place = start - fields[:, 0].flatten(2).transpose(1, 2)
    for step in range(1, motion.shape[2]):
        place = place - sample_cells(fields[:, step], place) * (step < count)[:, None, None]
    return (start - place).transpose(1, 2).reshape(*motion.shape[:2], 2, rows, columns)


def leave_out_motionless(manifest: Manifest) -> tuple[Manifest, str]:
    """Return the videos whose codec carries motion vectors, and a note about the others, "" for none.

    Raises ValueError where no video is left.
    """
    has_motion = [codec in CODECS for codec in manifest.table.column("codec").to_pylist()]
    if not any(has_motion):
        raise ValueError(f"none of {count_videos(len(manifest))} has motion vectors ({' and '.join(CODECS)} do)")
    count = len(manifest) - sum(has_motion)
    note = f"{count_videos(count)} without motion vectors {'is' if count == 1 else 'are'} left out" * bool(count)
    return Manifest(manifest.table.filter(pa.array(has_motion)), manifest.root), note


class CodecMotion:
    """Motion fields from a folder that `tgmae-data motion` wrote.

    note   what the user should know, "" for nothing

    Raises ValueError where the folder does not fit the videos, or their codec carries no motion.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        self.device = device
        self.maps = MapFolder(folder, COMMAND)
        self.maps.check(MOTION_KEY)
        self.maps.check_videos(manifest, digest_videos(manifest), _shapes_of(manifest))
        codecs = zip(manifest.names(), manifest.table.column("codec").to_pylist(), strict=True)
        without = [(name, codec) for name, codec in codecs if name in self.maps.unreadable]
        if silent := [f"{path} ({codec})" for path, codec in without if codec not in CODECS]:
            has = "has" if len(silent) == 1 else "have"
            exclude = "leave them out with --mask.no-motion exclude, or " * (len(silent) < len(manifest))
            raise ValueError(
                f"{len(silent)} of {count_videos(len(manifest))} {has} no motion vectors ({' and '.join(CODECS)} do), "
                f"such as {', '.join(silent[:3])}; {exclude}re-encode the data set with: "
                "tgmae-data compact MANIFEST --out FOLDER"
            )
        self.note = (
            f"{count_videos(len(without))} had no motion when {folder} was made, such as "
            f"{', '.join(path for path, _ in without[:3])}; their masks are random"
        ) * bool(without)

    def __call__(self, clips: ClipBatch) -> MotionField:
        requests, videos = clips.requests, clips.videos
        steps = np.stack([frame_steps(request) for request in requests])
        most = int(steps.max())
        windows = [self._window(video, request, most) for video, request in zip(videos, requests, strict=True)]
        motion = torch.from_numpy(_pad(windows)).to(self.device, non_blocking=True)
        count = torch.from_numpy(steps).to(self.device, non_blocking=True)
        vectors = compose(motion.float() * (UNIT / BLOCK), count) * BLOCK
        crops = [(r.crop.x, r.crop.y, r.crop.width, r.crop.height) for r in requests]
        return MotionField(
            vectors=vectors,
            steps=count.float(),
            moves=torch.from_numpy(np.stack([is_new(request) for request in requests])).to(self.device),
            grids=torch.tensor([window.shape[:2:-1] for window in windows], dtype=torch.float32, device=self.device),
            origin=torch.tensor([first_centre(video) for video in videos], device=self.device),
            cell=BLOCK,
            crops=torch.tensor(crops, dtype=torch.float32, device=self.device),
            flips=torch.tensor([request.flip for request in requests], device=self.device),
        )

    def _window(self, video: Video, request: ClipRequest, most: int) -> NDArray[np.int8]:
        """Return the motion up to each clip frame and up to the `most` - 1 frames before it: int8 [T, J, 2, Y, X]."""
        if video.name in self.maps.unreadable:
            return np.zeros((len(request.frames), most, 2, 1, 1), np.int8)
        maps = self.maps.read(video.name)
        frames = np.array(request.frames)[:, None] - video.start - np.arange(most)
        window: NDArray[np.int8] = maps[np.clip(frames, 0, len(maps) - 1)].astype(np.int8, copy=False)
        return window


def _shapes_of(manifest: Manifest) -> list[tuple[int, ...]]:
    """Return the shape of every row's motion, frames, 2, rows and columns, from the manifest's columns."""
    names = ("start_frame", "end_frame", "width", "height")
    rows = zip(*(manifest.table.column(name).to_pylist() for name in names), strict=True)
    return [(end - start, 2, -(-height // BLOCK), -(-width // BLOCK)) for start, end, width, height in rows]


def frame_steps(request: ClipRequest) -> NDArray[np.int64]:
    """Return the video frames from each frame of a clip back to the previous one, at least 1: int64 [T].

    The first frame takes the second's value. A repeated last frame keeps its own.
    """
    steps = np.diff(np.array(request.frames), prepend=request.frames[0])
    steps[0] = steps[1] if len(steps) > 1 else 1
    for frame in range(1, len(steps)):
        if not steps[frame]:
            steps[frame] = steps[frame - 1]
    return np.clip(steps, 1, _MOST_STEPS)


def is_new(request: ClipRequest) -> NDArray[np.bool_]:
    """Return which frames of a clip are not a repetition of the previous one: bool [T]."""
    frames = np.array(request.frames)
    return np.append(True, frames[1:] != frames[:-1])


def first_centre(video: Video) -> tuple[float, float]:
    """Return where the centre of a motion grid's first cell lies in the upright frame, x and y in pixels.

    The codec's blocks start at the top left of the coded frame. Where that is turned or mirrored, the cells that stick
    out at its right and bottom end up at the left or top.
    """
    over_x, over_y = (-video.width) % BLOCK, (-video.height) % BLOCK
    x = over_x if (video.rotation in (90, 180)) != video.mirrored else 0
    y = over_y if video.rotation in (180, 270) else 0
    return BLOCK / 2 - x, BLOCK / 2 - y


def _pad(windows: list[NDArray[np.int8]]) -> NDArray[np.int8]:
    """Stack windows of several grid sizes into one array; the padding repeats the border."""
    rows, columns = (max(window.shape[axis] for window in windows) for axis in (3, 4))
    out = np.empty((len(windows), *windows[0].shape[:3], rows, columns), np.int8)
    for target, window in zip(out, windows, strict=True):
        y, x = window.shape[3:]
        target[..., :y, :x] = window
        target[..., :y, x:] = window[..., -1:]
        target[..., y:, :] = target[..., y - 1 : y, :]
    return out
