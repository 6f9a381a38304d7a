"""Scores of predictions of participants, and how far one test part can tell them apart."""

from typing import Any

import numpy as np

from bids_brainfm.training.cohort import Targets

DRAWS, BLOCK = 2000, 100  # bootstrap samples of the participants, in all and at once
COVERED = 0.95
FEW = 20  # participants, below which such intervals are clearly too narrow
TOO_FEW = f' With fewer than {FEW} participants these intervals are too narrow.'


def scores_of(
    prediction: np.ndarray, target: np.ndarray, targets: Targets, weights: np.ndarray | None = None
) -> dict[str, Any]:
    """Score predictions of participants, (N, 1) in the target's units or (N, C) of classes.

    Regression: ``mse``, ``mae``, ``r2``, ``r`` (NaN where the prediction is constant); else
    ``accuracy``, ``balanced_accuracy``, ``f1`` (mean over classes), and ``auroc`` for two classes.
    With `weights` (draws, N), how often each participant counts, a score is an array (draws,).
    """
    counts = np.ones((1, len(target))) if weights is None else np.asarray(weights, float)
    score = _regression if targets.problem == 'regression' else _classification
    found = score(np.asarray(prediction, float), np.asarray(target, float), counts)
    if weights is not None:
        return found
    return {name: float(values[0]) for name, values in found.items()}


def _regression(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    x = x[:, 0]
    mean = lambda values: weights @ values / weights.sum(1)
    mse, mae = mean((x - y) ** 2), mean(np.abs(x - y))
    # what is left of a constant is the rounding of its mean
    rounding = [(1e-9 * np.abs(values).max()) ** 2 for values in (x, y)]
    x, y = x - x.mean(), y - y.mean()
    spread, measured = (mean(values**2) - mean(values) ** 2 for values in (x, y))
    shared = mean(x * y) - mean(x) * mean(y)
    divide = lambda a, b, where: np.divide(a, b, out=np.full_like(a, np.nan), where=where)
    varies = measured > rounding[1]
    both = varies & (spread > rounding[0])
    r = divide(shared, np.sqrt(np.abs(spread * measured)), both)
    return {'mse': mse, 'mae': mae, 'r2': 1 - divide(mse, measured, varies), 'r': r}


def _classification(p: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    n, classes = p.shape
    real, chosen = y.astype(int), p.argmax(1)
    cells = np.zeros((n, classes, classes))
    cells[np.arange(n), real, chosen] = 1
    confusion = np.tensordot(weights, cells, 1)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    of_class, as_class = confusion.sum(2), confusion.sum(1)
    ratio = lambda a, b: np.divide(a, b, out=np.full_like(b, np.nan), where=b > 0)
    found = {
        'accuracy': hits.sum(1) / weights.sum(1),
        'balanced_accuracy': np.nanmean(ratio(hits, of_class), axis=1),
        'f1': np.nanmean(ratio(2 * hits, of_class + as_class), axis=1),
    }
    if classes == 2:
        margin, one = p[:, 1] - p[:, 0], real == 1
        above = np.sign(margin[one, None] - margin[~one]) / 2 + 0.5
        won = ((weights[:, one] @ above) * weights[:, ~one]).sum(1)
        found['auroc'] = ratio(won, weights[:, one].sum(1) * weights[:, ~one].sum(1))
    return found


def measure_of(targets: Targets) -> str:
    """Name of the score by which predictors are compared."""
    if targets.problem == 'regression':
        return 'r'
    return 'auroc' if len(targets.classes) == 2 else 'balanced_accuracy'


def describe_test(
    predictions: dict[str, np.ndarray], target: np.ndarray, targets: Targets, seed: int
) -> dict[str, Any]:
    """Scores on the test part with intervals: what a card says of it.

    Intervals are percentiles (95 %) of a bootstrap over the participants of the test part, paired
    over the predictors. `predictions`, (N, C) each, are of ``model`` and of what it is compared
    with; with ``connectome`` among these, the difference to it is given, too.
    """
    scores = {name: scores_of(x, target, targets) for name, x in predictions.items()}
    drawn = _bootstrap(predictions, target, targets, seed)
    facts = {
        'test': scores.pop('model'),
        'test_baselines': scores,
        'test_intervals': {
            name: {key: _interval(values) for key, values in found.items() if _known(values)}
            for name, found in drawn.items()
        },
    }
    measure = measure_of(targets)
    if 'connectome' in predictions:
        difference = drawn['model'][measure] - drawn['connectome'][measure]
        if _known(difference):
            low, high = _interval(difference)
            found = facts['test'][measure] - scores['connectome'][measure]
            name = measure.replace('_', ' ')
            facts['test_difference'] = {
                'measure': measure, 'model_minus_connectome': found, 'interval': [low, high],
                'sd': float(np.nanstd(difference)),
                'statement': f'The difference in {name} between model and connectome is '
                f'{found:.2f} (95 % interval {low:.2f} to {high:.2f}). One test part of '
                f'{len(target)} participants cannot show differences smaller than about '
                f'{(high - low) / 2:.2f}.' + TOO_FEW * (len(target) < FEW),
            }  # fmt: skip
    return facts


def _bootstrap(
    predictions: dict[str, np.ndarray], target: np.ndarray, targets: Targets, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Scores (draws,) of each predictor on the same bootstrap samples."""
    rng, n = np.random.default_rng(seed), len(target)
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in predictions}
    for _ in range(DRAWS // BLOCK):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=BLOCK).astype(float)
        for name, prediction in predictions.items():
            for key, values in scores_of(prediction, target, targets, weights).items():
                found[name].setdefault(key, []).append(values)
    return {
        name: {key: np.concatenate(blocks) for key, blocks in scores.items()}
        for name, scores in found.items()
    }


def _known(values: np.ndarray) -> bool:
    """Whether a score is known in most samples; a rare class may be absent from a few."""
    return bool(np.isfinite(values).mean() > COVERED)


def _interval(values: np.ndarray) -> list[float]:
    outside = 50 * (1 - COVERED)
    return np.nanpercentile(values, [outside, 100 - outside]).tolist()
