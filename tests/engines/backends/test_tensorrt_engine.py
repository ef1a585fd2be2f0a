"""Real TensorRT plans, built by tensorrt_rtx for GPUs that need not be there. Only running a plan needs a GPU."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.backends import tensorrt_plan
from engines.backends.onnx_engine import OPSET_ATTENTION, OPSET_PLAIN, export_tower
from engines.backends.tensorrt_engine import TensorRTEngine
from engines.backends.tensorrt_plan import (
    PlanDescription,
    TensorSpec,
    build_plan,
    choose_opset,
    choose_target,
    describe_plan,
    load_library,
)
from engines.engine import TorchEngine
from engines.towers.clip_towers import FrameTower, PatchTower, StudentTower
from tests.conftest import skip_or_fail
from tests.support.clip_models import cosine_error, small_clip

FLOAT, HALF = torch.float32, torch.float16


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def student(cache: Path) -> Path:
    """Export the smallest graph there is."""
    torch.manual_seed(0)
    return export_tower(StudentTower(8, 32, 16), HALF, cache)


def build(graph: Path, out: Path, batch: int = 64, target: str | None = "sm80") -> Path:
    return build_plan(graph, out, "tensorrt_rtx", batch, target)


# Building


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("patch", HALF), ("naclip", HALF), ("naclip", FLOAT)])
def test_every_kind_of_tower_builds(kind: str, dtype: torch.dtype, cache: Path, tmp_path: Path) -> None:
    """Heads of 8 values have no fused kernel; NACLIP's attention has a bias."""
    visual = small_clip(1, layers=2).visual
    tower = PatchTower(visual, 8) if kind == "patch" else FrameTower(visual, 32, 48, 8, "naclip")
    graph = export_tower(tower, dtype, cache, choose_opset(load_library("tensorrt_rtx"), "tensorrt_rtx", dtype))
    plan = describe_plan(build(graph, tmp_path, batch=5, target="SM89"))
    name = "float32" if dtype == FLOAT else "float16"
    out = (-1, 16) if kind == "patch" else (-1, 24, 16)
    assert plan.inputs == (TensorSpec(name="pixels", dtype=name, shape=(-1, *tower.input_shape)),)
    assert plan.outputs == (TensorSpec(name="embeddings", dtype=name, shape=out),)
    assert (plan.profile, plan.gpu) == ((1, 5, 5), "sm89")


@pytest.mark.slow
def test_attention_in_float32_is_refused_before_it_crashes_the_builder(cache: Path, tmp_path: Path) -> None:
    graph = export_tower(PatchTower(small_clip(1, layers=2).visual, 8), FLOAT, cache, opset=OPSET_ATTENTION)
    with pytest.raises(ValueError, match="Attention in float32, which TensorRT cannot build: export it in fp16, or at"):
        build(graph, tmp_path)
    assert not list(tmp_path.glob("*.plan*[!k]"))


def test_opset_is_what_the_library_can_build() -> None:
    def version(text: str) -> Any:
        return SimpleNamespace(__version__=text)

    assert choose_opset(version("10.13.3.9"), "tensorrt", HALF) == OPSET_PLAIN
    assert choose_opset(version("10.14.1.48"), "tensorrt", HALF) == OPSET_ATTENTION
    assert choose_opset(version("11.4.0.106"), "tensorrt", HALF) == OPSET_ATTENTION
    assert choose_opset(version("11.4.0.106"), "tensorrt", FLOAT) == OPSET_PLAIN
    assert choose_opset(version("1.7.1.116"), "tensorrt_rtx", HALF) == OPSET_ATTENTION
    assert choose_opset(version("1.7.1.116"), "tensorrt_rtx", FLOAT) == OPSET_PLAIN


# Reuse


