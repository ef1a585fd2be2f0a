"""Progress in a log file: lines, and nothing that goes back in one."""

from __future__ import annotations

import os
import sys
import termios

import pytest
from tqdm import tqdm

import engines.progress
from engines.progress import progress_bar, shows_bars


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A message takes one line of its own, and a new postfix none."""
    monkeypatch.setattr(engines.progress, "_EVERY_S", 0)
    bar = progress_bar(range(3), desc="counting", unit="clip")
    for number in bar:
        bar.set_postfix_str(f"at {number}")
        if number == 1:
            tqdm.write("a message", file=sys.stderr)
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = [line.split(" [")[0] for line in said.splitlines()]
    counted = [f"counting: {number}/3" for number in (1, 2, 3, 3)]  # the last one on closing
    assert lines == ["counting: 0/3", counted[0], "a message", *counted[1:]]
    assert said.splitlines()[-1].endswith("clip/s, at 2]")


def test_few_lines_for_many_items(capsys: pytest.CaptureFixture[str]) -> None:
    """Begin and end, where less than ten seconds lie between them; nothing for a bar that is off."""
    for _ in progress_bar(range(1000), desc="counting"):
        pass
    for _ in progress_bar(range(2), disable=True):
        pass
    assert [line.split(" [")[0] for line in capsys.readouterr().err.splitlines()] == [
        "counting: 0/1000",
        "counting: 1000/1000",
    ]


def test_a_terminal_without_a_size_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs detached: tqdm draws nothing where there are no rows."""
    main, terminal = os.openpty()
    with os.fdopen(main), os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert not shows_bars()
        termios.tcsetwinsize(stream, (24, 80))
        assert shows_bars()


def test_a_terminal_gets_tqdms_own_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert type(progress_bar(total=1, disable=True)) is tqdm
