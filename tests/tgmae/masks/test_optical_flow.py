"""Motion from RAFT. Its published weights could not be had here: it has random ones, or stands for known flow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_small
from torchvision.transforms.functional import normalize

from dali_pipelines.types import ClipBatch, CropBox
from tests.support.videos import clip_batch, make_video
from tests.tgmae.masks.test_motion_field import request
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import read_manifest, write_manifest
from tgmae.masks.optical_flow import RaftMotion
from tgmae.masks.scorer import make_scorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft.pth"
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


def clips(size: int, frames: int = 4, count: int = 2) -> ClipBatch:
    pictures = torch.randint(0, 256, (count, frames, size, size, 3), dtype=torch.uint8)
    crop = CropBox(x=7, y=9, width=50, height=40)
    requests = tuple(request(0, range(frames), crop, flip=True, mask_seed=n) for n in range(count))
    return clip_batch(pictures, requests)


def test_flow_is_torchvisions(checkpoint: Path) -> None:
    """What the network answers for (frame, frame before), turned round; the first frame has the second's."""
    batch = clips(128)
    field = RaftMotion(checkpoint, CPU)(batch)
    assert field.vectors.shape == (2, 4, 2, 16, 16)
    model = raft_small(weights=None)
    model.load_state_dict(torch.load(checkpoint))
    scaled = batch.frames.permute(0, 1, 4, 2, 3).float() / 255
    after, before = (normalize(scaled[1, number], [0.5] * 3, [0.5] * 3)[None] for number in (2, 1))
    with torch.inference_mode():
        flow = model.eval()(after, before)[-1]
    expected = -flow[0].view(2, 16, 8, 16, 8).mean((2, 4))
    np.testing.assert_allclose(field.vectors[1, 2], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(field.vectors[:, 0], field.vectors[:, 1])
    # It is of the clip's own pictures: neither the crop in the video nor the flip has a say.
    np.testing.assert_allclose(field.points(2)[0], [[32, 32], [96, 32], [32, 96], [96, 96]])


class Shifted(nn.Module):
    """Stands for a network that sees everything `dx`, `dy` pixels away in the other picture."""

    def __init__(self, dx: float, dy: float) -> None:
        super().__init__()
        self.shift = dx, dy

    def forward(self, frames: Tensor, others: Tensor) -> list[Tensor]:
        assert frames.shape == others.shape
        assert frames.shape[2] >= 128
        return [torch.tensor(self.shift).view(1, 2, 1, 1).expand(len(frames), 2, *frames.shape[2:])]


def test_small_pictures_are_enlarged_and_their_flow_is_not(checkpoint: Path) -> None:
    motion = RaftMotion(checkpoint, CPU)
    motion.model = Shifted(4.0, -2.0)
    field = motion(clips(64))
    np.testing.assert_allclose(field.vectors[:, :, 0], -2.0)
    np.testing.assert_allclose(field.vectors[:, :, 1], 1.0)
    assert field.cell == 8


@pytest.mark.slow
def test_mgmae_runs_on_flow_without_motion_vectors(checkpoint: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.parquet", [make_video(codec="vp9")], tmp_path)
    config = InputConfig(
        model=ModelConfig(image_size=64, num_frames=4), mask=MaskConfig(kind="mgmae", ratio=0.75, flow=checkpoint)
    )
    scorer = make_scorer(config, read_manifest(tmp_path / "m.parquet"), CPU)
    batch = clips(64)
    scores = scorer(batch)
    assert scores.shape == (2, 2, 16)
    assert torch.equal(scores, scorer(batch))


def test_what_is_no_raft(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no RAFT checkpoint at .*raft_small and raft_large"):
        RaftMotion(tmp_path / "missing.pth", CPU)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read: .+$") as caught:
        RaftMotion(tmp_path / "text.pth", CPU)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds neither torchvision's raft_small nor raft_large"):
        RaftMotion(tmp_path / "other.pth", CPU)
