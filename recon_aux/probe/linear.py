"""The linear models that are trained on frozen features."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def linear_classifier() -> Any:
    """Make a classifier of features: logistic regression, as a scikit-learn estimator.

    Example:
        >>> features, labels = np.arange(8.0)[:, None], np.arange(8) > 3
        >>> linear_classifier().fit(features, labels).score(features, labels)
        1.0
    """
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))


def linear_regression() -> Any:
    """Make a regression of numbers on features: ridge regression, as a scikit-learn estimator.

    Leave-one-out validation chooses its strength, for each number by itself.

    Example:
        >>> features, numbers = np.arange(8.0)[:, None], np.arange(8) * 3
        >>> linear_regression().fit(features, numbers).score(features, numbers) > 0.99
        True
    """
    # Otherwise the number with the largest unit, degrees perhaps, would choose for all.
    ridge = RidgeCV(alphas=np.logspace(-1, 5, 7), alpha_per_target=True)
    return make_pipeline(StandardScaler(), ridge)
