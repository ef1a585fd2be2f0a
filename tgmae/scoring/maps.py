"""Score maps of whole videos, computed once: `tgmae-data scores` writes them, mask.scorer cached reads them.

A map covers the whole picture with square cells, as many along the short side as a clip has patches; there is one for
every `every`-th frame and every caption, in float16. A clip's scores are the map under its own crop, bilinear at the
centres of its patches, so cropping, flipping and resizing follow from the request.

    scores/cache.json          what the maps depend on: CLIP's fingerprint, tower, geometry, captions
    scores/part-00000.arrow    PART_VIDEOS videos each, written whole or not at all: a killed run goes on behind them

Dimensions: F scored frames, C captions of a video, Y X cells, S slots, K scored frames a slot, N patches a slot.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.clip import load_clip
from tgmae.config import InputConfig
from tgmae.manifest import Manifest
from tgmae.scoring.captions import captions_digest
from tgmae.types import ClipBatch, ClipRequest, CropBox, Video

PART_VIDEOS = 64
SCHEMA = pa.schema(
    [("path", pa.string()), ("captions", pa.string()), ("shape", pa.list_(pa.int32(), 4)), ("maps", pa.large_binary())]
)  # captions: their digest; shape: F, C, Y, X, all 0 where the video could not be read; maps: float16 in that order


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What score maps depend on, beside pictures and captions."""

    clip: str  # fingerprint of its weights
    tower: str  # name of the tower; tells the scorer, and for dense the last block
    patch_size: int  # pixels
    cells: int  # along the short side
    every: int  # frames between two maps

    def path(self, folder: Path) -> Path:
        return folder / "cache.json"

    def check(self, folder: Path, found: CacheKey) -> None:
        """Raise ValueError, naming what differs, where the maps in `folder` depend on something else."""
        wanted, there = asdict(self), asdict(found)
        differing = [f"{name} {there[name]} (now {wanted[name]})" for name in wanted if wanted[name] != there[name]]
        if differing:
            raise ValueError(
                f"the scores in {folder} were made with {', '.join(differing)}; make them anew in another folder with "
                "tgmae-data scores, or choose the settings they were made with"
            )


def read_key(folder: Path) -> CacheKey:
    """Raises FileNotFoundError or ValueError where `folder` holds no score maps."""
    path = folder / "cache.json"
    if not path.is_file():
        raise FileNotFoundError(f"no score maps in {folder}; make them with: tgmae-data scores MANIFEST --out {folder}")
    try:
        return CacheKey(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not describe score maps: {error}") from error


def write_key(folder: Path, key: CacheKey) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cache.json"
    if path.exists():
        key.check(folder, read_key(folder))
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(key), indent=2) + "\n")
    os.replace(temporary, path)


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.arrow"


class ScoreMaps:
    """The maps of one folder, read as they are needed; nothing is held in memory but where each video's maps lie."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, read_key(folder)
        self._place: dict[tuple[str, str], tuple[Path, int]] = {}
        self.unreadable: set[str] = set()  # paths of videos that have an entry and no maps
        for path in sorted(folder.glob("part-*.arrow")):
            table = _open_part(path)
            names = zip(table.column("path").to_pylist(), table.column("captions").to_pylist(), strict=True)
            self._place.update({name: (path, row) for row, name in enumerate(names)})
            empty = [not shape[0] for shape in table.column("shape").to_pylist()]
            self.unreadable.update(table.column("path").filter(pa.array(empty)).to_pylist())
        self._open: dict[Path, pa.Table] = {}

    def missing(self, manifest: Manifest) -> list[str]:
        """Paths of the manifest's videos that have no maps, or have them for other captions."""
        columns = (manifest.table.column(name).to_pylist() for name in ("path", "captions"))
        return [path for path, texts in zip(*columns, strict=True) if (path, captions_digest(texts)) not in self._place]

    def read(self, video: Video) -> NDArray[np.float16]:
        """[F, C, Y, X], without copying. Raises ValueError where the video could not be read when it was scored."""
        path, row = self._place[video.path, captions_digest(video.captions)]
        if path not in self._open:
            self._open[path] = _open_part(path)
        table = self._open[path]
        shape = table.column("shape")[row].as_py()
        if not shape[0]:
            raise ValueError(
                f"{video.path} could not be read when its scores were made; remove {path} and run tgmae-data scores "
                "again"
            )
        maps: NDArray[np.float16] = np.frombuffer(table.column("maps")[row].as_buffer(), np.float16).reshape(shape)
        return maps


