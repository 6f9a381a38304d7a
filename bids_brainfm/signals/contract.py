"""The contract of a model's input: from one run's parcel series to windows in the right shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.resample import nearest_volume, official_frames, resample, volumes_for
from bids_brainfm.signals.scale import Scaling, fit_scaling, load_scale_stats
from bids_brainfm.signals.series import ParcelSeries, Windows
from bids_brainfm.signals.windows import cut, fill_uncovered

TEMPORAL = ('resample', 'official')


@dataclass(frozen=True)
class Contract:
    """What a model expects, and what was asked for instead.

    Attributes
    ----------
    tr : float
        Seconds between samples.
    window : int
        Samples per window.
    scaling : str
        Method of :func:`bids_brainfm.signals.scale.scale`.
    divide_by : float
        Constant that scaled values are divided by.
    stride : int or None
        Samples between the starts of windows, the window's length if None.
    short_runs : {'refuse', 'pad', 'tile'}
        What to do with less than one window of data.
    min_coverage : float
        Share of a parcel below which its series is replaced.
    stats : Path or None
        Fitted statistics of ``cohort`` and ``cohort-means`` scaling.
    temporal : {'resample', 'official'}
        Resample to `tr`, or scale the run at its own repetition time and pick the frames that
        the official code picks, whatever that repetition time is.
    official_volumes : int or None
        Volumes that a window of official sampling spans; None for a model without it.
    min_real : float
        Share of recorded samples that suffices for a window (1: none may be missing).
    """

    tr: float
    window: int
    scaling: str
    divide_by: float = 1.0
    stride: int | None = None
    short_runs: str = 'refuse'
    min_coverage: float = 0.5
    stats: Path | None = None
    temporal: str = 'resample'
    official_volumes: int | None = None
    min_real: float = 1.0

    def __post_init__(self):
        if self.temporal not in TEMPORAL:
            raise BrainfmError(
                f'--temporal is one of {", ".join(TEMPORAL)}, not {self.temporal!r}.'
            )
        if self.temporal == 'official' and self.official_volumes is None:
            raise BrainfmError(
                '--temporal official: the card of this model gives no official_volumes, so it has '
                'no official way to pick frames; use --temporal resample.'
            )


@dataclass(frozen=True)
class ModelInput:
    """One run as a model takes it, not yet cut into windows.

    Attributes
    ----------
    data : (S, P) float32
        Scaled samples, without gaps.
    tr : float
        Seconds between samples.
    flagged : (S,) bool
        Samples that come from flagged volumes.
    scaling : Scaling
        How BOLD units became the model's.
    donors : (P,) int
        For each parcel the parcel that it was filled from, -1 where it has its own series.
    series : ParcelSeries
        What it was made from.
    """

    data: np.ndarray
    tr: float
    flagged: np.ndarray
    scaling: Scaling
    donors: np.ndarray
    series: ParcelSeries

    @property
    def own(self) -> np.ndarray:
        """Whether each parcel has a series of its own, (P,) bool."""
        return self.donors < 0

    def in_bold_units(self, values: np.ndarray) -> np.ndarray:
        """Bring values of the model back to the volumes and units of the run.

        Parameters
        ----------
        values : (S, P) float
            In place of ``data``; NaN where there is none.

        Returns
        -------
        (T, P) float32
            A row a volume of the series. NaN where the nearest sample has no value, at a last
            volume that lies beyond the last sample, and for parcels without a series of their
            own.
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
    series: ParcelSeries,
    contract: Contract,
    xyz: np.ndarray,
    atlas: str,
    structures: Sequence[str] | None = None,
) -> ModelInput:
    """Fill, resample and scale one run.

    Parameters
    ----------
    series : ParcelSeries
    contract : Contract
    xyz : (P, 3) array
        Centroids of the parcels in mm; a parcel without signal takes the series of the nearest
        parcel that has it.
    atlas : str
        Name of the atlas, which fitted statistics must be of.
    structures : sequence of P str, optional
        Structure of each parcel, within which parcels without signal are filled.

    Raises
    ------
    BrainfmError
        The run has too little coverage, or cannot be scaled.
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
    scaling = fit_scaling(data, contract.scaling, series.brain_mean, contract.divide_by, stats)
    return ModelInput(scaling.apply(data), tr, flagged, scaling, donors, series)


def windows_of(run: ModelInput, contract: Contract) -> Windows:
    """Cut one run into the windows that are embedded.

    Raises
    ------
    BrainfmError
        The run is too short.
    """
    windows = cut(
        run.data,
        run.flagged,
        run.tr,
        contract.window,
        stride=contract.stride,
        short=contract.short_runs,
        start=run.series.start,
        min_real=contract.min_real,
        span=contract.official_volumes if contract.temporal == 'official' else None,
    )
    if not len(windows.data):
        raise BrainfmError(_too_short(len(run.series.data), run.series.tr, contract))
    return windows


def prepare(
    series: ParcelSeries,
    contract: Contract,
    xyz: np.ndarray,
    atlas: str,
    structures: Sequence[str] | None = None,
) -> tuple[Windows, np.ndarray]:
    """Fill, resample, scale and cut one run: :func:`prepare_input`, then :func:`windows_of`.

    Returns
    -------
    windows : Windows
    donors : (P,) int
        For each parcel the parcel that it was filled from, -1 where it has its own series.
    """
    run = prepare_input(series, contract, xyz, atlas, structures)
    return windows_of(run, contract), run.donors


def _too_short(n_volumes: int, tr: float, contract: Contract) -> str:
    """What a run lacks to give one window."""
    samples = contract.window, math.ceil(contract.min_real * contract.window - 1e-9)
    if contract.temporal == 'official':
        last = official_frames(contract.window, contract.official_volumes)
        needed, enough = (int(last[n - 1]) + 1 for n in samples)
    else:
        needed, enough = (volumes_for(n, tr, contract.tr) for n in samples)
    text = lambda n: f'{n} ({n * tr:.1f} s)'
    least = f', {text(enough)} at the least' if enough < needed else ''
    return (
        f'the run has {n_volumes} volumes ({n_volumes * tr:.1f} s) and one window takes '
        f'{text(needed)}{least}: choose --short-runs pad or tile, or leave the run out.'
    )
