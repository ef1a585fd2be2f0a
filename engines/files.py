"""Files that are whole or not there, and made by one process at a time. Imports nothing of tgmae."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_umask = os.umask(0)
os.umask(_umask)
_MODE = 0o666 & ~_umask


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end; nothing is left where the writing fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.chmod(temporary, _MODE)  # safetensors writes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """The whole file or none, also where the process dies half way."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """One process at a time makes `path`: the ranks of a run all want the same one."""
    with open(path.with_name(path.name + ".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
