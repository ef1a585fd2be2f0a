"""Caches that other libraries fill, with a digest in front: a damaged one counts as empty."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from engines.files import write_atomically

_LENGTH = hashlib.sha256().digest_size


def write_sealed(path: Path, data: bytes) -> None:
    """Write data behind its digest, as a whole or not at all."""
    write_atomically(path, hashlib.sha256(data).digest() + data)


def read_sealed(path: Path) -> bytes:
    """Return the data that `write_sealed` wrote; b"" where there is no file, or a damaged one, which is said."""
    if not path.is_file():
        return b""
    sealed = path.read_bytes()
    digest, data = sealed[:_LENGTH], sealed[_LENGTH:]
    if hashlib.sha256(data).digest() == digest:
        return data
    print(f"tgmae: {path} is damaged or of an older version; starting without it", file=sys.stderr)
    return b""
