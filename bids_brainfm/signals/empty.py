"""Volumes without signal: of a scan that was stopped early, or that lost some."""

import numpy as np

SAMPLE = 2000  # voxels that are enough to see it
FLAT = 0.1  # of the usual SD over voxels, below which a dark volume shows no brain
DARK = 0.5  # of the usual mean over voxels
CONSTANT = 1e-6  # of its mean, SD over voxels of a volume that is constant
PARTIAL = 0.8  # of the voxels with a value that others have, below which a volume is not whole


def sample_of(n_voxels: int) -> slice:
    """Return the voxels to look at, evenly spaced."""
    return slice(None, None, max(1, n_voxels // SAMPLE))


def without_signal(values: np.ndarray) -> np.ndarray:
    """Find volumes (T,) bool that hold no signal, from a sample of voxels (T, N) in BOLD units.

    They are empty, NaN, constant over the brain, dark and nearly so, lack a part of it, or repeat
    the volume before. What is usual is the 90th percentile over volumes, so that a scan of which
    most is missing is judged by the rest. If all volumes are alike in this, none is marked.

    >>> without_signal(np.array([[1.0, 5, 9], [2, 4, 9], [0, 0, 0], [3, 5, 8], [3, 5, 8]]))
    array([False, False,  True, False,  True])
    """
    values = np.asarray(values, float)
    finite = np.isfinite(values)
    known = np.where(finite, values, 0)
    number = np.count_nonzero(known, axis=1)
    mean = known.sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
    with np.errstate(over='ignore', invalid='ignore'):  # of values that are refused later
        squares = np.where(finite, known - mean[:, None], 0) ** 2
        spread = np.sqrt(squares.sum(axis=1) / np.maximum(finite.sum(axis=1), 1))
    dark = np.abs(mean) < DARK * np.quantile(np.abs(mean), 0.9)
    found = dark & (spread <= FLAT * np.quantile(spread, 0.9))
    found |= spread <= CONSTANT * np.abs(mean)
    found |= number < PARTIAL * np.quantile(number, 0.9)
    found[1:] |= (known[1:] == known[:-1]).all(axis=1)
    return np.zeros_like(found) if found.all() else found
