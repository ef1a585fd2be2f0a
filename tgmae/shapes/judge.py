"""Scores compared with the ground truth: how well they tell an object's patches from all others.

Dimensions: S slots, N patches per slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score


def judge(
    truths: Sequence[NDArray[np.bool_]], scores: Sequence[NDArray[np.float32]], num_masked: int
) -> dict[str, float]:
    """Measure how well the scores [S, N] of each clip find its object's patches, `truths` [S, N].

    `num_masked` patches of each slot are masked. The measures are

    auc_clip, auc_slot  area under the ROC curve over the patches of a clip or of a slot, averaged over the clips or
                        slots that have patches of both kinds
    found               share of the object's patches that are found by taking the best-scored ones of a slot, as many
                        as the object has there
    masked_top          share of the object's patches that are masked; chance gives num_masked / N
    oracle_top          the highest masked_top that any scores could reach: an object close to the camera may fill more
                        of a slot than is masked
    visible_bottom      share of the object's patches that stay visible when the lowest scores are masked
    oracle_bottom       the highest visible_bottom that any scores could reach
    """
    slots = [pair for truth, score in zip(truths, scores, strict=True) for pair in zip(truth, score, strict=True)]
    num_visible = truths[0].shape[1] - num_masked
    # For each slot: whether each patch is the object's, best score first.
    ranked = [truth[np.argsort(-score, kind="stable")] for truth, score in slots]
    total = sum(slot.sum() for slot in ranked)

    def share(found: Iterable[int]) -> float:
        return round(float(sum(found) / total), 4)

    return {
        "auc_clip": mean_of(area_under_curve(truth, score) for truth, score in zip(truths, scores, strict=True)),
        "auc_slot": mean_of(area_under_curve(truth, score) for truth, score in slots),
        "found": share(slot[: slot.sum()].sum() for slot in ranked),
        "masked_top": share(slot[:num_masked].sum() for slot in ranked),
        "oracle_top": share(min(slot.sum(), num_masked) for slot in ranked),
        "visible_bottom": share(slot[:num_visible].sum() for slot in ranked),
        "oracle_bottom": share(min(slot.sum(), num_visible) for slot in ranked),
    }


def area_under_curve(truth: NDArray[np.bool_], scores: NDArray[np.float32]) -> float | None:
    """Return the area under the ROC curve, or None if all patches are of one kind."""
    if truth.all() or not truth.any():
        return None
    return float(roc_auc_score(truth.ravel(), scores.ravel()))


def mean_of(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are not None, rounded to four digits."""
    return round(float(np.mean([value for value in values if value is not None])), 4)