class CachedScorer:
    """A scorer that reads score maps. Raises ValueError where they do not fit CLIP, geometry, videos or captions."""

    def __init__(self, config: InputConfig, manifest: Manifest, device: torch.device) -> None:
        assert config.mask.scores is not None
        self.manifest, self.device = manifest, device
        self.side = config.model.image_size // config.model.patch_size
        self.slots, self.tubelet = config.model.num_slots, config.model.tubelet_size
        self.frames_per_tubelet = config.mask.frames_per_tubelet
        self.maps = ScoreMaps(config.mask.scores)
        found = self.maps.key
        clip, patch_size = load_clip(config.clip).fingerprint, config.model.patch_size
        wanted = CacheKey(clip=clip, tower=found.tower, patch_size=patch_size, cells=self.side, every=found.every)
        wanted.check(config.mask.scores, found)
        if missing := self.maps.missing(manifest):
            raise ValueError(
                f"{config.mask.scores} has no scores, or scores for other captions, for {len(missing)} of "
                f"{len(manifest)} videos, such as {', '.join(missing[:3])}; tgmae-data scores with that folder adds "
                "them"
            )
        lost = self.maps.unreadable.intersection(manifest.table.column("path").to_pylist())
        self.note = (
            f"{len(lost)} videos could not be read when their scores were made, such as {', '.join(sorted(lost)[:3])}; "
            "where they can be read now, run tgmae-data scores again"
        ) * bool(lost)

    def __call__(self, clips: ClipBatch) -> Tensor:
        """float32 [B, S, N]."""
        scores = np.stack([self.score(request) for request in clips.requests])
        return torch.from_numpy(scores).to(self.device, non_blocking=True)

    def score(self, request: ClipRequest) -> NDArray[np.float32]:
        """float32 [S, N] of one clip: the maps nearest to its scored frames, under its crop."""
        video = self.manifest[request.row]
        maps = self.maps.read(video)
        frames = np.array(request.frames).reshape(self.slots, self.tubelet)[:, : self.frames_per_tubelet]
        nearest = np.minimum(np.rint(frames / self.maps.key.every).astype(int), len(maps) - 1)
        chosen = maps[nearest, request.caption].astype(np.float32).mean(1)  # [S, Y, X]
        down, across = crop_weights(video, request.crop, request.flip, chosen.shape[1:], self.side)
        scores: NDArray[np.float32] = (down @ chosen @ across.T).reshape(self.slots, -1)
        return scores


def crop_weights(
    video: Video, crop: CropBox, flip: bool, grid: tuple[int, ...], side: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bilinear weights of a map's rows and columns at the patch centres of a crop: float32 [side, Y], [side, X].

    Beyond the outermost cell centres the outermost cells hold.
    """
    centres = (np.arange(side) + 0.5) / side
    rows = (crop.y + centres * crop.height) / video.height * grid[0] - 0.5
    columns = (crop.x + centres * crop.width) / video.width * grid[1] - 0.5
    return _weights(rows, grid[0]), _weights(columns[::-1] if flip else columns, grid[1])


def _weights(places: NDArray[np.float64], cells: int) -> NDArray[np.float32]:
    """Row i interpolates between the two cells around places[i]."""
    distance = np.abs(np.clip(places, 0, cells - 1)[:, None] - np.arange(cells))
    weights: NDArray[np.float32] = np.maximum(0, 1 - distance).astype(np.float32)
    return weights


def _open_part(path: Path) -> pa.Table:
    """Memory-mapped. Raises ValueError for a file that is no part; a rename makes a part, so this is damage."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run tgmae-data scores again") from error
