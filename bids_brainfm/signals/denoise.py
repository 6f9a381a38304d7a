"""Confound regression at parcel level, and how many degrees of freedom it leaves.

Averaging over a parcel and projecting confounds out are both linear and commute, so hundreds of
parcel series are regressed instead of hundreds of thousands of voxels; the result is the same.
"""

from dataclasses import dataclass

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.confounds import Confounds
from bids_brainfm.signals.strategy import Strategy

FEW_MINUTES = 4  # of unflagged data, below which a warning is given
LEAST_PROPORTION = 0.1  # of the volumes, that must be left by the nuisance regressors


@dataclass(frozen=True)
class Freedom:
    """How much data there is, and how much of it denoising uses up.

    Ranks are those of the regressors on unflagged volumes, and count the mean.
    """

    volumes: int  # without those dropped at the start
    unflagged: int
    regressors: int  # nuisance regressors; neither the mean nor a band-pass
    nuisance_rank: int
    total_rank: int  # with a band-pass
    minutes: float  # of unflagged data

    @property
    def residual(self) -> int:
        """Residual degrees of freedom."""
        return self.unflagged - self.total_rank

    @property
    def least(self) -> float:
        """Degrees of freedom that are few: a tenth of the volumes."""
        return LEAST_PROPORTION * self.volumes

    def refuse(self, strategy: Strategy) -> None:
        """Raise BrainfmError where less is left than a strategy asks for.

        A run of which nothing is regressed out or flagged has lost nothing, and is only held to
        ``min_minutes``.
        """
        left, filtered = self.unflagged - self.nuisance_rank, self.total_rank > self.nuisance_rank
        data = f'{self.unflagged} of {self.volumes} volumes are unflagged'
        flagged = ', raise --fd-threshold' * (self.unflagged < self.volumes)
        if self.minutes < strategy.min_minutes:
            raise BrainfmError(
                f'{data}, which are {self.minutes:.3g} minutes, '
                f'{strategy.min_minutes - self.minutes:.3g} fewer than the '
                f'{strategy.min_minutes:g} of --min-minutes: leave this run out{flagged} or lower '
                '--min-minutes.'
            )
        if not (strategy.regresses or strategy.outliers) and self.total_rank == 1:
            return
        if left < self.least:
            raise BrainfmError(
                f'{data}, and {self.regressors} nuisance regressors and the mean (rank '
                f'{self.nuisance_rank}) leave {left} degrees of freedom, '
                f'{self.least - left:.3g} fewer than a tenth of the volumes: choose a --denoise '
                f'with fewer regressors{flagged} or leave this run out.'
            )
        if self.residual < strategy.min_dof:
            wider = (
                'raise the upper limit of the band-pass, which uses up most of them at a short '
                'repetition time, or leave it open (--bandpass LOW 0), '
            ) * bool(strategy.bandpass and strategy.bandpass[1])
            what = ', the mean and the band-pass' if filtered else ' and the mean'
            raise BrainfmError(
                f'{data}, and {self.regressors} nuisance regressors{what} (rank '
                f'{self.total_rank}) leave {self.residual} degrees of freedom, '
                f'{strategy.min_dof - self.residual} fewer than the {strategy.min_dof} of '
                f'--min-dof: {wider}choose a --denoise with fewer regressors{flagged} or leave '
                'this run out.'
            )

    def warnings(self, strategy: Strategy) -> list[str]:
        """What is low, one sentence each."""
        found = []
        if self.residual < max(self.least, strategy.min_dof):
            found.append(
                f'{self.residual} degrees of freedom are left of {self.volumes} volumes '
                f'({self.unflagged} unflagged, regressors of rank {self.total_rank}), so '
                'correlations between parcels are inflated and vary by chance.'
            )
        if self.minutes < FEW_MINUTES:
            found.append(
                f'There are {self.minutes:.1f} minutes of unflagged data, fewer than '
                f'{FEW_MINUTES}, so correlations between parcels are not reliable.'
            )
        return found


def stop_band(n: int, tr: float, bandpass: tuple[float | None, float | None] | None) -> np.ndarray:
    """Discrete cosines (n, K) outside a band in Hz, without the constant.

    Cosine k has the frequency k / (2 n tr). With a lower limit only, they are those of
    nilearn's and fMRIPrep's high-pass filter.

    >>> stop_band(100, 2.0, (0.01, 0.08)).shape, stop_band(100, 2.0, (0.01, None)).shape
    ((100, 71), (100, 4))
    """
    low, high = bandpass or (None, None)
    order = np.arange(1, n)
    outside = order <= np.floor(2 * n * tr * (low or 0))
    if high is not None:
        outside |= order > 2 * n * tr * high
    phase = np.pi / n * np.outer(np.arange(n) + 0.5, order[outside])
    return np.sqrt(2 / n) * np.cos(phase)


