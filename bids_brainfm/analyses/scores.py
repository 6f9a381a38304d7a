"""How near predictions come to what was measured: never floored, NaN where nothing was scored."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """Agreement of a prediction with a target, an array of one shape for each measure."""

    mse: np.ndarray  # mean squared error, in the squared units of the target
    r2: np.ndarray  # proportion of variance explained; below 0: worse than the target's mean
    r: np.ndarray  # Pearson correlation


def score(
    prediction: np.ndarray, target: np.ndarray, axis: int | tuple[int, ...] | None = None
) -> Score:
    """Compare a prediction with its target, pooled over `axis` (all where not given).

    A point that is NaN in either is left out. Scores are NaN where fewer than two points remain;
    R2 and r where the target does not vary, and r where the prediction does not.

    >>> target = np.array([1.0, 2.0, 3.0, np.nan])
    >>> found = score(np.array([1.0, 2.0, 4.0, 9.0]), target)
    >>> round(float(found.mse), 3), round(float(found.r2), 3), round(float(found.r), 3)
    (0.333, 0.5, 0.982)
    """
    prediction, target = (np.asarray(x, dtype=float) for x in (prediction, target))
    scored = np.isfinite(prediction) & np.isfinite(target)
    n = scored.sum(axis=axis, keepdims=True)

    def centred(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deviations from the mean, and the sum of their squares."""
        values = np.where(scored, values, 0.0)
        level = np.divide(values.sum(axis=axis, keepdims=True), n, where=n > 0, out=0.0 * n)
        deviation = np.where(scored, values - level, 0.0)
        spread = (deviation**2).sum(axis=axis)
        # what is left of a constant is the rounding of its mean
        largest = np.abs(values).max(axis=axis, initial=0)
        rounding = n.reshape(spread.shape) * (1e-9 * largest) ** 2
        return deviation, np.where(spread > rounding, spread, 0)

    error = (np.where(scored, prediction - target, 0.0) ** 2).sum(axis=axis)
    predicted, predicted_spread = centred(prediction)
    measured, measured_spread = centred(target)
    shared = (predicted * measured).sum(axis=axis)
    count = n.reshape(error.shape)

    def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        empty = np.full(np.shape(error), np.nan)
        return np.divide(numerator, denominator, out=empty, where=(count > 1) & (denominator > 0))

    r = divide(shared, np.sqrt(predicted_spread * measured_spread))
    return Score(mse=divide(error, count), r2=1 - divide(error, measured_spread), r=r)
