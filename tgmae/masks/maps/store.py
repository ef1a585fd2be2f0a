"""Maps of whole videos on disk: computed once by a command of tgmae-data, read clip by clip in training.

A folder of maps holds

    maps.json           what the maps depend on; maps that depend on something else are refused
    part-00000.arrow    PART_VIDEOS videos each, written whole or not at all; of a part that is not finished every video
                        done so far is kept in a journal: a killed run goes on behind it

and each video has one array, of any shape and of the folder's dtype, compressed where maps.json says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engines.files import write_atomically
from tgmae.data.manifest import Manifest

# digest: of what the maps of this video depend on (`digest_videos`); shape: empty where the video could not be read
SCHEMA = pa.schema(
    [("path", pa.string()), ("digest", pa.string()), ("shape", pa.list_(pa.int32())), ("maps", pa.large_binary())]
)
_KEY_FILE = "maps.json"

Key = dict[str, str | int]  # has "dtype", may have "compression" (zstd), and what else the maps of a folder depend on


class MapFolder:
    """The maps of one folder, read as they are needed; in memory is only where each video's maps lie.

    command  what makes such a folder, for messages

    Raises FileNotFoundError or ValueError where `folder` holds no maps.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command, self.key = folder, command, _read_key(folder, command)
        self._place: dict[str, tuple[Path, int]] = {}  # by path: part and row, of the digest that was checked
        self._found: dict[tuple[str, str], tuple[Path, int, bool]] = {}  # by path and digest: and whether it has maps
        for part in sorted(folder.glob("part-*.arrow")):
            table = self._open_part(part)
            columns = (table.column(name).to_pylist() for name in ("path", "digest", "shape"))
            for row, (path, digest, shape) in enumerate(zip(*columns, strict=True)):
                if not self._found.get((path, digest), (part, row, False))[2]:  # a later part may have tried again
                    self._found[path, digest] = (part, row, bool(shape))
                self._place[path] = (part, row)
        readable = {path for (path, _), (_, _, has_maps) in self._found.items() if has_maps}
        self.unreadable = {path for path, _ in self._found} - readable  # of those that are checked, once they are
        self._open: dict[Path, pa.Table] = {}

    def check(self, wanted: Key) -> None:
        """Raise ValueError, naming what differs, where the maps depend on something else."""
        _check_key(self.folder, wanted, self.key, self.command)

    def check_videos(self, manifest: Manifest, digests: Sequence[str]) -> str:
        """Raise ValueError where videos have no maps, or for another digest; returns what the user should know."""
        paths = manifest.table.column("path").to_pylist()
        names = list(zip(paths, digests, strict=True))
        missing = [path for path, digest in names if (path, digest) not in self._found]
        if missing:
            raise ValueError(
                f"{self.folder} has no maps, or maps of other videos or captions, for {len(missing)} of "
                f"{len(manifest)} videos, such as {', '.join(missing[:3])}; {self.command} with that folder adds them"
            )
        self._place |= {name[0]: self._found[name][:2] for name in names}
        self.unreadable = {name[0] for name in names if not self._found[name][2]}
        lost = sorted(self.unreadable)
        return (
            f"{len(lost)} videos could not be read when {self.folder} was made, such as {', '.join(lost[:3])}; "
            f"where they can be read now, run {self.command} again"
        ) * bool(lost)

    def read(self, path: str) -> NDArray[np.generic]:
        """A video's maps, without copying unless they are compressed.

        Raises ValueError where the video could not be read when they were made.
        """
        part, row = self._place[path]
        if part not in self._open:
            self._open[part] = self._open_part(part)
        table = self._open[part]
        shape = table.column("shape")[row].as_py()
        if not shape:
            raise ValueError(f"{path} could not be read when {self.folder} was made; run {self.command} again")
        return _unpack(table.column("maps")[row].as_buffer(), shape, self.key)

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


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.arrow"


def make_record(path: str, digest: str, maps: NDArray[np.generic] | None, key: Key) -> pa.RecordBatch:
    """One video's row of `SCHEMA`; without maps for one that could not be read."""
    data, shape = b"", []
    if maps is not None:
        assert maps.dtype == key["dtype"]
        data, shape = maps.tobytes(), list(maps.shape)
        if "compression" in key:
            data = pa.compress(data, codec=key["compression"], asbytes=True)
    return pa.RecordBatch.from_pylist([{"path": path, "digest": digest, "shape": shape, "maps": data}], schema=SCHEMA)


def _unpack(data: pa.Buffer, shape: list[int], key: Key) -> NDArray[np.generic]:
    dtype = np.dtype(str(key["dtype"]))
    if "compression" in key:
        data = pa.decompress(data, math.prod(shape) * dtype.itemsize, codec=key["compression"])
    maps: NDArray[np.generic] = np.frombuffer(data, dtype).reshape(shape)
    return maps


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


def write_key(folder: Path, key: Key, command: str) -> None:
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
