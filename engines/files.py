"""Atomic writes and inter-process file locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LONGEST_NAME = 255  # bytes, of a file's name without its folder
# Python can read the umask only by setting it.
_umask = os.umask(0)
os.umask(_umask)
_MODE = 0o666 & ~_umask


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` when the block ends.

    sync   flush the file, and the folder that names it, to disk: the new file then survives a power cut

    If the block or the write fails, the temporary file is deleted and `path` stays as it was. A process that is killed
    leaves NAME.PID.tmp behind. The file gets the permissions of any new file.
    """
    end = f".{os.getpid()}.tmp"
    temporary = path.with_name(os.fsdecode(os.fsencode(path.name)[: LONGEST_NAME - len(end)]) + end)
    try:
        with naming_errors(path):
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
    with naming_errors(path):
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


@contextlib.contextmanager
def claim_file(path: Path) -> Iterator[None]:
    """Hold a lock on `path` while it is made. Raises BlockingIOError, which names the process that holds it.

    The lock is the file NAME.lock beside it, which is deleted in the end. It ends with the process that holds it.
    """
    lock = path.with_name(path.name + ".lock")
    while True:
        with open(lock, "a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().decode() or "of unknown number"
                raise BlockingIOError(f"process {holder} is writing {path}; wait until it ends") from None
            try:
                is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except FileNotFoundError:
                is_there = False
            if not is_there:  # its holder has deleted it since it was opened here
                continue
            try:
                with naming_errors(lock):
                    file.truncate(0)
                    file.write(str(os.getpid()).encode())
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Add the name of the file to an error that has none: writing to a full disk says only that it is full."""
    try:
        yield
    except OSError as error:
        # FFmpeg's errors and those with a class of their own are told apart by the caller.
        if type(error) is OSError and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk. It does not matter which descriptor wrote to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
