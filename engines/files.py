"""Atomic writes and inter-process file locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

LONGEST_NAME = 255  # bytes, of a file's name without its folder
# Python can read the umask only by setting it.
_umask = os.umask(0)
os.umask(_umask)
_MODE = 0o666 & ~_umask
# How file systems that cannot lock files say so.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` when the block ends.

    sync   flush the file, and the folder that names it, to disk: the new file then survives a power cut

    If the block or the write fails, the temporary file is deleted and `path` stays as it was. A process that is killed
    leaves NAME.PID.tmp behind. The file gets the permissions of any new file. An OSError always names a file.
    """
    end = f".{os.getpid()}.tmp"
    temporary = path.with_name(os.fsdecode(os.fsencode(path.name)[: LONGEST_NAME - len(end)]) + end)
    with naming_errors(path):
        try:
            yield temporary
            os.chmod(temporary, _MODE)  # safetensors writes files that only their owner can read
            if sync:
                flush_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if sync:
            flush_to_disk(path.parent)


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
                flush_to_disk(file)
            flush_to_disk(new)
            if path.exists():
                others = [file for file in path.iterdir() if not (new / file.name).exists()]
                for file in others:
                    (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
                path.rename(old)
            new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        flush_to_disk(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, data: bytes | memoryview, sync: bool = False) -> None:
    """Write a file as a whole or not at all, even if the process dies; `sync` as in `replacing`."""
    with replacing(path, sync) as temporary:
        temporary.write_bytes(data)


def seal_line(text: bytes) -> bytes:
    """Return a journal's line without its end: the text, which holds no tab, a tab, and the text's CRC-32."""
    return b"%s\t%08x" % (text, zlib.crc32(text))


def open_line(line: bytes) -> bytes | None:
    """Return the text of a journal's line; None where it is damaged. Lines of earlier versions have no CRC-32."""
    text, tab, checksum = line.partition(b"\t")
    return None if tab and checksum != b"%08x" % zlib.crc32(text) else text


def journal_of(journal: Path, rank: int) -> Path:
    """Return the journal of one of the processes that share a job: NAME.journal, NAME.1.journal, NAME.2.journal, …"""
    return journal.with_name(f"{journal.stem}.{rank}.journal") if rank else journal


def absorb_journals(journal: Path) -> None:
    """Append to a journal the lines of the other processes' journals, and delete those. No process may be writing."""
    for other in sorted(journal.parent.glob(f"{glob.escape(journal.stem)}.[0-9]*.journal")):
        with naming_errors(journal), journal.open("ab") as file:
            file.write(b"\n" + other.read_bytes())  # the newline ends a line that an interruption cut off
        other.unlink()


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, so that only one process makes it while others that want it wait.

    The lock is the file NAME.lock beside it, which is left there. It ends with the process that holds it. On a file
    system without locks a line says so.
    """
    lock = path.with_name(path.name + ".lock")
    with open(lock, "a") as file:
        try:
            _lock(file.fileno(), lock)
        except BlockingIOError:
            print(f"waiting for another process that writes {path}", flush=True)
            _lock(file.fileno(), lock, waits=True)
        yield


def _lock(descriptor: int, lock: Path, waits: bool = False) -> None:
    """Take the kernel's lock on an open file, or say that its file system has none.

    Raises BlockingIOError where another process holds it, unless this one `waits`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{lock} is on a file system without locks: make sure that only one process uses it", flush=True)


class InUseError(BlockingIOError):
    """Another process holds a file. `holder` says which, where and since when."""

    def __init__(self, holder: str, path: Path) -> None:
        super().__init__(f"{holder} is writing {path}; wait until it ends")
        self.holder = holder


@contextlib.contextmanager
def claim_file(path: Path) -> Iterator[None]:
    """Hold a lock on `path` while it is made. Raises InUseError where another process holds it.

    The lock is the file NAME.lock beside it, which is deleted in the end. It is the kernel's, so it ends with the
    process that holds it however that ends. On a file system without locks a line says so.
    """
    lock = path.with_name(path.name + ".lock")
    while (descriptor := _try_to_claim(lock, path)) is None:  # its holder has just deleted it
        pass
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _try_to_claim(lock: Path, path: Path) -> int | None:
    """Return a descriptor that holds the lock until it is closed; None where the file is no longer there."""
    lock.parent.mkdir(parents=True, exist_ok=True)  # a holder that has ended may have removed it
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, lock)
        if not _is_at(lock, descriptor):  # a lock on a deleted file keeps nobody out
            os.close(descriptor)
            return None
        with naming_errors(lock):
            os.ftruncate(descriptor, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
    except BlockingIOError:
        holder = os.read(descriptor, 500).decode(errors="replace").strip()
        os.close(descriptor)
        raise InUseError(holder or "a process that has just started", path) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


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


def flush_to_disk(path: Path) -> None:
    """Flush a file or a folder to disk. It does not matter which descriptor wrote to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
