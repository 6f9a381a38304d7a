"""The two words the signals are spoken in: parcel series and windows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import read_matrix
from bids_brainfm.bids.freshness import read_sidecar


@dataclass(frozen=True)
class ParcelSeries:
    """One run as parcels.

    Attributes
    ----------
    data : (T, P) float32
        Mean BOLD signal of each parcel, in the units of the BOLD file. A parcel without one
        usable voxel is NaN throughout.
    tr : float
        Repetition time in seconds.
    coverage : (P,) float32
        Share of each parcel that has signal in this run, 0 to 1.
    flagged : (T,) bool
        Volumes marked as outliers (motion).
    brain_mean : float
        Mean over voxels of the brain mask and all volumes, in BOLD units.
    start : float
        Time of the first row in seconds since the run's first volume (volumes dropped before it).
    """

    data: np.ndarray
    tr: float
    coverage: np.ndarray
    flagged: np.ndarray
    brain_mean: float
    start: float = 0.0


@dataclass(frozen=True)
class Windows:
    """One run cut to a model's length.

    Attributes
    ----------
    data : (W, P, T) float32
        Scaled windows, parcels in atlas order.
    onset : (W,) float
        Seconds since the run's first volume.
    duration : (W,) float
        Seconds of recorded signal in the window (less than its length where completed).
    real : (W,) float
        Share of samples that were recorded, not filled in or repeated.
    flagged : (W,) float
        Share of the recorded samples that come from flagged volumes.
    tr : float
        Seconds between samples (on average, where frames were picked).
    left_over : float
        Seconds at the end of the run that are in no window.
    """

    data: np.ndarray
    onset: np.ndarray
    duration: np.ndarray
    real: np.ndarray
    flagged: np.ndarray
    tr: float
    left_over: float = 0.0


def read_series(path: Path) -> ParcelSeries:
    """Read parcel series back from their derivative.

    Parameters
    ----------
    path : Path
        ``..._stat-mean_timeseries.tsv``; its sidecar and the coverage stand beside it.
    """
    import pandas as pd

    data, _ = read_matrix(path)
    coverage_name = path.name.replace('_stat-mean_timeseries', '_stat-coverage_bold')
    coverage = pd.read_csv(path.with_name(coverage_name), sep='\t')['coverage']
    sidecar = read_sidecar(path.with_suffix('.json'))
    flagged = np.zeros(len(data), dtype=bool)
    flagged[sidecar['FlaggedVolumes']] = True
    return ParcelSeries(
        data=data,
        tr=sidecar['RepetitionTime'],
        coverage=coverage.to_numpy(np.float32),
        flagged=flagged,
        brain_mean=sidecar['BrainMean'],
        start=sidecar['StartTime'],
    )
