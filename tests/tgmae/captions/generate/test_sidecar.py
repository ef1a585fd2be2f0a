"""The file of generated captions, and the journals that survive a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.files import journal_of
from tests.support.faults.flips import TryFlips
from tgmae.captions.generate.sidecar import Generated, Key, Record, Sidecar

KEY: Key = {"model": "m", "revision": "r1", "prompt": "What?", "frames": 3}


def record(name: str, *texts: str, digest: str = "d") -> Record:
    made = [Generated(text=text, flag="", prompt="What?", frames=(1, 5)) for text in texts]
    return Record(name=name, digest=digest, captions=tuple(made))


RECORDS = [record("a.mp4", "a hand", "eine Tür\u2028“zwei”"), record("späte/b.mp4", "x\ty"), record("c.mp4#0-9", "c")]


@pytest.fixture
def sidecar(tmp_path: Path) -> Sidecar:
    return Sidecar.beside(tmp_path / "m.parquet", "eyes", KEY)


def test_what_is_written_is_read(sidecar: Sidecar) -> None:
    assert sidecar.path.name == "m.captions-eyes.parquet"
    assert sidecar.read() == {}
    sidecar.write(RECORDS)
    assert list(sidecar.read().values()) == RECORDS


def test_journals_of_all_processes_count_and_go_when_the_file_is_written(sidecar: Sidecar) -> None:
    sidecar.write(RECORDS[:1])
    newer = record("a.mp4", "newer", digest="d2")
    for rank, made in ((0, RECORDS[1]), (3, RECORDS[2]), (1, newer)):
        with sidecar.open_journal(rank) as note:
            note(made)
    journals = [journal_of(sidecar.journal, rank) for rank in (0, 1, 3)]
    assert all(journal.exists() for journal in journals)
    found = sidecar.read()
    assert found == {made.name: made for made in (newer, *RECORDS[1:])}
    sidecar.write(found.values())
    assert not any(journal.exists() for journal in journals)
    assert sidecar.read() == found


@pytest.mark.parametrize("kept", range(3))
def test_a_line_that_was_cut_off_is_dropped_and_those_after_it_are_read(kept: int, sidecar: Sidecar) -> None:
    with sidecar.open_journal(0) as note:
        for made in RECORDS:
            note(made)
    lines = sidecar.journal.read_bytes().split(b"\n")
    sidecar.journal.write_bytes(b"\n".join([*lines[: kept + 1], lines[kept + 1][:-12]]))
    assert list(sidecar.read().values()) == RECORDS[:kept]
    with sidecar.open_journal(0) as note:
        note(RECORDS[2])
    assert list(sidecar.read().values()) == [*RECORDS[:kept], RECORDS[2]]


@pytest.mark.parametrize("is_journal", [False, True])
def test_captions_made_in_another_way_are_neither_mixed_nor_lost(is_journal: bool, sidecar: Sidecar) -> None:
    if is_journal:
        with sidecar.open_journal(0) as note:
            note(RECORDS[0])
    else:
        sidecar.write(RECORDS)
    held = sidecar.journal if is_journal else sidecar.path
    before = held.read_bytes()
    for name, value in (("prompt", "Who?"), ("revision", "r2"), ("frames", 1)):
        other = Sidecar(sidecar.path, {**KEY, name: value})
        told = rf"{held.name} holds captions made in another way \({name} {KEY[name]!r}, now {value!r}\)"
        with pytest.raises(ValueError, match=told.replace("?", r"\?")):
            other.read()
    assert held.read_bytes() == before


def test_no_bit_of_the_file_changes_a_caption(sidecar: Sidecar, try_flips: TryFlips) -> None:
    sidecar.write(RECORDS)

    def read() -> object:
        return sidecar.read()

    try_flips(sidecar.path, read)
