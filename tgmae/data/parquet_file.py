"""Parquet files that carry a digest of themselves, so that a single flipped bit is noticed.

The digest stands between the pages and the footer, where readers look at nothing, and covers every other byte of the
file: pages' own checksums leave out the footer, which holds types, offsets and metadata. A program that rewrites the
table drops the digest with it, and the file is then read without.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_MARK = b"\ntgmae: SHA-256 of all other bytes\n"
_DIGEST_BYTES = 32
_TAIL_BYTES = 8  # the footer's length and "PAR1"


class DamagedFileError(ValueError):
    """The bytes of a file are not those that were written."""


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table with its digest."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    footer = len(data) - _TAIL_BYTES - int.from_bytes(data[-_TAIL_BYTES:-4], "little")
    before, after = data[:footer] + _MARK, data[footer:]
    path.write_bytes(before + hashlib.sha256(before + after).digest() + after)


def read_table(path: Path) -> pa.Table:
    """Read a table and compare its digest, if there is one.

    Raises DamagedFileError where the digest differs, and pa.ArrowException or OSError where the file is not Parquet or
    holds impossible values.
    """
    data = path.read_bytes()
    place = data.rfind(_MARK)
    if place >= 0 and data.endswith(b"PAR1"):
        start = place + len(_MARK)
        digest = data[start : start + _DIGEST_BYTES]
        if hashlib.sha256(data[:start] + data[start + _DIGEST_BYTES :]).digest() != digest:
            raise DamagedFileError(f"{path} is damaged: its bytes are not those that were written")
    try:
        # Without threads: Arrow's may still run when a short command ends, and 1 of 40 then aborted (exit code 134).
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        table.validate(full=True)
        str(table.column_names)
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is damaged: a name in it is not text ({error})") from error
    return table
