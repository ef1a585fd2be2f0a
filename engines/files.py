"""Atomic writes and inter-process file locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Python can read the umask only by setting it.
_umask = os.umask(0)
os.umask(_umask)
_MODE = 0o666 & ~_umask


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` when the block ends.

    sync   flush the file, and the folder that names it, to disk: the new file then survives a power cut

    If the block or the write fails, the temporary file is deleted and `path` stays as it was. A process that is killed
    leaves NAME.PID.tmp behind. The file gets the permissions of any new file. An OSError always names a file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            yield temporary
            os.chmod(temporary, _MODE)  # safetensors writes files that only their owner can read
            if sync:
                _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if sync:
            _sync(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to fill, which replaces the folder `path` when the block ends; both are flushed to disk.

    Other files of the old folder are copied into the new one. If the block fails, the new folder is deleted and `path`
    stays as it was. A process that is killed leaves NAME.PID.tmp behind, and at worst no folder `path`. What earlier
    ones left is deleted, so only one process at a time may replace a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f"{path.name}.*.tmp"):
        shutil.rmtree(left_over)
    new, old = (path.with_name(f"{path.name}.{kind}{os.getpid()}.tmp") for kind in ("", "old-"))
    with naming(path):
        new.mkdir()
        try:
            yield new
            for file in new.iterdir():
                os.chmod(file, _MODE)
                _sync(file)
            _sync(new)
            if path.exists():
                others = [file for file in path.iterdir() if not (new / file.name).exists()]
                for file in others:
                    (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
                path.rename(old)
            new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, as one from a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes | memoryview, sync: bool = False) -> None:
    """Write a file as a whole or not at all, even if the process dies; `sync` as in `replacing`."""
    with replacing(path, sync) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, so that only one process makes it while others that want it wait.

    The lock is the file NAME.lock beside it, which is left there. It ends with the process that holds it.
    """
    with open(path.with_name(path.name + ".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk. It does not matter which descriptor wrote to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
