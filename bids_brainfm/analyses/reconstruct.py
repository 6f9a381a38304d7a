"""Reconstruct a whole run, each point from points that exclude it."""

from dataclasses import dataclass

import numpy as np
import torch

from bids_brainfm.analyses.scores import score
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.encoder import Encoder
from bids_brainfm.models.masking import leave_out, masked_tokens
from bids_brainfm.signals.windows import cover

AGGREGATES = ('first', 'mean')
# Powers of two about 1: they show a shift of a factor, and the range is that in which independent
# users found the 13M model's best gain (about 7).
GAINS = tuple(2.0**i for i in range(-3, 5))
# Least rise of R2 at another gain that is worth a warning
GAIN_MARGIN = 0.02


@dataclass(frozen=True)
class Reconstruction:
    """A run rebuilt by a model, and by two baselines from what the model saw; scaled units.

    Attributes
    ----------
    target : (S, P) float32
        The samples as the model takes them.
    model : (S, P) float32
        What the model made of each sample while it was hidden.
    mean : (S, P) float32
        Mean of what was seen of the parcel in the window.
    interpolation : (S, P) float32
        Linear interpolation in time between the seen points of the parcel, held at the ends.
    hidden : (S, P) bool
        Points that the first pass hid.
    n_passes : int
        Passes of the network for each window.
    """

    target: np.ndarray
    model: np.ndarray
    mean: np.ndarray
    interpolation: np.ndarray
    hidden: np.ndarray
    n_passes: int

    @property
    def ways(self) -> dict[str, np.ndarray]:
        """Model and baselines by name."""
        return {'model': self.model, 'mean': self.mean, 'interpolation': self.interpolation}


def reconstruct(
    encoder: Encoder,
    data: np.ndarray,
    ratio: float,
    aggregate: str = 'first',
    seed: int = 0,
    batch_size: int = 8,
) -> Reconstruction:
    """Leave every token out once, a share at a time, and let the model fill it in.

    This is no compression: in each pass the model sees the truth of all that the pass does not
    hide (BrainLM notebook 05; specification, section 5.1).

    Parameters
    ----------
    encoder : Encoder
        Of a BrainLM.
    data : (S, P) float32
        Samples of a run in the model's units and at its repetition time, atlas order.
    ratio : float
        Share of tokens hidden in a pass. 13M was trained with 0.2, the released vision
        transformers with 0.75.
    aggregate : {'first', 'mean'}
        Where several passes hide a token: the first one's answer, or the mean of all.
    seed : int
        Of the masks; every run has the same.
    batch_size : int
        Windows at once on a GPU.

    Returns
    -------
    Reconstruction
        A sample in two windows is taken from the first.

    Raises
    ------
    BrainfmError
        The model reconstructs nothing, or the ratio cannot be had.
    """
    windows, samples = cover(data, encoder.shape[1])
    generator = torch.Generator().manual_seed(seed)
    passes = [leave_out(encoder.network.tokens, ratio, generator) for _ in windows]
    seen, made = [], []
    for keep in map(torch.stack, zip(*passes, strict=True)):
        made.append(encoder.reconstruct(windows, keep, batch_size=batch_size))
        seen.append(~encoder.points(masked_tokens(keep, encoder.network.tokens)))
    filled = {
        'model': made,
        'mean': [seen_mean(windows, points) for points in seen],
        'interpolation': [interpolate(windows, points) for points in seen],
    }
    whole = {name: combine(values, seen, aggregate) for name, values in filled.items()}
    # windows end on end: what two hold is taken from the first, so the last is written first
    back = {name: np.full(data.shape, np.nan, np.float32) for name in whole}
    hidden = np.zeros(data.shape, dtype=bool)
    for i in reversed(range(len(windows))):
        real = samples[i] >= 0
        for name, values in whole.items():
            back[name][samples[i, real]] = values[i][:, real].T
        hidden[samples[i, real]] = ~seen[0][i][:, real].T
    return Reconstruction(np.asarray(data, np.float32), **back, hidden=hidden, n_passes=len(seen))


