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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engines.files import write_atomically
from tgmae.data.manifest import Manifest, count_videos, split_names
from tgmae.masks.maps.records import NOT_COMPARED, find_name, fits_key, is_whole, read_part, unpack
from tgmae.masks.maps.records import Key as Key

_KEY_FILE = "maps.json"
# Of maps.json and the parts. 1 had no format number and no identity of the CLIP, 2 no checksums; both are still read.
FORMAT = 3
_SCORES = "score maps"  # what maps.json holds where it does not say: `maps` names any other kind
_COUNTS = ("format", "patch_size", "cells", "every", "cell")  # in maps.json, where they are there
_LABELS = {"cells": "cells along the short side"}  # of settings whose names in maps.json do not explain themselves


class MapFolder:
    """The maps of one folder, read as they are needed. Only the places of the maps are kept in memory.

    command  the command that makes such a folder, for messages

    Raises FileNotFoundError or ValueError where `folder` holds no maps, or damaged ones.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command, self.key = folder, command, _read_key(folder, command)
        self.has_checksums = int(self.key.get("format", 1)) >= 3
        self._place: dict[str, tuple[Path, int]] = {}  # by name: part and row, for the digest that was checked
        # By name and digest: part and row, shape of the maps (empty for none), and why they end early.
        self._foreign: list[Path] = []  # parts that were not written for this maps.json
        self._found: dict[tuple[str, str], tuple[Path, int, list[int], str]] = {}
        for part in sorted(folder.glob("part-*.arrow")):
            table = self._open_part(part)
            if not fits_key(table.schema, self.key):
                self._foreign.append(part)
            columns = [table.column(name).to_pylist() for name in ("path", "digest", "shape")]
            columns.append(table.column("broken").to_pylist() if "broken" in table.column_names else [""] * len(table))
            for row, (name, digest, shape, broken) in enumerate(zip(*columns, strict=True)):
                if not shape and not is_whole(table, row):
                    raise ValueError(self._damaged(part, name))
                if not self._found.get((name, digest), (part, row, [], ""))[2]:  # a later part may have tried again
                    self._found[name, digest] = (part, row, shape, broken)
                self._place[name] = (part, row)
        readable = {name for (name, _), found in self._found.items() if found[2]}
        self.unreadable = {name for name, _ in self._found} - readable  # `check_videos` narrows it to its videos
        self._open: dict[Path, pa.Table] = {}

    def check(self, wanted: Key) -> None:
        """Raise ValueError, naming what differs, where the maps depend on something else."""
        _check_key(self.folder, wanted, self.key, self.command)

    def check_videos(
        self, manifest: Manifest, digests: Sequence[str], shapes: Sequence[tuple[int, ...]] | None = None
    ) -> str:
        """Return what the user should know about the maps of a manifest's videos.

        shapes  of the maps of each video, where the caller knows

        Raises ValueError where videos have no maps, maps of another digest or of another shape, and where maps.json is
        damaged.
        """
        if self._foreign:
            raise ValueError(
                f"{self._foreign[0]} was not written for {self.folder / _KEY_FILE}: one of the two is damaged; remove "
                f"both and run {self.command} again"
            )
        names = [find_name(self._found, name) for name in zip(manifest.names(), digests, strict=True)]
        missing = [row for row, name in enumerate(names) if name not in self._found]
        if missing:
            some = ", ".join(names[row][0] for row in missing[:3])
            raise ValueError(
                f"{self.folder} has no maps, or maps of other videos or captions, for {len(missing)} of "
                f"{len(manifest)} videos, such as {some}; add them with: {self.command} MANIFEST --out {self.folder}"
                f"{self._name_split({manifest[row].split for row in missing})}"
            )
        self._place |= {name[0]: self._found[name][:2] for name in names}
        self.unreadable = {name[0] for name in names if not self._found[name][2]}
        short = self._check_shapes(names, shapes) if shapes is not None else []
        lost = sorted(self.unreadable)
        unread = (
            f"{count_videos(len(lost))} could not be read when {self.folder} was made, such as {', '.join(lost[:3])}; "
            f"where they can be read now, run {self.command} again"
        ) * bool(lost)
        ended = (
            f"{count_videos(len(short))} could be read in part only when {self.folder} was made, such as "
            f"{', '.join(short[:3])}; clips from their ends get the last maps before"
        ) * bool(short)
        return "\n".join(filter(None, [unread, ended]))

    def _name_split(self, splits: set[str]) -> str:
        """Return the flag that makes the command add maps of these splits; motion is read of all, scores of one."""
        common = set.intersection(*(set(split_names(cell)) for cell in splits))
        if "train" in common or self.key.get("maps", _SCORES) != _SCORES:
            return ""
        return f" --data.split {min(common)}" if any(common) else ' --data.split ""'

    def _check_shapes(self, names: Sequence[tuple[str, str]], shapes: Sequence[tuple[int, ...]]) -> list[str]:
        """Return the videos whose maps end before they do, which is known. Raises ValueError for any other shape."""
        wrong: list[str] = []
        short: list[str] = []
        for name, wanted in zip(names, shapes, strict=True):
            shape, broken = self._found[name][2:]
            if not shape or tuple(shape) == wanted:
                continue
            # Folders of an old format do not tell a video that breaks off from a wrong map.
            is_short = tuple(shape[1:]) == wanted[1:] and shape[0] < wanted[0] and (broken or not self.has_checksums)
            (short if is_short else wrong).append(name[0] if is_short else f"{name[0]} {shape} (not {list(wanted)})")
        if wrong:
            raise ValueError(
                f"{self.folder} has maps of another shape than its videos need, for {len(wrong)} of {len(names)} "
                f"videos, such as {', '.join(wrong[:3])}; make them in another folder with {self.command}"
            )
        return short

    def read(self, name: str) -> NDArray[np.generic]:
        """Return the maps of a row of the manifest, without copying unless they are compressed.

        Raises ValueError where the video could not be read when they were made, and where they are damaged, or contain
        NaN or infinity.
        """
        part, row = self._place[name]
        if part not in self._open:
            self._open[part] = self._open_part(part)
        table = self._open[part]
        if table.column("path")[row].as_py() != name or not is_whole(table, row):
            raise ValueError(self._damaged(part, name))
        if not table.column("shape")[row].as_py():
            raise ValueError(f"{name} could not be read when {self.folder} was made; run {self.command} again")
        try:
            maps = unpack(table, row, self.key)
        except (ValueError, OSError) as error:  # of another writer: its checksums are right
            raise ValueError(
                f"the maps of {name} in {part} are not {self.key['dtype']} of the shape beside them ({error}); remove "
                f"that file and run {self.command} again"
            ) from error
        if maps.dtype.kind == "f" and not np.isfinite(maps).all():
            raise ValueError(
                f"the maps of {name} in {part} contain NaN or infinity; remove that file and run {self.command} again"
            )
        return maps

    def _damaged(self, part: Path, name: str) -> str:
        return f"{part} is damaged: the checksum of {name} is another one; run {self.command} again, which mends it"

    def _open_part(self, part: Path) -> pa.Table:
        """Map a part into memory. Parts are renamed into place, so one that cannot be read is damaged."""
        try:
            table = read_part(part, self.has_checksums)
        except ValueError as error:
            raise ValueError(f"{error}; remove it and run {self.command} again") from error
        return table


def digest_videos(manifest: Manifest, *columns: str) -> list[str]:
    """Return a digest per row of the given columns and of what tells one recording, or segment, from another.

    The date is left out: a copy of a data set has new dates. Where the content is known, its digest follows a dash.
    """
    names = ("num_frames", "width", "height", "rotation", "num_bytes", *columns)
    rows = zip(*(manifest.table.column(name).to_pylist() for name in names), strict=True)
    segments, streams, mirrored = (
        list(zip(*(manifest.table.column(name).to_pylist() for name in columns), strict=True))
        for columns in (("start_frame", "end_frame"), ("stream",), ("mirrored",))
    )
    # What says nothing is left out: folders made before manifests had segments and streams stay valid.
    described = [
        row + (segment if segment != (0, row[0]) else ()) + (stream + flipped if stream != (0,) or flipped[0] else ())
        for row, segment, stream, flipped in zip(rows, segments, streams, mirrored, strict=True)
    ]
    digests = [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12] for row in described]
    contents = manifest.table.column("digest").to_pylist()
    return [digest + f"-{content}" * bool(content) for digest, content in zip(digests, contents, strict=True)]


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.arrow"


def _read_key(folder: Path, command: str) -> Key:
    path = folder / _KEY_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no maps in {folder}; make them with: {command} MANIFEST --out {folder}")
    try:
        key = json.loads(path.read_text())
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{path} does not describe maps: {error}") from error
    remake = f"make the maps again in another folder with: {command} MANIFEST --out FOLDER"
    for name in _COUNTS if isinstance(key, dict) else ():
        if not isinstance(value := key.get(name, 1), int) or value < 1:
            raise ValueError(f"{path} is damaged: {name} is {value!r}, expected a whole number from 1; {remake}")
    number = key.get("format", 1) if isinstance(key, dict) else 1
    if number > FORMAT:
        raise ValueError(
            f"{path} has format {number}, but this version of tgmae reads formats up to {FORMAT}; update tgmae, or "
            f"{remake}"
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
    # The format promises checksums, which the parts of an old folder have not.
    parts = [read_part(part, has_checksums=False) for part in folder.glob("part-*.arrow")] if path.exists() else []
    number = FORMAT if all("checksum" in part.column_names for part in parts) else 2
    write_atomically(path, (json.dumps({"format": number, **key}, indent=2) + "\n").encode())


def _check_key(folder: Path, wanted: Key, found: Key, command: str) -> None:
    held, needed = (key.get("maps", _SCORES) for key in (found, wanted))
    if held != needed:
        raise ValueError(f"{folder} holds {held}, not {needed}; use another folder, made with {command}")
    names = [name for name in dict.fromkeys([*found, *wanted]) if name not in NOT_COMPARED]
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
