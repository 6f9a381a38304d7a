"""Motion parameters: respiration filtered out, framewise displacement, expansions, segments."""

from typing import TYPE_CHECKING

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.strategy import FD, HEAD_RADIUS, MotionFilter, Strategy

if TYPE_CHECKING:
    import pandas as pd

TRANSLATIONS = ('trans_x', 'trans_y', 'trans_z')
ROTATIONS = ('rot_x', 'rot_y', 'rot_z')


def framewise_displacement(parameters: np.ndarray, head_radius: float = HEAD_RADIUS) -> np.ndarray:
    """Framewise displacement (T,) in mm of Power et al. 2012, NaN for the first volume.

    `parameters` (T, 6) are three translations in mm and three rotations in radians, which become
    arcs on a sphere of `head_radius` mm.

    >>> framewise_displacement(np.array([[0, 0, 0, 0, 0, 0], [0.1, 0, -0.2, 0, 0.01, 0]]))
    array([nan, 0.8])
    """
    steps = np.abs(np.diff(parameters, axis=0)) @ np.array([1.0] * 3 + [head_radius] * 3)
    return np.r_[np.nan, steps]


def filter_motion(parameters: np.ndarray, tr: float, motion_filter: MotionFilter) -> np.ndarray:
    """Remove respiration from motion parameters (T, K) with zero phase, as XCP-D does.

    Raises BrainfmError where the band is not below the Nyquist frequency. (XCP-D folds the band
    there, and warns; the breathing of a person is not known well enough for that.)
    """
    from scipy.signal import butter, filtfilt, iirnotch

    low, high = motion_filter.band_stop_min, motion_filter.band_stop_max
    if max(low, high or 0) >= 30 / tr:
        raise BrainfmError(
            f'A repetition time of {tr:g} s resolves less than {30 / tr:.3g} breaths per minute, '
            f'and the filter of motion parameters goes up to {max(low, high or 0):g}: leave out '
            '--motion-filter-type, or lower the band.'
        )
    if motion_filter.type == 'lp':
        b, a = butter(motion_filter.order // 2, low / 60, fs=1 / tr)
        repeats = 1
    else:
        assert high is not None
        b, a = iirnotch((low + high) / 120, (low + high) / 2 / (high - low), fs=1 / tr)
        repeats = motion_filter.order // 4
    for _ in range(repeats):
        parameters = filtfilt(b, a, parameters, axis=0, padtype='constant',
                              padlen=len(parameters) - 1)  # fmt: skip
    return parameters


def with_own_motion(table: 'pd.DataFrame', strategy: Strategy, tr: float) -> 'pd.DataFrame':
    """Return the confounds with motion filtered, expanded anew, and FD computed from it."""
    names = [*TRANSLATIONS, *ROTATIONS]
    if missing := [name for name in names if name not in table]:
        raise BrainfmError(
            f'The confounds table has no column {", ".join(missing)}, which framewise '
            'displacement is computed from: use the table as fMRIPrep wrote it, or leave out '
            '--motion-filter-type and --head-radius.'
        )
    motion, table = table[names].to_numpy(float), table.copy()
    if strategy.motion_filter:
        motion = filter_motion(motion, tr, strategy.motion_filter)
        for name, values in zip(names, motion.T, strict=True):
            slope = np.r_[np.nan, np.diff(values)]
            made = {'': values, '_derivative1': slope, '_power2': values**2,
                    '_derivative1_power2': slope**2}  # fmt: skip
            for expansion, column in made.items():
                if name + expansion in table:
                    table[name + expansion] = column
    table[FD] = framewise_displacement(motion, strategy.head_radius or HEAD_RADIUS)
    return table


def flag_short_segments(flagged: np.ndarray, least: int) -> np.ndarray:
    """Flag (T,) bool segments of fewer than `least` unflagged volumes; a run without flags stays.

    >>> flag_short_segments(np.array([0, 0, 1, 0, 0, 0, 1, 0], bool), 3).astype(int)
    array([1, 1, 1, 0, 0, 0, 1, 1])
    """
    if not flagged.any():
        return flagged
    edges = np.flatnonzero(np.diff(np.r_[True, flagged, True].astype(int)))
    found = flagged.copy()
    for start, stop in edges.reshape(-1, 2):
        found[start:stop] |= stop - start < least
    return found
