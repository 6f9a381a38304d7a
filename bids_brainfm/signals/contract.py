"""The contract of a model's input: from one run's parcel series to windows in the right shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.resample import nearest_volume, official_frames, resample, volumes_for
from bids_brainfm.signals.scale import Scaling, check_method, fit_scaling, load_scale_stats
from bids_brainfm.signals.series import ParcelSeries, Windows
from bids_brainfm.signals.windows import check_cut, cut, fill_uncovered
from bids_brainfm.validation import is_number

TEMPORAL = ('resample', 'official')


@dataclass(frozen=True)
class Contract:
    """What a model expects, and what was asked for instead."""

    tr: float  # seconds between samples
    window: int  # samples per window
    scaling: str  # method of signals.scale.fit_scaling
    divide_by: float = 1.0  # constant that scaled values are divided by
    stride: int | None = None  # samples between the starts of windows, `window` if None
    short_runs: str = 'refuse'  # or 'pad' or 'tile': what to do with less than one window of data
    min_coverage: float = 0.5  # proportion of a parcel below which its series is replaced
    max_flagged: float = 1.0  # proportion of flagged volumes above which windows are excluded
    stats: Path | None = None  # fitted statistics of cohort and cohort-means scaling
    # 'resample' to `tr`, or 'official': scale at the run's own, pick the official code's frames
    temporal: str = 'resample'
    official_volumes: int | None = None  # that a window of official sampling spans
    min_real: float = 1.0  # proportion of recorded samples that suffices for a window

    def __post_init__(self) -> None:
        check_method(self.scaling, self.stats)
        check_cut(self.stride, self.short_runs)
        limits = {'--min-coverage': self.min_coverage, '--max-flagged': self.max_flagged}
        for flag, value in limits.items():
            if not (is_number(value) and 0 <= value <= 1):
                raise BrainfmError(f'{flag} is a proportion from 0 to 1, not {value}.')
        if self.temporal not in TEMPORAL:
            names = ', '.join(TEMPORAL)
            raise BrainfmError(f'--temporal is one of {names}, not {self.temporal!r}.')
        if self.temporal == 'official' and self.official_volumes is None:
            raise BrainfmError(
                '--temporal official: the card of this model gives no official_volumes, so it has '
                'no official way to pick frames; use --temporal resample.'
            )


@dataclass(frozen=True)
class ModelInput:
    """One run as a model takes it, not yet cut into windows."""

    data: np.ndarray  # (S, P) float32, scaled samples without gaps
    tr: float  # seconds between samples
    flagged: np.ndarray  # (S,) bool, samples that come from flagged volumes
    scaling: Scaling  # how BOLD units became the model's
    donors: np.ndarray  # (P,) int, parcel that each was filled from, -1 for its own series
    series: ParcelSeries  # what it was made from

    @property
    def own(self) -> np.ndarray:
        """Whether each parcel has a series of its own, (P,) bool."""
        return self.donors < 0

    def in_bold_units(self, values: np.ndarray) -> np.ndarray:
        """Convert values (S, P) in place of ``data`` to the volumes and units of the run, (T, P).

        NaN where the nearest sample is NaN, after the last one, and for filled parcels.
        """
        n_volumes, run_tr = len(self.series.data), self.series.tr
        # gaps are bridged by the run itself, so that the filter does not spread them
        whole = np.where(np.isfinite(values), values, self.data)
        back = resample(self.scaling.undo(whole), self.tr, run_tr)
        rows = nearest_volume(len(values), self.tr, run_tr)[:n_volumes]
        found = np.full((n_volumes, values.shape[1]), np.nan, np.float32)
        found[: len(rows)] = np.where(np.isfinite(values[rows]), back[: len(rows)], np.nan)
        found[:, ~self.own] = np.nan
        return found


def prepare_input(
    series: ParcelSeries, contract: Contract, xyz: np.ndarray, atlas: str,
    structures: Sequence[str] | None = None,
) -> ModelInput:  # fmt: skip
    """Fill, resample and scale one run.

    A parcel without signal takes the series of the nearest parcel that has it, by the centroids
    `xyz` (P, 3) in mm and, where given, within the same of the P `structures`. The scale is that
    of the unflagged samples. Fitted statistics must be of the atlas. Runs of too little coverage,
    or that cannot be scaled, are refused.
    """
    data, donors = fill_uncovered(
        series.data, series.coverage, xyz, contract.min_coverage, structures, atlas
    )
    stats = load_scale_stats(contract.stats, atlas, data.shape[1]) if contract.stats else None
    tr, flagged = series.tr, series.flagged
    if contract.temporal == 'resample':  # the official order is to scale the run, then to pick
        tr = contract.tr
        flagged = series.flagged[nearest_volume(len(data), series.tr, tr)]
        data = resample(data, series.tr, tr)
    # interpolated volumes vary less: with them, runs with much motion would be scaled up
    known = data if flagged.all() else data[~flagged]
    scaling = fit_scaling(known, contract.scaling, series.brain_mean, contract.divide_by, stats)
    return ModelInput(scaling.apply(data), tr, flagged, scaling, donors, series)


def windows_of(run: ModelInput, contract: Contract) -> Windows:
    """Cut one run into the windows that are embedded; one that is too short is refused.

    Windows with more flagged volumes than the contract allows are excluded, and all windows of a
    run with more.
    """
    span = contract.official_volumes if contract.temporal == 'official' else None
    windows = cut(
        run.data, run.flagged, run.tr, contract.window, contract.stride, contract.short_runs,
        run.series.start, contract.min_real, span,
    )  # fmt: skip
    if not len(windows.data):
        raise BrainfmError(_too_short(len(run.series.data), run.series.tr, contract))
    flagged = np.maximum(windows.flagged, run.series.flagged.mean())
    return replace(windows, excluded=flagged > contract.max_flagged)


def _too_short(n_volumes: int, tr: float, contract: Contract) -> str:
    """What a run lacks to give one window."""
    samples = contract.window, math.ceil(contract.min_real * contract.window - 1e-9)
    if contract.temporal == 'official':
        last = official_frames(contract.window, contract.official_volumes or contract.window)
        needed, enough = (int(last[n - 1]) + 1 for n in samples)
    else:
        needed, enough = (volumes_for(n, tr, contract.tr) for n in samples)
    text = lambda n: f'{n} ({n * tr:.1f} s)'
    least = f', {text(enough)} at the least' if enough < needed else ''
    return (
        f'the run has {n_volumes} volumes ({n_volumes * tr:.1f} s) and one window takes '
        f'{text(needed)}{least}: choose --short-runs pad or tile, or leave the run out.'
    )
