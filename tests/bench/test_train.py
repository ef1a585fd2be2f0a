"""The benchmarks of masks, overlap and training run through at their smallest, and their figures are consistent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from threading import Barrier

import pytest
import torch

from bench import masks, overlap, train
from bench.harness.wall_clock import CEILING, PAPER_RATIO, ratios, ssv2_hours, summarise
from bench.workloads import inputs
from bench.workloads.inputs import STRATEGIES, WITH_CLIP
from bench.workloads.training_step import Step
from dali_pipelines.types import ClipBatch
from tests.support.reports import read_report, rows_of
from tgmae.config.masks import MaskConfig
from tgmae.masks.scorer import Scorer
from tgmae.model.token_masks import TokenMasks
from tgmae.presets import PRESETS


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.mark.slow
def test_masks_run_through(shapes: Path, work_dir: Path, results: Path) -> None:
    masks.run(masks.Options(shapes, work_dir=work_dir, rounds=1, seconds=0, batch=1))
    demo, large = (rows_of(table) for table in read_report(results, "masks")["tables"])
    without_clip = set(STRATEGIES) - set(WITH_CLIP)
    assert set(demo) == {*STRATEGIES, masks.STEP}
    if not torch.cuda.is_available():
        assert set(large) == without_clip
    for rows in (demo, large):
        for name, row in rows.items():
            assert row["median"] == pytest.approx(median(row["values"]))
            assert row["ratio"]["to"] == "mgm"
            if name != masks.STEP:
                assert row["clips/s"] == pytest.approx(1000 / (row["score ms"] + row["top-k ms"]))
                assert ("of limit" in row) == (name in WITH_CLIP)
        assert rows["mgm"]["ratio"]["median"] == 1
    assert demo["tgm patch"]["GFLOP a clip"] == pytest.approx(0.31, rel=0.01)  # docs/results.md, "Scorers"
    assert "GFLOP a clip" not in demo["tgm cached"]  # it reads maps; CLIP does nothing


@pytest.mark.slow
def test_what_is_there_is_not_made_again(shapes: Path, work_dir: Path) -> None:
    demo, cpu = PRESETS["demo"], torch.device("cpu")
    first = inputs.prepare_videos(work_dir, shapes, demo.model, cpu)
    written = {path: path.stat().st_mtime_ns for path in (*first.motion.iterdir(), *first.scores.iterdir())}
    again = inputs.prepare_videos(work_dir, shapes, demo.model, cpu)
    assert (again.motion, again.scores) == (first.motion, first.scores)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    few = inputs.prepare_videos(work_dir, shapes, demo.model, cpu, first=3)
    assert (len(first.manifest), len(few.manifest)) == (24, 3)
    assert few.motion != first.motion


@pytest.mark.slow
def test_strategies_are_named(work_dir: Path, shapes: Path) -> None:
    preset = PRESETS["demo"].mask
    videos = inputs.prepare_videos(work_dir, shapes, PRESETS["demo"].model, torch.device("cpu"))
    mask = inputs.choose_mask("tgm cached", preset, videos, 0.65)
    assert (mask.kind, mask.scorer, mask.ratio, mask.frames_per_tubelet) == ("tgm", "cached", 0.65, 1)
    assert inputs.choose_mask("mgm", preset, videos, 0.75).motion == videos.motion
    for wrong in ("tgm", "mgm patch", "text"):
        with pytest.raises(ValueError, match="unknown mask strategy"):
            inputs.choose_mask(wrong, preset, videos, 0.5)


@pytest.mark.slow
def test_training_runs_through(shapes: Path, work_dir: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps, rounds = PRESETS["demo"].model, 2, 2
    seen: list[int] = []  # masked tokens of every step
    call = Step.__call__

    def watched(self: Step, frames: torch.Tensor, masks: TokenMasks) -> None:
        seen.append(masks.masked.shape[1])
        call(self, frames, masks)

    monkeypatch.setattr(Step, "__call__", watched)
    monkeypatch.setattr(train, "project_clips_per_s", lambda *_: 2.0)
    saved: list[int] = []  # rounds in the report, each time it is saved
    monkeypatch.setattr(train, "save_report", lambda _, tables, *__: saved.append(len(tables[0].rows[0].values)))
    monkeypatch.setattr(train, "_PATIENCE_S", 120.0)  # queues fill slowly on a busy machine
    strategies = ("tgm patch", "tgm cached", "mgm")
    options = train.Options(
        shapes, work_dir=work_dir, rounds=rounds, steps=steps, strategies=strategies, model="demo", batch=2, workers=1
    )
    train.run(options)
    report = read_report(results, "train")
    assert saved == [1, 2]

    # Every turn trains with its own ratio from the first step on, though loaders are kept from turn to turn.
    names = [*strategies, CEILING]
    order = [0.65] * 4 + [0.6, 0.6, 0.75] + [0.6, 0.75]
    slots, patches = model.num_slots, model.patches_per_slot
    wanted = [slots * MaskConfig(ratio=ratio).masked_per_slot(patches) for ratio in order]
    turns = [count for count in wanted for _ in range(train._WARM_UP + steps)]
    assert seen == turns * rounds

    equal, native = (rows_of(table) for table in report["tables"])
    assert list(equal) == names
    assert list(native) == ["tgm patch, γ 0.6", "tgm cached, γ 0.6", "mgm, γ 0.75", "ceiling, γ 0.6", "ceiling, γ 0.75"]
    assert report["tables"][0]["limit"] == equal[CEILING]["median"]
    for table, suffixes in ((equal, [""] * 3), (native, [", γ 0.6", ", γ 0.6", ", γ 0.75"])):
        for name, suffix in zip(strategies, suffixes, strict=True):
            row, ceiling = table[name + suffix], table[CEILING + suffix]
            assert 0 <= row["waiting"] <= 1
            assert row["of ceiling"] == pytest.approx(median(ratios(row["values"], ceiling["values"])))
            times = [2000 / value for value in row["values"]]  # two clips a step
            assert min(times) <= row["ms a step"] <= max(times)
            assert row["load ms"] > 0
            assert row["score ms"] > 0
            assert row["mask ms"] > 0

    measured = report["results"]["wall_clock_to_mgm"]
    for name in ("tgm patch", "tgm cached"):
        assert measured[f"{name}, one ratio"]["median"] == pytest.approx(
            median(ratios(equal["mgm"]["values"], equal[name]["values"]))
        )
        assert measured[f"{name}, own ratios"]["low"] <= measured[f"{name}, own ratios"]["high"]
    assert report["results"]["projected_hours"] == {
        "ViT-B, forward and backward alone": pytest.approx(168_913 * 200 / 2 / 3600)
    }
    assert "forward and backward alone" in report["headline"]["SSv2, 200 epochs, projected"]
    assert len(report["results"]["idle_cores"]) == len(order) * rounds
    assert max(report["results"]["idle_cores"]) < 0.15  # loaders come to rest before the next one's turn


def test_training_needs_motion_guided_masks_to_compare_with(shapes: Path) -> None:
    for wrong in (("tgm cached",), ("mgm", "text")):
        with pytest.raises(ValueError, match="--strategies needs mgm to compare with"):
            train.run(train.Options(shapes, strategies=wrong))


def test_wall_clock_is_the_inverse_of_clips_per_second() -> None:
    equal = [("tgm patch", 0.65), ("mgm", 0.65), (CEILING, 0.65)]
    native = [("tgm patch", 0.6), ("mgm", 0.75), (CEILING, 0.6), (CEILING, 0.75)]
    rates = {
        ("tgm patch", 0.65): [100.0, 50.0, 80.0], ("mgm", 0.65): [110.0, 60.0, 100.0],
        (CEILING, 0.65): [200.0, 100.0, 160.0], ("tgm patch", 0.6): [50.0] * 3, ("mgm", 0.75): [100.0] * 3,
        (CEILING, 0.6): [50.0] * 3, (CEILING, 0.75): [125.0] * 3,
    }  # fmt: skip
    headline, found = summarise(rates, equal, native, with_hours=True)
    assert found["wall_clock_to_mgm"] == {
        "tgm patch, one ratio": pytest.approx({"median": 1.2, "low": 1.1, "high": 1.25}),
        "tgm patch, own ratios": {"median": 2.0, "low": 2.0, "high": 2.0},
    }
    assert found["of_ceiling"]["tgm patch, γ 0.65"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert found["of_ceiling"]["mgm, γ 0.75"]["median"] == 0.8
    assert found["projected_hours"]["tgm patch, γ 0.65"] == ssv2_hours(80.0)
    assert headline["wall clock tgm patch / mgm, one ratio"] == "1.200 (1.100 to 1.250); the paper's: 1.154"
    assert "paper" not in headline["wall clock tgm patch / mgm, own ratios"]
    assert pytest.approx(1.154, abs=5e-4) == PAPER_RATIO
    assert ssv2_hours(722) == pytest.approx(13, rel=0.001)  # the paper's 13 h of MGM mean 722 clips/s


def test_what_is_hidden_is_what_both_at_once_save() -> None:
    assert overlap.hidden([10.0, 10.0, 10.0], [4.0, 4.0, 4.0], [10.0, 14.0, 16.0]) == [1, 0, -0.5]
    found = {
        "mgm: step": [10.0, 11.0], "mgm: scorer": [4.0, 4.0], "mgm: both": [12.0, 13.0],
        "tube: step": [10.0, 11.0], "tube: scorer": [0.1, 0.1], "tube: both": [11.0, 11.0],
        "tube: both, step first": [10.0, 11.0],
    }  # fmt: skip
    mgm, tube, first = overlap.make_table(found, ["mgm", "tube"], "", "").rows
    assert mgm.facts["hidden"] == "50% (50% to 50%)"
    assert mgm.facts["× step"] == pytest.approx((1.2 + 13 / 11) / 2)
    assert (tube.facts["hidden"], first.facts["hidden"]) == ("", "")  # the scorer takes less than the step's spread
    assert (first.name, first.facts["× step"]) == ("tube, step first", 1)


@pytest.mark.slow
def test_overlap_runs_through(shapes: Path, work_dir: Path, results: Path) -> None:
    overlap.run(overlap.Options(shapes, work_dir=work_dir, rounds=1, seconds=0, batch=1))
    (table,) = read_report(results, "overlap")["tables"]
    rows = rows_of(table)
    on_cuda = torch.cuda.is_available()
    assert set(rows) == {
        name + first for name in overlap.DEFAULT_STRATEGIES for first in ("", overlap.FIRST)[: 1 + on_cuda]
    }
    for row in rows.values():
        assert row["median"] / row["step alone"] == pytest.approx(row["× step"])
        assert row["scorer alone"] > 0


@pytest.mark.slow
def test_both_at_once_are_at_once(shapes: Path, work_dir: Path) -> None:
    """On a CPU a scorer and a step wait for each other: neither can finish before the other has begun."""
    both = overlap.Overlap(overlap.Options(shapes, work_dir=work_dir, seconds=0, batch=1), torch.device("cpu"))
    calls: list[str] = []
    alone, meeting = True, Barrier(2, timeout=60)

    def work(name: str) -> None:
        calls.append(name)
        if not alone:
            meeting.wait()

    score = both.scorers["mgm"]
    both.scorers["mgm"] = _Watched(score, lambda: work("score"))
    both.step = lambda *_: work("step")  # type: ignore[assignment, misc]
    try:
        assert both.step_alone() > 0
        assert both.scorer_alone("mgm") > 0
        assert calls == ["step"] * 3 + ["score"] * 3  # two warm-ups and one that counts
        alone = False
        assert both.both("mgm", False) > 0
    finally:
        both.close()
    assert calls.count("step") == calls.count("score") == 6


class _Watched:
    note = ""

    def __init__(self, scorer: Scorer, begin: Callable[[], None]) -> None:
        self.scorer, self.begin = scorer, begin

    def __call__(self, clips: ClipBatch) -> torch.Tensor:
        self.begin()
        return self.scorer(clips)
