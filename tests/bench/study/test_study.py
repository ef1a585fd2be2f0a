"""The study runs through, resumes where it was stopped, and counts correctly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from bench.study import __main__ as study
from bench.study import cells
from bench.study.cells import Cell, Plan, claim_folder, list_cells, make_config
from bench.study.judge import NUM_CLASSES
from bench.study.probe import probe, rotate_pixels
from bench.study.report import make_tables, name_random
from tests.support.reports import rows_of
from tgmae.config.differences import describe_differences
from tgmae.config.run import TrainConfig
from tgmae.presets import PRESETS
from tgmae.train import TrainResult, train

PLAN = Plan(clips=100, epochs=4, image_size=96)


def test_cells_of_a_kind_differ_in_the_contrastive_loss_alone(tmp_path: Path) -> None:
    found = {cell: make_config(tmp_path, PLAN, cell, 80) for cell in list_cells((3, 4))}
    assert len({config.run_dir for config in found.values()}) == len(found) == 12
    assert [cell.seed for cell in found] == [3] * 6 + [4] * 6
    for kind, ratio in (("tube", 0.75), ("mgm", 0.75), ("tgm", 0.6)):  # Fan et al., table 2
        without, with_it = (found[Cell(kind, on, 3)] for on in (False, True))  # type: ignore[arg-type]
        assert (without.mask.kind, without.mask.ratio, without.mask.masked_per_slot(36)) == (
            kind,
            ratio,
            int(36 * ratio),
        )
        assert describe_differences([without, with_it], ["loss.observe_contrastive"]) == [
            "contrastive 0.0", "contrastive 1.0",
        ]  # fmt: skip
        assert (without.loss.is_observing, with_it.loss.is_observing) == (True, False)
    one = found[Cell("tube", False, 3)]
    assert one.optim.warmup_epochs * 80 == PRESETS["demo"].optim.warmup_epochs * 256  # clips of the warm-up


def test_a_folder_belongs_to_one_plan(tmp_path: Path) -> None:
    claim_folder(tmp_path / "study", PLAN)
    claim_folder(tmp_path / "study", PLAN)
    with pytest.raises(ValueError, match=r'study of other settings, .* "epochs": 4, .* another --work-dir'):
        claim_folder(tmp_path / "study", replace(PLAN, epochs=5))


def test_a_probe_learns_what_is_there_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"] * 60)
    features = random.normal(size=(180, 20)).astype(np.float32)
    features[:, 7] += 1000 * (labels == "a") + 3000 * (labels == "b")  # one of large numbers
    assert probe(features[:120], labels[:120], features[120:], labels[120:]).accuracy == 1
    shuffled = random.permutation(labels)
    assert probe(features[:120], shuffled[:120], features[120:], shuffled[120:]).accuracy < 0.6


def test_rotated_pixels_are_as_good_as_pixels() -> None:
    """scikit-learn's regression on the pixels themselves decides the same, with the penalty of the same scale."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (50, 300), dtype=np.uint8)
    labels = np.array([0, 1] * 25)
    pixels[labels == 1, :40] //= 2
    learned, tested = rotate_pixels(pixels[:30], pixels[30:])
    assert learned.shape == (30, 30)
    centre = pixels[:30].astype(np.float64) - pixels[:30].mean(0)
    scale = np.sqrt(np.square(centre).sum() / learned.size)
    direct, rotated = (LogisticRegression(tol=1e-10, max_iter=10_000) for _ in range(2))
    direct.fit(centre / scale, labels[:30])
    rotated.fit(learned, labels[:30])
    np.testing.assert_allclose(
        rotated.predict_proba(tested), direct.predict_proba((pixels[30:] - pixels[:30].mean(0)) / scale), atol=1e-3
    )


def test_tables_say_what_was_found() -> None:
    seeds = (0, 1)
    found: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(["raw-pixels", *map(name_random, seeds), *(cell.name for cell in list_cells(seeds))]):
        found[name] = {task: {"accuracy": place / 100} for task in NUM_CLASSES}
        found[name] |= {"contrastive_loss": 2.0 + place, "reconstruction_loss": 1.0}
    tables = {table.title: rows_of(table.to_dict()) for table in make_tables(found, seeds, 20)}
    motion = tables["motion, 8 classes"]
    assert motion["raw pixels"]["values"] == [0]
    assert (motion["random encoder"]["values"], motion["random encoder"]["mean"]) == ([1, 2], 1.5)
    assert motion["tube, γ 0.75"]["values"] == [3, 9]  # cells of one seed stand together
    assert motion["tgm, γ 0.6, contrastive"]["values"] == pytest.approx([8, 14])
    gains = tables["what the contrastive loss adds, within a seed"]
    assert gains["mgm, colour × shape"]["values"] == pytest.approx([1, 1])
    assert gains["mgm, colour × shape"]["the paper, SSv2"] == 4.1
    assert tables["contrastive loss at the end"]["mgm, γ 0.75"]["values"] == [2 + 5, 2 + 11]


def test_impossible_studies_are_refused(tmp_path: Path) -> None:
    for wrong in (study.Options(seeds=()), study.Options(epochs=0), study.Options(clips=3)):
        with pytest.raises(ValueError, match="expected a seed, an epoch and ten clips at least"):
            study.run(replace(wrong, work_dir=tmp_path / "study"))
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_study_runs_through_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = PRESETS["demo"]
    small = replace(demo.model, width=24, depth=1, num_heads=2, decoder_width=24, decoder_depth=1, decoder_num_heads=2)
    tiny = replace(demo, model=small, pipeline="pyav", batch_size=4, device_batch_size=4)
    monkeypatch.setitem(cells.PRESETS, "demo", tiny)
    two = [Cell("tube", False, 0), Cell("tgm", True, 0)]
    monkeypatch.setattr(study, "list_cells", lambda seeds: two)
    monkeypatch.setattr(study.Study, "report", lambda self, seeds: reported.append(self))
    reported: list[study.Study] = []
    trained: list[Path] = []
    stops = [0, 15, 0]  # the second run is asked to stop

    def watched(config: TrainConfig) -> TrainResult:
        trained.append(config.run_dir)
        return replace(train(config), signal=stops[len(trained) - 1])

    monkeypatch.setattr(study, "train", watched)
    options = study.Options(seeds=(0,), clips=10, epochs=1, image_size=32, work_dir=tmp_path / "study")
    with pytest.raises(SystemExit) as left:
        study.run(options)
    assert (left.value.code, reported) == (128 + 15, [])
    study.run(options)
    assert sorted(reported[0].found) == ["random-encoder-0", "raw-pixels", "tgm-contrastive-0", "tube-plain-0"]
    assert set(reported[0].captions) <= {"colour", "shape", "motion"}
    hidden = reported[
        0
    ].hidden  # 3, 3 and 2 of the 4 patches of a slot are masked, of which the text finds the right ones
    assert set(hidden) == {"tube", "mgm", "tgm"}
    assert 0.55 < hidden["tgm"] <= 1
    assert abs(hidden["tube"] - 0.75) < 0.15
    assert [run_dir.name for run_dir in trained] == ["tube-plain-0", "tgm-contrastive-0", "tgm-contrastive-0"]
