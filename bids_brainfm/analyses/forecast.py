"""Forecast the end of each window from what comes before it, rolling over a run."""

from dataclasses import dataclass

import numpy as np
import torch

from bids_brainfm.analyses.scores import Score, score
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.encoder import Encoder
from bids_brainfm.models.masking import keep_visible
from bids_brainfm.signals.windows import cover

MODES = ('predict_last_pixel', 'predict_last')
AR_ORDER = 5  # of 1 to 20 the best at forecasting real series (TR 0.75 s), by a hair


@dataclass(frozen=True)
class Forecast:
    """Forecasts of the last H points of W windows, in the model's units.

    Attributes
    ----------
    samples : (W, H) int
        Sample of the run that each forecast point is.
    target : (W, P, H) float32
        What was measured.
    model, persistence, mean, ar : (W, P, H) float32
        What the model says; the last value before; the mean of what came before; and an
        autoregressive model fitted on what came before.
    level : (P,) float32
        Mean of each parcel over the run.
    """

    samples: np.ndarray
    target: np.ndarray
    model: np.ndarray
    persistence: np.ndarray
    mean: np.ndarray
    ar: np.ndarray
    level: np.ndarray

    @property
    def ways(self) -> dict[str, np.ndarray]:
        """Model and baselines by name."""
        names = ('model', 'persistence', 'mean', 'ar')
        return {name: getattr(self, name) for name in names}

    def scores(
        self, scored: np.ndarray, axis: tuple[int, ...] | None = (0, 1)
    ) -> dict[str, Score]:
        """Scores of model and baselines, the level of each parcel taken out.

        Parameters
        ----------
        scored : (S, P) bool
            Samples of the run and parcels to score.
        axis : tuple of int, optional
            Axes (windows, parcels, steps) to pool over: by default all but the steps, so that
            arrays are (H,); None for all.
        """
        level = self.level[:, None]
        there = scored[self.samples].transpose(0, 2, 1)
        target = np.where(there, self.target - level, np.nan)
        return {name: score(v - level, target, axis) for name, v in self.ways.items()}

    def along(self, values: np.ndarray, n_samples: int) -> np.ndarray:
        """Lay forecasts (W, P, H) along the run: (S, P), NaN where nothing was forecast."""
        found = np.full((n_samples, values.shape[1]), np.nan, np.float32)
        for rows, made in zip(self.samples, values, strict=True):
            found[rows] = made.T
        return found


def forecast(
    encoder: Encoder,
    data: np.ndarray,
    points: int,
    mode: str = 'predict_last_pixel',
    seed: int = 0,
    batch_size: int = 8,
) -> Forecast:
    """Hide the last points of windows that roll over a run, and let the model fill them in.

    Windows follow one another by as many points as are hidden, and the last ends with the run, so
    that forecasts lie end on end. In a run shorter than one window the past is continued
    backwards by each parcel's mean before the forecast.

    Parameters
    ----------
    encoder : Encoder
        Of a BrainLM.
    data : (S, P) float32
        Samples of a run in the model's units and at its repetition time, atlas order.
    points : int
        Points to forecast.
    mode : {'predict_last_pixel', 'predict_last'}
        Hide exactly so many points, or the whole tokens that hold any of them (up to a token's
        length more). Both are BrainLM's (specification, section 5); the 13M family hides whole
        patches only.
    seed : int
        Of the order of tokens, which matters in the 13M family.
    batch_size : int
        Windows at once on a GPU.

    Raises
    ------
    BrainfmError
        The model reconstructs nothing, cannot hide so many points, or would see none, or the run
        has not twice as many samples.
    """
    tokens, blank, horizon = hidden_points(encoder.network, points, mode, encoder.name)
    if len(data) < 2 * horizon:
        raise BrainfmError(
            f'the run has {len(data)} samples at the repetition time of {encoder.name}, and '
            f'forecasting {horizon} of them takes {2 * horizon}: leave the run out, or lower '
            f'--forecast-points.'
        )
    windows, samples = _rolling(data, encoder.shape[1], horizon)
    keep = keep_visible(tokens)[0]
    keep = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))]
    made = encoder.reconstruct(windows, keep, blank, batch_size)
    past = windows[:, :, :-horizon]
    flat = np.ones(horizon, np.float32)
    return Forecast(
        samples=samples[:, -horizon:],
        target=windows[:, :, -horizon:],
        model=made[:, :, -horizon:],
        persistence=past[:, :, -1:] * flat,
        mean=past.mean(axis=2, keepdims=True) * flat,
        ar=autoregress(past, horizon),
        level=data.mean(axis=0),
    )