@pytest.mark.slow
def test_a_plan_is_reused_for_the_same_of_everything_only(student: Path, cache: Path, tmp_path: Path) -> None:
    first = build(student, tmp_path)
    written = first.stat().st_mtime_ns
    assert build(student, tmp_path) == first
    assert first.stat().st_mtime_ns == written
    torch.manual_seed(1)
    other_weights = export_tower(StudentTower(8, 32, 16), HALF, cache)
    same_name = tmp_path / student.name
    same_name.write_bytes(other_weights.read_bytes())
    plans = {first, build(other_weights, tmp_path), build(same_name, tmp_path)}
    plans |= {build(student, tmp_path, batch=65), build(student, tmp_path, target="sm86")}
    assert len(plans) == 5
    assert first.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_plan_of_another_version_is_not_reused(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(student, tmp_path)
    monkeypatch.setattr(load_library("tensorrt_rtx"), "__version__", "1.8.0.0")
    second = build(student, tmp_path)
    assert second != first
    assert "tensorrt_rtx-1.8.0.0-b64" in second.name
    assert describe_plan(second).version == "1.8.0.0"


@pytest.mark.parametrize("damage", ["truncated", "foreign", "undescribed", "misdescribed"])
def test_a_damaged_plan_is_built_again(
    damage: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build(student, tmp_path)
    beside = path.with_name(path.name + ".json")
    capsys.readouterr()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        path.write_bytes(b"something else")
    elif damage == "undescribed":
        beside.unlink()
    else:
        beside.write_text("{}")
    with pytest.raises(
        ValueError, match=r"truncated, damaged or not the one|not a plan of tgmae, or .* is missing or damag"
    ):
        describe_plan(path)
    assert build(student, tmp_path) == path
    assert path.stat().st_size == describe_plan(path).plan_bytes > 10_000
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("tgmae: ")
    assert first.endswith("; building it again")
    assert second.startswith(f"tgmae: building {path.name} in {tmp_path}, ")


def test_a_build_that_dies_leaves_no_plan(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is written before its description, so that half of the pair is never mistaken for the whole."""

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(KeyboardInterrupt):
        build(student, tmp_path)
    monkeypatch.undo()
    (left,) = tmp_path.glob("*.plan")
    with pytest.raises(ValueError, match="is missing or damaged"):
        describe_plan(left)
    assert describe_plan(build(student, tmp_path)).profile == (1, 64, 64)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


# Mistakes


@pytest.mark.parametrize(("library", "install"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx-cu13")])
def test_a_missing_library_is_named(
    library: tensorrt_plan.Library, install: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{library} is not installed: pip install {install}"):
        build_plan(student, tmp_path, library, 8, None)


def test_the_bindings_alone_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI has wheels of the libraries and the bindings, but only the source of tensorrt_rtx itself."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert load_library("tensorrt_rtx").__name__ == "tensorrt_rtx_bindings"


def test_a_library_that_does_not_load_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(tensorrt_plan.importlib, "import_module", fail)
    with pytest.raises(ValueError, match="tensorrt is installed but does not load: libnvinfer"):
        load_library("tensorrt")


def test_without_a_gpu_a_target_must_be_named(monkeypatch: pytest.MonkeyPatch, student: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"no GPU to build for; name a target: --target sm75\|sm80\|sm86"):
        build(student, tmp_path, target=None)
    with pytest.raises(ValueError, match="has no target 'sm90'; it has sm75, sm80"):
        build(student, tmp_path, target="sm90")
    with pytest.raises(ValueError, match="builds for the GPU it runs on, and this machine has none"):
        choose_target(SimpleNamespace(), "tensorrt", None, None)
    with pytest.raises(ValueError, match="--target sm80 is for tensorrt_rtx only"):
        choose_target(SimpleNamespace(), "tensorrt", "sm80", None)


def test_the_target_is_the_gpus_own(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = load_library("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert choose_target(trt, "tensorrt_rtx", None, None) == "sm86"
    assert choose_target(trt, "tensorrt", None, None) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ValueError, match=r"not for this GPU \(sm90\): use --clip.engine tensorrt"):
        choose_target(trt, "tensorrt_rtx", None, None)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the graph .*none.onnx: No such file"):
        build(tmp_path / "none.onnx", tmp_path)
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(ValueError, match=r"cannot read the graph .*bad.onnx"):
        build(tmp_path / "bad.onnx", tmp_path)
    assert not list(tmp_path.glob("*.plan"))


@pytest.mark.slow
def test_a_graph_of_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    warnings.simplefilter("ignore")  # torch warns about itself
    program = torch.onnx.export(torch.nn.Linear(4, 2).eval(), (torch.zeros(3, 4),), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))
    with pytest.raises(ValueError, match="one input and a dynamic batch"):
        build(path, tmp_path)


@pytest.mark.slow
def test_the_builders_own_errors_are_told(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    """Without our own check, attention in float32 fails in the builder."""
    monkeypatch.setattr(tensorrt_plan, "_let_decompose", lambda *_: None)
    graph = export_tower(PatchTower(small_clip(1, layers=2).visual, 8), FLOAT, cache, opset=OPSET_ATTENTION)
    with pytest.raises(ValueError, match=r"could not build patch8-fp32-op23.*not supported by a dedicated kernel"):
        build(graph, tmp_path)
    assert not list(tmp_path.glob("*.plan"))


def test_it_needs_cuda(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--clip.engine tensorrt_rtx runs on CUDA only; on a CPU use --clip.engine torch"
    ):
        TensorRTEngine(StudentTower(8, 32, 16), HALF, torch.device("cpu"), tmp_path, "tensorrt_rtx", 8)


def test_descriptions_survive_the_file(student: Path, tmp_path: Path) -> None:
    plan = describe_plan(build(student, tmp_path))
    assert isinstance(plan, PlanDescription)
    assert isinstance(plan.profile, tuple)
    assert plan.build_s > 0
    assert len(plan.graph_hash) == 12


# Running


def require(library: tensorrt_plan.Library) -> Any:
    try:
        return load_library(library)
    except ValueError as error:
        skip_or_fail(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["patch", "naclip"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_a_plan_equals_torch(library: tensorrt_plan.Library, dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    loaded = require(library)
    try:
        choose_target(loaded, library, None, None)
    except ValueError as error:
        pytest.skip(str(error))  # tensorrt_rtx builds nothing for Hopper
    device = torch.device("cuda")
    visual = small_clip(1).visual
    tower = PatchTower(visual, 7) if kind == "patch" else FrameTower(visual, 32, 48, 8, "naclip")
    engine = TensorRTEngine(tower, dtype, device, tmp_path, library, 33)
    reference = TorchEngine(tower, FLOAT, device)
    worst = 1e-4 if dtype == FLOAT else 2e-3
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for stream in (torch.cuda.default_stream(), side):
        with torch.cuda.stream(stream):
            for count in (33, 1, 5):
                x = torch.randn(count + 1, *tower.input_shape, device=device)
                # From the second row on, whose address is not a multiple of 256 bytes.
                assert cosine_error(engine(x[1:].to(dtype)), reference(x[1:])) < worst
                assert cosine_error(engine(x.to(dtype)[1:]), reference(x[1:])) < worst
    # Results stay valid while the next are computed, and the next read their own input.
    xs = [torch.randn(33, *tower.input_shape, device=device) for _ in range(8)]
    for x, ours in zip(xs, [engine(x.to(dtype)) for x in xs], strict=True):
        assert cosine_error(ours, reference(x)) < worst
    with pytest.raises(ValueError, match="takes up to 33 inputs at once, got 34"):
        engine(torch.zeros(34, *tower.input_shape, device=device, dtype=dtype))
    with pytest.raises(ValueError, match="expected torch"):
        engine(torch.zeros(3, *tower.input_shape, device="cpu", dtype=dtype))
    (plan,) = (tmp_path / "plans").glob("*.plan")
    written = plan.stat().st_mtime_ns
    again = TensorRTEngine(tower, dtype, device, tmp_path, library, 33)
    assert plan.stat().st_mtime_ns == written
    assert torch.equal(again(xs[0].to(dtype)), engine(xs[0].to(dtype)))


@pytest.mark.gpu
def test_the_host_does_not_wait(tmp_path: Path) -> None:
    require("tensorrt")
    device = torch.device("cuda")
    engine = TensorRTEngine(StudentTower(8, 32, 16), HALF, device, tmp_path, "tensorrt", 8)
    x = torch.zeros(8, 192, device=device, dtype=HALF)
    engine(x)
    torch.cuda.synchronize()
    for cycles in (10**9, 10**10):  # GPU cycles: half a second, then five for a host that was delayed
        torch.cuda._sleep(cycles)
        engine(x)
        if runs_ahead := not torch.cuda.current_stream().query():
            break
    torch.cuda.synchronize()
    assert runs_ahead
