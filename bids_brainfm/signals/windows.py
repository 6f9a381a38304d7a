"""Windows of a model's length out of a run, and parcels filled where the run has none."""

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.series import Windows

SHORT_RUNS = ('refuse', 'pad', 'tile')


def cut(data, flagged, tr, length, stride=None, short='refuse', start=0.0) -> Windows:
    """Cut a run into windows.

    Windows begin at the first sample and follow one another without overlap, or every `stride`
    samples. What remains at the end and fills no window is left over, unless `short` says how to
    complete it.

    Parameters
    ----------
    data : (T, P) array
        Scaled parcel series at the model's repetition time.
    flagged : (T,) bool
        Samples that come from flagged volumes.
    tr : float
        Seconds between samples.
    length : int
        Samples in a window.
    stride : int, optional
        Samples from one window's start to the next; `length` if left out.
    short : {'refuse', 'pad', 'tile'}
        What to do with an incomplete window: refuse a run shorter than one window and leave the
        rest of a longer one; continue with each parcel's mean over the run; or repeat the run
        from its start.
    start : float
        Seconds from the run's first volume to the first sample.

    Returns
    -------
    Windows
        In order of time; an incomplete window, if any, is the last.

    Raises
    ------
    BrainfmError
        A run shorter than one window with ``short='refuse'``, or a stride below 1.

    Examples
    --------
    >>> run = np.arange(5.0)[:, None]
    >>> windows = cut(run, np.zeros(5, bool), tr=2.0, length=3, short='tile')
    >>> windows.data[:, 0]
    array([[0., 1., 2.],
           [3., 4., 0.]], dtype=float32)
    >>> windows.onset, windows.duration
    (array([0., 6.]), array([6., 4.]))
    """
    if short not in SHORT_RUNS:
        raise BrainfmError(f'--short-runs is one of {", ".join(SHORT_RUNS)}, not {short!r}.')
    stride = length if stride is None else stride
    if stride < 1:
        raise BrainfmError(f'--stride must be at least 1 sample, not {stride}.')
    data, flagged = np.asarray(data, dtype=np.float32), np.asarray(flagged, dtype=bool)
    n_samples = len(data)
    if n_samples < length and short == 'refuse':
        raise BrainfmError(
            f'The run is too short: the model needs {length} volumes at TR {tr:g} s '
            f'({length * tr:.1f} s) and there are {n_samples} ({n_samples * tr:.1f} s); '
            'add --short-runs pad to fill the rest with the mean of each parcel.'
        )
    starts = list(range(0, n_samples - length + 1, stride))
    covered = starts[-1] + length if starts else 0
    following = len(starts) * stride
    if short != 'refuse' and covered < n_samples and following < n_samples:
        starts.append(following)
        covered = n_samples

    index = np.array(starts)[:, None] + np.arange(length)
    recorded = index < n_samples
    cut_out = data[index % n_samples]
    if short == 'pad':
        cut_out = np.where(recorded[..., None], cut_out, data.mean(axis=0))
    n_recorded = recorded.sum(axis=1)
    n_flagged = (recorded & flagged[index % n_samples]).sum(axis=1)
    return Windows(
        data=np.ascontiguousarray(cut_out.transpose(0, 2, 1)),
        onset=start + np.array(starts) * tr,
        duration=n_recorded * tr,
        real=n_recorded / length,
        flagged=n_flagged / n_recorded,
        tr=tr,
        left_over=(n_samples - covered) * tr,
    )


def fill_uncovered(data, coverage, xyz, min_coverage):
    """Give each parcel without enough signal the series of the nearest parcel that has it.

    Parameters
    ----------
    data : (T, P) array
        Parcel series.
    coverage : (P,) array
        Share of each parcel with signal.
    xyz : (P, 3) array
        Centroids in mm.
    min_coverage : float
        Below this share, or where the series is NaN, a parcel is uncovered.

    Returns
    -------
    data : (T, P) array
        A copy without gaps.
    donors : (P,) int
        Parcel whose series was taken, -1 where the parcel's own was kept.

    Raises
    ------
    BrainfmError
        More than half of the parcels are uncovered.

    Examples
    --------
    >>> xyz = np.array([[0, 0, 0], [1, 0, 0], [9, 0, 0]])
    >>> fill_uncovered(np.array([[1.0, 2.0, 3.0]]), np.array([1, 0.2, 1]), xyz, 0.5)
    (array([[1., 1., 3.]]), array([-1,  0, -1]))
    """
    data, xyz = np.array(data), np.asarray(xyz, dtype=float)
    covered = (np.asarray(coverage) >= min_coverage) & np.isfinite(data).all(axis=0)
    missing = np.flatnonzero(~covered)
    if missing.size > covered.size / 2:
        raise BrainfmError(
            f'{missing.size} of {covered.size} parcels have less than {min_coverage:.0%} of their '
            'voxels with signal in this run; check that the run is in the space of the atlas and '
            'well registered.'
        )
    donors = np.full(covered.size, -1)
    candidates = np.flatnonzero(covered)
    distance = np.linalg.norm(xyz[missing, None] - xyz[candidates], axis=2)
    donors[missing] = candidates[distance.argmin(axis=1)]
    data[:, missing] = data[:, donors[missing]]
    return data, donors
