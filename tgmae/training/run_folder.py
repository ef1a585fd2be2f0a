"""The folder of a run: only one run at a time works in it, and an older one in it can be set aside."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dali_pipelines.workers.endings import is_launched
from engines.files import InUseError, claim_file
from tgmae.telemetry.metrics import METRICS_FILE
from tgmae.training.checkpoints.folder import free_name, newest_checkpoint
from tgmae.training.parallel import World

LOCK_FILE = "run.lock"


# Seconds that a process of torchrun waits for the folder. Restarted, it may meet one of before that is just ending, on
# another machine or in a system call that a slow disk holds up.
_PATIENCE_S = 10.0


@contextmanager
def hold_run_folder(run_dir: Path, world: World) -> Iterator[None]:
    """Keep other runs out of `run_dir`, which is made if need be, while the block lasts. Every process must call it.

    Under torchrun, which may have restarted the run, it waits ten seconds for a process that holds the folder.

    The main process holds a lock of the kernel, which ends with it however it ends. The file RUN/run.lock, which says
    whose lock it is, may outlive a killed run without harm. A folder that holds nothing else in the end is removed.

    Raises OSError: in use (the message says by whom), or not writable.
    """
    problem = ""
    with ExitStack() as held:
        if world.is_main:
            try:
                held.callback(_remove_if_empty, run_dir)
                _claim(run_dir, held, _PATIENCE_S if is_launched() else 0)
            except InUseError as error:
                problem = (
                    f"{run_dir} is in use by another run ({error.holder}); wait until it has ended, or use another "
                    "--run-dir"
                )
            except OSError as error:
                problem = str(error)
        if world.max(bool(problem))[0]:
            raise OSError(problem or f"the main process cannot use the run folder {run_dir}")
        yield


def _claim(run_dir: Path, held: ExitStack, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            held.enter_context(claim_file(run_dir / "run"))
            return
        except InUseError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


def _remove_if_empty(run_dir: Path) -> None:
    with suppress(OSError):
        run_dir.rmdir()


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
