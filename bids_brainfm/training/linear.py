"""Linear prediction of participants: ridge and logistic regression by cross-validation."""

from collections.abc import Sequence

import numpy as np
from sklearn.pipeline import Pipeline

from bids_brainfm.errors import BrainfmError
from bids_brainfm.training.cohort import Targets

FOLDS = 5
# Relative to the mean eigenvalue of the features, so that they suit any number of features
PENALTIES = np.logspace(-5, 3, 17)


def fit_linear(
    x: np.ndarray, y: np.ndarray, groups: Sequence[int] | None, targets: Targets, seed: int
) -> Pipeline:
    """Fit ridge or logistic regression to features (N, F) and targets (N,).

    Features are standardised, and rotated to their principal components, which changes nothing
    but the time that it takes. The penalty is chosen by cross-validation over the participants
    given here (5 folds; mean squared error, or log loss), with `groups` (N,) kept together.

    Raises BrainfmError where there are too few participants, of a class or in groups, for it.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rotate = make_pipeline(StandardScaler(), PCA())
    z = rotate.fit_transform(x)
    penalties = PENALTIES * max(x.shape)
    if targets.problem == 'regression':
        estimator, grid, by = Ridge(), {'alpha': penalties}, 'neg_mean_squared_error'
    else:
        estimator, by = LogisticRegression(max_iter=2000), 'neg_log_loss'
        grid = {'C': 1 / penalties}
    search = GridSearchCV(estimator, grid, scoring=by, cv=folds_of(y, targets, seed, groups))
    search.fit(z, y)
    return Pipeline([*rotate.steps, ('linear', search.best_estimator_)])


def folds_of(
    y: np.ndarray, targets: Targets, seed: int, groups: Sequence[int] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit and to validate in each fold of the inner cross-validation.

    Raises BrainfmError where there are too few participants or groups.
    """
    from sklearn import model_selection as sklearn

    classified = targets.problem == 'classification'
    units = np.arange(len(y)) if groups is None else np.asarray(groups)
    kinds = y if classified else np.zeros(len(y))
    fewest = min(len(set(units[kinds == kind])) for kind in set(kinds))
    n = min(FOLDS, fewest)
    if n < 2:
        what = 'groups' if groups is not None else 'participants'
        raise BrainfmError(
            f'--target {targets.column}: the training part has {fewest} {what}'
            f'{" of one of the classes" * classified}, and cross-validation needs at least 2: add '
            f'participants, or choose another --seed.'
        )
    shuffled = {'n_splits': n, 'shuffle': True, 'random_state': seed}
    if groups is None:
        division = (sklearn.StratifiedKFold if classified else sklearn.KFold)(**shuffled)
    elif classified:
        division = sklearn.StratifiedGroupKFold(**shuffled)
    else:
        division = sklearn.GroupKFold(n)
    folds = list(division.split(np.zeros((len(y), 1)), y, groups))
    if classified and any(set(y[rows]) != set(y) for rows, _ in folds):
        raise BrainfmError(
            f'--group-column: the groups of the training part cannot be divided into {n} folds '
            f'so that each has all classes of {targets.column} left to learn from: choose another '
            f'column, or another --seed.'
        )
    return folds


def predict_linear(fitted: Pipeline, x: np.ndarray, targets: Targets) -> np.ndarray:
    """Predictions (N, 1) in the target's units, or probabilities of the classes (N, C)."""
    if targets.problem == 'regression':
        return fitted.predict(x)[:, None]
    return fitted.predict_proba(x)


def as_layer(fitted: Pipeline) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring a fitted pipeline to one linear layer: outputs = weight (x - centre) + bias.

    Returns weight (C, F), bias (C,) and centre (F,); outputs are in the target's units, or logits.
    """
    scaler, rotation, linear = (step for _, step in fitted.steps)
    weight = np.atleast_2d(linear.coef_)
    bias = np.atleast_1d(linear.intercept_) - weight @ (rotation.components_ @ rotation.mean_)
    weight = weight @ rotation.components_ / scaler.scale_
    if hasattr(linear, 'classes_') and len(weight) == 1:  # of two classes one log odds
        half = np.array([-0.5, 0.5])
        weight, bias = half[:, None] * weight, half * bias
    return weight, bias, scaler.mean_
