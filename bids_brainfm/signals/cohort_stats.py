"""Fit the statistics of a cohort that series are scaled by, run after run, in constant memory."""

import numpy as np

from bids_brainfm.signals.scale import CLIP_SD, GRAND_MEAN, STATISTICS, ScaleStats, brain_level

_RELATIVE_WIDTH = 5e-4  # of a bin, as a proportion of its value
_REACH = 1e9  # values are distinguished up to so many units from zero


class Sketch:
    """Quantiles of each parcel from counts in bins that widen with the distance from zero.

    Memory does not grow with the values, and the order of runs does not matter. As in DDSketch
    (Masson et al. 2019, Proceedings of the VLDB Endowment 12:2195-2205) the error is a proportion
    of the value; that of values smaller than 1 is as of 1.

    >>> sketch = Sketch(1)
    >>> for part in (np.arange(0, 500.0), np.arange(500, 1001.0)):
    ...     sketch.add(part[:, None])
    >>> sketch.quantile(0.25).round(), sketch.count
    (array([250.]), array([1001]))
    """

    def __init__(self, n_parcels: int) -> None:
        self._middle = int(np.arcsinh(_REACH) / _RELATIVE_WIDTH)
        # Rows are touched only where there are values, and memory is taken only there
        self._counts = np.zeros((n_parcels, 2 * self._middle + 1), np.uint32)
        self._least, self._most = np.full(n_parcels, np.inf), np.full(n_parcels, -np.inf)

    @property
    def count(self) -> np.ndarray:
        """Number of values of each parcel, (P,) int."""
        return self._counts.sum(axis=1, dtype=int)

    def add(self, values: np.ndarray) -> None:
        """Count values (N, P); NaN is left out."""
        values = np.asarray(values, float)
        known = np.isfinite(values)
        bins = np.arcsinh(np.where(known, values, 0)) / _RELATIVE_WIDTH
        bins = np.clip(np.rint(bins), -self._middle, self._middle).astype(int) + self._middle
        parcels = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        np.add.at(self._counts, (parcels[known], bins[known]), 1)
        self._least = np.fmin(self._least, np.where(known, values, np.inf).min(axis=0))
        self._most = np.fmax(self._most, np.where(known, values, -np.inf).max(axis=0))

    def quantile(self, proportion: float) -> np.ndarray:
        """Value below which a proportion of each parcel's values lies, (P,); NaN without any."""
        found = np.full(len(self._counts), np.nan)
        for parcel, counts in enumerate(self._counts):
            filled = np.flatnonzero(counts)
            if not filled.size:
                continue
            until = np.cumsum(counts[filled], dtype=int)
            rank = proportion * (until[-1] - 1)  # between the values next to it, as in NumPy
            ranks = np.array([np.floor(rank), np.ceil(rank)])
            at = np.searchsorted(until, ranks, side='right')
            inside = counts[filled[at]]
            within = (ranks - (until[at] - inside) + 0.5) / inside - 0.5
            places = (filled[at] - self._middle + within) * _RELATIVE_WIDTH
            values = np.sinh(places)
            # so that a parcel that is always the same has a range of zero
            values = np.clip(values, self._least[parcel], self._most[parcel])
            found[parcel] = values[0] + (rank - ranks[0]) * (values[1] - values[0])
        return found


class CohortFit:
    """Both kinds of statistics of a cohort, from its runs, one after the other.

    >>> rng, fit = np.random.default_rng(0), CohortFit('A424')
    >>> for participant in ('01', '02', '03'):
    ...     fit.add(participant, 9000 + rng.normal(0, 90, (400, 2)), brain_mean=9000.0)
    >>> stats = fit.series()  # 1 % of 10000; IQR of a normal distribution
    >>> (stats.iqr / (100 * 1.349)).round(1)
    array([1., 1.])
    """

    def __init__(self, atlas: str) -> None:
        self.atlas = atlas
        self._samples = self._people = Sketch(0)  # until the number of parcels is known
        self._squares: np.ndarray | float = 0.0
        self._participant: str | None = None
        self._means: list[np.ndarray] = []

    def add(self, participant: str, data: np.ndarray, brain_mean: float) -> None:
        """Take in a run (T, P) in BOLD units; those of a participant must follow one another.

        NaN for parcels to be left out; a `brain_mean` that is no BOLD level is refused.
        """
        series = np.array(data, float)
        series *= GRAND_MEAN / brain_level(brain_mean, series.std(axis=0))
        mean = series.mean(axis=0)
        values = series - mean
        if self._participant is None:
            self._samples, self._people = Sketch(len(mean)), Sketch(len(mean))
        self._samples.add(values)
        self._squares = self._squares + np.nan_to_num(values**2).sum(axis=0)
        if participant != self._participant:
            self._close_participant()
            self._participant = participant
        self._means.append(mean)

    def _close_participant(self) -> None:
        if self._means:
            means = np.array(self._means)
            known = np.isfinite(means)
            with np.errstate(invalid='ignore'):  # parcels that no run has
                mean = np.where(known, means, 0).sum(axis=0) / known.sum(axis=0)
            self._people.add(mean[None])
        self._means = []

    def series(self) -> ScaleStats:
        """Statistics of ``'cohort'``, which BrainLM was trained with, over all samples.

        Of series whose grand mean is 10 000 and whose parcel means are taken out, with bounds at
        -3.6 and 3.7 SD, as for ``'run-robust'``; samples are those recorded, not resampled.
        """
        count = self._samples.count
        median, iqr = _median_iqr(self._samples)
        with np.errstate(invalid='ignore', divide='ignore'):  # parcels that never vary
            lower, upper = (bound * np.sqrt(self._squares / count) / iqr for bound in CLIP_SD)
        counts = {'NumberOfSamples': count.tolist()}
        return ScaleStats(median, iqr, self.atlas, lower, upper, STATISTICS['cohort'], counts)

    def temporal_means(self) -> ScaleStats:
        """Statistics of ``'cohort-means'``, which Brain-JEPA was pretrained with.

        Over participants, of the mean over their runs and over time, with the grand mean of each
        run at 10 000; no more runs can follow.
        """
        self._close_participant()
        median, iqr = _median_iqr(self._people)
        counts = {'NumberOfParticipantsWithParcel': self._people.count.tolist()}
        kind = STATISTICS['cohort-means']
        return ScaleStats(median, iqr, self.atlas, statistic=kind, provenance=counts)


def _median_iqr(sketch: Sketch) -> tuple[np.ndarray, np.ndarray]:
    first, median, third = (sketch.quantile(part) for part in (0.25, 0.5, 0.75))
    return median, third - first
