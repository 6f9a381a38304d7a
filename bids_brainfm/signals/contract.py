"""The contract of a model's input: from one run's parcel series to windows in the right shape."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.resample import nearest_volume, resample
from bids_brainfm.signals.scale import load_scale_stats, scale
from bids_brainfm.signals.series import ParcelSeries, Windows
from bids_brainfm.signals.windows import cut, fill_uncovered


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
        Fitted statistics of ``cohort`` scaling.
    """

    tr: float
    window: int
    scaling: str
    divide_by: float = 1.0
    stride: int | None = None
    short_runs: str = 'refuse'
    min_coverage: float = 0.5
    stats: Path | None = None


def prepare(
    series: ParcelSeries, contract: Contract, xyz: np.ndarray, atlas: str
) -> tuple[Windows, np.ndarray]:
    """Fill, resample, scale and cut one run.

    Parameters
    ----------
    series : ParcelSeries
    contract : Contract
    xyz : (P, 3) array
        Centroids of the parcels in mm; a parcel without signal takes the series of the nearest
        parcel that has it.
    atlas : str
        Name of the atlas, which fitted statistics must be of.

    Returns
    -------
    windows : Windows
    donors : (P,) int
        For each parcel the parcel that it was filled from, -1 where it has its own series.

    Raises
    ------
    BrainfmError
        The run is too short, has too little coverage, or cannot be scaled.
    """
    volumes = nearest_volume(len(series.data), series.tr, contract.tr)
    if len(volumes) < contract.window and contract.short_runs == 'refuse':
        needed = 1 + math.ceil((contract.window - 1) * contract.tr / series.tr - 1e-6)
        raise BrainfmError(
            f'the run has {len(series.data)} volumes ({len(series.data) * series.tr:.1f} s) and '
            f'one window takes {needed} ({needed * series.tr:.1f} s): choose --short-runs pad or '
            f'tile, or leave the run out.'
        )
    data, donors = fill_uncovered(series.data, series.coverage, xyz, contract.min_coverage)
    stats = load_scale_stats(contract.stats, atlas, data.shape[1]) if contract.stats else None
    scaled = scale(
        resample(data, series.tr, contract.tr),
        contract.scaling,
        series.brain_mean,
        contract.divide_by,
        stats,
    )
    windows = cut(
        scaled,
        series.flagged[volumes],
        contract.tr,
        contract.window,
        stride=contract.stride,
        short=contract.short_runs,
        start=series.start,
    )
    return windows, donors
