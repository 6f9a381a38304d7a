"""Parcel series in the units a model was trained on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.documents import is_intact, read_json
from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import LARGEST, SMALLEST, is_number

METHODS = ('none', 'run-robust', 'global-z', 'parcel-z', 'cohort', 'cohort-means')
# What the statistics that a method needs are fitted on.
STATISTICS = {'cohort': 'series', 'cohort-means': 'temporal mean'}

# UK Biobank brings the grand mean of every recording to this value, and both models were
# pretrained on its data; fMRIPrep does not.
GRAND_MEAN = 10_000
# BrainLM's recipe: parcels in units of their interquartile range, clipped at about these
# multiples of their SD.
CLIP_SD = (-3.6, 3.7)
_SD_PER_IQR = 0.79
# Formats of the files of statistics. In format 1 temporal means were in BOLD units.
FORMAT_VERSIONS = {'series': 1, 'temporal mean': 2}
_NO_SPREAD = 1e-6  # a smaller proportion of the values is rounding of single precision
# Half of a cohort lies within one range of its median; a run this far off is no member of it.
_FAR_IQR = 20
# Proportion of variance that is constant in time, above which there is a warning
_MOSTLY_STATIC = 0.9


@dataclass(frozen=True)
class ScaleStats:
    """Statistics of each parcel over a cohort, for :func:`fit_scaling`."""

    # (P,) float64, with the grand mean of each run at 10 000. 'series': over all samples, the
    # run's parcel mean taken out. 'temporal mean': over participants, of the mean over time.
    median: np.ndarray
    iqr: np.ndarray
    atlas: str
    # (P,) float64, bounds of the scaled values in units of the interquartile range ('series' only)
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    statistic: str = 'series'  # for 'cohort', or 'temporal mean' for 'cohort-means'
    provenance: dict[str, Any] = field(default_factory=dict)  # what else the file says

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The (P,) arrays that there are, by their keys in a file."""
        every = {'Median': self.median, 'IQR': self.iqr, 'Lower': self.lower, 'Upper': self.upper}
        return {key: column for key, column in every.items() if column is not None}


def load_scale_stats(path: Path, atlas: str, n_parcels: int) -> ScaleStats:
    """Read cohort statistics for the parcels of an atlas from a JSON file.

    Its keys are ``Atlas`` (name), ``Median`` and ``IQR`` (lists, one value per parcel), and either
    ``Lower`` and ``Upper`` (such lists) or ``Statistic`` with the value ``temporal mean`` and
    ``FormatVersion`` 2; others are provenance. Unreadable, outdated or incomplete files, and
    those of another atlas, are refused.
    """
    stats = _read(path)
    if stats.atlas != atlas:
        raise BrainfmError(
            f'The scale statistics {path} were fitted on the atlas {stats.atlas}, but the model '
            f'uses {atlas}; give statistics of that atlas (one file for each).'
        )
    for column in stats.columns.values():
        if column.shape != (n_parcels,):
            raise BrainfmError(
                f'The scale statistics {path} hold {column.size} values in a list, but the atlas '
                f'{atlas} has {n_parcels} parcels; fit them again.'
            )
    if stats.lower is not None and stats.upper is not None:
        crossed = np.flatnonzero(stats.lower >= stats.upper)
        if crossed.size:
            raise BrainfmError(
                f'The scale statistics {path} hold bounds that cross: Lower is not below Upper '
                f'for {crossed.size} parcels (the first is number {crossed[0] + 1}); fit them '
                'again.'
            )
    return stats


def stats_content(stats: ScaleStats) -> dict[str, Any]:
    """What a JSON file holds from which :func:`load_scale_stats` reads these statistics."""
    plain = lambda values: [float(f'{v:.9g}') if np.isfinite(v) else None for v in values]
    return {
        'FormatVersion': FORMAT_VERSIONS[stats.statistic],
        'Atlas': stats.atlas,
        'Statistic': stats.statistic,
        **stats.provenance,
        **{key: plain(values) for key, values in stats.columns.items()},
    }


def kind_of(path: Path) -> tuple[str, str]:
    """Atlas and statistic that the cohort statistics of a file are of."""
    stats = _read(path)
    return stats.atlas, stats.statistic


