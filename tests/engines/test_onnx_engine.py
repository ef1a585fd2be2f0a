"""Real exports, run by ONNX Runtime and compared with torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxscript
import pytest
import torch

from engines.backends import onnx_engine
from engines.backends.onnx_engine import OnnxEngine, count_operators, export_tower, graph_fingerprint
from engines.config import CLIPConfig
from engines.engine import TorchEngine, choose_dtype, open_engine
from engines.towers.clip_towers import FrameTower, PatchTower, StudentTower, Tower
from tests.conftest import skip_or_fail
from tests.support.clip_models import cosine_error, small_clip
from tests.support.onnx_graphs import hash_graph

CPU = torch.device("cpu")
TOWERS: dict[str, Callable[[], Tower]] = {
    "patch": lambda: PatchTower(small_clip(1, layers=2).visual, 7),
    "naclip": lambda: FrameTower(small_clip(1, layers=2).visual, 24, 40, 8, "naclip"),
    "sclip": lambda: FrameTower(small_clip(1, layers=1).visual, 16, 24, 8, "sclip"),
    "clearclip": lambda: FrameTower(small_clip(1, layers=1).visual, 16, 24, 8, "clearclip"),
    "maskclip, no quick gelu": lambda: FrameTower(
        small_clip(1, quick_gelu=False, layers=1).visual, 32, 32, 16, "maskclip"
    ),
    "student": lambda: StudentTower(5, 24, 16),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of this file, because an export takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in TOWERS), ("patch", torch.float16), ("naclip", torch.float16)],
)
def test_onnxruntime_equals_torch(kind: str, dtype: torch.dtype, cache: Path) -> None:
    tower = TOWERS[kind]()
    engine = OnnxEngine(tower, dtype, CPU, cache)
    assert (engine.dtype, engine.device) == (dtype, CPU)
    reference = TorchEngine(tower, torch.float32, CPU)
    for count in (1, 2, 3, 17):  # one export for all
        x = torch.randn(count, *tower.input_shape, generator=torch.Generator().manual_seed(count))
        ours, expected = engine(x.to(dtype)), reference(x)
        assert ours.dtype == dtype
        assert ours.shape == expected.shape
        assert cosine_error(ours, expected) < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("patch", torch.float32), ("naclip", torch.float16)])
def test_opset_18_spells_attention_out(kind: str, dtype: torch.dtype, cache: Path) -> None:
    tower = TOWERS[kind]()
    path = export_tower(tower, dtype, cache, opset=18)
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    counts = count_operators(path)
    assert "Attention" not in counts
    assert counts["Softmax"] == 2
    session = onnxruntime_session(path)
    x = torch.randn(5, *tower.input_shape, generator=torch.Generator().manual_seed(0))
    (ours,) = session.run(None, {"pixels": x.to(dtype).numpy()})
    assert cosine_error(torch.from_numpy(ours), tower(x)) < (1e-5 if dtype == torch.float32 else 2e-3)


def onnxruntime_session(path: Path):  # type: ignore[no-untyped-def]
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_graph_says_what_it_is(cache: Path) -> None:
    tower = TOWERS["patch"]()
    path = export_tower(tower, torch.float16, cache)
    model = onnx.load(path)
    fingerprint = graph_fingerprint(tower)
    assert path == cache / "onnx" / f"patch7-fp16-op23-{fingerprint}.onnx"
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "tgmae_tower": "patch7", "tgmae_dtype": "fp16", "tgmae_opset": "23", "tgmae_fingerprint": fingerprint,
    }  # fmt: skip
    onnx.checker.check_model(model)
    assert count_operators(path)["Attention"] == 2
    for tensors, name, rest in ((model.graph.input, "pixels", [147]), (model.graph.output, "embeddings", [16])):
        (tensor,) = tensors
        dims = tensor.type.tensor_type.shape.dim
        assert (tensor.name, dims[0].dim_param, [d.dim_value for d in dims[1:]]) == (name, "batch", rest)
        assert tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()  # no path of this machine
    assert not [name for name in os.listdir(path.parent) if name.endswith((".tmp", ".data"))]


# The version of the graphs

# Hashes of the towers' graphs at opset 23 in float32, by GRAPH_VERSION, and what exported them.
EXPORTER = "torch 2.11.0, onnxscript 0.7.2"
GRAPHS: dict[int, dict[str, str]] = {
    1: {
        "patch": "52b218977f393daa",
        "naclip": "fc0535e6ba9f06db",
        "sclip": "09e57a1189d7894f",
        "clearclip": "210fd0aa4fc1e5c8",
        "maskclip, no quick gelu": "8f571c81b676c85d",
        "student": "b0eae210a9ccdb1a",
    }
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOWERS)
def test_a_graph_changes_with_its_version_only(kind: str, cache: Path) -> None:
    found = hash_graph(export_tower(TOWERS[kind](), torch.float32, cache))
    recorded = GRAPHS.get(onnx_engine.GRAPH_VERSION, {}).get(kind)
    assert found == recorded, (
        f"the graph of {kind} now has hash {found}, and {recorded} is recorded for GRAPH_VERSION "
        f"{onnx_engine.GRAPH_VERSION}: raise GRAPH_VERSION if the graph was meant to change, and record the new hash. "
        f"It was recorded with {EXPORTER}; this is torch {torch.__version__}, onnxscript {onnxscript.__version__}. If "
        "only the exporter changed, record the new hash without raising GRAPH_VERSION"
    )


@pytest.mark.slow
def test_the_hash_of_a_graph_ignores_weights_and_sees_code(cache: Path, tmp_path: Path) -> None:
    class Shifted(StudentTower):
        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            return super().forward(patches + 0.5)

    hashes = [hash_graph(export_tower(TOWERS["student"](), torch.float32, cache))]
    for tower in (StudentTower(5, 24, 16), Shifted(5, 24, 16)):
        hashes.append(hash_graph(export_tower(tower, torch.float32, tmp_path)))
    assert hashes[0] == hashes[1] != hashes[2]


# The cache


@pytest.mark.slow
def test_a_graph_is_reused_for_the_same_weights_only(cache: Path) -> None:
    tower = TOWERS["student"]()
    first = export_tower(tower, torch.float32, cache)
    written = first.stat().st_mtime_ns
    assert export_tower(tower, torch.float32, cache) == first
    assert first.stat().st_mtime_ns == written
    tower.layers[2].bias.data[3] += 1e-3
    other = export_tower(tower, torch.float32, cache)
    assert other != first
    assert first.stat().st_mtime_ns == written
    x = torch.randn(2, 75)
    (ours,) = onnxruntime_session(other).run(None, {"pixels": x.numpy()})
    assert cosine_error(torch.from_numpy(ours), tower(x)) < 1e-5


def test_fingerprint_sees_what_weights_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_clip(1)
    prints = {graph_fingerprint(PatchTower(model.visual, 8))}
    assert graph_fingerprint(PatchTower(model.visual, 8)) in prints
    for changed in (small_clip(1, quick_gelu=False), small_clip(1, head_width=16)):
        changed.load_state_dict(model.state_dict())
        prints.add(graph_fingerprint(PatchTower(changed.visual, 8)))
    kinds = ("maskclip", "sclip", "clearclip", "naclip")
    prints |= {graph_fingerprint(FrameTower(model.visual, 32, 32, 8, kind)) for kind in kinds}  # type: ignore[arg-type]
    monkeypatch.setattr(onnx_engine, "GRAPH_VERSION", onnx_engine.GRAPH_VERSION + 1)
    prints.add(graph_fingerprint(PatchTower(model.visual, 8)))
    assert len(prints) == 8


@pytest.mark.slow
def test_a_damaged_file_is_exported_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = TOWERS["student"]()
    path = export_tower(tower, torch.float32, tmp_path)
    whole = path.read_bytes()
    foreign = onnx.load(path)
    foreign.metadata_props[-1].value = "another fingerprint"
    monkeypatch.setattr(onnx_engine, "_export", lambda *_: whole)
    capsys.readouterr()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], b"no graph", foreign.SerializeToString()):
        path.write_bytes(damaged)
        assert export_tower(tower, torch.float32, tmp_path) == path
        assert path.read_bytes() == whole
        first, second = capsys.readouterr().err.splitlines()
        assert first == f"tgmae: {path} is damaged; exporting it again"
        assert second.startswith(f"tgmae: exporting {path.name} to {path.parent}, ")


@pytest.mark.slow
def test_a_half_written_file_of_a_dead_process_does_no_harm(tmp_path: Path) -> None:
    tower = TOWERS["student"]()
    name = f"student5-24-fp32-op23-{graph_fingerprint(tower)}.onnx"
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / f"{name}.4711.tmp").write_bytes(b"half")
    (tmp_path / "onnx" / f"{name}.lock").touch()
    path = export_tower(tower, torch.float32, tmp_path)
    assert path.name == name
    onnx.checker.check_model(onnx.load(path))


@pytest.mark.slow
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        export_tower(TOWERS["student"](), torch.float32, tmp_path)
    assert [name for name in os.listdir(tmp_path / "onnx") if not name.endswith(".lock")] == []


@pytest.mark.slow
def test_export_says_one_line_and_leaves_the_tower_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tower = TOWERS["student"]()
    before = {name: weight.clone() for name, weight in tower.state_dict().items()}
    path = export_tower(tower, torch.float16, tmp_path)
    said = f"tgmae: exporting {path.name} to {path.parent}, which takes a few seconds; it is cached there\n"
    assert capfd.readouterr() == ("", said)
    export_tower(tower, torch.float16, tmp_path)
    assert capfd.readouterr() == ("", "")
    for name, weight in tower.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])


# Mistakes


@pytest.mark.slow
def test_other_inputs_are_refused(cache: Path) -> None:
    engine = OnnxEngine(TOWERS["student"](), torch.float32, CPU, cache)
    for wrong in (torch.zeros(2, 74), torch.zeros(2, 75).half(), torch.zeros(0, 75), torch.zeros(2, 3, 75)):
        with pytest.raises(ValueError, match=r"expected torch.float32 \[n, 75\] on cpu, got torch"):
            engine(wrong)
    wide = torch.randn(4, 150)
    torch.testing.assert_close(engine(wide[:, ::2]), engine(wide[:, ::2].contiguous()))


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exported in float32 or float16, got torch.bfloat16"):
        export_tower(TOWERS["student"](), torch.bfloat16, tmp_path)


@pytest.mark.slow
def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    class Odd(StudentTower):
        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            return patches if patches.sum() > 0 else -patches

    with pytest.raises(ValueError, match="student5-24 could not be exported at opset 23: "):
        export_tower(Odd(5, 24, 16), torch.float32, tmp_path)


@pytest.mark.parametrize("package", ["onnxscript", "onnx", "onnxruntime"])
def test_missing_packages_are_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        OnnxEngine(TOWERS["student"](), torch.float32, CPU, tmp_path)


def test_cuda_needs_its_provider(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(ValueError, match="pip install onnxruntime-gpu"):
        OnnxEngine(TOWERS["student"](), torch.float32, torch.device("cuda"), tmp_path)


# The choice of engine


@pytest.mark.slow
def test_open_engine_opens_what_is_asked_for(tmp_path: Path) -> None:
    tower = TOWERS["student"]()
    for engine, kind in (("torch", TorchEngine), ("onnxruntime", OnnxEngine)):
        config = CLIPConfig(engine=engine, cache_dir=tmp_path)  # type: ignore[arg-type]
        assert isinstance(open_engine(tower, config, CPU, 8), kind)
    for engine in ("tensorrt", "tensorrt_rtx"):
        config = CLIPConfig(engine=engine, cache_dir=tmp_path)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"--clip.engine {engine} runs on CUDA only"):
            open_engine(tower, config, CPU, 8)


def test_precision_follows_the_device_unless_named() -> None:
    cuda = torch.device("cuda")
    assert choose_dtype(CLIPConfig(), CPU) == torch.float32
    assert choose_dtype(CLIPConfig(), cuda) == torch.float16
    assert choose_dtype(CLIPConfig(precision="fp32"), cuda) == torch.float32
    assert choose_dtype(CLIPConfig(precision="fp16"), CPU) == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["patch", "naclip"])
def test_cuda_provider_equals_torch(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        skip_or_fail("this onnxruntime has no CUDAExecutionProvider: pip install onnxruntime-gpu")
    device, tower = torch.device("cuda"), TOWERS[kind]()
    engine = OnnxEngine(tower, dtype, device, tmp_path)
    reference = TorchEngine(tower, torch.float32, device)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for stream in (torch.cuda.default_stream(), side):
        with torch.cuda.stream(stream):
            for count in (1, 5, 33):
                x = torch.randn(count, *tower.input_shape, device=device)
                assert cosine_error(engine(x.to(dtype)), reference(x)) < (1e-4 if dtype == torch.float32 else 2e-3)
