"""The types that the signals share: parcel series and windows."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import read_matrix
from bids_brainfm.bids.freshness import sidecar_path
from bids_brainfm.bids.naming import join_name, parse_name


@dataclass(frozen=True)
class ParcelSeries:
    """One run as parcels."""

    # (T, P) float32, mean BOLD signal of each parcel in the units of the BOLD file; a parcel
    # without one usable voxel is NaN throughout
    data: np.ndarray
    tr: float  # repetition time in seconds
    coverage: np.ndarray  # (P,) float32, proportion of each parcel that has signal in this run
    flagged: np.ndarray  # (T,) bool, volumes marked as outliers (motion)
    brain_mean: float  # over voxels of the brain mask and all volumes, in BOLD units
    start: float = 0.0  # seconds from the run's first volume to the first row


@dataclass(frozen=True)
class Windows:
    """One run cut to a model's length."""

    data: np.ndarray  # (W, P, T) float32, scaled, parcels in atlas order
    onset: np.ndarray  # (W,) seconds since the run's first volume
    duration: np.ndarray  # (W,) seconds of recorded signal, less than its length where completed
    real: np.ndarray  # (W,) proportion of samples that were recorded, not filled in or repeated
    flagged: np.ndarray  # (W,) proportion of the recorded samples from flagged volumes
    tr: float  # seconds between samples (on average, where frames were picked)
    left_over: float = 0.0  # seconds at the end of the run that are in no window


def coverage_path(series: Path) -> Path:
    """Table of the coverage of parcels, next to the table of their series."""
    entities = parse_name(series.name)[0] | {'stat': 'coverage'}
    return series.with_name(join_name(entities, 'bold', '.tsv'))


def read_series(path: Path) -> ParcelSeries:
    """Read parcel series back from their table, its sidecar and the coverage next to it."""
    import pandas as pd

    data, _ = read_matrix(path)
    coverage = pd.read_csv(coverage_path(path), sep='\t')
    sidecar = json.loads(sidecar_path(path).read_text())
    flagged = np.zeros(len(data), dtype=bool)
    flagged[sidecar['FlaggedVolumes']] = True
    tr, brain_mean, start = (sidecar[k] for k in ('RepetitionTime', 'BrainMean', 'StartTime'))
    covered = coverage['coverage'].to_numpy(np.float32)
    return ParcelSeries(data, tr, covered, flagged, brain_mean, start)
