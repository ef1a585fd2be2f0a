"""What a run says at its start."""

from __future__ import annotations

from dataclasses import replace

from engines.config import CLIPConfig
from tgmae.config.masks import MaskConfig
from tgmae.presets import PRESETS
from tgmae.training.run_log import advise_scorer


def test_scorer_patch_with_a_large_clip_is_advised_against() -> None:
    ssv2 = PRESETS["ssv2"]
    advice = advise_scorer(ssv2)
    assert advice.startswith("scorer patch costs 25 TFLOP a clip, the training step half a TFLOP: ")
    assert "tgmae-data scores" in advice
    assert "tgmae-engine distill" in advice
    for other in (
        replace(ssv2, clip=CLIPConfig(model="ViT-L-14")),
        replace(ssv2, model=replace(ssv2.model, image_size=112)),
        replace(ssv2, mask=MaskConfig(frames_per_tubelet=1)),
        replace(ssv2, mask=MaskConfig(ratio=0.75)),
    ):  # nothing was counted for these
        assert "TFLOP" not in advise_scorer(other)
        assert "tgmae-data scores" in advise_scorer(other)
    for cheap in (
        PRESETS["demo"],
        replace(ssv2, mask=MaskConfig(scorer="dense")),
        replace(ssv2, mask=MaskConfig(kind="tube")),
    ):
        assert advise_scorer(cheap) == ""
