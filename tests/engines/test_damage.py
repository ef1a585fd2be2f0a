"""Single flipped bits in what engines keep: no file passes one on in silence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from engines.backends import tensorrt_plan
from engines.backends.onnx_engine import _holds, export_tower
from engines.backends.tensorrt_plan import PlanDescription, TensorSpec, describe_plan
from engines.clip_model import load_clip
from engines.config import CLIPConfig
from engines.sealed import read_sealed, seal_fields, write_sealed
from engines.text_cache import embed_captions
from engines.torch_files import read_torch_file
from engines.towers.clip_towers import StudentTower
from engines.towers.student import load_student, save_student
from tests.support.faults.flips import TryFlips, flip_bits

CPU = torch.device("cpu")


def tensors(module: torch.nn.Module) -> list[bytes]:
    return [weight.numpy().tobytes() for weight in module.state_dict().values()]


def small_student(path: Path) -> StudentTower:
    torch.manual_seed(0)
    tower = StudentTower(8, 8, 4)
    save_student(path, tower, "a" * 16, {"agreement": 0.5})
    return tower


@pytest.mark.slow
def test_no_flipped_bit_in_a_student_is_silent(tmp_path: Path, try_flips: TryFlips) -> None:
    path = tmp_path / "student.safetensors"
    tower = small_student(path)
    assert tensors(load_student(path, "a" * 16, 8)) == tensors(tower)
    flips = try_flips(path, lambda: tensors(load_student(path, "a" * 16, 8)))
    assert flips.refused > 0.9 * flips.tried


def test_a_damaged_student_is_named(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    small_student(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"student\.safetensors is damaged: its checksum .* with tgmae-engine distill"):
        load_student(path, "a" * 16, 8)


@pytest.mark.slow
def test_no_flipped_bit_in_an_own_checkpoint_is_silent(tmp_path: Path, try_flips: TryFlips) -> None:
    """The kind that distill leaves as OUT.partial."""
    path = tmp_path / "state.partial"
    state = {"settings": "x", "tower": {"weight": torch.randn(40, 30)}, "step": 3}
    torch.save(state, path)

    def read() -> object:
        found = read_torch_file(path)
        return found["settings"], found["step"], found["tower"]["weight"].numpy().tobytes()

    try_flips(path, read)
    data = bytearray(path.read_bytes())
    place = data.index(state["tower"]["weight"].numpy().tobytes()) + 2  # type: ignore[index]
    data[place] ^= 1
    path.write_bytes(data)
    silent = torch.load(path, weights_only=True)
    assert not torch.equal(silent["tower"]["weight"], state["tower"]["weight"])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"state\.partial cannot be read: its entry state/data/0 is damaged"):
        read_torch_file(path)


@pytest.mark.slow
def test_no_flipped_bit_in_a_graph_is_silent(tmp_path: Path, try_flips: TryFlips) -> None:
    tower = small_student(tmp_path / "student.safetensors")
    path = export_tower(tower, torch.float32, tmp_path)
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert _holds(path, about)

    def read() -> onnx.ModelProto:
        if not _holds(path, about):
            raise ValueError("exported again")
        return onnx.load(path)

    flips = try_flips(path, read, all=1000)
    assert flips.refused > 0.95 * flips.tried
    again = path.read_bytes()
    path.write_bytes(again[:-100] + bytes([again[-100] ^ 1]) + again[-99:])
    assert export_tower(tower, torch.float32, tmp_path) == path
    assert path.read_bytes() == again


def test_no_flipped_bit_in_a_plans_description_is_silent(tmp_path: Path, try_flips: TryFlips) -> None:
    """A shape that is read wrongly would let the GPU write behind its tensor."""
    import hashlib

    path = tmp_path / "a.plan"
    path.write_bytes(b"plan" * 50)
    spec = TensorSpec(name="embeddings", dtype="float16", shape=(-1, 512))
    plan = PlanDescription(
        library="tensorrt_rtx", version="1", gpu="sm80", graph_hash="0", inputs=(spec,), outputs=(spec,),
        profile=(1, 8, 8), build_s=1.0, plan_bytes=200, plan_hash=hashlib.sha256(path.read_bytes()).hexdigest(),
    )  # fmt: skip
    fields = asdict(plan)
    tensorrt_plan._beside(path).write_text(json.dumps(seal_fields(fields)))
    assert describe_plan(path) == plan
    for file in (path, tensorrt_plan._beside(path)):
        flips = try_flips(file, lambda: describe_plan(path))
        assert flips.refused > 0.9 * flips.tried
    tensorrt_plan._beside(path).write_text(json.dumps(fields))  # of a plan built before
    assert describe_plan(path) == plan


def test_sealed_caches_are_whole_or_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.timing"
    assert read_sealed(path) == b""
    write_sealed(path, b"timings")
    assert read_sealed(path) == b"timings"
    for _ in flip_bits(path, 50):
        assert read_sealed(path) == b""
    assert capsys.readouterr().err.count("a.timing is damaged or of an older version") == 50


@pytest.mark.slow
def test_no_flipped_bit_in_the_text_cache_is_silent(tmp_path: Path, try_flips: TryFlips) -> None:
    """It is computed again, or what was flipped did not matter."""
    clip = load_clip(CLIPConfig(model="shapes"))
    captions = [f"a red ball {number}" for number in range(12)]
    expected, too_long = embed_captions(clip, captions, tmp_path, CPU)
    [path] = tmp_path.glob("captions-*.parquet")

    def read() -> list[bool]:
        before = path.stat().st_mtime_ns
        found, cut = embed_captions(clip, captions, tmp_path, CPU)
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-6)
        assert cut == too_long
        if path.stat().st_mtime_ns != before:
            raise ValueError("computed again")
        return cut

    assert try_flips(path, read, all=1000).refused
