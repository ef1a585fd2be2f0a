"""One run at a time in a folder; the second is told who is there and changes nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tests.support.runs import REPOSITORY, command, run_here, wait_for_group_to_end, wait_for_step
from tests.tgmae.test_stopping import TWO, start_two
from tgmae.telemetry.metrics import METRICS_FILE
from tgmae.training import run_folder
from tgmae.training.parallel import World
from tgmae.training.run_folder import LOCK_FILE, hold_run_folder, set_aside_run

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def assert_in_use(run_dir: Path, process: int) -> None:
    with pytest.raises(OSError, match="is in use by another run") as caught, hold_run_folder(run_dir, ALONE):
        pass
    words = f"{run_dir} is in use by another run (process {process} on {socket.gethostname()}, since "
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith("); wait until it has ended, or use another --run-dir")


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    """By whatever path it is reached; and free again afterwards."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for _ in range(2):
        with hold_run_folder(tmp_path / "run", ALONE):
            assert_in_use(tmp_path / "run", os.getpid())
            assert_in_use(tmp_path / "link", os.getpid())
            with hold_run_folder(tmp_path / "other", ALONE):
                pass
            (tmp_path / "run" / "config.json").touch()
        assert os.listdir(tmp_path / "run") == ["config.json"]


def test_a_restarted_run_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torchrun has killed, but which is not quite gone. A run that stays there is in use all the same."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with ExitStack() as before:
        before.enter_context(hold_run_folder(tmp_path / "run", ALONE))
        with ThreadPoolExecutor(1) as threads:
            threads.submit(lambda: [time.sleep(0.3), before.close()])
            with hold_run_folder(tmp_path / "run", ALONE):
                monkeypatch.setattr(run_folder, "_PATIENCE_S", 0.2)
                assert_in_use(tmp_path / "run", os.getpid())


def test_a_folder_that_holds_nothing_else_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="failed"), hold_run_folder(tmp_path / "run", ALONE):
        raise ValueError("failed")
    assert os.listdir(tmp_path) == []


def test_the_lock_stays_when_the_run_in_the_folder_is_set_aside(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/step_00000001.pt", "config.json", METRICS_FILE):
        (run_dir / name).write_text(name)
    with hold_run_folder(run_dir, ALONE):
        assert set_aside_run(run_dir) == tmp_path / "run.old-1"
        assert os.listdir(run_dir) == [LOCK_FILE]
        assert_in_use(run_dir, os.getpid())
        assert set_aside_run(run_dir) is None
    for name in ("checkpoints/step_00000001.pt", "config.json", METRICS_FILE):
        assert (tmp_path / "run.old-1" / name).read_text() == name


def test_many_starts_at_once(tmp_path: Path) -> None:
    """Never two at a time, although every one of them deletes the file that it has locked."""
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            os._exit(0 if hold_many_times(tmp_path) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6


def hold_many_times(folder: Path) -> bool:
    """Hold the folder twenty times, and return whether nobody else ever held it meanwhile."""
    count, deadline = 0, time.monotonic() + 100
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "config.json").touch()
    try:
        while count < 20 and time.monotonic() < deadline:
            try:
                with hold_run_folder(folder / "run", ALONE):
                    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                    time.sleep(0.001)
                    (folder / "inside").unlink()
                    count += 1
            except OSError as error:
                if "in use" not in str(error):
                    return False
        return count == 20
    except BaseException:
        return False


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_run_folder(tmp_path / "run", ALONE):
        assert "is on a file system without locks: make sure that only one process uses it" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run"), hold_run_folder(tmp_path / "file" / "run", ALONE):
        pass


@pytest.mark.slow
def test_a_second_run_is_refused_and_changes_nothing(shapes: Path, tmp_path: Path) -> None:
    """Resuming, starting over, or as two processes. A run that was killed holds nothing back."""
    run_dir = tmp_path / "run"
    arguments = command(shapes, run_dir, "--epochs", "1000", "--log.checkpoint-every", "2")
    first = subprocess.Popen(
        arguments, cwd=REPOSITORY, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_step(run_dir, 3, first)
    words = f"tgmae-train: {run_dir} is in use by another run (process {first.pid} on {socket.gethostname()}, since "
    for resume in ("auto", "never"):
        with pytest.raises(SystemExit) as caught:
            run_here([*arguments, "--resume", resume])
        assert str(caught.value.code).startswith(words)
    both = start_two(command(shapes, run_dir, *TWO))
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [1, 1], outputs
    assert words in outputs[0]
    assert f"tgmae-train: the main process cannot use the run folder {run_dir}" in outputs[1]
    assert not any("Traceback" in output for output in outputs)
    assert os.listdir(tmp_path) == ["run"]
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_for_group_to_end(first.pid)
    assert (run_dir / LOCK_FILE).exists()
    run_here([*arguments, "--resume", "never", "--max-steps", "1"])
    assert sorted(os.listdir(tmp_path)) == ["run", "run.old-1"]
    assert not (run_dir / LOCK_FILE).exists()
