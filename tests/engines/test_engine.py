"""Engines by precision, scores that are NaN, and the CUDA graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.clip_model import CLIPModel, load_clip
from engines.config import CLIPConfig, TowerSpec
from engines.engine import TorchEngine, choose_dtype, open_engine
from engines.patch_similarity import make_patch_similarity
from engines.towers.clip_towers import FrameTower, PatchTower, StudentTower, Tower
from tests.support.clip_models import cosine_error, save_small_clip, small_clip

CPU = torch.device("cpu")
PRECISIONS = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "auto": torch.float32,
}  # fmt: skip
TOWERS = ("patch", "sclip", "student")


def make_tower(kind: str) -> Tower:
    visual = small_clip(1, layers=2).visual
    if kind == "student":
        return StudentTower(8, 64, 32)
    return PatchTower(visual, 8) if kind == "patch" else FrameTower(visual, 32, 48, 8, "sclip")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_on_a_cpu(precision: str) -> None:
    tower = make_tower("patch")
    x = draw(9, *tower.input_shape)
    exact = tower(x)
    config = CLIPConfig(precision=precision)  # type: ignore[arg-type]
    engine = open_engine(tower, config, CPU, 9)
    assert engine.dtype == choose_dtype(config, CPU) == PRECISIONS[precision]
    out = engine(x.to(engine.dtype))
    assert out.dtype == engine.dtype
    limits = {"fp32": 1e-6, "auto": 1e-6, "fp16": 1e-4, "bf16": 5e-4, "fp8": 5e-3}
    assert cosine_error(out, exact) < limits[precision]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt", "tensorrt_rtx"])
def test_what_only_torch_can(precision: str, engine: str) -> None:
    with pytest.raises(ValueError, match=rf"--clip.precision {precision} needs --clip.engine torch, got {engine}; "):
        CLIPConfig(precision=precision, engine=engine)  # type: ignore[arg-type]


def test_a_graph_needs_cuda() -> None:
    """On a CPU the flag does nothing."""
    tower = make_tower("patch")
    x = draw(4, 192)
    plain, asked = (open_engine(make_tower("patch"), CLIPConfig(cuda_graph=graph), CPU, 4) for graph in (False, True))
    assert torch.equal(plain(x), asked(x))
    assert torch.equal(plain(x), tower(x))


# Scores that are NaN


@pytest.fixture
def overflowing(tmp_path: Path) -> CLIPModel:
    """A CLIP whose first norm returns values beyond float16."""
    save_small_clip(tmp_path)
    clip = load_clip(CLIPConfig(model=str(tmp_path)))
    clip.visual.ln_pre.weight.data *= 1e6
    return clip


@pytest.mark.parametrize("scorer", ["patch", "dense"])
def test_nan_is_refused(overflowing: CLIPModel, scorer: str) -> None:
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = torch.nn.functional.normalize(draw(2, 1, 16), dim=-1)
    spec = TowerSpec(kind=scorer)  # type: ignore[arg-type]
    for precision in ("fp32", "bf16", "fp16"):
        config = CLIPConfig(precision=precision)  # type: ignore[arg-type]
        similarity = make_patch_similarity(overflowing, config, spec, 8, 32, 32, CPU)
        if precision == "fp16":
            with pytest.raises(ValueError, match=r"CLIP gives NaN for 32 of 32 scores in float16: .* fp32, or bf16"):
                similarity.compare(frames, texts)
        else:
            assert similarity.compare(frames, texts).isfinite().all()


# The graph


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_graph_equals_the_tower_bit_for_bit(kind: str, precision: str) -> None:
    """Full passes and others, in any order, on two streams in turn; each result is kept while the next is computed."""
    if precision == "fp8" and (kind == "student" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("no FP8 here")
    device = torch.device("cuda")
    torch.manual_seed(0)
    engines = [
        open_engine(make_tower(kind), CLIPConfig(precision=precision, cuda_graph=graph), device, 64)  # type: ignore[arg-type]
        for graph in (False, True)
    ]
    if kind == "student":
        state = engines[0].tower.state_dict()  # type: ignore[attr-defined]
        engines[1].tower.load_state_dict(state)  # type: ignore[attr-defined]
    eager, graph = engines
    assert isinstance(graph, TorchEngine)
    assert graph._captured is not None
    shape = make_tower(kind).input_shape
    inputs = [draw(n, *shape, seed=n + seed).to(device, eager.dtype) for seed in (0, 1) for n in (64, 17, 64, 1, 63)]
    expected = [eager(x) for x in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream):
            found = [graph(x) for x in inputs]
        torch.cuda.synchronize()
        for ours, wanted in zip(found, expected, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.gpu
def test_calls_from_two_streams_do_not_mix() -> None:
    device = torch.device("cuda")
    engine = TorchEngine(make_tower("patch"), torch.float16, device, 512)
    reference = TorchEngine(make_tower("patch"), torch.float16, device)
    inputs = [draw(512, 192, seed=seed).to(device, torch.float16) for seed in range(16)]
    expected = [reference(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    found = []
    for number, x in enumerate(inputs):
        with torch.cuda.stream(streams[number % 2]):
            found.append(engine(x))
    torch.cuda.synchronize()
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.gpu
def test_the_pass_that_training_takes_is_recorded(overflowing: CLIPModel) -> None:
    similarity = make_patch_similarity(
        overflowing, CLIPConfig(batch=64), TowerSpec(kind="patch"), 8, 32, 32, torch.device("cuda")
    )
    assert isinstance(similarity.engine, TorchEngine)
    assert similarity.engine._captured is not None
    assert similarity.engine._captured.shape == (64, 192)
