"""Configurations of runs are told apart by what differs and matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tgmae.config.differences import describe_differences
from tgmae.config.loss import LossConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.training import OptimConfig
from tgmae.presets import PRESETS

DEMO = PRESETS["demo"]
TUBE = replace(DEMO, mask=MaskConfig(kind="tube", ratio=0.9))
MGM = replace(DEMO, mask=MaskConfig(kind="mgm", ratio=0.75, motion=Path("data/motion")))


def test_masks_are_named_by_kind_and_ratio() -> None:
    assert describe_differences([TUBE, MGM, DEMO]) == ["tube, γ 0.9", "mgm, γ 0.75", "tgm, γ 0.6"]


def test_equal_configurations_have_no_words() -> None:
    assert describe_differences([DEMO, DEMO]) == ["", ""]
    assert describe_differences([DEMO]) == [""]


def test_what_is_only_said_where_a_run_writes_is_no_difference() -> None:
    moved = replace(
        TUBE, run_dir=Path("elsewhere"), resume="never", max_steps=3, log=replace(TUBE.log, metrics_every=7),
        data=replace(TUBE.data, num_workers=9), clip=replace(TUBE.clip, model="ViT-B-32"),
    )  # fmt: skip
    assert describe_differences([TUBE, moved]) == ["", ""]  # tube masks read no text


def test_a_setting_counts_where_it_has_an_effect() -> None:
    cached = replace(DEMO, mask=replace(DEMO.mask, scorer="cached", scores=Path("a/maps")))
    assert describe_differences([DEMO, cached]) == ["scorer auto, scores None", "scorer cached, scores maps"]
    assert describe_differences([MGM, replace(MGM, mask=replace(MGM.mask, motion=Path("b/other")))]) == [
        "motion motion", "motion other",
    ]  # fmt: skip
    contrasted = replace(TUBE, loss=LossConfig(contrastive=1.0))
    warmer = replace(TUBE, loss=LossConfig(contrastive=1.0, temperature=0.2))
    assert describe_differences([contrasted, warmer]) == ["temperature 0.1", "temperature 0.2"]
    assert describe_differences([contrasted, TUBE]) == ["contrastive 1.0", "contrastive 0.0"]  # and no temperature


def test_names_that_end_alike_are_given_whole() -> None:
    wider = replace(DEMO, model=replace(DEMO.model, width=64, decoder_width=64), optim=OptimConfig(base_lr=0.5))
    words = describe_differences([DEMO, wider])
    assert "width 64" in words[1]
    assert "decoder width 64" in words[1]
    other = replace(DEMO, clip=replace(DEMO.clip, weights="w", batch=3), seed=1)
    assert describe_differences([DEMO, other]) == ["seed 0, weights openai", "seed 1, weights w"]
    assert describe_differences([DEMO, other], without=("seed",)) == ["weights openai", "weights w"]