def _read(path: Path) -> ScaleStats:
    """Cohort statistics of a file, not yet compared with an atlas."""
    try:
        content = read_json(path)
        if not is_intact(content):
            raise ValueError('its contents are not those that were written')
        name, statistic = content.pop('Atlas'), content.pop('Statistic', 'series')
        keys = ['Median', 'IQR'] + ['Lower', 'Upper'] * (statistic == 'series')
        columns = [_numbers(content.pop(key), key) for key in keys]
        if not (isinstance(name, str) and isinstance(statistic, str)):
            raise TypeError('Atlas and Statistic must be text')
    except KeyError as error:
        is_bound = error.args[0] in ('Lower', 'Upper')
        raise BrainfmError(
            f'The scale statistics {path} have no key {error}'
            + (', or else no "Statistic": "temporal mean", which has no bounds.' * is_bound or '.')
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BrainfmError(f'The scale statistics {path} cannot be read ({error}).') from error
    if statistic not in STATISTICS.values():
        raise BrainfmError(
            f'The scale statistics {path} are of {statistic!r}, but Statistic is one of '
            f'{", ".join(STATISTICS.values())}; fit them again.'
        )
    version, readable = content.pop('FormatVersion', 1), FORMAT_VERSIONS[statistic]
    if version != readable:
        outdated = version == 1  # of temporal means
        raise BrainfmError(
            f'The scale statistics {path} are of format {version!r}'
            + f', without a grand mean of {GRAND_MEAN}' * outdated
            + f', and this bids_brainfm reads format {readable} of the {statistic}: '
            + 'update bids_brainfm, or ' * (not outdated)
            + 'fit them again with bids_brainfm OUT OUT group --scale-stats.'
        )
    median, iqr, *bounds = columns
    lower, upper = bounds or (None, None)
    return ScaleStats(median, iqr, name, lower, upper, statistic, content)


def _numbers(values: Any, key: str) -> np.ndarray:
    """One value for each parcel, NaN for null; raises ValueError for anything but numbers."""
    if not isinstance(values, list):
        raise ValueError(f'its {key} is no list')
    for value in values:
        if not (value is None or is_number(value)):
            raise ValueError(
                f'its {key} holds {value!r:.40}, which is no number up to {LARGEST:g}'
            )
    return np.array(values, dtype=float)


def unusable(stats: ScaleStats) -> np.ndarray:
    """Parcels (U,) int whose interquartile range is not above zero, or that lack a number."""
    known = np.isfinite(list(stats.columns.values())).all(axis=0)
    return np.flatnonzero(~(known & (stats.iqr >= SMALLEST)))


def check_method(method: str, stats: Path | None = None) -> None:
    """Refuse a method that :func:`fit_scaling` does not know, or statistics it does not use."""
    if method not in METHODS:
        raise BrainfmError(f'There is no scaling {method!r}; choose one of {", ".join(METHODS)}.')
    if stats is not None and method not in STATISTICS:
        raise BrainfmError('--scale-stats is used by --scale cohort only: add --scale cohort.')


def check_stats(stats: ScaleStats | None, method: str) -> None:
    """Refuse statistics that a method of :func:`fit_scaling` needs and cannot use."""
    wanted = STATISTICS.get(method)
    if wanted is None:
        return
    if stats is None:
        raise BrainfmError(
            f'The scaling {method!r} needs statistics of a cohort; give them with --scale-stats.'
        )
    if stats.statistic != wanted:
        raise BrainfmError(
            f'The scaling {method!r} needs statistics of the {wanted} of each parcel, but those '
            f'given are of the {stats.statistic}; give the other file, or fit them again.'
        )
    if unusable(stats).size > stats.iqr.size / 2:
        raise BrainfmError(
            f'The scale statistics have no median, or no interquartile range above zero, for '
            f'{unusable(stats).size} of {stats.iqr.size} parcels; fit them again.'
        )


@dataclass(frozen=True)
class Scaling:
    """How the parcels of one run are converted to a model's units, and back; all (P,) float64."""

    offset: np.ndarray  # subtracted first, in BOLD units
    gain: np.ndarray  # factor; 0 for a parcel that does not vary or has unusable statistics
    lower: np.ndarray  # bounds of the scaled values, infinite where there are none
    upper: np.ndarray

    def apply(self, data: np.ndarray) -> np.ndarray:
        """BOLD units (T, P) to the model's, (T, P) float32; NaN columns stay NaN."""
        scaled = (np.asarray(data, dtype=float) - self.offset) * self.gain
        return np.clip(scaled, self.lower, self.upper).astype(np.float32)

    def undo(self, scaled: np.ndarray) -> np.ndarray:
        """Values in the model's units (T, P) to BOLD units, (T, P) float32.

        What the bounds cut off does not come back. A parcel that was set to zero gets its offset.
        """
        spread = np.divide(1, self.gain, out=np.zeros_like(self.gain), where=self.gain != 0)
        return (self.offset + np.asarray(scaled, dtype=float) * spread).astype(np.float32)


def fit_scaling(
    data: np.ndarray, method: str, brain_mean: float, divide_by: float = 1.0,
    stats: ScaleStats | None = None,
) -> Scaling:  # fmt: skip
    """Find how a run is scaled.

    Parameters
    ----------
    data : (T, P) parcel series in BOLD units; NaN columns stay NaN
    method :
        - ``'none'``: the values as they are, not divided either.
        - ``'run-robust'``: parcel mean taken out, divided by the parcel's own interquartile range
          (by SD / 0.79 where that is unusable), clipped at -3.6 and 3.7 SD.
        - ``'global-z'``: one mean and one SD for all parcels of the run.
        - ``'parcel-z'``: each parcel by its own mean and SD.
        - ``'cohort'``: grand mean to 10 000, parcel mean taken out, then median, interquartile
          range and bounds of a cohort.
        - ``'cohort-means'``: grand mean to 10 000, then median taken out and divided by the
          interquartile range, both over the temporal means of a cohort; the level of a parcel
          relative to the brain stays.
    brain_mean : mean over the brain and time, in BOLD units
    divide_by : constant of the model's card, applied last by all methods but ``'none'``
    stats : for ``'cohort'`` and ``'cohort-means'``, of the kind that :data:`STATISTICS` names

    Returns
    -------
    Scaling : a parcel that does not vary is zero throughout (global-z, cohort-means: constant),
        one with :func:`unusable` statistics is zero

    Raises
    ------
    BrainfmError : unknown method, no fitting statistics, a run that is constant, a brain mean that
        is no BOLD level (``'cohort'``, ``'cohort-means'``), or parcels without their level or far
        from those of the cohort (``'cohort-means'``)

    Notes
    -----
    SDs are unbiased. BrainLM's full-corpus statistics were never released; ``'run-robust'`` brings
    a run near the range of its training data (``Voxelwise_RobustScaler_Normalized_Recording``)
    and ``'cohort'`` is its formula with fitted statistics. Brain-JEPA was pretrained with
    ``'cohort-means'`` on recordings whose grand mean UK Biobank had brought to 10 000; its authors
    use ``'global-z'`` downstream.
    """
    check_method(method)
    series = np.asarray(data, dtype=float)
    n_parcels = series.shape[1]
    free = np.full(n_parcels, np.inf)
    if method == 'none':
        return Scaling(np.zeros(n_parcels), np.ones(n_parcels), -free, free)
    mean = series.mean(axis=0)
    demeaned = series - mean
    sd = demeaned.std(axis=0, ddof=1) if len(series) > 1 else np.zeros(n_parcels)
    varies = sd > _NO_SPREAD * np.abs(series).max(axis=0)
    if not varies.any():
        raise BrainfmError(
            'All parcels of this run are constant, so it cannot be scaled; '
            'leave the run out, or check its preprocessing.'
        )
    check_stats(stats, method)
    offset, spread, low, high = mean, sd, -free, free
    if method == 'global-z':
        offset = np.full(n_parcels, np.nanmean(series))
        spread, varies = np.full(n_parcels, np.nanstd(series, ddof=1)), ~np.isnan(mean)
    elif method == 'run-robust':
        # The grand mean of 10 000 is a factor of series, range and bounds alike: it cancels.
        first, third = np.percentile(demeaned, [25, 75], axis=0)
        spread = np.where(third - first > 1e-3 * sd, third - first, sd / _SD_PER_IQR)
        with np.errstate(invalid='ignore', divide='ignore'):  # parcels that do not vary
            low, high = (bound * sd / spread for bound in CLIP_SD)
    elif stats is not None and method == 'cohort':
        to_run = brain_level(brain_mean, sd) / GRAND_MEAN
        offset, spread = mean + stats.median * to_run, stats.iqr * to_run
        low = low if stats.lower is None else stats.lower
        high = high if stats.upper is None else stats.upper
    elif stats is not None and method == 'cohort-means':
        level, fluctuation = np.nanmedian(np.abs(mean)), np.nanmedian(sd)
        if level < fluctuation:  # BOLD fluctuates by percents around its level
            raise BrainfmError(
                f'The parcels of this run have means about zero ({level:.3g}, at an SD of '
                f'{fluctuation:.3g}), so they were demeaned, while the medians of the scale '
                f'statistics are about {np.nanmedian(stats.median):.4g}: the model would see one '
                'large constant; give series that were not demeaned, or choose another --scale '
                "such as 'global-z'."
            )
        to_run = brain_level(brain_mean, sd) / GRAND_MEAN
        offset, spread, varies = stats.median * to_run, stats.iqr * to_run, ~np.isnan(mean)
    if stats is not None and method in STATISTICS:
        varies = varies & ~np.isin(np.arange(n_parcels), unusable(stats))
    gain = np.divide(1, spread, out=np.zeros(n_parcels), where=varies)
    if method == 'cohort-means':
        typical = np.nanmedian(np.abs(((mean - offset) * gain)[varies]))
        if typical > _FAR_IQR:
            raise BrainfmError(
                f'With the mean of the brain ({brain_mean:.4g}) at {GRAND_MEAN}, the parcels of '
                f"this run lie {typical:.3g} interquartile ranges (median) from the cohort's "
                'medians, where people of one cohort lie about one: the mean of the brain is in '
                'other units than the parcels, or the statistics were fitted on unlike data; fit '
                "them on your own, or choose --scale 'global-z'."
            )
    return Scaling(
        np.where(varies, offset, mean),
        gain / divide_by,
        np.where(varies, low, -np.inf) / divide_by,
        np.where(varies, high, np.inf) / divide_by,
    )


def static_proportion(scaled: np.ndarray) -> float:
    """Proportion of the variance of a scaled run (T, P) that is constant in time.

    Constant are the differences between the parcels' means. Near 1 a model sees mostly how bright
    each parcel is. NaN columns are left out.

    >>> static_proportion(np.array([[1.0, 11.0], [3.0, 13.0]]))  # means 2 and 12, SD 1 about each
    0.9615384615384616
    """
    scaled = np.asarray(scaled, dtype=float)
    return float(np.nanvar(scaled.mean(axis=0)) / np.nanvar(scaled))


def static_warning(proportion: float, method: str) -> str | None:
    """Sentence on a run that is mostly static (:func:`static_proportion`) after ``'global-z'``.

    None for other methods: ``'cohort-means'`` keeps each parcel's level on purpose, and the
    others take it out or leave the values as they are.
    """
    if method != 'global-z' or proportion <= _MOSTLY_STATIC:
        return None
    return (
        f'After --scale global-z, {proportion:.1%} of the variance that the model is given is '
        'constant over time: most of what it sees is how bright each parcel is, which differs '
        'with coil, field strength and acquisition; compare with --scale parcel-z, which removes '
        'the level of each parcel, or with --scale cohort, as Brain-JEPA was pretrained.'
    )


def brain_level(brain_mean: float, sd: np.ndarray) -> float:
    """The brain mean, refused if it is no BOLD level: not above the SD (P,) of the parcels."""
    fluctuation = np.nanmedian(sd)
    if np.isfinite(brain_mean) and brain_mean > fluctuation:
        return brain_mean
    raise BrainfmError(
        f'The mean of the brain is {brain_mean:.3g}, at an SD of the parcels of '
        f'{fluctuation:.3g}: not a BOLD level, so the run cannot be brought '
        "to the cohort's grand mean; give series that were not demeaned, or choose another "
        "--scale such as 'run-robust'."
    )
