"""Maps of two conditions or groups compared parcel by parcel."""

import warnings
from dataclasses import dataclass

import numpy as np

from bids_brainfm.errors import BrainfmError


@dataclass(frozen=True)
class Contrast:
    """Condition a against condition b, parcel by parcel; NaN where it cannot be told."""

    difference: np.ndarray
    """(P,) float, mean of a minus mean of b, in the unit of the maps."""
    t: np.ndarray
    """(P,) float."""
    p: np.ndarray
    """(P,) float, two-sided."""
    q: np.ndarray
    """(P,) float, p after control of the false discovery rate over parcels."""
    n_a: int
    """Number of maps in a."""
    n_b: int
    """Number of maps in b."""


def contrast(a: np.ndarray, b: np.ndarray, paired: bool) -> Contrast:
    """Compare the maps of two conditions or groups with a t test for each parcel.

    Parameters
    ----------
    a, b : (N, P) and (M, P) float
        One map per row. A value that is not finite is left out, and in paired maps its
        counterpart with it.
    paired : bool
        Row i of `a` and row i of `b` belong together: paired t test, otherwise Welch's, which
        does not take variances for equal.

    Returns
    -------
    Contrast
        t, p and q are NaN for parcels with fewer than two values a side (two pairs), or whose
        values (differences of pairs) are all the same; the difference needs one value a side.
        q controls the false discovery rate over the parcels that have p (Benjamini and Hochberg
        1995, doi:10.1111/j.2517-6161.1995.tb02031.x).

    Raises
    ------
    BrainfmError
        A side is empty, the parcels are not the same, or paired sides differ in number.

    Examples
    --------
    >>> rest = np.array([[1.0, 5], [2, 5], [3, 5]])
    >>> found = contrast(rest + [[2, 1], [3, 1], [4, 1]], rest, paired=True)
    >>> found.difference
    array([3., 1.])
    >>> found.t.round(2)
    array([5.2, nan])
    """
    from scipy.stats import false_discovery_control, ttest_ind, ttest_rel

    a, b = (np.array(maps, float) for maps in (a, b))
    _check(a, b, paired)
    there_a, there_b = np.isfinite(a), np.isfinite(b)
    if paired:
        there_a = there_b = there_a & there_b
    a[~there_a], b[~there_b] = np.nan, np.nan

    test = (there_a.sum(axis=0) >= 2) & (there_b.sum(axis=0) >= 2)
    size = np.fmax(_largest(a), _largest(b))
    test &= _differ(a - b, size) if paired else _differ(a, size) | _differ(b, size)
    t, p, q = np.full((3, a.shape[1]), np.nan)
    if test.any():
        sides = a[:, test], b[:, test]
        with warnings.catch_warnings():
            # of a constant side, which Welch's test allows if the other is not
            warnings.filterwarnings('ignore', 'Precision loss', RuntimeWarning)
            if paired:
                t[test], p[test] = ttest_rel(*sides, nan_policy='omit')
            else:
                t[test], p[test] = ttest_ind(*sides, equal_var=False, nan_policy='omit')
        q[test] = false_discovery_control(p[test])
    return Contrast(_mean(a) - _mean(b), t, p, q, len(a), len(b))


def _check(a, b, paired):
    """Refuse what cannot be compared."""
    for name, maps in (('first', a), ('second', b)):
        if len(maps) == 0:
            raise BrainfmError(
                f'The {name} side of the contrast has no maps: give at least one participant '
                'a side, or look whether the selection names what the dataset has.'
            )
    if a.shape[1] != b.shape[1]:
        raise BrainfmError(
            f'The first side of the contrast has {a.shape[1]} parcels, the second '
            f'{b.shape[1]}: compare maps of one atlas.'
        )
    if paired and len(a) != len(b):
        raise BrainfmError(
            f'A paired contrast needs the same participants on both sides, not {len(a)} and '
            f'{len(b)} maps: leave out those without a counterpart, or compare them unpaired.'
        )


def _mean(maps):
    """(P,) mean over the rows that have a value, NaN where none has."""
    count = np.isfinite(maps).sum(axis=0)
    out = np.full(maps.shape[1], np.nan)
    return np.divide(np.nansum(maps, axis=0), count, out=out, where=count > 0)


def _largest(maps):
    """(P,) largest magnitude of each column."""
    return np.fmax.reduce(np.abs(maps), axis=0)


def _differ(values, size):
    """(P,) bool, whether a column differs by more than the rounding of numbers of that size."""
    return np.fmax.reduce(values, axis=0) - np.fmin.reduce(values, axis=0) > 1e-12 * size
