"""The functional connectome: the baseline that every embedding is to be compared with."""

import numpy as np

LABEL = 'connectome'


def connectome(data: np.ndarray) -> np.ndarray:
    """Pearson correlation (P, P) float32 between parcel series (T, P).

    Symmetric, 1 on the diagonal; NaN for parcels without data (NaN) or without variance.

    >>> t = np.arange(10.0)
    >>> connectome(np.stack([t, -t, t * 0], axis=1))
    array([[ 1., -1., nan],
           [-1.,  1., nan],
           [nan, nan, nan]], dtype=float32)
    """
    centred = data - data.mean(axis=0, dtype=np.float64)
    norm = np.sqrt((centred**2).sum(axis=0))
    # a constant parcel is constant up to the rounding of its mean
    usable = norm > 1e-6 * np.abs(data).max(axis=0, initial=0)
    unit = np.divide(centred, norm, out=np.full_like(centred, np.nan), where=usable)
    relmat = np.clip(unit.T @ unit, -1, 1)
    np.fill_diagonal(relmat, np.where(usable, 1.0, np.nan))
    return relmat.astype(np.float32)


def connectome_vector(relmat: np.ndarray) -> np.ndarray:
    """Correlations (P * (P - 1) / 2,) of all pairs of parcels, row by row above the diagonal."""
    return relmat[np.triu_indices(len(relmat), 1)]
