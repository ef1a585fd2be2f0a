"""Atomic writes: whole or not at all, with ordinary permissions. Locks: one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.files import claim_file, lock_file, naming_errors, replacing, replacing_folder, write_atomically


def test_a_new_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # a rename must stay on one file system
        assert temporary.name == f"file.txt.{os.getpid()}.tmp"
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("sync", [False, True])
def test_what_was_there_stays_until_the_end(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path, sync=sync) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("failing", ["block", "replace", "nothing written"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, sync: bool
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    if failing == "replace":

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)

    def write() -> None:
        with replacing(path, sync=sync) as temporary:
            if failing != "nothing written":
                temporary.write_text("half")
            if failing == "block":
                raise KeyboardInterrupt

    expected = {"block": KeyboardInterrupt, "replace": OSError, "nothing written": FileNotFoundError}[failing]
    with pytest.raises(expected):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    ordinary, path = tmp_path / "ordinary", tmp_path / "file"
    ordinary.touch()
    with replacing(path) as temporary:
        temporary.touch(mode=0o600)  # as safetensors does
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("write", [lambda path: write_atomically(path, b"new", sync=True), None])
def test_sync_flushes_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None] | None
) -> None:
    path, calls = tmp_path / "file.txt", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    if write is None:
        with replacing(path, sync=True) as temporary:
            temporary.write_bytes(b"new")
    else:
        write(path)
    assert calls == [f"file.txt.{os.getpid()}.tmp", "replace", tmp_path.name]
    assert path.read_bytes() == b"new"
    calls.clear()
    write_atomically(path, b"newer")
    assert calls == ["replace"]


def test_an_error_names_the_file(tmp_path: Path) -> None:
    """One from a write to a full disk has no name of its own."""

    def fill() -> None:
        with replacing(tmp_path / "file") as new:
            new.symlink_to("/dev/full")
            new.write_bytes(b"new")

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/file'"):
        fill()
    with pytest.raises(OSError, match=r"^other$"), replacing(tmp_path / "file"):
        raise OSError("other")
    with pytest.raises(FileNotFoundError, match="'elsewhere'"), replacing(tmp_path / "file"):
        Path("elsewhere").read_bytes()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, is_there: bool) -> None:
    folder = tmp_path / "new" / "folder"
    if is_there:
        folder.mkdir(parents=True)
        for name in ("one", "mine"):
            (folder / name).write_text("old")

    def fail() -> None:
        with replacing_folder(folder) as new:
            (new / "one").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert folder.exists() == is_there
    assert not is_there or (folder / "one").read_text() == "old"
    with replacing_folder(folder) as new:
        (new / "one").write_text("new")
        assert not is_there or (folder / "one").read_text() == "old"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"one": "new"} | (
        {"mine": "old"} if is_there else {}
    )
    assert os.listdir(folder.parent) == ["folder"]


def test_bytes_of_any_kind_are_written(tmp_path: Path) -> None:
    for data in (b"", b"\x00\xff", memoryview(b"view")):
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == bytes(data)


# Locks

HOLD = """
import sys
from pathlib import Path
import engines.files
with getattr(engines.files, sys.argv[2])(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(path: Path, function: str = "lock_file") -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path), function], **pipes)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("end", ["release", "kill"])
def test_one_process_at_a_time(tmp_path: Path, end: str) -> None:
    """The second process waits, says so, and continues when the first one is done or dies."""
    path = tmp_path / "file"
    first, second = hold(path), None
    try:
        assert read_line(first) == "held\n"
        second = hold(path)
        assert read_line(second) == f"waiting for another process that writes {path}\n"
        if end == "kill":
            first.kill()
            first.wait()
        else:
            first.communicate("\n")
        assert read_line(second) == "held\n"
        second.communicate("\n")
        assert second.returncode == 0
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()


@pytest.mark.parametrize("lock", [lock_file, claim_file])
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lock: Callable[[Path], Any]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path / "file"):
        assert "file.lock is on a file system without locks: make sure that only one" in capsys.readouterr().out


def test_a_lock_can_be_taken_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with lock_file(tmp_path / "file"):
            pass
    assert os.listdir(tmp_path) == ["file.lock"]
    assert capsys.readouterr().out == ""


def test_a_claimed_file_is_not_waited_for(tmp_path: Path) -> None:
    """The error names the process. The lock is gone when it ends, and one that a killed process left does not count."""
    path = tmp_path / "file"
    first = hold(path, "claim_file")
    try:
        assert read_line(first) == "held\n"
        with pytest.raises(
            BlockingIOError, match=rf"^process {first.pid} on .*, since .* is writing {path}; wait until it ends$"
        ):
            claim_file(path).__enter__()
        first.kill()
        first.wait()
        assert os.listdir(tmp_path) == ["file.lock"]
        for _ in range(2):
            with claim_file(path):
                assert (tmp_path / "file.lock").read_text().startswith(f"process {os.getpid()} on ")
                with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .* is writing"):
                    claim_file(path).__enter__()
        assert os.listdir(tmp_path) == []
    finally:
        if first.poll() is None:
            first.kill()
            first.wait()


def test_errors_without_a_file_get_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def fail(error: Exception) -> None:
        with naming_errors(path):
            raise error

    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{path}'$"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    for error in (OSError("words"), OSError(errno.EIO, "x", "other"), PermissionError(errno.EPERM, "x"), ValueError()):
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert caught.value is error