def hidden_points(network, points: int, mode: str, name: str) -> tuple:
    """Find what hides the last points of a window.

    Parameters
    ----------
    network : nn.Module
        A BrainLM.
    points, mode
        As :func:`forecast` takes them.
    name : str
        The model's name, for messages.

    Returns
    -------
    tokens : (1, N) bool Tensor
        Tokens to mask.
    blank : (T,) bool Tensor or None
        Time points to set to 0.
    horizon : int
        Time points that are hidden.

    Raises
    ------
    BrainfmError
        The model cannot hide so many points, or would see none.
    """
    if mode not in MODES:
        raise BrainfmError(f'--forecast-mode is one of {", ".join(MODES)}, not {mode!r}.')
    length = network.window_shape[1]
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
    """Windows (W, P, length), `step` apart, the last flush with the end; their samples."""
    lacking = length - len(data)
    if lacking > 0:
        before = np.broadcast_to(data[:-step].mean(axis=0), (lacking, data.shape[1]))
        windows, samples = cover(np.concatenate([before, data]), length)
        return windows, samples - lacking
    starts = np.arange(-lacking % step, -lacking + 1, step)
    samples = starts[:, None] + np.arange(length)
    return np.ascontiguousarray(data[samples].transpose(0, 2, 1)), samples


def autoregress(past: np.ndarray, steps: int, order: int = AR_ORDER) -> np.ndarray:
    """Continue series by an autoregressive model of their own.

    Coefficients solve the Yule-Walker equations of the series' autocovariance, which makes a
    stationary model: its forecasts return to the mean and never run away.

    Parameters
    ----------
    past : (W, P, T) float
        A model is fitted to each series.
    steps : int
        Points H to forecast.
    order : int
        Points that a forecast is a sum of.

    Returns
    -------
    (W, P, H) float32

    Examples
    --------
    >>> wave = np.cos(2 * np.pi * np.arange(200) / 20)[None, None]
    >>> autoregress(wave, 10)[0, 0, [0, 4, 9]].round(1)
    array([ 1. ,  0.2, -0.9], dtype=float32)
    """
    mean = past.mean(axis=2, keepdims=True)
    centred = past.astype(float) - mean
    order = min(order, past.shape[2] - 1)
    n_times = past.shape[2]
    covariance = np.stack(
        [(centred[..., lag:] * centred[..., : n_times - lag]).sum(-1) for lag in range(order + 1)],
        axis=-1,
    )
    lags = np.abs(np.subtract.outer(np.arange(order), np.arange(order)))
    matrix = covariance[..., lags]
    # a constant series has no equations; its coefficients are zero
    ridge = np.where(covariance[..., :1] > 0, 1e-9 * covariance[..., :1], 1.0)
    matrix = matrix + ridge[..., None] * np.eye(order)
    weights = np.linalg.solve(matrix, covariance[..., 1:, None])[..., 0]
    recent = centred[..., ::-1][..., :order]
    made = np.empty((*past.shape[:2], steps))
    for step in range(steps):
        made[..., step] = (weights * recent).sum(-1)
        recent = np.concatenate([made[..., step, None], recent[..., :-1]], axis=-1)
    return (made + mean).astype(np.float32)
