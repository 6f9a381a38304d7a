"""Parcel series to another repetition time."""

import math
from fractions import Fraction

import numpy as np

_LARGEST_FACTOR = 1000
_SAME_RATE = 1e-3
_ROUNDING = 1e-6


def resample(data: np.ndarray, tr: float, target_tr: float) -> np.ndarray:
    """Resample series (T, P) to another repetition time in s, with an anti-aliasing filter.

    Sample k of the result, (T2, P) float32, is the signal at ``k * target_tr``; nothing is
    extrapolated beyond the last volume. NaN columns stay NaN. Rates that differ by less than one
    part in a thousand are left alone.

    Polyphase filtering (`scipy.signal.resample_poly`) with the ratio as a fraction of numbers up
    to 1000. The mean is taken out before, since the filter's ripple on it would look like signal.
    Both ends are continued by point reflection, which keeps level and slope.
    """
    data = np.asarray(data)
    if same_rate(tr, target_tr) or len(data) < 2:
        return data.astype(np.float32)
    from scipy.signal import resample_poly  # a second of imports, which most runs can do without

    series = data.astype(float)
    mean = series.mean(axis=0)
    up, down = _ratio(tr, target_tr).as_integer_ratio()
    fine = resample_poly(series - mean, up, down, axis=0, padtype='antireflect')
    return (fine[: _length(len(data), tr, target_tr)] + mean).astype(np.float32)


def nearest_volume(n_volumes: int, tr: float, target_tr: float) -> np.ndarray:
    """Volume nearest in time to each sample of the resampled series, (T2,) int.

    >>> nearest_volume(3, tr=2.0, target_tr=1.0)
    array([0, 0, 1, 2, 2])
    """
    if same_rate(tr, target_tr) or n_volumes < 2:
        return np.arange(n_volumes)
    return np.rint(np.arange(_length(n_volumes, tr, target_tr)) * target_tr / tr).astype(int)


def volumes_for(n_samples: int, tr: float, target_tr: float) -> int:
    """Volumes that a run must have to give so many samples after resampling.

    >>> [len(nearest_volume(n, 2.0, 2.2142)) for n in (177, 178)]
    [159, 160]
    """
    if same_rate(tr, target_tr):
        return n_samples
    return 1 + math.ceil((n_samples - 1 - _ROUNDING) * target_tr / tr)


def official_frames(n_samples: int, n_volumes: int) -> np.ndarray:
    """Volumes that the official code of Brain-JEPA takes instead of resampling.

    They are spread evenly from the first to the last of the volumes that a window spans, rounded
    down: no filter, and steps that differ by one. Whole numbers, so that no rounding can move one.

    >>> official_frames(160, 480)[[0, 1, 79, 80, 157, 158, 159]]
    array([  0,   3, 237, 241, 472, 475, 479])
    """
    return np.arange(n_samples) * (n_volumes - 1) // (n_samples - 1)


def same_rate(tr: float, target_tr: float) -> bool:
    """Whether two repetition times are so near that series are not resampled."""
    return abs(tr / target_tr - 1) < _SAME_RATE


def _length(n_volumes: int, tr: float, target_tr: float) -> int:
    """Samples up to the time of the last volume (with room for rounding)."""
    return int((n_volumes - 1) * tr / target_tr + _ROUNDING) + 1


def _ratio(tr: float, target_tr: float) -> Fraction:
    """New over old sampling rate, as a fraction of numbers up to 1000."""
    if tr > target_tr:
        return 1 / Fraction(target_tr / tr).limit_denominator(_LARGEST_FACTOR)
    return Fraction(tr / target_tr).limit_denominator(_LARGEST_FACTOR)
