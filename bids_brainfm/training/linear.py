"""Linear prediction of participants: ridge and logistic regression by cross-validation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.training.cohort import Targets

FOLDS = 5
# Relative to the mean eigenvalue of the features, so that they suit any number of features
PENALTIES = np.logspace(-5, 3, 17)


@dataclass(frozen=True)
class LinearModel:
    """Outputs weight (x - centre) + bias of features x (F,): the target, or logits of classes."""

    weight: np.ndarray  # (C, F)
    bias: np.ndarray  # (C,)
    centre: np.ndarray  # (F,)
    problem: str  # 'regression' or 'classification'

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Predictions (N, 1) in the target's units, or probabilities of the classes (N, C)."""
        outputs = (x - self.centre) @ self.weight.T + self.bias
        if self.problem == 'regression':
            return outputs
        odds = np.exp(outputs - outputs.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)


def fit_linear(
    x: np.ndarray, y: np.ndarray, groups: Sequence[int] | None, targets: Targets, seed: int
) -> LinearModel:
    """Fit ridge or logistic regression to features (N, F) and targets (N,).

    Features are standardised. The penalty is chosen by cross-validation over the participants
    given here (5 folds; mean squared error, or log loss), with `groups` (N,) kept together.

    Raises BrainfmError where there are too few participants, of a class or in groups, for it.
    """
    from scipy.linalg import qr
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    z, basis = scaler.transform(x), None
    if z.shape[1] > len(z):  # rotated into the span of the participants: the same fit, in no time
        basis = qr(z.T, mode='economic')[0]
        z = (z @ basis).astype(float)
    penalties = PENALTIES * max(x.shape)
    if targets.problem == 'regression':
        estimator, grid, by = Ridge(), {'alpha': penalties}, 'neg_mean_squared_error'
    else:
        estimator, by = LogisticRegression(max_iter=2000), 'neg_log_loss'
        grid = {'C': 1 / penalties}
    search = GridSearchCV(estimator, grid, scoring=by, cv=folds_of(y, targets, seed, groups))
    fitted = search.fit(z, y).best_estimator_
    weight, bias = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)
    weight = (weight if basis is None else weight @ basis.T) / scaler.scale_
    if targets.problem == 'classification' and len(weight) == 1:  # log odds of the second class
        half = np.array([-0.5, 0.5])
        weight, bias = half[:, None] * weight, half * bias
    return LinearModel(weight, bias, scaler.mean_, targets.problem)


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
