"""Several DALI pipelines that take turns give the batches of one, and one file that DALI cannot decode costs itself."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_pipelines.dali_pipeline import DaliPipeline
from dali_pipelines.types import ClipBatch, ClipRequest
from tests.support.requests import Plan, request
from tests.support.videos import read_number, write_numbered
from tgmae.config.data import DataConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest, write_manifest
from tgmae.data.sampling import ClipSampler

pytestmark = pytest.mark.slow

SIZE, NUM_FRAMES, BATCH = 32, 8, 4


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """What DALI decodes on a CPU, and what its workers decode."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(3):
        write_numbered(folder / f"{number}.mp4", g="12")
        write_numbered(folder / f"{number}.webm", codec="libvpx-vp9", g="12")
    index_folder(folder, folder / "manifest.parquet", num_workers=1)
    return read_manifest(folder / "manifest.parquet")


def make(manifest: Manifest, first_batch: int = 0, **data: int) -> DaliPipeline:
    config = DataConfig(stride=2, flip=True, **data)  # type: ignore[arg-type]
    plan = ClipSampler(manifest=manifest, data=config, num_frames=NUM_FRAMES, batch_size=BATCH, seed=3)
    return DaliPipeline(manifest, plan, config, SIZE, first_batch)


def take(pipeline: DaliPipeline, count: int) -> list[ClipBatch]:
    try:
        return [pipeline.next_batch() for _ in range(count)]
    finally:
        pipeline.close()


@pytest.mark.parametrize("repeat", [1, 2])
def test_any_number_of_pipelines_gives_the_same_batches(mixed: Manifest, repeat: int) -> None:
    """From the start and resumed at a batch that another pipeline's turn would have been."""
    truth = take(make(mixed, repeat=repeat), 6)
    for pipelines, first in ((2, 0), (3, 1)):
        found = take(make(mixed, first, repeat=repeat, pipelines=pipelines), 5)
        for batch, wanted in zip(found, truth[first:], strict=first == 1):
            assert batch.requests == wanted.requests
            assert torch.equal(batch.frames, wanted.frames)


def test_totals_are_divided(mixed: Manifest) -> None:
    """Five workers are two for each of two pipelines; all of them end with the pipeline."""
    before = set(multiprocessing.active_children())
    pipeline = make(mixed, num_workers=5, pipelines=2, threads=1)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 4
    pipeline.next_batch()
    pipeline.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and set(multiprocessing.active_children()) & started:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) & started


@pytest.mark.parametrize(
    "said",
    [
        "Error in GPU operator encountered:\nCUDA allocation failed\nCan't allocate 268435456 bytes on device 0.",
        "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
    ],
)
def test_running_out_of_memory_is_no_fault_of_the_files(
    mixed: Manifest, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """No GPU is here to run out of it, so DALI's words stand for it."""
    pipeline = make(mixed)

    def fail(_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(pipeline.turns[0], "_take", fail)
    try:
        with pytest.raises(ValueError, match=r"DALI ran out of memory: .*lower --device-batch-size, or fewer --data"):
            pipeline.next_batch()
        assert not pipeline.feed.distrusted
    finally:
        pipeline.close()


class Cycle:
    """Batches that come again and again; picklable for the worker processes."""

    def __init__(self, batches: list[tuple[ClipRequest, ...]]) -> None:
        self.batches = batches

    def __call__(self, batch: int) -> tuple[ClipRequest, ...]:
        return self.batches[batch % len(self.batches)]


class TestCulprits:
    """A file that kills DALI's decoder and that PyAV reads: H.264, which DALI has none for on a CPU, listed as VP9."""

    FRAMES = tuple(range(32, 40))

    @pytest.fixture
    def manifest(self, tmp_path: Path) -> Manifest:
        """a.webm, b.mp4 (listed as VP9), c.webm, d.webm (all noise) and e.mp4, which the workers decode."""
        for name in ("a.webm", "c.webm", "d.webm"):
            write_numbered(tmp_path / name, codec="libvpx-vp9", g="12")
        for name in ("b.mp4", "e.mp4"):
            write_numbered(tmp_path / name, g="12")
        out = tmp_path / "manifest.parquet"
        index_folder(tmp_path, out, num_workers=1)
        indexed = read_manifest(out)
        listed = [replace(indexed[row], codec="vp9") if row == 1 else indexed[row] for row in range(5)]
        write_manifest(out, listed, tmp_path)
        content = (tmp_path / "d.webm").read_bytes()
        (tmp_path / "d.webm").write_bytes(content[:300] + np.random.default_rng(0).bytes(len(content) - 300))
        return read_manifest(out)

    def make(self, manifest: Manifest, rows: tuple[int, ...], **data: int) -> DaliPipeline:
        plan = Plan(tuple(request(manifest, row, self.FRAMES) for row in rows))
        return DaliPipeline(manifest, plan, DataConfig(**data), 64)  # type: ignore[arg-type]

    def test_one_file_costs_itself(self, manifest: Manifest) -> None:
        """Of five videos DALI goes on to decode two; PyAV takes over the one it dies of, and says what the noise is."""
        pipeline = self.make(manifest, (0, 1, 2, 3, 4), pipelines=2)
        with pytest.warns(UserWarning, match=r"DALI cannot decode these videos(.|\n)*b\.mp4: .*[Ff]ailed") as warned:
            batches = take(pipeline, 3)
        (told,) = [str(warning.message) for warning in warned if "DALI cannot" in str(warning.message)]
        assert ".webm" not in told
        assert pipeline.feed.distrusted == {1}  # DALI never gets the noise: no excerpt can be cut from it
        assert [row for row in range(5) if pipeline.feed.worker.is_native(row)] == [0, 1, 2, 3]
        for batch in batches:
            assert [video.path for video in batch.skipped] == ["d.webm"]
            assert [r.row for r in batch.requests] == [0, 1, 2, 4, 4]
            for clip in batch.frames:
                assert tuple(read_number(picture) for picture in clip.numpy()) == self.FRAMES

    def test_the_whole_batch_where_none_fails_alone(self, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
        """No real file does this; so the search is made to find nothing."""
        monkeypatch.setattr("dali_pipelines.resilient.decode_alone", lambda *_: None)
        pipeline = self.make(manifest, (0, 1, 4), num_workers=1)
        with pytest.warns(UserWarning, match=r"(.|\n)*a\.webm: (.|\n)*b\.mp4: "):
            (batch,) = take(pipeline, 1)
        assert pipeline.feed.distrusted == {0, 1}
        for clip in batch.frames:
            assert tuple(read_number(picture) for picture in clip.numpy()) == self.FRAMES

    def test_failing_batch_after_batch_is_an_error(self, manifest: Manifest) -> None:
        """Every video of every batch fails although PyAV reads them: then it is not about single files."""
        for number in range(3):
            shutil.copy2(manifest.file(1), manifest.root / f"copy{number}.mp4")
        copies = [replace(manifest[1], path=name) for name in ("b.mp4", "copy0.mp4", "copy1.mp4", "copy2.mp4")]
        write_manifest(manifest.root / "copies.parquet", copies, manifest.root)
        deadly = read_manifest(manifest.root / "copies.parquet")
        plan = Cycle([(request(deadly, row, self.FRAMES),) for row in range(4)])
        pipeline = DaliPipeline(deadly, plan, DataConfig(num_workers=1), 64)
        with (
            pytest.warns(UserWarning, match="DALI cannot"),
            pytest.raises(ValueError, match=r"batch after batch.*decode cpu"),
        ):
            take(pipeline, 4)
