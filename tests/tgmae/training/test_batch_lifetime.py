"""A batch lives until the stream that works on it is done with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dali_pipelines.dali_pipeline import DaliPipeline
from dali_pipelines.types import ClipBatch
from tests.support.simulated_gpu import SimulatedGpu
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.data.manifest import read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.scorer import BoundScorer
from tgmae.training.batch_lifetime import BatchLifetime
from tgmae.training.loader import Loader

SIZE, NUM_FRAMES, BATCH = 64, 8, 8


class Batch:
    """Something that can be weakly referred to."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    monkeypatch.setattr(torch.cuda, "Event", simulated.event)
    return simulated


def hand_out(lifetime: BatchLifetime) -> Callable[[], Batch | None]:
    """Hand out a batch that nobody else holds."""
    seen = weakref.ref(lifetime.hand_out(Batch))
    return seen


def test_batches_live_until_their_work_is_done(gpu: SimulatedGpu) -> None:
    lifetime = BatchLifetime(torch.device("cuda"))
    first = hand_out(lifetime)
    gpu.launch(5.0)
    second = hand_out(lifetime)
    gpu.launch(5.0)
    assert first() is not None
    gpu.host_s = 5.0
    lifetime.hand_out(Batch)
    assert first() is None
    assert second() is not None


def test_closing_waits_for_all_of_them(gpu: SimulatedGpu) -> None:
    lifetime = BatchLifetime(torch.device("cuda"))
    batches = []
    for _ in range(2):
        batches.append(hand_out(lifetime))
        gpu.launch(5.0)
    lifetime.close()
    assert gpu.host_s == 10.0
    assert [batch() for batch in batches] == [None, None]
    lifetime.close()


@pytest.mark.parametrize("load_s", [0.035, 0.069, 0.105])
def test_accumulation_under_a_graph_runs_two_passes_ahead(gpu: SimulatedGpu, load_s: float) -> None:
    """Passes of 70 ms that the host launches in .2 ms, 32 to an optimiser step, which ends by reading the last one.

    Memory stays bounded, and waiting is what the GPU stood still: nothing where a batch takes less than a pass.
    """
    pass_s, lifetime, steps = 0.07, BatchLifetime(torch.device("cuda")), 3
    ready_s, batches, ends, alive, idle_s = load_s, [], [], 0, 0.0

    def take() -> Batch:
        nonlocal ready_s, idle_s
        gpu.host_s = max(gpu.host_s, ready_s)
        ready_s = gpu.host_s + load_s  # the loader's thread makes the next batch
        idle_s += max(gpu.host_s - gpu.free_s, 0.0)
        return Batch()

    for _ in range(steps):
        for _ in range(32):
            batches.append(weakref.ref(lifetime.hand_out(take)))
            gpu.launch(pass_s, host_s=0.0002)
            alive = max(alive, sum(batch() is not None for batch in batches))
        ends.append(gpu.event())
        ends[-1].record()
        if len(ends) > 1:  # losses are read a step later
            ends[-2].synchronize()
    lifetime.close()
    assert alive <= 2
    assert lifetime.waited_s == pytest.approx(idle_s)
    total_s = load_s + (steps * 32 - 1) * max(load_s, pass_s) + pass_s
    assert gpu.host_s == pytest.approx(total_s, rel=0.01)
    assert lifetime.waited_s == pytest.approx(total_s - steps * 32 * pass_s, abs=0.02)


@pytest.mark.slow
def test_a_cpu_loader_records_no_event(shapes: Path) -> None:
    loader = make_loader(shapes, torch.device("cpu"))
    try:
        assert len(loader.next_batch().clips.frames) == BATCH
        assert loader.next_batch().clips.frames.device.type == "cpu"
    finally:
        loader.close()


def make_pipeline(shapes: Path, device: torch.device, **data: object) -> DaliPipeline:
    config = DataConfig(manifest=shapes, stride=2, flip=True, **data)  # type: ignore[arg-type]
    manifest = read_manifest(shapes)
    plan = ClipSampler(manifest=manifest, data=config, num_frames=NUM_FRAMES, batch_size=BATCH, seed=3)
    return DaliPipeline(manifest, plan, config, SIZE, device=device)


def make_loader(shapes: Path, device: torch.device, **data: object) -> Loader:
    model = ModelConfig(image_size=SIZE, num_frames=NUM_FRAMES)
    mask = MaskConfig(kind="tube")
    return Loader(make_pipeline(shapes, device, **data), BoundScorer(Noise(model, device), None), mask, model, device)


class Noise:
    """Scores that need no manifest."""

    note = ""
    needs_text = False

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, clips: ClipBatch, text: torch.Tensor | None = None) -> torch.Tensor:
        shape = (len(clips.requests), self.model.num_slots, self.model.patches_per_slot)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.device)


def check_sums(frames: torch.Tensor) -> torch.Tensor:
    """One number a clip that any changed byte changes."""
    weights = torch.arange(frames[0].numel(), device=frames.device) % 1009 + 1
    return (frames.flatten(1).long() * weights).sum(1)


@pytest.mark.gpu
@pytest.mark.parametrize("repeat", [1, 2])
def test_training_may_be_slower_than_the_host(shapes: Path, repeat: int) -> None:
    """Batches are dropped by Python long before the training stream reads them; what it reads is what was decoded."""
    device = torch.device("cuda", 0)
    calm = make_pipeline(shapes, device, repeat=repeat)
    try:
        wanted = []
        for _ in range(12):
            batch = calm.next_batch()
            wanted.append(check_sums(batch.frames).cpu())
            torch.cuda.synchronize()
    finally:
        calm.close()
    loader = make_loader(shapes, device, repeat=repeat)
    try:
        sums = []
        for _ in range(12):
            frames = loader.next_batch().clips.frames
            assert frames.device == device
            torch.cuda._sleep(200_000_000)  # clock cycles: about a tenth of a second
            sums.append(check_sums(frames))
            del frames
        found = torch.stack(sums).cpu()
    finally:
        loader.close()
    assert torch.equal(found, torch.stack(wanted))


@pytest.mark.gpu
def test_one_clip_a_decode_is_not_copied(shapes: Path) -> None:
    """The frames are DALI's memory: torch's allocator has given out none for them."""
    device = torch.device("cuda", 0)
    for repeat, copies in ((1, 0), (2, 1)):
        pipeline = make_pipeline(shapes, device, repeat=repeat)
        try:
            before = torch.cuda.memory_allocated(device)
            frames = pipeline.next_batch().frames
            assert torch.cuda.memory_allocated(device) - before == copies * frames.nbytes
        finally:
            torch.cuda.synchronize()
            pipeline.close()


@pytest.mark.gpu
def test_scorers_read_what_was_decoded(shapes: Path) -> None:
    """On the loader's own stream, before the batch is handed out."""
    device = torch.device("cuda", 0)
    seen = []

    class Looking(Noise):
        def __call__(self, clips: ClipBatch, text: torch.Tensor | None = None) -> torch.Tensor:
            seen.append(check_sums(clips.frames))
            return super().__call__(clips)

    model = ModelConfig(image_size=SIZE, num_frames=NUM_FRAMES)
    pipeline = make_pipeline(shapes, device)
    loader = Loader(pipeline, BoundScorer(Looking(model, device), None), MaskConfig(kind="tube"), model, device)
    try:
        for _ in range(6):
            frames = loader.next_batch().clips.frames
            torch.cuda.synchronize()
            assert torch.equal(seen.pop(0), check_sums(frames))
    finally:
        loader.close()
