"""The types that the signals share: parcel series and windows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.bids.files import read_matrix
from bids_brainfm.bids.freshness import sidecar_path
from bids_brainfm.bids.naming import join_name, parse_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import MAX_TR, MIN_TR, is_number


@dataclass(frozen=True)
class ParcelSeries:
    """One run as parcels."""

    # (T, P) float32, mean BOLD signal of each parcel in the units of the BOLD file; a parcel
    # without one usable voxel is NaN throughout
    data: np.ndarray
    tr: float  # repetition time in seconds
    coverage: np.ndarray  # (P,) float32, proportion inside the brain mask (if any) and varying
    flagged: np.ndarray  # (T,) bool, volumes marked as outliers (motion)
    brain_mean: float  # over the brain mask and the volumes in steady state, in BOLD units
    start: float = 0.0  # time of the first row in seconds since the run's start

    def __post_init__(self) -> None:
        check_tr(self.tr)
        arrays = self.data, self.coverage, self.flagged
        shapes = [array.shape if isinstance(array, np.ndarray) else () for array in arrays]
        if len(shapes[0]) != 2 or not shapes[0][0] or shapes[1:] != [shapes[0][1:], shapes[0][:1]]:
            raise BrainfmError(
                'A ParcelSeries takes arrays data (volumes, parcels), coverage (parcels,) and '
                f'flagged (volumes,), not {", ".join(map(str, shapes))}: make them fit.'
            )


@dataclass(frozen=True)
class Windows:
    """One run cut to a model's length."""

    data: np.ndarray  # (W, P, T) float32, scaled, parcels in atlas order
    onset: np.ndarray  # (W,) seconds since the run's start
    duration: np.ndarray  # (W,) seconds of recorded signal, less than its length where completed
    real: np.ndarray  # (W,) proportion of samples that were recorded, not filled in or repeated
    flagged: np.ndarray  # (W,) proportion of the recorded samples from flagged volumes
    excluded: np.ndarray  # (W,) bool, windows that summaries of the run leave out
    tr: float  # seconds between samples (on average, where frames were picked)
    left_over: float = 0.0  # seconds at the end of the run that are in no window


def coverage_path(series: Path) -> Path:
    """Table of the coverage of parcels, next to the table of their series."""
    entities = parse_name(series.name)[0] | {'stat': 'coverage'}
    return series.with_name(join_name(entities, 'bold', '.tsv'))


def check_tr(tr: Any, where: str = '') -> float:
    """Return a repetition time in seconds; refuse what cannot be one, such as milliseconds."""
    if is_number(tr) and MIN_TR <= tr <= MAX_TR:
        return float(tr)
    raise BrainfmError(
        f'tr={tr!r}{where} is not a repetition time in seconds: give tr= as a number from '
        f'{MIN_TR:g} to {MAX_TR}.'
    )


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
