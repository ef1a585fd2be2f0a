"""Maps of several data sets whose videos have the same names: each clip gets the scores that a run on its own gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dali_pipelines.types import ClipBatch
from engines.config import CLIPConfig
from tests.support.data_sets import split_shapes
from tests.support.requests import request
from tests.support.videos import clip_batch
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.mixing.joined import data_sets, join_sets, open_data_sets
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.maps.build_scores import build_scores
from tgmae.masks.scorer import make_scorer

CPU = torch.device("cpu")
MODEL = ModelConfig(image_size=64, num_frames=8)


@pytest.fixture(scope="module")
def folder(shapes: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two manifests, and score maps and motion of each."""
    folder = tmp_path_factory.mktemp("sets")
    for one in data_sets(open_few(split_shapes(shapes, folder))):
        build(one.manifest, folder, one.name, cache_dir)
    return folder


def build(manifest: Manifest, folder: Path, name: str, cache_dir: Path) -> None:
    clip = CLIPConfig(model="shapes", cache_dir=cache_dir)
    build_scores(
        manifest, folder / f"scores-{name}", clip, MaskConfig().tower(), cells=4, patch_size=16, every=20, device=CPU,
        num_workers=0,
    )  # fmt: skip
    build_motion(manifest, folder / f"motion-{name}", 0)


def open_few(paths: tuple[Path, ...]) -> Manifest:
    """The first three videos of each data set."""
    sets = data_sets(open_data_sets(DataConfig(manifest=paths)))
    few = [Manifest(one.manifest.table.slice(0, 3), one.manifest.root) for one in sets]
    return join_sets([one.name for one in sets], few)


def masking(folder: Path, kind: str, *names: str) -> InputConfig:
    """A configuration whose maps of this kind lie in the named folders."""
    scores, motion = (tuple(folder / f"{what}-{name}" for name in names) for what in ("scores", "motion"))
    mask = MaskConfig(kind=kind, scorer="cached", scores=scores, motion=motion, frames_per_tubelet=1)  # type: ignore[arg-type]
    data = DataConfig(manifest=(folder / "a.parquet", folder / "b" / "manifest.parquet"))
    return InputConfig(model=MODEL, mask=mask, clip=CLIPConfig(model="shapes"), data=data)


def clips_of(manifest: Manifest, rows: list[int]) -> ClipBatch:
    requests = [request(manifest, row, tuple(range(1, 17, 2))) for row in rows]
    return clip_batch(torch.zeros(len(rows), 8, 64, 64, 3, dtype=torch.uint8), requests, manifest)


def score_alone(config: InputConfig, folder: Path, manifest: Manifest, rows: list[int]) -> list[Tensor]:
    """Score clips of the joined manifest one by one, each in a run on its data set."""
    scores: dict[int, Tensor] = {}
    for one in data_sets(manifest):
        mask = replace(config.mask, scores=folder / f"scores-{one.name}", motion=folder / f"motion-{one.name}")
        own = replace(config, mask=mask, data=DataConfig())
        scorer = make_scorer(own, one.manifest, CPU)
        for row in one.rows_of(rows):
            [scores[row]] = scorer(clips_of(one.manifest, [row - one.first]))
    return [scores[row] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tgm", "mgm"])
def test_each_clip_is_scored_as_in_a_run_on_its_own(folder: Path, kind: str) -> None:
    config = masking(folder, kind, "a", "b")
    manifest = open_few(config.data.manifests)
    rows = [4, 0, 1, 5, 3, 2]
    found = make_scorer(config, manifest, CPU)(clips_of(manifest, rows))
    expected = score_alone(config, folder, manifest, rows)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert manifest[4].name == manifest[1].name
    assert not torch.equal(found[0], found[2])


@pytest.mark.slow
def test_one_folder_may_hold_the_maps_of_all(shapes: Path, folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Added one data set after the other; no two videos may have the same name then."""
    whole = read_manifest(shapes)
    parts = [Manifest(whole.table.slice(first, 3), whole.root) for first in (0, 3)]
    for part in parts:
        build(part, tmp_path, "all", cache_dir)
    joined, plain = join_sets(["a", "b"], parts), Manifest(whole.table.slice(0, 6), whole.root)
    rows = [4, 0, 1, 5, 3, 2]
    for kind in ("tgm", "mgm"):
        config = masking(folder, kind, "a", "b")
        mask = replace(config.mask, scores=tmp_path / "scores-all", motion=tmp_path / "motion-all")
        config = replace(config, mask=mask)
        found, expected = (make_scorer(config, one, CPU)(clips_of(one, rows)) for one in (joined, plain))
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tgm", "mgm"])
def test_folders_of_the_wrong_data_set_are_refused(folder: Path, kind: str) -> None:
    config = masking(folder, kind, "b", "a")
    with pytest.raises(ValueError, match=r"^a: .*-b has no maps, or maps of other videos .* for 3 of 3 videos, such"):
        make_scorer(config, open_few(config.data.manifests), CPU)
