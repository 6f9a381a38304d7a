"""The types that the signals share: parcel series and windows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.bids.files import read_matrix
from bids_brainfm.bids.freshness import check_contents, read_sidecar, sidecar_path
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
    """Read parcel series back from their table, its sidecar and the coverage next to it.

    Raises BrainfmError where one of them is not as it was written, or holds impossible values.
    """
    import pandas as pd

    check_contents(path, coverage_path(path))
    data, _ = read_matrix(path)
    covered = pd.read_csv(coverage_path(path), sep='\t')['coverage'].to_numpy(np.float32)
    sidecar: dict[str, Any] = read_sidecar(sidecar_path(path)) or {}
    names = ('RepetitionTime', 'BrainMean', 'StartTime', 'FlaggedVolumes')
    values: list[Any] = [sidecar.get(name) for name in names]
    tr, level, start, volumes = values
    valid = {
        # exactly 0 is no mean of measured values, not even of denoised ones
        'BrainMean': is_number(level) and np.isfinite(level) and level != 0,
        'StartTime': is_number(start) and np.isfinite(start),
        'FlaggedVolumes': isinstance(volumes, list)
        and all(is_number(number, int) and 0 <= number < len(data) for number in volumes),
    }
    if wrong := [key for key, is_valid in valid.items() if not is_valid]:
        value = 'no value' if wrong[0] not in sidecar else f'{sidecar[wrong[0]]!r:.60}'
        raise BrainfmError(
            f'{sidecar_path(path)} has {value} for {wrong[0]}, which is impossible: remove it, '
            f'and run the participant level again.'
        )
    flagged = np.zeros(len(data), dtype=bool)
    flagged[volumes] = True
    return ParcelSeries(data, tr, covered, flagged, level, start)
