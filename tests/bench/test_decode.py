"""Every decoder returns the frames it is asked for, and the benchmark of decoders runs through."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import decode
from bench.rivals.decoders import DECODERS, dali_pipeline, import_decoder, rate_of_dali
from bench.workloads.window import Window
from tests.support.reports import read_report
from tests.support.videos import read_number, write_numbered
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest

WINDOW = tuple(range(17, 49, 2))  # from the middle of a group of 12, over several


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Videos large enough for NVDEC, which does not take HEVC below 144 pixels."""
    folder = tmp_path_factory.mktemp("numbered")
    for name, options in {
        "a_h264.mp4": dict(codec="libx264", g="12", bf="2"),
        "b_vp9.webm": dict(codec="libvpx-vp9", g="12"),
        # Closed groups, as tgmae.data.compact makes them: decord 0.6 misses frames at the seams of open ones.
        "c_hevc.mp4": dict(codec="libx265", g="12", **{"x265-params": "log-level=none:open-gop=0"}),
    }.items():
        write_numbered(folder / name, num_frames=60, width=192, height=160, **options)  # type: ignore[arg-type]
    index_folder(folder, folder / "manifest.parquet")
    return read_manifest(folder / "manifest.parquet")


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "PyAV, YUV"])
def test_decoders_give_the_frames_asked_for(numbered: Manifest, name: str) -> None:
    if name != "PyAV":
        try:
            import_decoder(name)
        except (ImportError, RuntimeError, OSError) as error:
            pytest.skip(f"{name} does not import: {str(error).splitlines()[0]}")
    for row in range(len(numbered)):
        frames: Any = DECODERS[name](Window(numbered.file(row), numbered[row], WINDOW))
        assert frames.shape == (16, 160, 192, 3)
        assert frames.dtype == np.uint8
        assert tuple(read_number(frame) for frame in frames) == WINDOW


@pytest.mark.parametrize(("on_gpu", "rows"), [(False, [1]), pytest.param(True, [0, 1, 2], marks=pytest.mark.gpu)])
def test_dali_gives_the_frames_asked_for(
    numbered: Manifest, on_gpu: bool, rows: list[int], request: pytest.FixtureRequest
) -> None:
    """A CPU decodes VP9 only."""
    if on_gpu:
        request.getfixturevalue("nvdec")
    windows = (WINDOW, tuple(frame - 10 for frame in WINDOW), (3, 4, 59))
    for row in rows:
        asked = [Window(numbered.file(row), numbered[row], window) for window in windows]
        (decoded,) = dali_pipeline(asked, batch=3, num_threads=1, on_gpu=on_gpu).run()
        frames = decoded.as_cpu() if on_gpu else decoded
        for place, window in enumerate(windows):
            assert tuple(read_number(picture) for picture in np.asarray(frames.at(place))) == window


def test_several_dali_pipelines_decode_at_once(numbered: Manifest) -> None:
    """Windows that do not divide by the pipelines, more pipelines than windows, and a window that cannot be decoded."""
    windows = [Window(numbered.file(1), numbered[1], tuple(range(first, first + 4))) for first in range(3)]
    for pipelines in (1, 2, 4):
        begun: list[float] = []
        rate = rate_of_dali(windows, False, 0, 1, pipelines, lambda begun=begun: begun.append(time.perf_counter()))  # type: ignore[misc]
        assert len(begun) == 1
        assert rate > 0
    h264 = Window(numbered.file(0), numbered[0], (0, 1))
    with pytest.raises(RuntimeError, match=r"(?i)codec|decoder"):
        rate_of_dali([*windows, h264], False, 0, 1, 2)


def test_frames_passed_are_counted_from_the_keyframe(numbered: Manifest) -> None:
    h264 = numbered[0]
    assert h264.keyframes[:3] == (0, 12, 24)
    for first, last, passed in ((17, 47, 36), (12, 42, 31), (0, 0, 1), (11, 12, 13)):
        assert Window("", h264, (first, last)).frames_passed == passed


