"""What torchrun's page says of a process that ends, by torch's own code, and who is silent."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dali_pipelines.workers.endings import leave, leave_on_signal


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment that torchrun gives to the first of two processes."""
    path = tmp_path / "error.json"
    names = {"RUN_ID": "1", "RESTART_COUNT": "0", "MAX_RESTARTS": "0", "ERROR_FILE": str(path)}
    for name, value in names.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return path


@pytest.fixture(autouse=True)
def sigterm_as_before() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_reason_is_the_last_line_of_torchruns_page(error_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And stands there alone: the process itself prints nothing."""
    with pytest.raises(SystemExit) as left:
        leave("tgmae-train: no manifest at gone.parquet")
    assert left.value.code == 1
    assert capsys.readouterr() == ("", "")
    page = str(ChildFailedError("tgmae.cli.train", {0: ProcessFailure(0, 123, 1, str(error_file))}))
    *_, reason, border = page.splitlines()
    assert reason == "  traceback : tgmae-train: no manifest at gone.parquet"
    assert set(border) == {"="}


def test_the_reason_is_printed_where_no_page_comes(error_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun restarts the job."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(SystemExit, match="no manifest"):
        leave("tgmae-train: no manifest at gone.parquet")


@pytest.mark.parametrize("was_lost", [True, False])
def test_the_others_are_silent_when_torchrun_ends_them(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], was_lost: bool
) -> None:
    """With 0, because torchrun's page lists whatever ended otherwise."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as left:
        leave("tgmae-train: no manifest at gone.parquet", was_lost=was_lost)
    assert left.value.code == 0
    with pytest.raises(SystemExit) as left:
        leave_on_signal("tgmae-train: stopped by SIGTERM", signal.SIGTERM)
    assert left.value.code == 0
    assert not error_file.exists()
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as left:
        leave_on_signal("tgmae-train: stopped by SIGINT", signal.SIGINT)
    assert left.value.code == 128 + signal.SIGINT