def denoise(
    data: np.ndarray, confounds: Confounds, strategy: Strategy, tr: float
) -> tuple[np.ndarray, Freedom]:
    """Regress confounds out of parcel series and interpolate flagged volumes.

    Volumes at the start are dropped first: series (T, P) become (T - dummy, P) float32. A parcel
    that is NaN stays NaN.

    Raises BrainfmError where too few degrees of freedom or minutes are left.
    """
    start = confounds.dummy
    series = np.asarray(data)[start:].astype(float)
    good = ~confounds.flagged[start:]
    if not good.any():
        raise BrainfmError(f'All {len(series)} volumes are flagged: leave this run out.')
    filters = stop_band(len(series), tr, strategy.bandpass)
    nuisance, noise, signal = (
        array[start:] for array in (confounds.regressors, confounds.noise, confounds.signal)
    )
    removed = np.hstack([nuisance, noise])
    freedom = Freedom(
        volumes=len(series), unflagged=int(good.sum()), regressors=removed.shape[1],
        nuisance_rank=(rank := _rank(removed, good)),
        total_rank=_rank(np.hstack([removed, filters]), good) if filters.shape[1] else rank,
        minutes=float(good.sum() * tr / 60),
    )  # fmt: skip
    freedom.refuse(strategy)
    if signal.shape[1]:
        fitted = _rank(np.hstack([removed, filters, signal]), good)
        if fitted >= freedom.unflagged:
            raise BrainfmError(
                f'{freedom.unflagged} of {len(series)} volumes are unflagged, and all components '
                f'and regressors (rank {fitted}) fit them without a remainder: use an ICA with '
                'fewer components or leave this run out.'
            )
    if freedom.total_rank > 1:
        series = regress(series, np.hstack([nuisance, filters]), good, noise, signal)
    return interpolate(series, good).astype(np.float32), freedom


def regress(
    series: np.ndarray, regressors: np.ndarray, good: np.ndarray,
    noise: np.ndarray, signal: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Remove regressors (T, K) from series (T, P), fitted by least squares on `good` volumes.

    What is fitted is subtracted everywhere, and each parcel keeps its mean over good volumes.
    Components of an ICA are removed in part: `noise` (T, N) with the weights of a fit together
    with the regressors and `signal` (T, S), so that what noise shares with signal stays.
    """
    series = series.copy()
    parcels = np.isfinite(series).all(axis=0)
    values = series[:, parcels]
    regressors, noise = _centre(regressors, good), _centre(noise, good)
    if noise.shape[1]:
        design = np.hstack([noise, regressors, _centre(signal, good)])
        values = values - noise @ _fit(design, values, good)[: noise.shape[1]]
    series[:, parcels] = values - regressors @ _fit(regressors, values, good)
    return series


def interpolate(series: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Interpolate volumes of series (T, P) that are not good linearly; the nearest at the ends."""
    rows, bad = np.flatnonzero(good), np.flatnonzero(~good)
    after = np.clip(np.searchsorted(rows, bad), 1, max(len(rows) - 1, 1))
    left, right = rows[after - 1], rows[np.minimum(after, len(rows) - 1)]
    weight = np.clip((bad - left) / np.maximum(right - left, 1), 0, 1)[:, None]
    filled = series.copy()
    filled[bad] = (1 - weight) * series[left] + weight * series[right]
    return filled


def _centre(columns: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Columns (T, K) around their means over good volumes, and of unit size there.

    Centred, so the parcel means stay; of one size, so the fit is well conditioned: squared
    rotations are 1e-8, squared tissue signals 1e8.
    """
    centred = columns - columns[good].mean(axis=0)
    size = np.abs(centred[good]).max(axis=0, initial=0)
    # A column that is constant up to rounding is no regressor
    constant = size <= 1e-12 * np.abs(columns[good]).max(axis=0, initial=0)
    return np.where(constant, 0, centred / np.where(constant, 1, size))


def _fit(design: np.ndarray, values: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Least-squares weights of centred columns on good volumes; 0 for those that depend on others.

    By a QR decomposition with pivoting, as in nilearn: several times faster than the singular
    values where a band-pass has hundreds of columns.
    """
    from scipy.linalg import qr, solve_triangular

    weights = np.zeros((design.shape[1], values.shape[1]))
    if not design.shape[1]:
        return weights
    target = values[good] - values[good].mean(axis=0)
    q, r, order = qr(design[good], mode='economic', pivoting=True, check_finite=False)
    rank = _count(r, design[good].shape)
    weights[order[:rank]] = solve_triangular(r[:rank, :rank], q[:, :rank].T @ target)
    return weights


def _rank(columns: np.ndarray, good: np.ndarray) -> int:
    """Rank of columns and the mean on good volumes."""
    from scipy.linalg import qr

    if not columns.shape[1]:
        return 1
    centred = _centre(columns, good)[good]
    found = _count(qr(centred, mode='r', pivoting=True, check_finite=False)[0], centred.shape)
    return min(found, len(centred) - 1) + 1  # rounding could add one to centred columns


def _count(r: np.ndarray, shape: tuple[int, ...]) -> int:
    """Rank of a matrix of a `shape` whose pivoted QR decomposition has the triangle `r`."""
    size = np.abs(np.diag(r))
    return int(np.count_nonzero(size > size[0] * max(shape) * np.finfo(float).eps))
