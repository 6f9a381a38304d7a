"""How near predictions come to what was measured: never floored, NaN where nothing was scored."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """Agreement of a prediction with a target, an array of one shape for each measure.

    Attributes
    ----------
    mse : array
        Mean squared error, in the squared units of the target.
    r2 : array
        Share of the target's variance that is explained, 1 at best. Below 0 the prediction is
        worse than the target's mean.
    r : array
        Pearson correlation.
    """

    mse: np.ndarray
    r2: np.ndarray
    r: np.ndarray


def score(prediction: np.ndarray, target: np.ndarray, axis: int | tuple | None = None) -> Score:
    """Compare a prediction with its target.

    Parameters
    ----------
    prediction, target : arrays of one shape
        A point that is NaN in either is left out.
    axis : int or tuple of int, optional
        Axes to pool over; all of them where not given.

    Returns
    -------
    Score
        NaN where fewer than two points remain; R2 and r where the target does not vary, and r
        where the prediction does not.

    Examples
    --------
    >>> target = np.array([1.0, 2.0, 3.0, np.nan])
    >>> found = score(np.array([1.0, 2.0, 4.0, 9.0]), target)
    >>> round(float(found.mse), 3), round(float(found.r2), 3), round(float(found.r), 3)
    (0.333, 0.5, 0.982)
    >>> float(score(np.full(4, 2.0), target).r2)
    0.0
    """
    prediction, target = (np.asarray(x, dtype=float) for x in (prediction, target))
    scored = np.isfinite(prediction) & np.isfinite(target)
    n = scored.sum(axis=axis, keepdims=True)

    def centred(values):
        values = np.where(scored, values, 0.0)
        level = np.divide(values.sum(axis=axis, keepdims=True), n, where=n > 0, out=0.0 * n)
        away = np.where(scored, values - level, 0.0)
        spread = (away**2).sum(axis=axis)
        # what is left of a constant is the rounding of its mean
        largest = np.abs(values).max(axis=axis, initial=0)
        return away, np.where(spread > n.reshape(spread.shape) * (1e-9 * largest) ** 2, spread, 0)

    error = (np.where(scored, prediction - target, 0.0) ** 2).sum(axis=axis)
    made, made_spread = centred(prediction)
    real, real_spread = centred(target)
    shared = (made * real).sum(axis=axis)
    enough = n.reshape(error.shape) > 1

    def divide(numerator, denominator):
        empty = np.full(np.shape(error), np.nan)
        return np.divide(numerator, denominator, out=empty, where=enough & (denominator > 0))

    return Score(
        mse=divide(error, n.reshape(error.shape)),
        r2=1 - divide(error, real_spread),
        r=divide(shared, np.sqrt(made_spread * real_spread)),
    )
