"""Windows of a model's length out of a run, and parcels filled where the run has none."""

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.resample import official_frames
from bids_brainfm.signals.series import Windows

SHORT_RUNS = ('refuse', 'pad', 'tile')


def cut(
    data, flagged, tr, length, stride=None, short='refuse', start=0.0, min_real=1.0, span=None
) -> Windows:
    """Cut a run into windows.

    Windows begin at the first sample and follow one another without overlap, or every `stride`
    samples. What remains at the end and fills no window is left over, unless `short` or
    `min_real` says that it is completed.

    Parameters
    ----------
    data : (T, P) array
        Scaled parcel series: at the model's repetition time, or with `span` at the run's own.
    flagged : (T,) bool
        Rows that come from flagged volumes.
    tr : float
        Seconds between rows.
    length : int
        Samples in a window.
    stride : int, optional
        Samples from one window's start to the next; `length` if left out.
    short : {'refuse', 'pad', 'tile'}
        What to do with an incomplete window: leave it out, so that a run shorter than one window
        has none; continue with each parcel's mean over the run (with `span` by the run's last
        row, as the official code does); or repeat the run from its start.
    start : float
        Seconds from the run's first volume to the first row.
    min_real : float
        Share of recorded samples from which ``'refuse'`` too takes an incomplete window, and
        completes it as ``'pad'`` does.
    span : int, optional
        Rows that a window spans, of which it takes `length` by
        :func:`bids_brainfm.signals.resample.official_frames`; if left out, a window is `length`
        rows on end.

    Returns
    -------
    Windows
        In order of time; an incomplete window, if any, is the last.

    Raises
    ------
    BrainfmError
        A stride below 1, or an unknown way to deal with an incomplete window.

    Examples
    --------
    >>> run = np.arange(5.0)[:, None]
    >>> windows = cut(run, np.zeros(5, bool), tr=2.0, length=3, short='tile')
    >>> windows.data[:, 0]
    array([[0., 1., 2.],
           [3., 4., 0.]], dtype=float32)
    >>> windows.onset, windows.duration
    (array([0., 6.]), array([6., 4.]))
    >>> len(cut(run, np.zeros(5, bool), tr=2.0, length=3).data)
    1
    >>> cut(run, np.zeros(5, bool), tr=2.0, length=3, min_real=0.6).real
    array([1.        , 0.66666667])
    """
    if short not in SHORT_RUNS:
        raise BrainfmError(f'--short-runs is one of {", ".join(SHORT_RUNS)}, not {short!r}.')
    stride = length if stride is None else stride
    if stride < 1:
        raise BrainfmError(f'--stride must be at least 1 sample, not {stride}.')
    data, flagged = np.asarray(data, dtype=np.float32), np.asarray(flagged, dtype=bool)
    n_rows = len(data)
    if span is None:
        n_spanned, frames, spacing = length, np.arange(length), tr
    else:
        n_spanned, frames = span, official_frames(length, span)
        spacing = tr * (span - 1) / (length - 1)

    starts = np.arange(0, n_rows * length, stride * n_spanned) // length
    real = (starts[:, None] + frames < n_rows).mean(axis=1)
    n_windows = np.count_nonzero(real == 1)
    covered = starts[n_windows - 1] + n_spanned if n_windows else 0
    least = min_real if short == 'refuse' else 0
    if covered < n_rows and (real[n_windows : n_windows + 1] >= least).any():
        n_windows, covered = n_windows + 1, n_rows
    starts, real = starts[:n_windows], real[:n_windows]

    index = starts[:, None] + frames
    recorded = index < n_rows
    rows = index % n_rows if short == 'tile' else np.minimum(index, n_rows - 1)
    cut_out = data[rows]
    if short != 'tile' and span is None:
        cut_out = np.where(recorded[..., None], cut_out, data.mean(axis=0))
    return Windows(
        data=np.ascontiguousarray(cut_out.transpose(0, 2, 1)),
        onset=start + starts * tr,
        duration=np.minimum(n_spanned, n_rows - starts) * tr,
        real=real,
        flagged=(recorded & flagged[rows]).sum(axis=1) / recorded.sum(axis=1),
        tr=spacing,
        left_over=(n_rows - covered) * tr,
    )


def cover(data, length) -> tuple[np.ndarray, np.ndarray]:
    """Cut a run into windows that together hold every sample.

    A run shorter than one window is completed by each parcel's mean. It is never repeated: a
    model would find what is hidden from it in the copy.

    Parameters
    ----------
    data : (S, P) array
        Scaled parcel series.
    length : int
        Samples in a window.

    Returns
    -------
    windows : (W, P, length) float32
        End to end from the first sample; the last one is flush with the end of the run and
        overlaps the one before it.
    samples : (W, length) int
        Sample that each time point is, -1 for one that was completed.

    Examples
    --------
    >>> windows, samples = cover(np.arange(5.0)[:, None], 3)
    >>> samples.tolist()
    [[0, 1, 2], [2, 3, 4]]
    """
    data = np.asarray(data, dtype=np.float32)
    if len(data) < length:
        samples = np.arange(length)[None]
        cut_out = cut(data, np.zeros(len(data), bool), 1.0, length, short='pad').data
        return cut_out, np.where(samples < len(data), samples, -1)
    starts = [*range(0, len(data) - length, length), len(data) - length]
    samples = np.array(starts)[:, None] + np.arange(length)
    return np.ascontiguousarray(data[samples].transpose(0, 2, 1)), samples


def fill_uncovered(
    data, coverage, xyz, min_coverage, structures=None, atlas='the atlas'
) -> tuple[np.ndarray, np.ndarray]:
    """Give each parcel without enough signal the series of the nearest parcel that has it.

    The nearest is sought within the same structure: the signal of a nucleus is not that of the
    cortex around it.

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
    structures : sequence of P str, optional
        Structure of each parcel (cortex, subcortex); one for all if left out.
    atlas : str
        Name of the atlas, for the refusal.

    Returns
    -------
    data : (T, P) array
        A copy without gaps.
    donors : (P,) int
        Parcel whose series was taken, -1 where the parcel's own was kept.

    Raises
    ------
    BrainfmError
        More than half of the parcels are uncovered, or all of one structure.

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
    structures = np.asarray([''] * covered.size if structures is None else structures)
    for structure in np.unique(structures):
        inside = structures == structure
        if not covered[inside].any():
            raise BrainfmError(
                f'none of the {inside.sum()} {structure} parcels of {atlas} has enough signal in '
                'this run: the model needs these rows, and they are not filled from another '
                "structure; take data that include them, such as fMRIPrep's volumes or its "
                '--cifti-output 91k.'
            )
    donors = np.full(covered.size, -1)
    candidates = np.flatnonzero(covered)
    distance = np.linalg.norm(xyz[missing, None] - xyz[candidates], axis=2)
    distance[structures[missing, None] != structures[candidates]] = np.inf
    donors[missing] = candidates[distance.argmin(axis=1)]
    data[:, missing] = data[:, donors[missing]]
    return data, donors
