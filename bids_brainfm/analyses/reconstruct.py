"""Reconstruct a whole run, each point from points that exclude it."""

from dataclasses import dataclass

import numpy as np
import torch

from bids_brainfm.analyses.conditional import from_covariance
from bids_brainfm.analyses.scores import score
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.encoder import Encoder
from bids_brainfm.models.masking import leave_out, masked_tokens
from bids_brainfm.signals.windows import cover

AGGREGATES = ('first', 'mean')
BASELINES = ('mean', 'interpolation', 'covariance')
# The range is that in which independent users found the 13M model's best gain (about 7).
GAINS = tuple(2.0**i for i in range(-3, 5))
GAIN_MARGIN = 0.02  # least rise of R2 at another gain that is worth a warning


@dataclass(frozen=True)
class Reconstruction:
    """A run reconstructed from what the model saw, (S, P) float32 in scaled units."""

    target: np.ndarray  # the samples as the model takes them
    model: np.ndarray  # each sample as the model reconstructed it while it was hidden
    mean: np.ndarray  # baseline: mean of what was seen of the parcel in the window
    interpolation: np.ndarray  # baseline: linear in time between the seen points of the parcel
    covariance: np.ndarray  # baseline: conditional mean given the parcels seen at that instant
    hidden: np.ndarray  # (S, P) bool, points that the first pass hid
    n_passes: int  # passes of the network for each window

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """Reconstructions by model and baselines."""
        return {name: getattr(self, name) for name in ('model', *BASELINES)}


def reconstruct(
    encoder: Encoder, data: np.ndarray, ratio: float, aggregate: str = 'first', seed: int = 0,
    batch_size: int = 8, flagged: np.ndarray | None = None, donors: np.ndarray | None = None,
    correlation: np.ndarray | None = None,
) -> Reconstruction:  # fmt: skip
    """Leave every token out once, a proportion at a time, and let the model fill it in.

    This is no compression: in each pass the model sees the truth of all that the pass does not
    hide (BrainLM notebook 05; specification, section 5.1).

    Parameters
    ----------
    encoder : Encoder
    data : (S, P) float32, a run in the model's units and TR, atlas order
    ratio : float, proportion of tokens hidden in a pass (13M was trained with 0.2, the released
        vision transformers with 0.75)
    aggregate : {'first', 'mean'}, which answer is taken where several passes hide a token; a
        sample in two windows is taken from the first
    seed : int, of the masks, which are the same for every run
    batch_size : int, windows at once on a GPU
    flagged : (S,) bool, optional, samples from flagged volumes; see :func:`visible_input`
    donors : (P,) int, optional, parcel that each was filled from, -1 for its own series
    correlation : (P, P) float, optional, correlation between parcels of other people, for the
        covariance baseline; by default it is estimated in each pass from what is visible

    Raises
    ------
    BrainfmError
        The model reconstructs nothing, or the ratio cannot be had.
    """
    windows, samples = cover(data, encoder.shape[1])
    own = np.ones(data.shape[1], bool) if donors is None else donors < 0
    n_tokens, generator = encoder.reconstructing.tokens, torch.Generator().manual_seed(seed)
    passes = [leave_out(n_tokens, ratio, generator) for _ in windows]
    seen = []
    by_pass: dict[str, list[np.ndarray]] = {name: [] for name in ('model', *BASELINES)}
    for keep in map(torch.stack, zip(*passes, strict=True)):
        seen.append(~encoder.points(masked_tokens(keep, n_tokens)))
        shown, known = visible_input(windows, seen[-1], samples, flagged, donors)
        visible = known & own[:, None]
        by_pass['model'].append(encoder.reconstruct(shown, keep, batch_size=batch_size))
        by_pass['mean'].append(seen_mean(windows, known))
        by_pass['interpolation'].append(interpolate(windows, known))
        in_run = in_all_windows(visible, samples, len(data))
        by_pass['covariance'].append(from_covariance(windows, visible, data, in_run, correlation))
    by_window = {name: combine(values, seen, aggregate) for name, values in by_pass.items()}
    # windows end on end: what two hold is taken from the first, so the last is written first
    run = {name: np.full(data.shape, np.nan, np.float32) for name in by_window}
    hidden = np.zeros(data.shape, dtype=bool)
    for i in reversed(range(len(windows))):
        real = samples[i] >= 0
        for name, values in by_window.items():
            run[name][samples[i, real]] = values[i][:, real].T
        hidden[samples[i, real]] = ~seen[0][i][:, real].T
    return Reconstruction(np.asarray(data, np.float32), **run, hidden=hidden, n_passes=len(seen))


