"""Windows of a model's length out of a run, and parcels filled where the run has none."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.resample import official_frames
from bids_brainfm.signals.series import Windows
from bids_brainfm.validation import is_number

SHORT_RUNS = ('refuse', 'pad', 'tile')


def cut(
    data: np.ndarray, flagged: np.ndarray, tr: float, length: int, stride: int | None = None,
    short: str = 'refuse', start: float = 0.0, min_real: float = 1.0, span: int | None = None,
) -> Windows:  # fmt: skip
    """Cut a run into windows.

    Windows begin at the first sample and follow one another without overlap, or every `stride`
    samples. What fills no window at the end is left over, unless `short` or `min_real` applies.

    Parameters
    ----------
    data : (T, P), scaled, at the model's repetition time, or with `span` at the run's own
    flagged, tr : (T,) bool, rows that come from flagged volumes; seconds between rows
    length, stride : samples in a window, and between the starts of two (`length` if left out)
    short : ``'refuse'`` leaves an incomplete window out; ``'pad'`` continues with each parcel's
        mean over the run (with `span` by the run's last row, as the official code does);
        ``'tile'`` repeats the run from its start
    start : time of the first row in seconds since the run's start
    min_real : proportion of recorded samples from which ``'refuse'`` too does as ``'pad'``
    span : rows that a window spans, of which it takes `length` by
        :func:`bids_brainfm.signals.resample.official_frames`; `length` rows on end if left out

    Raises
    ------
    BrainfmError : a stride below 1, or an unknown `short`

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
    check_cut(stride, short)
    stride = length if stride is None else stride
    data, flagged = np.asarray(data, dtype=np.float32), np.asarray(flagged, dtype=bool)
    n_rows = len(data)
    n_spanned, frames, spacing = length, np.arange(length), tr
    if span is not None:
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
    windows = np.ascontiguousarray(cut_out.transpose(0, 2, 1))
    onset, duration = start + starts * tr, np.minimum(n_spanned, n_rows - starts) * tr
    marked = (recorded & flagged[rows]).sum(axis=1) / recorded.sum(axis=1)
    excluded, left_over = np.zeros(len(starts), bool), (n_rows - covered) * tr
    return Windows(windows, onset, duration, real, marked, excluded, spacing, left_over)


def check_cut(stride: int | None, short: str) -> None:
    """Refuse a stride below one sample, and a way with short runs that is not known."""
    if short not in SHORT_RUNS:
        raise BrainfmError(f'--short-runs is one of {", ".join(SHORT_RUNS)}, not {short!r}.')
    if stride is not None and not (is_number(stride, Integral) and stride >= 1):
        raise BrainfmError(f'--stride must be at least 1 sample, not {stride!r}.')


def cover(data: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a run (S, P) into windows that together hold every sample.

    They are (W, P, length) float32, end to end from the first sample; the last is flush with the
    end of the run and overlaps the one before it. The second array, (W, length) int, is the sample
    of each time point, -1 for one that was completed: a run shorter than one window is completed
    by each parcel's mean. It is never repeated: a model would find what is hidden in the copy.

    >>> cover(np.arange(5.0)[:, None], 3)[1].tolist()
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
    data: np.ndarray, coverage: np.ndarray, xyz: np.ndarray, min_coverage: float,
    structures: Sequence[str] | None = None, atlas: str = 'the atlas',
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Give each parcel without enough signal the series of the nearest parcel that has it.

    The nearest within the same structure: a nucleus has not the signal of the cortex around it.

    Parameters
    ----------
    data, coverage : (T, P) parcel series; (P,) proportion of each parcel with signal
    xyz : (P, 3), centroids in mm
    min_coverage : below this proportion, or where the series is NaN, a parcel is uncovered
    structures : P structures (cortex, subcortex); one for all if left out
    atlas : its name, for the refusal

    Returns
    -------
    data, donors : (T, P), a copy without gaps; (P,) int, parcel whose series was taken, or -1

    Raises
    ------
    BrainfmError : more than half of the parcels are uncovered, or all of one structure

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
    groups = np.asarray([''] * covered.size if structures is None else structures)
    for structure in np.unique(groups):
        inside = groups == structure
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
    distance[groups[missing, None] != groups[candidates]] = np.inf
    donors[missing] = candidates[distance.argmin(axis=1)]
    data[:, missing] = data[:, donors[missing]]
    return data, donors
