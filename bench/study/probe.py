"""Linear probes: a plain logistic regression on frozen features.

Dimensions: n clips to learn from, m held-out clips, D features.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

_STRENGTHS = tuple(10.0**power for power in range(-3, 4))  # of C, scikit-learn's inverse of the penalty
_ITERATIONS = 300  # of L-BFGS at most
_FOLDS = 3

Array = NDArray[np.generic]


class Probed(NamedTuple):
    """The share of held-out clips that are classified correctly, and the penalty that was chosen without them."""

    accuracy: float
    strength: float


def probe(train: Array, labels: Array, test: Array, test_labels: Array, scaled: bool = True) -> Probed:
    """Fit a logistic regression to features [n, D] and their labels, and classify held-out features [m, D].

    scaled   give every feature mean 0 and deviation 1 first, as in `train`

    The penalty is the one of `_STRENGTHS` that does best in a cross-validation over `train`.
    """
    scaler = [StandardScaler()] if scaled else []
    folds = KFold(_FOLDS, shuffle=True, random_state=0)
    regression = make_pipeline(*scaler, LogisticRegression(max_iter=_ITERATIONS))
    search = GridSearchCV(regression, {"logisticregression__C": _STRENGTHS}, cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties would take minutes
        search.fit(train, labels)
    return Probed(float(search.score(test, test_labels)), search.best_params_["logisticregression__C"])


def rotate_pixels(train: Array, test: Array) -> tuple[Array, Array]:
    """Return coordinates float32 [n, n] and [m, n] of pixels within the span of the clips to learn from.

    A penalised linear model of them is one of the pixels, whose weights the penalty keeps within that span. They are
    scaled alike, to a mean square of 1.
    """
    rotation = PCA(svd_solver="full").fit(train.astype(np.float32))
    train, test = (rotation.transform(part.astype(np.float32)) for part in (train, test))
    scale = np.sqrt(np.mean(np.square(train)))
    return train / scale, test / scale
