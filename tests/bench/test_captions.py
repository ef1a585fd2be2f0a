"""The loops that captioning is compared with give the same frames, and the benchmark of them runs through."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from bench.captions import __main__ as captions
from bench.captions.loops import LOOPS, Wanted
from tests.support.reports import read_report
from tests.support.videos import read_number, write_numbered
from tgmae.data.indexing import index_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    for number in range(4):
        write_numbered(folder / f"{number}.mp4", num_frames=40, g="12", bf="2")
    index_folder(folder, folder / "m.parquet", num_workers=1)
    return folder


@pytest.mark.parametrize("name", LOOPS)
def test_loops_show_the_wanted_frames(name: str, folder: Path) -> None:
    if name == "decord":
        pytest.importorskip("decord")
    frames = LOOPS[name](Wanted(str(folder / "0.mp4"), (6, 20, 33), 25.0))
    assert [read_number(frame) for frame in frames] == [6, 20, 33]


@pytest.mark.slow
def test_benchmark_runs_through(folder: Path, results: Path) -> None:
    captions.run(captions.Options(folder / "m.parquet", rounds=1, workers=2))
    report = read_report(results, "captions.m")
    [table] = report["tables"]
    names = [row["name"] for row in table["rows"]]
    assert names[:3] == [
        "tgmae, 2 processes",
        "PyAV, decoding from the start",
        "PyAV, decoding from the start, 2 processes",
    ]
    assert all(row["median"] > 0 for row in table["rows"])
    if importlib.util.find_spec("decord") is None:
        assert table["note"] == "decord is missing (pip install decord==0.6.0)"
        assert report["results"]["absent"] == [table["note"]]
    assert len(report["headline"]) == 3
