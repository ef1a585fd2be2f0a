"""The records of a part: one per video, each with a checksum of everything in it.

A flipped bit in a record is found when the record is read. One in the structure around it makes the part unreadable,
or its names and shapes not those that are wanted.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Key = dict[str, str | int]  # has "dtype", may have "compression" (zstd), and whatever else the maps depend on

# path: the name of the row (`Video.name`). digest: of what its maps depend on (`digest_videos`). shape: empty where the
# video could not be read. broken: why the maps end before the video does, "" where they do not.
_FIELDS = [("path", pa.string()), ("digest", pa.string()), ("shape", pa.list_(pa.int32())), ("maps", pa.large_binary())]
OLD_SCHEMA = pa.schema(_FIELDS)  # of folders up to format 2
SCHEMA = pa.schema([*_FIELDS, ("broken", pa.string()), ("checksum", pa.uint32())])
NOT_COMPARED = ("format", "clip_identity")  # of a key; the CLIP is compared by its fingerprint
_KEY = b"tgmae.maps"  # Arrow metadata of a part: the key that its folder's maps.json must hold


@dataclass(frozen=True)
class Broken:
    """The maps of the frames that could be read of a video, and why there are no more."""

    maps: NDArray[np.generic]
    reason: str


def find_name(records: Container[tuple[str, str]], name: tuple[str, str]) -> tuple[str, str]:
    """Return the name and digest under which a video's maps are held: earlier versions did not know contents."""
    before = name[0], name[1].partition("-")[0]
    return before if name not in records and before in records else name


def schema_of(key: Key) -> pa.Schema:
    """Return the schema of new parts."""
    return SCHEMA.with_metadata({_KEY: _plain(key)})


def fits_key(schema: pa.Schema, key: Key) -> bool:
    """Return whether a part was written for this key; parts of old formats do not say."""
    return (schema.metadata or {}).get(_KEY, b"") in (b"", _plain(key))


def _plain(key: Key) -> bytes:
    compared = {name: value for name, value in key.items() if name not in NOT_COMPARED}
    return json.dumps(compared, sort_keys=True).encode()


def make_record(name: str, digest: str, maps: NDArray[np.generic] | Broken | None, key: Key) -> pa.RecordBatch:
    """Make one row of a part; a video that could not be read has no maps."""
    if maps is None:
        return _record(name, digest, [], b"", "")
    values, broken = (maps.maps, maps.reason) if isinstance(maps, Broken) else (maps, "")
    assert values.dtype == key["dtype"]
    data = values.tobytes()
    if "compression" in key:
        data = pa.compress(data, codec=key["compression"], asbytes=True)
    return _record(name, digest, list(values.shape), data, broken)


def _record(name: str, digest: str, shape: list[int], data: bytes | memoryview, broken: str) -> pa.RecordBatch:
    checksum = _checksum(name, digest, shape, broken, data)
    row = {"path": name, "digest": digest, "shape": shape, "maps": data, "broken": broken, "checksum": checksum}
    return pa.RecordBatch.from_pylist([row], schema=SCHEMA)


def _checksum(name: str, digest: str, shape: list[int], broken: str, data: bytes | memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(json.dumps([name, digest, shape, broken]).encode()))


def read_part(path: Path, has_checksums: bool) -> pa.Table:
    """Map a part into memory, and check its structure but not its maps.

    has_checksums  whether parts of an old format are refused

    Raises FileNotFoundError, or ValueError where it is damaged.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
        if not table.schema.equals(SCHEMA) and (has_checksums or not table.schema.equals(OLD_SCHEMA)):
            raise ValueError("its columns are not those of maps")
    except FileNotFoundError:
        raise
    except Exception as error:  # a flipped bit makes Arrow raise anything, from ArrowInvalid to MemoryError
        raise ValueError(f"{path} is damaged ({str(error).partition(chr(10))[0]})") from error
    return table


def is_whole(table: pa.Table | pa.RecordBatch, row: int) -> bool:
    """Return whether a row is as it was written. Rows of an old format have no checksum."""
    if "checksum" not in table.schema.names:
        return True
    name, digest, shape, broken, wanted = (
        table.column(column)[row].as_py() for column in ("path", "digest", "shape", "broken", "checksum")
    )
    data = memoryview(table.column("maps")[row].as_buffer())
    return bool(wanted == _checksum(name, digest, shape, broken, data))


def renew(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a record of one row in today's schema."""
    if "checksum" in batch.schema.names:
        return batch
    row = batch.to_pylist()[0]
    return _record(row["path"], row["digest"], row["shape"], row["maps"], "")


def unpack(table: pa.Table, row: int, key: Key) -> NDArray[np.generic]:
    """Return the maps of a row, without copying unless they are compressed. The row `is_whole`."""
    dtype = np.dtype(str(key["dtype"]))
    shape = table.column("shape")[row].as_py()
    data = table.column("maps")[row].as_buffer()
    if "compression" in key:
        data = pa.decompress(data, math.prod(shape) * dtype.itemsize, codec=key["compression"])
    maps: NDArray[np.generic] = np.frombuffer(data, dtype).reshape(shape)
    return maps
