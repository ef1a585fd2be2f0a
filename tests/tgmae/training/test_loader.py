"""The batches of the loader: what they carry and what they show."""

from __future__ import annotations

import concurrent.futures.thread
import itertools
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from dali_pipelines.types import Caption
from engines.clip_model import SHAPES_CLIP
from engines.config import CLIPConfig
from tests.support.segments import cut_segments
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import TrainConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.masks.scorer import bind_scorer
from tgmae.training.loader import InputError, Loader, TrainingBatch, make_loader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Segments with several captions each."""
    files = read_manifest(shapes)
    files = files.with_captions(
        [
            [*row, Caption("a blue star spinning", "test"), Caption(f"number {n}", "")]
            for n, row in enumerate(files.captions())
        ]
    )
    rows = [(row, segment) for row in range(3) for segment in ((0, 16), (16, 40))]
    return cut_segments(files, tmp_path_factory.mktemp("segments") / "manifest.parquet", rows)


@pytest.fixture(scope="module")
def config(cache_dir: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(image_size=32, num_frames=4), data=DataConfig(stride=2, flip=True), batch_size=6,
        device_batch_size=6, mask=MaskConfig(frames_per_tubelet=1, ratio=0.5), pipeline="pyav",
        clip=CLIPConfig(model="shapes", cache_dir=cache_dir),
    )  # fmt: skip


@contextmanager
def loading(config: TrainConfig, manifest: Manifest) -> Iterator[Loader]:
    bound = bind_scorer(config, manifest, CPU)
    loader = make_loader(config, manifest, bound, 0, CPU)
    try:
        yield loader
    finally:
        loader.close()


def encode(captions: list[str]) -> Tensor:
    """Return what open_clip itself makes of captions."""
    model = open_clip.create_model(f"local-dir:{SHAPES_CLIP}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{SHAPES_CLIP}")(captions)
    with torch.inference_mode():
        return model.encode_text(tokens, normalize=True)  # type: ignore[operator, no-any-return]


@pytest.mark.slow
def test_text_is_the_embedding_of_the_drawn_captions(config: TrainConfig, manifest: Manifest) -> None:
    with loading(config, manifest) as loader:
        batches = list(itertools.islice(loader, 3))
    drawn = set()
    for batch in batches:
        assert batch.text is not None
        assert (batch.text.dtype, batch.text.shape) == (torch.float32, (6, 64))
        pairs = zip(batch.clips.videos, batch.clips.requests, strict=True)
        captions = [video.captions[request.caption].text for video, request in pairs]
        torch.testing.assert_close(batch.text, encode(captions), rtol=0, atol=1e-5)
        torch.testing.assert_close(batch.text.norm(dim=1), torch.ones(6), rtol=0, atol=1e-5)
        assert len({tuple(row.tolist()) for row in batch.text}) == len(set(captions)) > 1
        drawn |= {request.caption for request in batch.clips.requests}
        assert [video.name for video in batch.clips.videos] == [manifest[r.row].name for r in batch.clips.requests]
    assert drawn == {0, 1, 2}


def test_text_of_a_stand_in_is_its_own(config: TrainConfig, manifest: Manifest, tmp_path: Path) -> None:
    """Where a video cannot be read, clip, caption and text all are those of the clip in its place."""
    missing = manifest[0].path
    for row in range(1, len(manifest)):
        target = tmp_path / manifest[row].path
        target.parent.mkdir(parents=True, exist_ok=True)
        if manifest[row].path != missing and not target.exists():
            target.symlink_to(manifest.file(row))
    with loading(config, Manifest(manifest.table, tmp_path)) as loader:
        batch = loader.next_batch()
        assert {video.path for video in loader.skipped.values()} == {manifest[0].name, manifest[1].name}
    assert len(batch.clips.skipped) == 2
    assert missing not in {video.path for video in batch.clips.videos}
    assert batch.text is not None
    torch.testing.assert_close(batch.text, encode(batch.clips.captions()), rtol=0, atol=1e-5)


def test_masks_without_text(config: TrainConfig, manifest: Manifest) -> None:
    tube = replace(config, mask=MaskConfig(kind="tube", ratio=0.5))
    with loading(tube, manifest.with_captions([[]] * len(manifest))) as loader:
        batch = loader.next_batch()
    assert batch.text is None
    assert batch.clips.captions() == [""] * 6


def test_repr_shows_shapes_and_no_contents(config: TrainConfig, manifest: Manifest) -> None:
    with loading(config, manifest) as loader:
        batch = loader.next_batch()
    assert repr(batch) == (
        "TrainingBatch(clips ClipBatch(frames uint8 [6, 4, 32, 32, 3] on cpu), "
        "masks TokenMasks(visible int32 [6, 4], masked int32 [6, 4], cpu), text float32 [6, 64] on cpu)"
    )
    assert repr(TrainingBatch(batch.clips, batch.masks, None)).endswith(", cpu), text None)")


def test_input_that_ends_is_an_input_error(config: TrainConfig, manifest: Manifest, tmp_path: Path) -> None:
    """Every file is gone: the message names segments and their reasons."""
    with (
        loading(config, Manifest(manifest.table, tmp_path)) as loader,
        pytest.raises(InputError, match=r"none of the videos of 16 batches could be read; the first:\n  .*#\d+-\d+: "),
    ):
        loader.next_batch()


def test_a_signal_waits_until_the_loaders_thread_has_started(
    config: TrainConfig, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python waits at its end for a thread that nobody tells to stop."""
    start, executor = threading.Thread.start, ThreadPoolExecutor(1, "loader")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        signal.raise_signal(signal.SIGINT)

    bound = bind_scorer(config, manifest, CPU)
    monkeypatch.setattr("tgmae.training.loader.ThreadPoolExecutor", lambda *_, **__: executor)
    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_loader(config, manifest, bound, 0, CPU)
        started = [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
        assert started
        assert set(started) <= set(concurrent.futures.thread._threads_queues)  # these are told to
    finally:
        signal.signal(signal.SIGINT, before)
        executor.shutdown(wait=False)
