"""Parcel series to another repetition time."""

import math
from fractions import Fraction

import numpy as np

_LARGEST_FACTOR = 1000
_SAME_RATE = 1e-3
_ROUNDING = 1e-6


def resample(data, tr, target_tr) -> np.ndarray:
    """Resample in time, with an anti-aliasing filter.

    Sample k of the result is the signal at ``k * target_tr``; nothing is extrapolated beyond the
    last volume. Rates that differ by less than one part in a thousand are left alone.

    Parameters
    ----------
    data : (T, P) array
        Parcel series; NaN columns stay NaN.
    tr, target_tr : float
        Present and wanted repetition time in seconds.

    Returns
    -------
    (T2, P) float32

    Notes
    -----
    Polyphase filtering (`scipy.signal.resample_poly`) with the ratio as a fraction of numbers up
    to 1000. The mean is taken out before and added after it: BOLD fluctuates by a percent around
    a high level, and the filter's ripple on that level would look like signal. At both ends the
    series is continued by point reflection, which keeps its level and slope.

    Examples
    --------
    >>> resample(np.full((100, 1), 9000.0), tr=2.0, target_tr=0.735)[[0, -1], 0]
    array([9000., 9000.], dtype=float32)
    """
    data = np.asarray(data)
    if same_rate(tr, target_tr) or len(data) < 2:
        return data.astype(np.float32)
    from scipy.signal import resample_poly  # a second of imports, which most runs can do without

    ratio = _ratio(tr, target_tr)
    series = data.astype(float)
    mean = series.mean(axis=0)
    fine = resample_poly(
        series - mean, ratio.numerator, ratio.denominator, axis=0, padtype='antireflect'
    )
    return (fine[: _length(len(data), tr, target_tr)] + mean).astype(np.float32)


def nearest_volume(n_volumes, tr, target_tr) -> np.ndarray:
    """Volume nearest in time to each sample of the resampled series.

    Parameters
    ----------
    n_volumes : int
        Volumes T before resampling.
    tr, target_tr : float
        Present and wanted repetition time in seconds.

    Returns
    -------
    (T2,) int
        To carry a property of volumes (such as being flagged) over to samples.

    Examples
    --------
    >>> nearest_volume(3, tr=2.0, target_tr=1.0)
    array([0, 0, 1, 2, 2])
    """
    if same_rate(tr, target_tr) or n_volumes < 2:
        return np.arange(n_volumes)
    return np.rint(np.arange(_length(n_volumes, tr, target_tr)) * target_tr / tr).astype(int)


def volumes_for(n_samples, tr, target_tr) -> int:
    """Volumes that a run must have to give so many samples.

    Parameters
    ----------
    n_samples : int
        Samples after resampling.
    tr, target_tr : float
        Present and wanted repetition time in seconds.

    Examples
    --------
    >>> volumes_for(160, tr=2.0, target_tr=2.2142)
    178
    >>> [len(nearest_volume(n, 2.0, 2.2142)) for n in (177, 178)]
    [159, 160]
    """
    if same_rate(tr, target_tr):
        return n_samples
    return 1 + math.ceil((n_samples - 1 - _ROUNDING) * target_tr / tr)


def official_frames(n_samples, n_volumes) -> np.ndarray:
    """Volumes that the official code of Brain-JEPA takes instead of resampling.

    Evenly spread from the first to the last of `n_volumes`, rounded down: no filter, and steps
    that differ by one.

    Parameters
    ----------
    n_samples : int
        Samples of a window.
    n_volumes : int
        Volumes that it spans.

    Returns
    -------
    (n_samples,) int
        Counted from the window's first volume. In whole numbers, so that no rounding of a
        fraction can move a frame.

    Examples
    --------
    >>> official_frames(160, 480)[[0, 1, 79, 80, 157, 158, 159]]
    array([  0,   3, 237, 241, 472, 475, 479])
    """
    return np.arange(n_samples) * (n_volumes - 1) // (n_samples - 1)


def same_rate(tr, target_tr) -> bool:
    """Whether two repetition times are so near that series are not resampled.

    >>> same_rate(0.7346, 0.735), same_rate(0.72, 0.735)
    (True, False)
    """
    return abs(tr / target_tr - 1) < _SAME_RATE


def _length(n_volumes, tr, target_tr):
    """Samples up to the time of the last volume (with room for rounding)."""
    return int((n_volumes - 1) * tr / target_tr + _ROUNDING) + 1


def _ratio(tr, target_tr):
    """New over old sampling rate, as a fraction of numbers up to 1000.

    >>> _ratio(2.0, 0.735), _ratio(0.735, 2.2142)
    (Fraction(400, 147), Fraction(80, 241))
    """
    if tr > target_tr:
        return 1 / Fraction(target_tr / tr).limit_denominator(_LARGEST_FACTOR)
    return Fraction(tr / target_tr).limit_denominator(_LARGEST_FACTOR)
