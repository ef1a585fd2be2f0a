"""Maps of whole videos on disk: computed once by a command of tgmae-data, read clip by clip in training.

A folder of maps holds

    maps.json           what the maps depend on; maps that depend on something else are refused
    part-00000.arrow    PART_VIDEOS videos each, written whole or not at all: a killed run goes on behind them

and each video has one array, of any shape and of the folder's dtype.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from tgmae.files import replacing, write_atomically
from tgmae.manifest import Manifest
from tgmae.types import CropBox, SkippedVideo, Video

PART_VIDEOS = 64
# digest: of what the maps of this video depend on (`digest_videos`); shape: empty where the video could not be read
_SCHEMA = pa.schema(
    [("path", pa.string()), ("digest", pa.string()), ("shape", pa.list_(pa.int32())), ("maps", pa.large_binary())]
)
_KEY_FILE = "maps.json"
_STALE_S = 3600  # after which no process can still be writing a part

Key = dict[str, str | int]  # has "dtype", and what else the maps of a folder depend on
# The maps of each of the given rows in turn, or the reason why there are none.
Compute = Callable[[list[int]], Iterator[NDArray[np.generic] | str]]


@dataclass(frozen=True)
class BuildResult:
    num_videos: int  # done now
    num_reused: int  # found in parts written before
    skipped: list[SkippedVideo]
    num_bytes: int  # of this process's parts
    seconds: float


class MapFolder:
    """The maps of one folder, read as they are needed; in memory is only where each video's maps lie.

    command  what makes such a folder, for messages

    Raises FileNotFoundError or ValueError where `folder` holds no maps.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command, self.key = folder, command, _read_key(folder, command)
        self._place: dict[str, tuple[Path, int, str]] = {}  # by path: part, row, digest
        self.unreadable: set[str] = set()  # paths of videos that could not be read
        for part in sorted(folder.glob("part-*.arrow")):
            table = self._open_part(part)
            columns = (table.column(name).to_pylist() for name in ("path", "digest", "shape"))
            for row, (path, digest, shape) in enumerate(zip(*columns, strict=True)):
                self._place[path] = (part, row, digest)
                if not shape:
                    self.unreadable.add(path)
        self._open: dict[Path, pa.Table] = {}

    def check(self, wanted: Key) -> None:
        """Raise ValueError, naming what differs, where the maps depend on something else."""
        _check_key(self.folder, wanted, self.key, self.command)

    def check_videos(self, manifest: Manifest, digests: Sequence[str]) -> str:
        """Raise ValueError where videos have no maps, or for another digest; returns what the user should know."""
        paths = manifest.table.column("path").to_pylist()
        missing = [
            path for path, digest in zip(paths, digests, strict=True) if self._place.get(path, ("", 0, ""))[2] != digest
        ]
        if missing:
            raise ValueError(
                f"{self.folder} has no maps, or maps of other videos or captions, for {len(missing)} of "
                f"{len(manifest)} videos, such as {', '.join(missing[:3])}; {self.command} with that folder adds them"
            )
        lost = sorted(self.unreadable.intersection(paths))
        return (
            f"{len(lost)} videos could not be read when {self.folder} was made, such as {', '.join(lost[:3])}; "
            f"where they can be read now, run {self.command} again"
        ) * bool(lost)

    def read(self, path: str) -> NDArray[np.generic]:
        """A video's maps, without copying. Raises ValueError where it could not be read when they were made."""
        part, row, _ = self._place[path]
        if part not in self._open:
            self._open[part] = self._open_part(part)
        table = self._open[part]
        shape = table.column("shape")[row].as_py()
        if not shape:
            raise ValueError(f"{path} could not be read when {self.folder} was made; run {self.command} again")
        dtype = np.dtype(str(self.key["dtype"]))
        maps: NDArray[np.generic] = np.frombuffer(table.column("maps")[row].as_buffer(), dtype).reshape(shape)
        return maps

    def _open_part(self, part: Path) -> pa.Table:
        """Memory-mapped. A rename makes a part, so one that cannot be read is damaged."""
        try:
            return pa.ipc.open_file(pa.memory_map(str(part))).read_all()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{part} is damaged ({error}); remove it and run {self.command} again") from error