def combine(values: list[np.ndarray], seen: list[np.ndarray], aggregate: str) -> np.ndarray:
    """Put the hidden points of several passes together.

    Parameters
    ----------
    values : list of (W, P, T) float
        Answer of each pass.
    seen : list of (W, P, T) bool
        Points that each pass did not hide.
    aggregate : {'first', 'mean'}
        Where several passes hid a point: the first one's answer, or the mean of all.

    Returns
    -------
    (W, P, T) float32
        NaN where no pass hid the point.

    Examples
    --------
    >>> values = [np.full((1, 1, 3), v) for v in (1.0, 2.0)]
    >>> seen = [np.array([[[False, False, True]]]), np.array([[[True, False, True]]])]
    >>> combine(values, seen, 'first')[0, 0], combine(values, seen, 'mean')[0, 0]
    (array([ 1.,  1., nan], dtype=float32), array([1. , 1.5, nan], dtype=float32))
    """
    if aggregate not in AGGREGATES:
        raise BrainfmError(f'--aggregate is one of {", ".join(AGGREGATES)}, not {aggregate!r}.')
    hidden = ~np.stack(seen)
    if aggregate == 'first':
        hidden &= np.cumsum(hidden, axis=0) == 1
    count = hidden.sum(axis=0)
    total = np.where(hidden, np.stack(values), 0).sum(axis=0)
    found = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return found.astype(np.float32)


def seen_mean(windows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Mean of the seen points of each parcel, everywhere: (W, P, T).

    A parcel of which nothing is seen takes the mean of all that is seen of its window.

    >>> seen_mean(np.array([[[1.0, 3.0, 9.0]]]), np.array([[[True, True, False]]]))
    array([[[2., 2., 2.]]])
    """
    count = seen.sum(axis=2, keepdims=True)
    total = np.where(seen, windows, 0).sum(axis=2, keepdims=True)
    overall = total.sum(axis=1, keepdims=True) / np.maximum(count.sum(axis=1, keepdims=True), 1)
    level = np.where(count > 0, total / np.maximum(count, 1), overall)
    return np.broadcast_to(level, windows.shape)


def interpolate(windows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Interpolate linearly in time between the seen points of each parcel, (W, P, T).

    Beyond the outermost seen points their values are held; a parcel of which nothing is seen
    takes the mean of all that is seen of its window.

    >>> interpolate(np.array([[[1.0, 0.0, 3.0, 0.0]]]), np.array([[[True, False, True, False]]]))
    array([[[1., 2., 3., 3.]]])
    """
    found = np.array(seen_mean(windows, seen))
    time = np.arange(windows.shape[2])
    for w, p in zip(*np.nonzero(seen.any(axis=2)), strict=True):
        points = seen[w, p]
        found[w, p] = np.interp(time, time[points], windows[w, p, points])
    return found


@dataclass(frozen=True)
class GainCheck:
    """How well the input is reconstructed when it is made larger or smaller.

    Attributes
    ----------
    gains : (G,) float
        Factors on the model's input.
    r2 : (G,) float
        R2 of the hidden points at each gain, pooled.
    """

    gains: np.ndarray
    r2: np.ndarray

    @property
    def best(self) -> float:
        """The gain at which the input is reconstructed best."""
        return float(self.gains[np.nanargmax(self.r2)])

    @property
    def warned(self) -> bool:
        """Whether the input lies outside of the range that the model knows."""
        plain = self.r2[np.argmin(np.abs(np.log(self.gains)))]
        return bool(np.nanmax(self.r2) > max(plain, 0) + GAIN_MARGIN and self.best != 1)


def gain_check(
    encoder: Encoder,
    window: np.ndarray,
    ratio: float,
    seed: int = 0,
    scored: np.ndarray | None = None,
) -> GainCheck:
    """Reconstruct one window at several amplitudes, under one mask.

    It needs no labels: a model reconstructs best what has the amplitude of its training data.

    Parameters
    ----------
    encoder : Encoder
    window : (P, T) float32
        In the model's units, atlas order.
    ratio : float
        Share of tokens that is hidden.
    seed : int
        Of the mask.
    scored : (P, T) bool, optional
        Points to score, of those that are hidden.
    """
    (keep, *_) = leave_out(encoder.network.tokens, ratio, torch.Generator().manual_seed(seed))
    hidden = encoder.points(masked_tokens(keep[None], encoder.network.tokens))[0]
    hidden = hidden if scored is None else hidden & scored
    target = np.where(hidden, window, np.nan)
    level = target_level(target.T)[:, None]
    r2 = []
    for gain in GAINS:
        made = encoder.reconstruct(gain * window[None], keep)[0]
        r2.append(float(score(made - gain * level, gain * (target - level)).r2))
    return GainCheck(np.array(GAINS), np.array(r2))


def target_level(target: np.ndarray) -> np.ndarray:
    """Mean over time of what is scored of each parcel, (P,); 0 for a parcel of which nothing is.

    Taken out of target and prediction before parcels are pooled. Else parcels of different level
    would make any prediction that knows the levels look good.

    >>> target_level(np.array([[1.0, np.nan], [3.0, np.nan]])).tolist()
    [2.0, 0.0]
    """
    known = np.isfinite(target)
    return np.where(known, target, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
