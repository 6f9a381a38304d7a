"""The functional connectome: the baseline that every embedding is to be compared with."""

from collections.abc import Iterable

import numpy as np

LABEL = 'connectome'
_LARGEST_R = 0.999999  # Fisher z of the same series twice would be infinite


def connectome(data: np.ndarray, flagged: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlation (P, P) float32 between parcel series (T, P), over unflagged volumes.

    Volumes that are `flagged`, (T,) bool, hold interpolated values and are left out. The matrix is
    symmetric, with 1 on the diagonal; NaN for parcels without data (NaN) or without variance.

    >>> t = np.arange(10.0)
    >>> connectome(np.stack([t, -t, t * 0], axis=1))
    array([[ 1., -1., nan],
           [-1.,  1., nan],
           [nan, nan, nan]], dtype=float32)
    """
    data = data if flagged is None else data[~np.asarray(flagged, bool)]
    if len(data) < 2:
        return np.full((data.shape[1],) * 2, np.nan, np.float32)
    centred = data - data.mean(axis=0, dtype=np.float64)
    norm = np.sqrt((centred**2).sum(axis=0))
    # a constant parcel is constant up to the rounding of its mean
    usable = norm > 1e-6 * np.abs(data).max(axis=0, initial=0)
    unit = np.divide(centred, norm, out=np.full_like(centred, np.nan), where=usable)
    relmat = np.clip(unit.T @ unit, -1, 1)
    np.fill_diagonal(relmat, np.where(usable, 1.0, np.nan))
    return relmat.astype(np.float32)


def fisher_z(correlations: np.ndarray) -> np.ndarray:
    """Fisher z of correlations, finite also for 1 and -1; NaN stays NaN."""
    return np.arctanh(np.clip(np.asarray(correlations, float), -_LARGEST_R, _LARGEST_R))


def mean_connectome(connectomes: Iterable[np.ndarray]) -> np.ndarray:
    """Mean of correlation matrices, or of their vectors, through Fisher z; float64.

    Correlations that are missing (NaN) are left out, and NaN where all are. One matrix at a time
    is in memory.

    >>> mean_connectome([np.array([0.0, 0.3]), np.array([0.8, np.nan])])
    array([0.5, 0.3])
    """
    total = count = np.zeros(())
    for relmat in connectomes:
        z = fisher_z(relmat)
        total, count = total + np.nan_to_num(z), count + np.isfinite(z)
    mean = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return np.tanh(mean)


def connectome_vector(relmat: np.ndarray) -> np.ndarray:
    """Correlations (P * (P - 1) / 2,) of all pairs of parcels, row by row above the diagonal."""
    return relmat[np.triu_indices(len(relmat), 1)]
