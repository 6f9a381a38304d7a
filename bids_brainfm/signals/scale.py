"""Parcel series in the units a model was trained on."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError

METHODS = ('none', 'run-robust', 'global-z', 'parcel-z', 'cohort', 'cohort-means')
# What the statistics that a method needs are fitted on.
STATISTICS = {'cohort': 'series', 'cohort-means': 'temporal mean'}

# BrainLM's recipe: the grand mean of a recording at 10 000 (UK Biobank's convention), parcels in
# units of their interquartile range, clipped at about these multiples of their SD.
GRAND_MEAN = 10_000
_CLIP_SD = (-3.6, 3.7)
_SD_PER_IQR = 0.79
# Spread below this share of the values is rounding of single precision, not signal.
_NO_SPREAD = 1e-6
# Half of a cohort lies within one range of its median; a run this far off is in other units.
_FAR_IQR = 20


@dataclass(frozen=True)
class ScaleStats:
    """Statistics of each parcel over a cohort, for :func:`scale`.

    Attributes
    ----------
    median, iqr : (P,) float64
        ``'series'``: over all samples, with the grand mean at 10 000 and the run's parcel mean
        taken out. ``'temporal mean'``: over participants, of the mean over time in BOLD units.
    atlas : str
        Name of the atlas.
    lower, upper : (P,) float64 or None
        Bounds of the scaled values, in units of the interquartile range (``'series'`` only).
    statistic : {'series', 'temporal mean'}
        What was described: series for ``'cohort'``, temporal means for ``'cohort-means'``.
    provenance : dict
        Everything else the file says about how it was made.
    """

    median: np.ndarray
    iqr: np.ndarray
    atlas: str
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    statistic: str = 'series'
    provenance: dict = field(default_factory=dict)

    @property
    def columns(self) -> list[np.ndarray]:
        """The (P,) arrays that there are."""
        every = (self.median, self.iqr, self.lower, self.upper)
        return [column for column in every if column is not None]


def load_scale_stats(path, atlas, n_parcels) -> ScaleStats:
    """Read cohort statistics from a JSON file.

    Parameters
    ----------
    path : path-like
        An object with the keys ``Atlas`` (name), ``Median`` and ``IQR`` (lists, one value a
        parcel), and either ``Lower`` and ``Upper`` (such lists) or ``Statistic`` with the value
        ``temporal mean``; further keys are provenance.
    atlas : str
        Atlas of the series to be scaled.
    n_parcels : int
        Number of its parcels.

    Returns
    -------
    ScaleStats

    Raises
    ------
    BrainfmError
        The file cannot be read, lacks a key, is of another atlas, or its bounds cross.
    """
    stats = _read(path)
    if stats.atlas != atlas:
        raise BrainfmError(
            f'The scale statistics {path} were fitted on the atlas {stats.atlas}, but the model '
            f'uses {atlas}; give statistics of that atlas (one file for each).'
        )
    for column in stats.columns:
        if column.shape != (n_parcels,):
            raise BrainfmError(
                f'The scale statistics {path} hold {column.size} values in a list, but the atlas '
                f'{atlas} has {n_parcels} parcels; fit them again.'
            )
    if stats.statistic == 'series' and (stats.lower >= stats.upper).any():
        crossed = np.flatnonzero(stats.lower >= stats.upper)
        raise BrainfmError(
            f'The scale statistics {path} hold bounds that cross: Lower is not below Upper for '
            f'{crossed.size} parcels (the first is number {crossed[0] + 1}); fit them again.'
        )
    return stats


def atlas_of(path) -> str:
    """Atlas that the cohort statistics of a file were fitted on.

    Raises
    ------
    BrainfmError
        The file cannot be read or lacks a key.
    """
    return _read(path).atlas


def _read(path):
    """Cohort statistics of a file, not yet held against an atlas."""
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        name, statistic = content.pop('Atlas'), content.pop('Statistic', 'series')
        keys = ['Median', 'IQR'] + ['Lower', 'Upper'] * (statistic == 'series')
        columns = {key.lower(): np.array(content.pop(key), dtype=float) for key in keys}
        if not (isinstance(name, str) and isinstance(statistic, str)):
            raise TypeError('Atlas and Statistic must be text')
    except KeyError as error:
        bounds = error.args[0] in ('Lower', 'Upper')
        raise BrainfmError(
            f'The scale statistics {path} have no key {error}'
            + (', or else no "Statistic": "temporal mean", which has no bounds.' * bounds or '.')
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BrainfmError(f'The scale statistics {path} cannot be read ({error}).') from error
    if statistic not in STATISTICS.values():
        raise BrainfmError(
            f'The scale statistics {path} are of {statistic!r}, but Statistic is one of '
            f'{", ".join(STATISTICS.values())}; fit them again.'
        )
    return ScaleStats(**columns, atlas=name, statistic=statistic, provenance=content)


def unusable(stats) -> np.ndarray:
    """Parcels whose statistics cannot be used, so that :func:`scale` sets them to zero.

    Parameters
    ----------
    stats : ScaleStats

    Returns
    -------
    (U,) int
        Parcels with an interquartile range that is not above zero, or without a number.
    """
    return np.flatnonzero(~(np.isfinite(stats.columns).all(axis=0) & (stats.iqr > 0)))


def check_stats(stats, method) -> None:
    """See that a method has the statistics that it needs.

    Parameters
    ----------
    stats : ScaleStats or None
    method : str
        Of :func:`scale`.

    Raises
    ------
    BrainfmError
        There are none, they are of another kind, or most parcels of them cannot be used.
    """
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


def scale(data, method, brain_mean, divide_by=1.0, stats=None) -> np.ndarray:
    """Scale parcel series.

    Parameters
    ----------
    data : (T, P) array
        Parcel series in BOLD units; NaN columns stay NaN.
    method : str
        - ``'none'``: the values as they are, not divided either.
        - ``'run-robust'``: grand mean to 10 000, parcel mean taken out, divided by the parcel's
          own interquartile range (by SD / 0.79 where that is unusable), clipped at -3.6 and
          3.7 SD.
        - ``'global-z'``: one mean and one SD for all parcels of the run.
        - ``'parcel-z'``: each parcel by its own mean and SD.
        - ``'cohort'``: grand mean to 10 000, parcel mean taken out, then median, interquartile
          range and bounds of a cohort.
        - ``'cohort-means'``: median taken out and divided by the interquartile range, both over
          the temporal means of a cohort; the parcel's own level stays.
    brain_mean : float
        Mean over the brain and all volumes, in BOLD units.
    divide_by : float
        Constant of the model's card, applied last by all methods but ``'none'``.
    stats : ScaleStats, optional
        For ``'cohort'`` and ``'cohort-means'``, of the kind that :data:`STATISTICS` names.

    Returns
    -------
    (T, P) float32
        A parcel that does not vary is zero throughout (global-z, cohort-means: constant). One
        with :func:`unusable` statistics is zero.

    Raises
    ------
    BrainfmError
        Unknown method, no fitting statistics, a run that is constant, a brain mean that is no
        BOLD level (``'cohort'``), or parcels without their level (``'cohort-means'``).

    Notes
    -----
    SDs are unbiased. BrainLM's full-corpus statistics were never released; ``'run-robust'`` brings
    a single run near the range of its training data (column
    ``Voxelwise_RobustScaler_Normalized_Recording``) and ``'cohort'`` is its formula with
    statistics fitted on one's own cohort. ``'cohort-means'`` is what Brain-JEPA was pretrained
    with, ``'global-z'`` what its authors use downstream.
    """
    data = np.asarray(data)
    if method == 'none':
        return data.astype(np.float32)
    if method not in METHODS:
        raise BrainfmError(f'There is no scaling {method!r}; choose one of {", ".join(METHODS)}.')
    series = data.astype(float)
    demeaned = series - series.mean(axis=0)
    sd = demeaned.std(axis=0, ddof=1) if len(series) > 1 else np.zeros(series.shape[1])
    varies = sd > _NO_SPREAD * np.abs(series).max(axis=0)
    if not varies.any():
        raise BrainfmError(
            'All parcels of this run are constant, so it cannot be scaled; '
            'leave the run out, or check its preprocessing.'
        )
    check_stats(stats, method)
    if method == 'global-z':
        scaled = (series - np.nanmean(series)) / np.nanstd(series, ddof=1)
        return (scaled / divide_by).astype(np.float32)
    scaled = np.where(np.isfinite(demeaned), 0.0, np.nan)
    if method == 'parcel-z':
        scaled[:, varies] = demeaned[:, varies] / sd[varies]
    elif method == 'run-robust':
        scaled[:, varies] = _run_robust(demeaned[:, varies], sd[varies])
    elif method == 'cohort':
        usable = np.setdiff1d(np.flatnonzero(varies), unusable(stats))
        scaled[:, usable] = _cohort(demeaned[:, usable], _level(brain_mean), stats, usable)
    else:
        _check_means(series.mean(axis=0), sd, stats)
        usable = np.setdiff1d(np.arange(sd.size), unusable(stats))
        scaled[:, usable] = (series[:, usable] - stats.median[usable]) / stats.iqr[usable]
        _check_range(np.nanmedian(np.abs(scaled[:, usable].mean(axis=0))))
    return (scaled / divide_by).astype(np.float32)


def static_share(scaled) -> float:
    """Share of a scaled run's variance that is constant in time.

    The variance is about the mean of all values; what is constant are the differences between
    the parcels' own means. Near 1 a model sees mostly how bright each parcel is.

    Parameters
    ----------
    scaled : (T, P) array
        NaN columns are left out.

    Examples
    --------
    >>> static_share(np.array([[1.0, 11.0], [3.0, 13.0]]))  # means 2 and 12, SD 1 about each
    0.9615384615384616
    """
    scaled = np.asarray(scaled, dtype=float)
    return float(np.nanvar(scaled.mean(axis=0)) / np.nanvar(scaled))


def _run_robust(demeaned, sd):
    # The grand mean of 10 000 is a factor of series, range and bounds alike: it cancels.
    low, high = np.percentile(demeaned, [25, 75], axis=0)
    iqr = np.where(high - low > 1e-3 * sd, high - low, sd / _SD_PER_IQR)
    return np.clip(demeaned, *(bound * sd for bound in _CLIP_SD)) / iqr


def _cohort(demeaned, brain_mean, stats, parcels):
    centred = demeaned * (GRAND_MEAN / brain_mean) - stats.median[parcels]
    return np.clip(centred / stats.iqr[parcels], stats.lower[parcels], stats.upper[parcels])


def _level(brain_mean):
    """The brain mean, if it is a BOLD level."""
    if np.isfinite(brain_mean) and brain_mean > 0:
        return brain_mean
    raise BrainfmError(
        f'The mean of the brain is {brain_mean:g}, not a BOLD level, so the run cannot be brought '
        "to the cohort's grand mean; give series that were not demeaned, or choose another "
        "--scale such as 'run-robust'."
    )


def _check_means(means, sd, stats):
    """See that the parcels have their level: BOLD fluctuates by percents around it."""
    mean, spread = np.nanmedian(np.abs(means)), np.nanmedian(sd)
    if mean < spread:
        raise BrainfmError(
            f'The parcels of this run have means about zero ({mean:.3g}, at an SD of '
            f'{spread:.3g}), so they were demeaned, while the medians of the scale statistics are '
            f'about {np.nanmedian(stats.median):.4g}: the model would see one large constant; '
            "give series that were not demeaned, or choose another --scale such as 'global-z'."
        )


def _check_range(typical):
    """See that the run is of the cohort's units: people lie a few ranges from its median."""
    if typical > _FAR_IQR:
        raise BrainfmError(
            f'The parcels of this run lie {typical:.3g} interquartile ranges (median) from the '
            f"cohort's medians, where people of one cohort lie about one: the statistics were "
            "fitted on data in other units; fit them on your own, or choose --scale 'global-z'."
        )