def digest_videos(manifest: Manifest, *columns: str) -> list[str]:
    """For each video, a digest of the given columns of the manifest and of what tells one recording from another.

    The date is left out: a copy of a data set has new ones.
    """
    names = ("num_frames", "width", "height", "rotation", "num_bytes", *columns)
    rows = zip(*(manifest.table.column(name).to_pylist() for name in names), strict=True)
    return [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12] for row in rows]


def write_maps(
    manifest: Manifest, digests: Sequence[str], out: Path, key: Key, command: str, compute: Compute,
    share: int = 0, shares: int = 1,
) -> BuildResult:  # fmt: skip
    """Write the parts `share`, `share` + `shares`, … of a manifest's maps that are not there yet.

    Raises ValueError where `out` holds maps that depend on something else.
    """
    started = time.perf_counter()
    _write_key(out, key, command)
    parts = range(share, -(-len(manifest) // PART_VIDEOS), shares)
    rows_of = {part: range(part * PART_VIDEOS, min((part + 1) * PART_VIDEOS, len(manifest))) for part in parts}
    for part in parts:  # what a killed run left behind
        for half_written in out.glob(f"{_part_path(out, part).name}.*.tmp"):
            if time.time() - half_written.stat().st_mtime > _STALE_S:
                half_written.unlink()
    todo = [part for part in parts if not _is_done(_part_path(out, part), manifest, digests, rows_of[part])]
    rows = [row for part in todo for row in rows_of[part]]
    results = compute(rows)
    skipped: list[SkippedVideo] = []
    bar = tqdm(total=len(rows), desc=command.split()[-1], unit="video")
    for part in todo:
        records: list[dict[str, object]] = []
        for row in rows_of[part]:
            maps, shape, path = next(results), [], manifest[row].path
            if isinstance(maps, str):
                skipped.append(SkippedVideo(row=row, path=path, reason=maps))
                data = b""
            else:
                assert maps.dtype == key["dtype"]
                data, shape = maps.tobytes(), list(maps.shape)
            records.append({"path": path, "digest": digests[row], "shape": shape, "maps": data})
            bar.update()
        _write_part(_part_path(out, part), records)
    bar.close()
    num_bytes = sum(_part_path(out, part).stat().st_size for part in parts)
    reused = sum(len(rows_of[part]) for part in parts) - len(rows)
    return BuildResult(len(rows) - len(skipped), reused, skipped, num_bytes, time.perf_counter() - started)


def crop_weights(
    video: Video, crop: CropBox, flip: bool, grid: tuple[int, ...], side: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bilinear weights of a map's rows and columns at the patch centres of a crop: float32 [side, Y], [side, X].

    The map's cells divide the whole picture evenly. Beyond the outermost cell centres the outermost cells hold.
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


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.arrow"


def _is_done(path: Path, manifest: Manifest, digests: Sequence[str], rows: range) -> bool:
    """Whether a part holds just these rows, for just these digests; one with an unreadable video is tried again."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    paths, found, shapes = (table.column(name).to_pylist() for name in ("path", "digest", "shape"))
    wanted = manifest.table.column("path").slice(rows.start, len(rows)).to_pylist()
    return paths == wanted and found == [digests[row] for row in rows] and all(shapes)


def _write_part(path: Path, records: list[dict[str, object]]) -> None:
    with replacing(path) as temporary, pa.ipc.new_file(temporary, _SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(records, schema=_SCHEMA))


def _read_key(folder: Path, command: str) -> Key:
    path = folder / _KEY_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no maps in {folder}; make them with: {command} MANIFEST --out {folder}")
    try:
        key = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} does not describe maps: {error}") from error
    if not isinstance(key, dict) or "dtype" not in key:
        raise ValueError(f"{path} does not describe maps: it has no dtype")
    return key


def _write_key(folder: Path, key: Key, command: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _KEY_FILE
    if path.exists():
        _check_key(folder, key, _read_key(folder, command), command)
        return
    write_atomically(path, (json.dumps(key, indent=2) + "\n").encode())


def _check_key(folder: Path, wanted: Key, found: Key, command: str) -> None:
    names = dict.fromkeys([*found, *wanted])
    differing = [
        f"{name} {found.get(name)} (now {wanted.get(name)})" for name in names if wanted.get(name) != found.get(name)
    ]
    if differing:
        raise ValueError(
            f"the maps in {folder} were made with {', '.join(differing)}; make them anew in another folder with "
            f"{command}, or choose the settings they were made with"
        )
