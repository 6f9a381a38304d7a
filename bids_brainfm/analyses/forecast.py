"""Forecast the end of each window from what comes before it, rolling over a run."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bids_brainfm.analyses.scores import Score, score
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.encoder import Encoder
from bids_brainfm.models.masking import keep_visible
from bids_brainfm.models.protocol import Reconstructing
from bids_brainfm.signals.windows import cover

MODES = ('predict_last_pixel', 'predict_last')
Axis = tuple[int, ...] | None
AR_ORDER = 5  # of 1 to 20 the best at forecasting real series (TR 0.75 s), by a hair


@dataclass(frozen=True)
class Forecast:
    """Forecasts of the last H points of W windows, in the model's units, (W, P, H) float32."""

    samples: np.ndarray  # (W, H) int, sample of the run that each forecast point is
    target: np.ndarray
    model: np.ndarray
    persistence: np.ndarray  # the last value before
    mean: np.ndarray  # of what came before
    ar: np.ndarray  # of an autoregressive model fitted on what came before
    level: np.ndarray  # (P,) float32, mean of each parcel over the run

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """Forecasts of model and baselines."""
        return {name: getattr(self, name) for name in ('model', 'persistence', 'mean', 'ar')}

    def scores(self, scored: np.ndarray, axis: Axis = (0, 1)) -> dict[str, Score]:
        """Scores (H,) of model and baselines, the level of each parcel taken out.

        `scored` (S, P) marks the samples and parcels to score. Steps too are pooled with an
        `axis` of None.
        """
        level = self.level[:, None]
        kept = scored[self.samples].transpose(0, 2, 1)
        target = np.where(kept, self.target - level, np.nan)
        return {name: score(v - level, target, axis) for name, v in self.predictions.items()}

    def along(self, values: np.ndarray, n_samples: int) -> np.ndarray:
        """Lay forecasts (W, P, H) along the run: (S, P), NaN where nothing was forecast."""
        series = np.full((n_samples, values.shape[1]), np.nan, np.float32)
        for rows, forecasts in zip(self.samples, values, strict=True):
            series[rows] = forecasts.T
        return series


def forecast(
    encoder: Encoder, data: np.ndarray, points: int, mode: str = 'predict_last_pixel',
    seed: int = 0, batch_size: int = 8, flagged: np.ndarray | None = None,
) -> Forecast:  # fmt: skip
    """Hide the last points of windows that roll over a run, and let the model fill them in.

    Windows follow one another by as many points as are hidden, and the last ends with the run, so
    that forecasts lie end on end. In a run shorter than one window the past is continued
    backwards. What the model and the baselines forecast from is filled by :func:`causal_context`;
    a window without one unflagged sample before the forecast has none (NaN).

    Parameters
    ----------
    encoder : Encoder
    data : (S, P) float32, a run in the model's units and TR, atlas order
    points : int, number of samples to forecast
    mode : {'predict_last_pixel', 'predict_last'}, whether exactly so many points are hidden, or
        the whole tokens that hold any of them, up to a token's length more. Both are BrainLM's
        (specification, section 5); the 13M family hides whole patches only
    seed : int, of the order of tokens, which matters to the 13M family
    batch_size : int, windows at once on a GPU
    flagged : (S,) bool, optional, samples from flagged volumes

    Raises
    ------
    BrainfmError
        The model reconstructs nothing, cannot hide so many points, or would see none, or the run
        has not twice as many samples.
    """
    tokens, blank, horizon = hidden_points(encoder.reconstructing, points, mode, encoder.name)
    if len(data) < 2 * horizon:
        raise BrainfmError(
            f'the run has {len(data)} samples at the repetition time of {encoder.name}, and '
            f'forecasting {horizon} of them takes {2 * horizon}: leave the run out, or lower '
            f'--forecast-points.'
        )
    flagged = np.zeros(len(data), bool) if flagged is None else np.asarray(flagged, bool)
    windows, samples = _rolling(data, encoder.shape[1], horizon)
    unknown = (samples < 0) | flagged[np.maximum(samples, 0)]
    past = causal_context(windows[:, :, :-horizon], unknown[:, :-horizon])
    shown = np.concatenate([np.nan_to_num(past), windows[:, :, -horizon:]], axis=2)
    keep = keep_visible(tokens)[0]
    keep = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))]
    predicted = encoder.reconstruct(shown, keep, blank, batch_size)[:, :, -horizon:]
    flat = np.ones(horizon, np.float32)
    return Forecast(
        samples=samples[:, -horizon:],
        target=windows[:, :, -horizon:],
        model=np.where(np.isnan(past[:, :, -1:]), np.nan, predicted),
        persistence=past[:, :, -1:] * flat,
        mean=past.mean(axis=2, keepdims=True) * flat,
        ar=autoregress(past, horizon),
        level=data[~flagged].mean(axis=0) if not flagged.all() else data.mean(axis=0),
    )


