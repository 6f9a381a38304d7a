"""Parcel series in the units a model was trained on."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError

METHODS = ('none', 'run-robust', 'global-z', 'parcel-z', 'cohort')

# BrainLM's recipe: the grand mean of a recording at 10 000 (UK Biobank's convention), parcels in
# units of their interquartile range, clipped at about these multiples of their SD.
GRAND_MEAN = 10_000
_CLIP_SD = (-3.6, 3.7)
_SD_PER_IQR = 0.79
# Spread below this share of the values is rounding of single precision, not signal.
_NO_SPREAD = 1e-6


@dataclass(frozen=True)
class ScaleStats:
    """Statistics of each parcel over a cohort, for :func:`scale` with ``'cohort'``.

    Attributes
    ----------
    median, iqr : (P,) float64
        Of the series with the grand mean at 10 000 and the run's parcel mean taken out.
    lower, upper : (P,) float64
        Bounds of the scaled values, in units of the interquartile range.
    atlas : str
        Name of the atlas.
    provenance : dict
        Everything else the file says about how it was made.
    """

    median: np.ndarray
    iqr: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    atlas: str
    provenance: dict = field(default_factory=dict)


def load_scale_stats(path, atlas, n_parcels) -> ScaleStats:
    """Read cohort statistics from a JSON file.

    Parameters
    ----------
    path : path-like
        An object with the keys ``Atlas`` (name), ``Median``, ``IQR``, ``Lower`` and ``Upper``
        (lists, one value a parcel); further keys are provenance.
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
        The file cannot be read, lacks a key, or is of another atlas.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        name = content.pop('Atlas')
        columns = [
            np.array(content.pop(key), dtype=float) for key in ('Median', 'IQR', 'Lower', 'Upper')
        ]
    except KeyError as error:
        raise BrainfmError(f'The scale statistics {path} have no key {error}.') from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BrainfmError(f'The scale statistics {path} cannot be read ({error}).') from error
    if name != atlas:
        raise BrainfmError(
            f'The scale statistics {path} were fitted on the atlas {name}, but the model uses '
            f'{atlas}; fit them on that atlas.'
        )
    for column in columns:
        if column.shape != (n_parcels,):
            raise BrainfmError(
                f'The scale statistics {path} hold {column.size} values in a list, but the atlas '
                f'{atlas} has {n_parcels} parcels; fit them again.'
            )
    return ScaleStats(*columns, atlas=name, provenance=content)


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
    brain_mean : float
        Mean over the brain and all volumes, in BOLD units.
    divide_by : float
        Constant of the model's card, applied last by all methods but ``'none'``.
    stats : ScaleStats, optional
        For ``'cohort'``.

    Returns
    -------
    (T, P) float32
        A parcel that does not vary is zero throughout (global-z: constant).

    Raises
    ------
    BrainfmError
        Unknown method, no statistics for ``'cohort'``, a run that is constant, or a brain mean
        that is no BOLD level.

    Notes
    -----
    SDs are unbiased. BrainLM's full-corpus statistics were never released; ``'run-robust'`` brings
    a single run near the range of its training data (column
    ``Voxelwise_RobustScaler_Normalized_Recording``) and ``'cohort'`` is its formula with
    statistics fitted on one's own cohort.
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
    if method == 'global-z':
        scaled = (series - np.nanmean(series)) / np.nanstd(series, ddof=1)
        return (scaled / divide_by).astype(np.float32)
    scaled = np.where(np.isfinite(demeaned), 0.0, np.nan)
    if method == 'parcel-z':
        scaled[:, varies] = demeaned[:, varies] / sd[varies]
    elif method == 'run-robust':
        scaled[:, varies] = _run_robust(demeaned[:, varies], sd[varies])
    else:
        usable = varies & _usable(stats)
        scaled[:, usable] = _cohort(demeaned[:, usable], _level(brain_mean), stats, usable)
    return (scaled / divide_by).astype(np.float32)


def _run_robust(demeaned, sd):
    # The grand mean of 10 000 is a factor of series, range and bounds alike: it cancels.
    low, high = np.percentile(demeaned, [25, 75], axis=0)
    iqr = np.where(high - low > 1e-3 * sd, high - low, sd / _SD_PER_IQR)
    return np.clip(demeaned, *(bound * sd for bound in _CLIP_SD)) / iqr


def _cohort(demeaned, brain_mean, stats, parcels):
    centred = demeaned * (GRAND_MEAN / brain_mean) - stats.median[parcels]
    return np.clip(centred / stats.iqr[parcels], stats.lower[parcels], stats.upper[parcels])


def _usable(stats):
    """(P,) bool, parcels whose cohort statistics can be used."""
    if stats is None:
        raise BrainfmError(
            "The scaling 'cohort' needs statistics of a cohort; give them with --scale-stats."
        )
    known = np.isfinite([stats.median, stats.iqr, stats.lower, stats.upper]).all(axis=0)
    return known & (stats.iqr > 0)


def _level(brain_mean):
    """The brain mean, if it is a BOLD level."""
    if np.isfinite(brain_mean) and brain_mean > 0:
        return brain_mean
    raise BrainfmError(
        f'The mean of the brain is {brain_mean:g}, not a BOLD level, so the run cannot be brought '
        "to the cohort's grand mean; give series that were not demeaned, or choose another "
        "--scale such as 'run-robust'."
    )