@pytest.mark.slow
def test_decode_runs_through(numbered: Manifest, tmp_path: Path, results: Path) -> None:
    manifest = numbered.root / "manifest.parquet"
    decode.run(decode.Options(manifest, videos=1, clips=2, seconds=0, rounds=1, workers=(1,), work_dir=tmp_path))
    report = read_report(results, f"decode.{numbered.root.name}")
    codecs, turns, keyframes, sizes, workers = report["tables"]
    for table in (codecs, keyframes, sizes, workers):
        for row in table["rows"]:
            assert row["median"] > 0
            assert row["frames/s"] == pytest.approx(row["median"] * row["frames a clip"])
            assert 31 <= row["frames a clip"] <= 60  # a window of 16 frames, stride 2; videos of 60 frames
    assert names(codecs) >= {f"{codec}: {decoder}" for codec in decode.CODECS for decoder in ("PyAV", "PyAV, YUV")}
    assert "vp9: DALI CPU" in names(codecs)
    assert "h264: DALI CPU" not in names(codecs)
    passed = [next(row for row in keyframes["rows"] if row["name"] == f"every {gop}: PyAV") for gop in decode.GOPS]
    assert [row["frames a clip"] for row in passed] == sorted(row["frames a clip"] for row in passed)
    assert names(sizes) >= {"short side 160: PyAV", "short side 128: PyAV", "as it came (h264): PyAV"}
    assert names(workers) >= {"h264, 1: PyAV", "vp9, 1: DALI CPU"}
    if not torch.cuda.is_available():
        assert names(turns) == {
            "1 pipeline × 1 thread", "1 pipeline × 2 threads", "2 pipelines × 1 thread", "2 pipelines × 2 threads"
        }  # fmt: skip
    assert all(row["frames/s"] > row["median"] > 0 for row in turns["rows"])


@pytest.mark.slow
def test_tables_in_the_order_asked_for(
    numbered: Manifest, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the variants they need are encoded. A pair that fails, at once or later, is named; the others still run."""

    def rate(
        windows: Any, on_gpu: bool, seconds: float, threads: int, pipelines: int = 1, begin: Any = None,
        batch: int | None = None,
    ) -> float:  # fmt: skip
        if (pipelines, threads) == (1, 4) or (pipelines == 2 and batch is None):
            raise RuntimeError("no decoder left\nstack")
        return 10.0

    monkeypatch.setattr(decode, "rate_of_dali", rate)
    monkeypatch.setattr(decode, "PAIRS_ON_CPU", decode.PAIRS_ON_GPU)
    manifest = numbered.root / "manifest.parquet"
    options = decode.Options(manifest, tables=("turns", "codec"), videos=1, clips=2, seconds=0, rounds=1, workers=(1,))
    decode.run(replace(options, work_dir=tmp_path))
    turns, codecs = read_report(results, f"decode.{numbered.root.name}")["tables"]
    assert turns["title"].startswith("By pipelines")
    assert codecs["title"].startswith("By codec")
    made = {path.name for path in (tmp_path / numbered.root.name).iterdir()}
    assert made == {f"{codec}-160-gop12" for codec in decode.CODECS}
    assert [row["name"] for row in turns["rows"]] == [
        "1 pipeline × 1 thread", "1 pipeline × 16 threads", "4 pipelines × 4 threads", "7 pipelines × 2 threads",
        "8 pipelines × 4 threads", "1 pipeline × 2 threads",
    ]  # fmt: skip
    for pair in ("1 pipeline × 4 threads", "2 pipelines × 8 threads"):
        assert f"{pair} is left out: no decoder left\n" in turns["note"] + "\n"


def test_every_codec_takes_its_turns(numbered: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first variant runs with every pair, the others with one thread and with what training uses."""
    manifest, seen = numbered.root / "manifest.parquet", list[tuple[str, int, int]]()

    def rate(windows: Any, on_gpu: bool, seconds: float, threads: int, pipelines: int, *rest: Any) -> float:
        seen.append((windows[0].video.codec, pipelines, threads))
        return 10.0

    monkeypatch.setattr(decode, "rate_of_dali", rate)
    made = decode.Bench(decode.Options(manifest, videos=1, clips=2, seconds=0, rounds=1, work_dir=tmp_path))
    made.placement = replace(made.placement, pipelines=3, threads=5)
    with made.pool:
        table = made.table_of_turns([made.variant(codec, 160, 12) for codec in ("h264", "vp9")])
    others = [row.name for row in table.rows if "vp9" in row.name]
    assert others == ["1 pipeline × 1 thread, vp9-160-gop12", "3 pipelines × 5 threads, vp9-160-gop12"]
    assert len(table.rows) == len(decode.PAIRS_ON_CPU) + 3
    assert {case for case in seen if case[0] == "vp9"} == {("vp9", 1, 1), ("vp9", 3, 5)}
    assert {case for case in seen if case[0] == "h264"} == {("h264", *pair) for pair in (*decode.PAIRS_ON_CPU, (3, 5))}


def names(table: dict[str, Any]) -> set[str]:
    return {row["name"] for row in table["rows"]}
