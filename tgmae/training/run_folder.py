"""The folder of a run: only one run at a time works in it, and an older one in it can be set aside."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engines.files import naming_errors
from tgmae.telemetry.metrics import METRICS_FILE
from tgmae.training.checkpoint import free_name, newest_checkpoint
from tgmae.training.parallel import World

LOCK_FILE = "run.lock"
# How file systems that cannot lock files say so.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def hold_run_folder(run_dir: Path, world: World) -> Iterator[None]:
    """Keep other runs out of `run_dir`, which is made if need be, while the block lasts. Every process must call it.

    The main process holds a lock of the kernel, which ends with it however it ends. The file RUN/run.lock, which says
    whose lock it is, may outlive a killed run without harm. A folder that holds nothing else in the end is removed.

    Raises OSError: in use (the message says by whom), or not writable.
    """
    lock, problem = None, ""
    if world.is_main:
        try:
            lock = _lock(run_dir)
        except OSError as error:
            problem = str(error)
    if world.max(bool(problem))[0]:
        raise OSError(problem or f"the main process cannot use the run folder {run_dir}")
    try:
        yield
    finally:
        if lock is not None:
            (run_dir / LOCK_FILE).unlink(missing_ok=True)
            os.close(lock)
            with suppress(OSError):
                run_dir.rmdir()


def _lock(run_dir: Path) -> int:
    """Return a descriptor that holds the lock until it is closed."""
    path = run_dir / LOCK_FILE
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run before this one deletes its file. A lock on a deleted file keeps nobody out.
            if _is_at(path, descriptor):
                _sign(descriptor, path)
                return descriptor
        except BlockingIOError as error:
            holder = os.read(descriptor, 500).decode(errors="replace").strip()
            os.close(descriptor)
            raise OSError(
                f"{run_dir} is in use by another run ({holder or 'which has just started'}); wait until it has ended, "
                "or use another --run-dir"
            ) from error
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(f"{run_dir} is on a file system without locks: make sure that no other run uses it", flush=True)
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int, path: Path) -> None:
    """Write into the lock file who holds it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with naming_errors(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)


def set_aside_run(run_dir: Path) -> Path | None:
    """Move a run that left metrics or checkpoints to <name>.old-<n>; return None where there is neither.

    The folder and its lock stay. Checkpoints are moved last: a move that was interrupted can be repeated, and a run
    that resumes instead finds them.
    """
    if not (run_dir / METRICS_FILE).exists() and newest_checkpoint(run_dir / "checkpoints") is None:
        return None
    old = free_name(run_dir.resolve() if run_dir.is_symlink() else run_dir)
    old.mkdir()
    for path in sorted(run_dir.iterdir(), reverse=True):
        if path.name != LOCK_FILE:
            path.rename(old / path.name)
    return old
