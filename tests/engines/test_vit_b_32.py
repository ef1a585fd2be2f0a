"""CLIP ViT-B/32 in its real size, exported once: as a graph for ONNX Runtime, and as a plan for a GPU not there."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from engines.backends.onnx_engine import count_operators, export_tower
from engines.backends.tensorrt_plan import TensorSpec, build_plan, describe_plan
from engines.towers.clip_towers import PatchTower
from tests.support.clip_models import cosine_error, vit_b_32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its 16-pixel patch tower in float16 at opset 23."""
    return export_tower(PatchTower(vit_b_32().visual, 16), torch.float16, tmp_path_factory.mktemp("cache"))


def test_vit_b_32_has_twelve_attentions(graph: Path) -> None:
    assert count_operators(graph)["Attention"] == 12
    assert 170 * 2**20 < graph.stat().st_size < 260 * 2**20
    x = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (ours,) = session.run(None, {"pixels": x.half().numpy()})
    assert cosine_error(torch.from_numpy(ours), PatchTower(vit_b_32().visual, 16)(x)) < 2e-3


def test_vit_b_32_builds_for_sm80(graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    path = build_plan(graph, tmp_path, "tensorrt_rtx", 3920, "sm80")
    plan = describe_plan(path)
    assert plan.inputs == (TensorSpec(name="pixels", dtype="float16", shape=(-1, 768)),)
    assert plan.outputs == (TensorSpec(name="embeddings", dtype="float16", shape=(-1, 512)),)
    assert plan.profile == (1, 3920, 3920)
    assert (plan.library, plan.gpu) == ("tensorrt_rtx", "sm80")
    assert plan.plan_bytes == path.stat().st_size > 150 * 2**20
    assert path.name.startswith(f"{graph.stem}-sm80-tensorrt_rtx-{plan.version}-b3920-")
    said = f"tgmae: building {path.name} in {tmp_path}, which takes seconds to minutes; it is cached there\n"
    assert capfd.readouterr() == ("", said)  # no warning of lossy casts, for one
