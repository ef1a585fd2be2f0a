"""How the pictures of a batch move from frame to frame of their clips, from the motion vectors that
`tgmae-data motion` keeps.

Dimensions: B clips, T frames, J video frames from one clip frame to the next, Y X cells, P points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.types import ClipBatch, ClipRequest, Video
from dali_pipelines.video.motion import BLOCK, CODECS, UNIT
from tgmae.data.manifest import Manifest
from tgmae.masks.maps.store import Key, MapFolder, digest_videos

COMMAND = "tgmae-data motion"
MOTION_KEY: Key = {"dtype": "int8", "compression": "zstd", "maps": "motion vectors", "cell": BLOCK, "unit": str(UNIT)}
_MOST_STEPS = 16  # video frames followed back from a clip frame: with uniform sampling the one before may be far off


@dataclass(frozen=True)
class MotionField:
    """How far the picture has moved since the clip frame before, and where a clip's crop lies in it.

    vectors  float32 [B, T, 2, Y, X], right and down, in pixels; the first frame's are since as long before it
    steps    float32 [B, T], video frames since then
    moves    bool [B, T], false where a short video's last frame is repeated: its vectors are those that led to it, and
             lead nowhere now
    grids    float32 [B, 2], columns and rows that hold a clip's motion; what lies beyond is padding
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
        """side² points spread evenly over each clip's crop, in the order of its pixels: float32 [B, side², 2]."""
        place = (torch.arange(side, device=self.crops.device) + 0.5) / side
        across = torch.where(self.flips[:, None], 1 - place, place) * self.crops[:, 2:3] + self.crops[:, 0:1]
        down = place * self.crops[:, 3:4] + self.crops[:, 1:2]
        shape = (len(self.crops), side, side)
        return torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], -1).flatten(1, 2)

    def at(self, frame: int | slice, points: Tensor) -> Tensor:
        """The vectors of some frames at points [B, P, 2] or [B, frames, P, 2]: float32 [B, frames, P, 2]."""
        chosen = self.vectors[:, frame] if isinstance(frame, slice) else self.vectors[:, frame : frame + 1]
        if points.dim() == 3:
            points = points[:, None].expand(-1, chosen.shape[1], -1, -1)
        places = (points - self.origin[:, None, None]) / self.cell
        places = torch.minimum(places, self.grids[:, None, None] - 1)
        return sample_cells(chosen.flatten(0, 1), places.flatten(0, 1)).view_as(places)


def sample_cells(cells: Tensor, places: Tensor) -> Tensor:
    """Bilinear values of cells [M, 2, Y, X] at places [M, P, 2] (x, y in cells) → [M, P, 2]; the border goes on.

    torch's grid_sample would do, but rounds by the size of the grid: here a clip's values do not depend on how far the
    grids of its batch are padded.
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
    """Follow every cell back over the frames between two clip frames and add up how far it moved.

    motion  [B, T, J, 2, Y, X] in cells: [:, i, j] leads to the video frame j before clip frame i, from the one before
            it        steps  [B, T], how many of the J lie since the clip frame before

    Returns [B, T, 2, Y, X] in cells.
    """
    rows, columns = motion.shape[-2:]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    start = torch.stack([x, y], -1).view(1, -1, 2).to(motion)
    fields, count = motion.flatten(0, 1), steps.flatten()
    # The first step is read off the cell itself, the others between cells.
    place = start - fields[:, 0].flatten(2).transpose(1, 2)
    for step in range(1, motion.shape[2]):
        place = place - sample_cells(fields[:, step], place) * (step < count)[:, None, None]
    return (start - place).transpose(1, 2).reshape(*motion.shape[:2], 2, rows, columns)


class CodecMotion:
    """Motion fields from a folder that `tgmae-data motion` wrote.

    note   what the user should know, "" for nothing

    Raises ValueError where the folder does not fit the videos, or their codec carries no motion.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        self.manifest, self.device = manifest, device
        self.maps = MapFolder(folder, COMMAND)
        self.maps.check(MOTION_KEY)
        self.maps.check_videos(manifest, digest_videos(manifest))
        columns = (manifest.table.column(name).to_pylist() for name in ("path", "codec"))
        without = [(path, codec) for path, codec in zip(*columns, strict=True) if path in self.maps.unreadable]
        if silent := [f"{path} ({codec})" for path, codec in without if codec not in CODECS]:
            raise ValueError(
                f"{len(silent)} of {len(manifest)} videos carry no motion vectors ({' and '.join(CODECS)} do), such as "
                f"{', '.join(silent[:3])}; re-encode the data set with: tgmae-data compact MANIFEST --out FOLDER"
            )
        self.note = (
            f"{len(without)} videos gave no motion when {folder} was made, such as "
            f"{', '.join(path for path, _ in without[:3])}; their masks are random"
        ) * bool(without)

    def __call__(self, clips: ClipBatch) -> MotionField:
        requests = clips.requests
        videos = [self.manifest[request.row] for request in requests]
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
        """The motion that leads to each of a clip's frames and to the `most` - 1 before it, int8 [T, J, 2, Y, X]."""
        if video.path in self.maps.unreadable:
            return np.zeros((len(request.frames), most, 2, 1, 1), np.int8)
        maps = self.maps.read(video.path)
        frames = np.array(request.frames)[:, None] - np.arange(most)
        window: NDArray[np.int8] = maps[np.clip(frames, 0, len(maps) - 1)].astype(np.int8, copy=False)
        return window


def frame_steps(request: ClipRequest) -> NDArray[np.int64]:
    """Video frames from each of a clip's frames back to the one before, at least 1, int64 [T].

    The first is given the second's; where the last frame is repeated, its own holds.
    """
    steps = np.diff(np.array(request.frames), prepend=request.frames[0])
    steps[0] = steps[1] if len(steps) > 1 else 1
    for frame in range(1, len(steps)):
        if not steps[frame]:
            steps[frame] = steps[frame - 1]
    return np.clip(steps, 1, _MOST_STEPS)


def is_new(request: ClipRequest) -> NDArray[np.bool_]:
    """Which of a clip's frames are not the one before again, bool [T]."""
    frames = np.array(request.frames)
    return np.append(True, frames[1:] != frames[:-1])


def first_centre(video: Video) -> tuple[float, float]:
    """Where the centre of a motion grid's first cell lies in the upright picture, x and y in pixels.

    The codec's blocks begin at the coded picture's top left; where it is turned, the cells that stick out at its right
    and bottom come to lie at the left or top.
    """
    over_x, over_y = (-video.width) % BLOCK, (-video.height) % BLOCK
    x = over_x if video.rotation in (90, 180) else 0
    y = over_y if video.rotation in (180, 270) else 0
    return BLOCK / 2 - x, BLOCK / 2 - y


def _pad(windows: list[NDArray[np.int8]]) -> NDArray[np.int8]:
    """One array of windows of several grid sizes; what is added repeats the border."""
    rows, columns = (max(window.shape[axis] for window in windows) for axis in (3, 4))
    out = np.empty((len(windows), *windows[0].shape[:3], rows, columns), np.int8)
    for target, window in zip(out, windows, strict=True):
        y, x = window.shape[3:]
        target[..., :y, :x] = window
        target[..., :y, x:] = window[..., -1:]
        target[..., y:, :] = target[..., y - 1 : y, :]
    return out
