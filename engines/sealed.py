"""Digests in files: JSON objects that carry a checksum, and caches that other libraries fill."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.files import write_atomically

CHECKSUM = "checksum"  # the last key of a JSON object that carries one
_DIGITS = 16
_LENGTH = hashlib.sha256().digest_size


def seal_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a checksum of its values as its last key, which readers may ignore.

    It does not depend on the order of the keys nor on white space, which other programs may change.
    """
    return {**fields, CHECKSUM: _digest(fields)[:_DIGITS]}


def open_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return a JSON object without its checksum, and whether it is as it was sealed, or never was."""
    plain = {name: value for name, value in fields.items() if name != CHECKSUM}
    if CHECKSUM not in fields:
        # What looks like a checksum is one whose key is damaged.
        last = next(reversed(plain.values()), None)
        return plain, not (isinstance(last, str) and re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", last))
    checksum = str(fields[CHECKSUM])
    # Plans of earlier versions have all 64 digits.
    return plain, len(checksum) >= _DIGITS and _digest(plain).startswith(checksum)


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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
