"""Maps of two conditions or groups compared, with one test for each token of the model."""

import warnings
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bids_brainfm.errors import BrainfmError


@dataclass(frozen=True)
class Contrast:
    """Condition a against condition b at each place, (P,) float; NaN where not computable.

    q controls the false discovery rate over the tests (Benjamini and Hochberg 1995,
    doi:10.1111/j.2517-6161.1995.tb02031.x).
    """

    difference: np.ndarray  # mean of a minus mean of b, in the unit of the maps
    t: np.ndarray
    p: np.ndarray  # two-sided
    q: np.ndarray
    n_a: int  # number of maps
    n_b: int


def contrast_tokens(a: np.ndarray, b: np.ndarray, paired: bool, token: np.ndarray) -> Contrast:
    """Compare maps whose parcels share the values of tokens: one test for each token.

    Each parcel is given the result of its token; one without any value on a side has none.

    Parameters
    ----------
    a, b : (N, P) and (M, P) float, one map per row; a parcel has the value of its token or NaN
    paired : bool, whether rows i of both belong together, as in :func:`contrast`
    token : (P,) int, number of the token that holds each parcel

    Raises BrainfmError as :func:`contrast` does.
    """
    numbers, place = np.unique(token, return_inverse=True)
    a, b = (np.asarray(maps, float) for maps in (a, b))
    first, second = (
        np.stack([np.fmax.reduce(maps[:, token == k], axis=1) for k in numbers], axis=1)
        for maps in (a, b)
    )
    found = contrast(first, second, paired)
    known = np.isfinite(a).any(axis=0) & np.isfinite(b).any(axis=0)
    shown = lambda values: np.where(known, values[place], np.nan)
    return replace(
        found, difference=shown(found.difference), t=shown(found.t), p=shown(found.p),
        q=shown(found.q),
    )  # fmt: skip


def contrast(a: np.ndarray, b: np.ndarray, paired: bool) -> Contrast:
    """Compare the maps of two conditions or groups with a t test for each parcel.

    `a` (N, P) and `b` (M, P) are float, one map per row; a value that is not finite is left out,
    with its counterpart if paired. `paired`: rows i belong together, otherwise Welch's test.
    t, p and q are NaN for parcels with fewer than two values per side (two pairs), or whose
    values (differences of pairs) are all the same; the difference needs one value per side.

    Raises BrainfmError where a side is empty, or parcels or the numbers of pairs differ.
    """
    from scipy.stats import false_discovery_control, ttest_ind, ttest_rel

    a, b = (np.array(maps, float) for maps in (a, b))
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
    known_a, known_b = np.isfinite(a), np.isfinite(b)
    if paired:
        known_a = known_b = known_a & known_b
    a[~known_a], b[~known_b] = np.nan, np.nan

    testable = (known_a.sum(axis=0) >= 2) & (known_b.sum(axis=0) >= 2)
    size = np.fmax.reduce(np.abs(np.concatenate([a, b])), axis=0)
    testable &= _vary(a - b, size) if paired else _vary(a, size) | _vary(b, size)
    t, p, q = np.full((3, a.shape[1]), np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Mean of empty slice', RuntimeWarning)
        # of a constant side, which Welch's test allows if the other is not
        warnings.filterwarnings('ignore', 'Precision loss', RuntimeWarning)
        difference = np.nanmean(a, axis=0) - np.nanmean(b, axis=0)
        if testable.any():
            sides = a[:, testable], b[:, testable]
            test = ttest_rel if paired else partial(ttest_ind, equal_var=False)
            t[testable], p[testable] = test(*sides, nan_policy='omit')
            q[testable] = false_discovery_control(p[testable])
    return Contrast(difference, t, p, q, len(a), len(b))


def _vary(values: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(P,) bool, whether a column varies by more than the rounding of numbers of that size."""
    return np.fmax.reduce(values, axis=0) - np.fmin.reduce(values, axis=0) > 1e-12 * size
