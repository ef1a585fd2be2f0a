"""Maps of whole videos on disk: computed once by a command of tgmae-data, read clip by clip in training.

A folder of maps holds

    maps.json           what the maps depend on; maps that depend on something else are refused
    part-00000.arrow    PART_VIDEOS videos each, written atomically; a journal keeps every finished video of a part that
                        is not complete, and a killed run resumes after it

Each row of the manifest has one array, of any shape and of the folder's dtype, compressed where maps.json says so.
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
from tgmae.data.manifest import Manifest, count_videos

# path: the name of the row (`Video.name`). digest: of what its maps depend on (`digest_videos`). shape: empty where the
# video could not be read.
SCHEMA = pa.schema(
    [("path", pa.string()), ("digest", pa.string()), ("shape", pa.list_(pa.int32())), ("maps", pa.large_binary())]
)
_KEY_FILE = "maps.json"
FORMAT = 2  # of maps.json and the parts; 1 had no format number and no identity of the CLIP, and is still read
_NOT_COMPARED = ("format", "clip_identity")  # the CLIP is compared by its fingerprint
_SCORES = "score maps"  # what maps.json holds where it does not say: `maps` names any other kind
_LABELS = {"cells": "cells along the short side"}  # of settings whose names in maps.json do not explain themselves

Key = dict[str, str | int]  # has "dtype", may have "compression" (zstd), and whatever else the maps depend on


class MapFolder:
    """The maps of one folder, read as they are needed. Only the places of the maps are kept in memory.

    command  the command that makes such a folder, for messages

    Raises FileNotFoundError or ValueError where `folder` holds no maps.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command, self.key = folder, command, _read_key(folder, command)
        self._place: dict[str, tuple[Path, int]] = {}  # by name: part and row, for the digest that was checked
        self._found: dict[tuple[str, str], tuple[Path, int, bool]] = {}  # by name and digest; and whether it has maps
        for part in sorted(folder.glob("part-*.arrow")):
            table = self._open_part(part)
            columns = (table.column(name).to_pylist() for name in ("path", "digest", "shape"))
            for row, (name, digest, shape) in enumerate(zip(*columns, strict=True)):
                if not self._found.get((name, digest), (part, row, False))[2]:  # a later part may have tried again
                    self._found[name, digest] = (part, row, bool(shape))
                self._place[name] = (part, row)
        readable = {name for (name, _), (_, _, has_maps) in self._found.items() if has_maps}
        self.unreadable = {name for name, _ in self._found} - readable  # `check_videos` narrows it to its videos
        self._open: dict[Path, pa.Table] = {}

    def check(self, wanted: Key) -> None:
        """Raise ValueError, naming what differs, where the maps depend on something else."""
        _check_key(self.folder, wanted, self.key, self.command)

    def check_videos(self, manifest: Manifest, digests: Sequence[str]) -> str:
        """Raise ValueError where videos have no maps, or maps of another digest. Returns what the user should know."""
        names = list(zip(manifest.names(), digests, strict=True))
        missing = [name for name, digest in names if (name, digest) not in self._found]
        if missing:
            raise ValueError(
                f"{self.folder} has no maps, or maps of other videos or captions, for {len(missing)} of "
                f"{len(manifest)} videos, such as {', '.join(missing[:3])}; {self.command} with that folder adds them"
            )
        self._place |= {name[0]: self._found[name][:2] for name in names}
        self.unreadable = {name[0] for name in names if not self._found[name][2]}
        lost = sorted(self.unreadable)
        return (
            f"{count_videos(len(lost))} could not be read when {self.folder} was made, such as {', '.join(lost[:3])}; "
            f"where they can be read now, run {self.command} again"
        ) * bool(lost)

    def read(self, name: str) -> NDArray[np.generic]:
        """Return the maps of a row of the manifest, without copying unless they are compressed.

        Raises ValueError where the video could not be read when they were made.
        """
        part, row = self._place[name]
        if part not in self._open:
            self._open[part] = self._open_part(part)
        table = self._open[part]
        shape = table.column("shape")[row].as_py()
        if not shape:
            raise ValueError(f"{name} could not be read when {self.folder} was made; run {self.command} again")
        return _unpack(table.column("maps")[row].as_buffer(), shape, self.key)

    def _open_part(self, part: Path) -> pa.Table:
        """Map a part into memory. Parts are renamed into place, so one that cannot be read is damaged."""
        try:
            return pa.ipc.open_file(pa.memory_map(str(part))).read_all()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{part} is damaged ({error}); remove it and run {self.command} again") from error


def digest_videos(manifest: Manifest, *columns: str) -> list[str]:
    """Return a digest per row of the given columns and of what tells one recording, or segment, from another.

    The date is left out: a copy of a data set has new dates.
    """
    names = ("num_frames", "width", "height", "rotation", "num_bytes", *columns)
    rows = zip(*(manifest.table.column(name).to_pylist() for name in names), strict=True)
    segments = zip(*(manifest.table.column(name).to_pylist() for name in ("start_frame", "end_frame")), strict=True)
    described = [
        row if segment == (0, row[0]) else (*row, *segment) for row, segment in zip(rows, segments, strict=True)
    ]
    return [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12] for row in described]


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.arrow"


def make_record(name: str, digest: str, maps: NDArray[np.generic] | None, key: Key) -> pa.RecordBatch:
    """Make one row of `SCHEMA`; a video that could not be read has no maps."""
    data, shape = b"", []
    if maps is not None:
        assert maps.dtype == key["dtype"]
        data, shape = maps.tobytes(), list(maps.shape)
        if "compression" in key:
            data = pa.compress(data, codec=key["compression"], asbytes=True)
    return pa.RecordBatch.from_pylist([{"path": name, "digest": digest, "shape": shape, "maps": data}], schema=SCHEMA)


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
    number = key.get("format", 1) if isinstance(key, dict) else 1
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"{path} has format {number}, but this version of tgmae reads formats up to {FORMAT}; update tgmae, or "
            f"make the maps again in another folder with: {command} MANIFEST --out FOLDER"
        )
    if not isinstance(key, dict) or "dtype" not in key:
        raise ValueError(f"{path} does not describe maps: it has no dtype")
    return key


def write_key(folder: Path, key: Key, command: str) -> None:
    """Write maps.json, or compare it where it is there. Raises ValueError where the maps depend on something else.

    A folder made before maps.json held the identity of the CLIP gets it now, so that training need not load CLIP.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _KEY_FILE
    if path.exists():
        found = _read_key(folder, command)
        _check_key(folder, key, found, command)
        if "clip_identity" in found or "clip_identity" not in key:
            return
    write_atomically(path, (json.dumps({"format": FORMAT, **key}, indent=2) + "\n").encode())


def _check_key(folder: Path, wanted: Key, found: Key, command: str) -> None:
    held, needed = (key.get("maps", _SCORES) for key in (found, wanted))
    if held != needed:
        raise ValueError(f"{folder} holds {held}, not {needed}; use another folder, made with {command}")
    names = [name for name in dict.fromkeys([*found, *wanted]) if name not in _NOT_COMPARED]
    differing = [
        f"{_LABELS.get(name, name)} {found.get(name)} (now {wanted.get(name)})"
        for name in names
        if wanted.get(name) != found.get(name)
    ]
    if differing:
        raise ValueError(
            f"the maps in {folder} were made with {', '.join(differing)}; make maps in another folder with "
            f"{command}, or use the settings they were made with"
        )