def visible_input(
    windows: np.ndarray, seen: np.ndarray, samples: np.ndarray,
    flagged: np.ndarray | None = None, donors: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Fill the gaps of what a model sees from visible points only, so that no hidden one shows.

    Flagged volumes were interpolated between their neighbours, parcels without signal have the
    series of another, and a short run is completed by its mean: all may hold what is hidden.
    Visible points that were not measured are filled anew, by linear interpolation between the
    visible measured points of the parcel in the window, or their mean after the end of the run.

    Parameters
    ----------
    windows, samples : (W, P, T) float32, (W, T) int, as of
        :func:`bids_brainfm.signals.windows.cover`
    seen : (W, P, T) bool, points of the visible tokens
    flagged : (S,) bool, optional, samples from flagged volumes
    donors : (P,) int, optional, parcel that each was filled from, -1 for its own series

    Returns
    -------
    shown, known : (W, P, T) float32, the input; (W, P, T) bool, points whose value may be used
    """
    recorded = samples >= 0
    measured = recorded if flagged is None else recorded & ~np.asarray(flagged, bool)[samples]
    parcels = np.arange(windows.shape[1])
    source = parcels if donors is None else np.where(donors < 0, parcels, donors)
    known = seen[:, source] & measured[:, None]
    gaps = seen & ~known
    if not gaps.any():
        return windows, known
    filling = np.where(recorded[:, None], interpolate(windows, known), seen_mean(windows, known))
    return np.where(gaps, filling, windows).astype(np.float32), known


def in_all_windows(points: np.ndarray, samples: np.ndarray, length: int) -> np.ndarray:
    """Points of a run, (S, P) bool, that are marked in every window (W, P, T) that holds them."""
    found = np.ones((length, points.shape[1]), bool)
    for rows, marked in zip(samples, points, strict=True):
        real = rows >= 0
        found[rows[real]] &= marked[:, real].T
    return found


def combine(values: list[np.ndarray], seen: list[np.ndarray], aggregate: str) -> np.ndarray:
    """Combine the points that several passes hid: (W, P, T) float32, NaN where none did.

    `values` and `seen` are the answer of each pass and the points that it left, both (W, P, T).
    """
    if aggregate not in AGGREGATES:
        raise BrainfmError(f'--aggregate is one of {", ".join(AGGREGATES)}, not {aggregate!r}.')
    hidden = ~np.stack(seen)
    if aggregate == 'first':
        hidden &= np.cumsum(hidden, axis=0) == 1
    count = hidden.sum(axis=0)
    total = np.where(hidden, np.stack(values), 0).sum(axis=0)
    mean = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return mean.astype(np.float32)


def seen_mean(windows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Mean of the seen points of each parcel, everywhere: (W, P, T).

    A parcel of which nothing is seen takes the mean of all that is seen of its window.
    """
    count = seen.sum(axis=2, keepdims=True)
    total = np.where(seen, windows, 0).sum(axis=2, keepdims=True)
    overall = total.sum(axis=1, keepdims=True) / np.maximum(count.sum(axis=1, keepdims=True), 1)
    level = np.where(count > 0, total / np.maximum(count, 1), overall)
    return np.broadcast_to(level, windows.shape)


def interpolate(windows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Interpolate linearly in time between the seen points of each parcel, (W, P, T).

    Beyond the outermost seen points their values are held; a parcel of which nothing is seen
    takes its :func:`seen_mean`.
    """
    filled = np.array(seen_mean(windows, seen))
    time = np.arange(windows.shape[2])
    for w, p in zip(*np.nonzero(seen.any(axis=2)), strict=True):
        points = seen[w, p]
        filled[w, p] = np.interp(time, time[points], windows[w, p, points])
    return filled


@dataclass(frozen=True)
class GainCheck:
    """R2 of the hidden points, pooled, when the input is multiplied by each gain; both (G,)."""

    gains: np.ndarray
    r2: np.ndarray

    @property
    def best(self) -> float:
        """The gain at which the input is reconstructed best."""
        return float(self.gains[np.nanargmax(self.r2)])

    @property
    def warned(self) -> bool:
        """Whether the input lies outside of the range that the model knows."""
        unchanged = self.r2[np.argmin(np.abs(np.log(self.gains)))]
        return bool(np.nanmax(self.r2) > max(unchanged, 0) + GAIN_MARGIN and self.best != 1)


def gain_check(
    encoder: Encoder, data: np.ndarray, ratio: float, seed: int = 0,
    flagged: np.ndarray | None = None, donors: np.ndarray | None = None,
) -> GainCheck:  # fmt: skip
    """Reconstruct one window of a run at several amplitudes, under one mask.

    It is the window with the most measured samples, the first of equals. The check needs no
    labels: a model reconstructs best what has the amplitude of its training data. Arguments are
    as of :func:`reconstruct`; only measured points are scored.
    """
    windows, samples = cover(data, encoder.shape[1])
    known = samples >= 0 if flagged is None else (samples >= 0) & ~flagged[samples]
    best = int(known.sum(axis=1).argmax())
    windows, samples, measured = windows[best : best + 1], samples[best : best + 1], known[best]
    n_tokens = encoder.reconstructing.tokens
    (keep, *_) = leave_out(n_tokens, ratio, torch.Generator().manual_seed(seed))
    hidden = encoder.points(masked_tokens(keep[None], n_tokens))
    shown, _ = visible_input(windows, ~hidden, samples, flagged, donors)
    scored = hidden[0] & measured
    if donors is not None:
        scored &= (donors < 0)[:, None]
    target = np.where(scored, windows[0], np.nan)
    level = target_level(target.T)[:, None]
    r2 = []
    for gain in GAINS:
        predicted = encoder.reconstruct(gain * shown, keep)[0]
        r2.append(float(score(predicted - gain * level, gain * (target - level)).r2))
    return GainCheck(np.array(GAINS), np.array(r2))


def target_level(target: np.ndarray) -> np.ndarray:
    """Mean over time of what is scored of each parcel, (P,); 0 for a parcel of which nothing is.

    Taken out before parcels are pooled, else any prediction that knows the levels looks good.
    """
    known = np.isfinite(target)
    return np.where(known, target, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