def causal_context(past: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Fill the samples before a forecast that were not measured, from those before them.

    Flagged volumes were interpolated between their neighbours, and so hold what comes after them.
    Each takes the last known value of the parcel. Those before the first one take the mean of the
    known samples, and so do those before the start of the run.

    `past` is (W, P, T) float, `unknown` (W, T) bool. Returned are (W, P, T) float32, NaN in
    windows where nothing is known.

    >>> past = np.array([[[9.0, 1, 9, 3, 9, 9]]])
    >>> causal_context(past, np.array([[True, False, True, False, True, True]]))
    array([[[2., 1., 1., 3., 3., 3.]]], dtype=float32)
    """
    time = np.where(unknown, -1, np.arange(unknown.shape[1]))
    last = np.maximum.accumulate(time, axis=1)[:, None]
    held = np.take_along_axis(past, np.maximum(last, 0), axis=2)
    count = (~unknown).sum(axis=1)[:, None, None]
    total = np.where(unknown[:, None], 0, past).sum(axis=2, keepdims=True)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return np.where(last < 0, mean, held).astype(np.float32)


def hidden_points(
    network: Reconstructing, points: int, mode: str, name: str
) -> tuple[Tensor, Tensor | None, int]:
    """Find what hides the last points of a window, asked for as of :func:`forecast`.

    Returns the tokens to mask (1, N) bool, the time points to set to 0, (T,) bool or None, and
    how many are hidden. Refused are numbers that the model cannot hide, or so many that it would
    see nothing.
    """
    if mode not in MODES:
        raise BrainfmError(f'--forecast-mode is one of {", ".join(MODES)}, not {mode!r}.')
    length = network.capabilities.window[1]
    if not 0 < points < length:
        raise BrainfmError(
            f'{name} takes windows of {length} points, so it can forecast 1 to {length - 1} of '
            f'them, not {points}; change --forecast-points.'
        )
    tokens, blank = network.hide_last(points, mode == 'predict_last_pixel')
    horizon = int((network.points(tokens)[0].any(0) if blank is None else blank).sum())
    if horizon > length - 2:
        raise BrainfmError(
            f'Hiding the last {points} points hides {horizon} of {length}, so that {name} sees '
            f'nothing to forecast from; lower --forecast-points.'
        )
    return tokens, blank, horizon


def _rolling(data: np.ndarray, length: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows (W, P, length), `step` apart, the last flush with the end; their samples.

    Those before the start of the run are below 0, and their values are 0.
    """
    missing = length - len(data)
    if missing > 0:
        before = np.zeros((missing, data.shape[1]), data.dtype)
        windows, samples = cover(np.concatenate([before, data]), length)
        return windows, samples - missing
    samples = np.arange(-missing % step, -missing + 1, step)[:, None] + np.arange(length)
    return np.ascontiguousarray(data[samples].transpose(0, 2, 1)), samples


def autoregress(past: np.ndarray, steps: int, order: int = AR_ORDER) -> np.ndarray:
    """Continue each series (W, P, T) by an autoregressive model fitted to it: (W, P, steps).

    Coefficients solve the Yule-Walker equations of the series' autocovariance, which makes a
    stationary model: its forecasts return to the mean and never run away.
    """
    mean = past.mean(axis=2, keepdims=True)
    centred, length = past.astype(float) - mean, past.shape[2]
    order = min(order, length - 1)
    product = lambda lag: (centred[..., lag:] * centred[..., : length - lag]).sum(-1)
    covariance = np.stack([product(lag) for lag in range(order + 1)], axis=-1)
    lags = np.abs(np.subtract.outer(np.arange(order), np.arange(order)))
    # a constant series has no equations; its coefficients are zero
    ridge = np.where(covariance[..., :1] > 0, 1e-9 * covariance[..., :1], 1.0)
    matrix = covariance[..., lags] + ridge[..., None] * np.eye(order)
    weights = np.linalg.solve(matrix, covariance[..., 1:, None])[..., 0]
    recent = centred[..., ::-1][..., :order]
    predicted = np.empty((*past.shape[:2], steps))
    for step in range(steps):
        predicted[..., step] = (weights * recent).sum(-1)
        recent = np.concatenate([predicted[..., step, None], recent[..., :-1]], axis=-1)
    return (predicted + mean).astype(np.float32)
