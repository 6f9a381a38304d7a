"""Perturb parcels of a window and see how the reconstruction of the others changes.

BrainLM's authors mention such an experiment without describing it, so this one is our own: raise
the target for the length of one token (or hold it at one level throughout the window), reconstruct
the other parcels under masks, subtract, and compare with sham targets at matched distance.
"""

from dataclasses import dataclass

import numpy as np
import torch

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.encoder import Encoder
from bids_brainfm.models.masking import leave_out, masked_tokens
from bids_brainfm.models.protocol import Reconstructing

MODES = ('pulse', 'clamp')
PULSES = 4  # at most, spread evenly over the window
LAGS = (0, -1, 1)  # tokens from the pulse to where its response is averaged
SHAMS = 19  # so that a change beyond those of all sham targets has p = 1 / 20
ALPHA = 0.05


@dataclass(frozen=True)
class Perturbation:
    """Change of the reconstruction of each parcel when others are perturbed.

    Changes are in SD of the parcel; NaN for the target, parcels that share a token with it, and
    parcels that are not eligible.
    """

    target: np.ndarray  # (P,) bool, parcels that were perturbed
    # (L, P) float, mean over pulses and the time of the pulse; for pulses also one token before
    # and one after, as `LAGS` has it
    response: np.ndarray
    null: np.ndarray  # (N, P) float, changes under N sham targets at matched distance
    mismatch: float  # median difference between the distances that were matched, in mm
    sham_counts: np.ndarray  # (N,) int, significant parcels of each sham as if it were the target
    times: np.ndarray  # (M, T) bool, when each of M stimuli took place

    @property
    def change(self) -> np.ndarray:
        """Change (P,) during the perturbation."""
        return self.response[0]

    @property
    def p(self) -> np.ndarray:
        """Proportion (P,) of targets, shams and this, with as large a change; NaN if few shams."""
        return _p(self.change, self.null)

    @property
    def null_rms(self) -> np.ndarray:
        """Root mean square (P,) of the changes under sham targets; NaN where there are none."""
        if not len(self.null):
            return np.full(len(self.target), np.nan)
        return np.sqrt((self.null**2).mean(axis=0))

    @property
    def significant(self) -> np.ndarray:
        """Whether p is at most `ALPHA`, (P,) bool; not corrected for the number of parcels."""
        return _significant(self.p)

    @property
    def expected(self) -> float:
        """Number of significant parcels expected by chance."""
        targets = 1 + len(self.null)
        return np.isfinite(self.p).sum() * np.floor(ALPHA * targets + 1e-9) / targets


def perturb(
    encoder: Encoder, window: np.ndarray, target: np.ndarray, mean: np.ndarray, sd: np.ndarray,
    xyz: np.ndarray, k_sd: float, ratio: float, mode: str = 'pulse', seed: int = 0,
    shams: int = SHAMS, eligible: np.ndarray | None = None, recorded: np.ndarray | None = None,
) -> Perturbation:  # fmt: skip
    """Perturb parcels of a window and reconstruct the others, with and without.

    The tokens that hold the perturbation stay visible; all others are hidden in turn, under the
    same masks with and without it.

    Parameters
    ----------
    encoder : Encoder, in float32: the change is a small difference of large numbers
    window : (P, T) float32, in the model's units, atlas order
    target : (P,) bool, parcels to perturb
    mean, sd : (P,) float, of each parcel over the run, in the model's units
    xyz : (P, 3) float, centres of the parcels in mm
    k_sd : float, size of the perturbation in SD of each parcel, negative for a decrease
    ratio : float, proportion of tokens hidden in a pass
    mode : {'pulse', 'clamp'}
        ``'pulse'`` adds `k_sd` SD for the length of one token, at `PULSES` times in separate
        copies of the window, and averages over them; ``'clamp'`` holds the target at its mean
        plus `k_sd` SD throughout the window
    seed : int, of masks and sham targets
    shams : int, number of sham targets, see :func:`sham_targets` and :func:`matched_null`
    eligible : (P,) bool, optional, parcels with a signal of their own; others have no result
    recorded : (T,) bool, optional, points that were recorded

    Raises
    ------
    BrainfmError
        There is nothing to perturb, no token without a perturbed parcel, no recorded token in the
        window, or no such mode.
    """
    target = np.asarray(target, dtype=bool)
    if not np.any(sd[target] > 0):
        raise BrainfmError('there is no parcel with a signal of its own to perturb; name another.')
    if not others_left(encoder.reconstructing, target, encoder.order):
        raise BrainfmError(
            f'each token of {encoder.name} holds one of the {target.sum()} perturbed parcels, so '
            'there is nothing to reconstruct; perturb fewer parcels, or take a model with a token '
            'for each parcel.'
        )
    eligible = np.ones_like(target) if eligible is None else eligible
    recorded = np.ones(window.shape[1], bool) if recorded is None else recorded
    times = stimulus_times(encoder, recorded, mode)
    generator = torch.Generator().manual_seed(seed)
    targets = [target, *sham_targets(encoder, target, eligible, shams, seed)]
    responses = []
    for parcels in targets:
        given = stimuli(window, parcels, times, mean, sd, k_sd, mode)
        visible = encoder.covering(parcels[:, None] & times.any(axis=0))
        changes = _changes(encoder, window, given, visible, ratio, generator)
        lags = LAGS if mode == 'pulse' else LAGS[:1]
        points = encoder.capabilities.token_span[1]
        found = [_mean_at(changes, times, lag * points, recorded) for lag in lags]
        with np.errstate(invalid='ignore', divide='ignore'):
            responses.append(np.where((sd > 0) & eligible, np.array(found) / sd, np.nan))
    distance = np.array([_distance(xyz, parcels) for parcels in targets])
    changes = np.array(responses)[:, 0]
    null, mismatch = matched_null(changes, distance)
    counts = np.zeros(len(null), dtype=int)
    for k in range(1, len(targets)):
        rest = [k, *range(k), *range(k + 1, len(targets))]
        under_shams, _ = matched_null(changes[rest], distance[rest])
        counts[k - 1] = _significant(_p(changes[k], under_shams)).sum()
    return Perturbation(target, responses[0], null, mismatch, counts, times)


def stimulus_times(encoder: Encoder, recorded: np.ndarray, mode: str) -> np.ndarray:
    """Choose when parcels are perturbed, (M, T) bool: a row for each stimulus.

    A clamp lasts throughout the window. Each pulse lasts one token, of those that lie wholly
    within the window and among the `recorded` (T,) bool points.
    """
    if mode not in MODES:
        raise BrainfmError(f'{mode!r} is no mode of perturbation; choose {" or ".join(MODES)}.')
    if mode == 'clamp':
        return np.ones((1, len(recorded)), dtype=bool)
    tokens = torch.from_numpy(encoder.parcel_tokens[0])
    marked = torch.nn.functional.one_hot(tokens, encoder.network.tokens).bool()
    covered = encoder.points(marked)[:, 0]
    whole = (covered & recorded).sum(axis=1) == encoder.capabilities.token_span[1]
    if not whole.any():
        raise BrainfmError(
            f'the recorded part of the first window is shorter than a token of {encoder.name}, so '
            'there is no room for a pulse; leave the run out, or use --perturb-mode clamp.'
        )
    places = np.flatnonzero(whole)
    chosen = np.unique((np.arange(PULSES) + 0.5) / PULSES * len(places) // 1).astype(int)
    return covered[places[chosen]]


def stimuli(
    window: np.ndarray, target: np.ndarray, times: np.ndarray, mean: np.ndarray, sd: np.ndarray,
    k_sd: float, mode: str,
) -> np.ndarray:  # fmt: skip
    """Perturb a window once for each row of `times` (M, T): (M, P, T); see :func:`perturb`."""
    rise = (k_sd * sd)[:, None]
    raised = window + rise if mode == 'pulse' else mean[:, None] + rise
    return np.where(target[:, None] & times[:, None], raised, window).astype(window.dtype)


def departure(run: np.ndarray, given: np.ndarray, target: np.ndarray, times: np.ndarray) -> float:
    """Measure how far perturbed stretches lie outside what the run does.

    The mean of the target over each perturbed stretch is compared with the means over all
    stretches of this length in the run.

    Parameters
    ----------
    run : (S, P) float, the run in the model's units
    given : (M, P, T) float, perturbed windows, see :func:`stimuli`
    target : (P,) bool
    times : (M, T) bool, the perturbed stretches

    Returns
    -------
    float
        Distance from their mean in SD of these means, averaged over parcels and stretches; NaN
        where the run is not longer than a stretch.
    """
    length = int(times[0].sum())
    if len(run) <= length:
        return np.nan
    total = np.cumsum(np.pad(run[:, target].astype(float), ((1, 0), (0, 0))), axis=0)
    means = (total[length:] - total[:-length]) / length
    perturbed = np.array([x[target][:, t].mean(axis=1) for x, t in zip(given, times, strict=True)])
    spread = means.std(axis=0)
    return float((np.abs(perturbed - means.mean(axis=0)) / spread)[:, spread > 0].mean())


def sham_targets(
    encoder: Encoder, target: np.ndarray, eligible: np.ndarray, shams: int, seed: int
) -> list[np.ndarray]:
    """Draw sham targets (P,) bool: the target moved along the order of the model's rows.

    They have as many parcels, spaced alike in that order, and share tokens as the target does.
    Each consists of `eligible` parcels. There are fewer than `shams` where not so many leave
    something to reconstruct and differ from the target.
    """
    order = np.arange(len(target)) if encoder.order is None else encoder.order
    drawn: list[np.ndarray] = []
    for shift in np.random.default_rng(seed).permutation(np.arange(1, len(target))):
        if len(drawn) == shams:
            break
        sham = np.zeros_like(target)
        sham[order] = np.roll(target[order], shift)
        sham &= eligible
        other = sham.any() and not (sham <= target).all()
        if other and others_left(encoder.reconstructing, sham, encoder.order):
            drawn.append(sham)
    return drawn


def matched_null(changes: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, float]:
    """Pair each parcel with one that lies as far from each sham target as it does from the target.

    Near parcels respond more than distant ones whatever is perturbed, so a change is compared with
    changes at about the same distance. Some parcels also respond more than others, so changes are
    taken relative to the root mean square of each parcel over all targets.

    Parameters
    ----------
    changes : (1 + N, P) float, changes under the target (first) and N shams; NaN where unknown
    distance : (1 + N, P) float, of each parcel from each target in mm

    Returns
    -------
    null : (N, P) float, changes under the shams, on the scale of each parcel
    mismatch : float, median absolute difference of the matched distances, NaN without shams
    """
    known = np.isfinite(changes)
    square = np.where(known, changes, 0) ** 2
    scale = np.sqrt(square.sum(axis=0) / np.maximum(known.sum(axis=0), 1))
    relative = np.divide(changes, scale, out=np.zeros_like(changes), where=scale > 0)
    null, mismatch = [], []
    for found, has, away in zip(relative[1:], known[1:], distance[1:], strict=True):
        difference = np.abs(distance[0][:, None] - np.where(has, away, np.inf))
        nearest = difference.argmin(axis=1)
        null.append(found[nearest] * scale)
        mismatch.append(difference[np.arange(len(nearest)), nearest][known[0]])
    n_parcels = changes.shape[1]
    return np.reshape(null, (-1, n_parcels)), float(np.median(mismatch)) if mismatch else np.nan


def others_left(
    network: Reconstructing, target: np.ndarray, order: np.ndarray | None = None
) -> bool:
    """Whether any parcel is in tokens that hold none of the target, (P,) bool in atlas order.

    Row i of the network's input is parcel ``order[i]``.
    """
    rows = torch.from_numpy(target if order is None else target[order])
    tokens = network.covering(rows[None, :, None].expand(1, *network.capabilities.window))
    return bool(network.points(~tokens).any())


def _p(change: np.ndarray, null: np.ndarray) -> np.ndarray:
    """See :attr:`Perturbation.p`."""
    p = (1 + (np.abs(null) >= np.abs(change)).sum(axis=0)) / (1 + len(null))
    return np.where(np.isfinite(change) & (len(null) >= SHAMS), p, np.nan)


def _significant(p: np.ndarray) -> np.ndarray:
    """Whether p is at most `ALPHA`; with 19 shams the smallest p is exactly 1 / 20."""
    return p <= ALPHA + 1e-9


def _distance(xyz: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Distance (P,) of each parcel from the nearest one of the target, in mm."""
    return np.linalg.norm(xyz[:, None] - xyz[target], axis=2).min(axis=1)


def _changes(
    encoder: Encoder, window: np.ndarray, given: np.ndarray, visible: torch.Tensor, ratio: float,
    generator: torch.Generator,
) -> np.ndarray:  # fmt: skip
    """Change (M, P, T) of the reconstruction of hidden tokens from `window` to each of `given`.

    It is NaN for the points of `visible` tokens (N,) bool, which are never hidden.
    """
    n_tokens = encoder.reconstructing.tokens
    changes = np.full(given.shape, np.nan)
    for keep in leave_out(n_tokens, ratio, generator, visible):
        without, *perturbed = encoder.reconstruct(np.stack([window, *given]), keep)
        hidden = encoder.points(masked_tokens(keep[None], n_tokens))[0]
        changes = np.where(hidden & np.isnan(changes), np.array(perturbed) - without, changes)
    return changes


def _mean_at(changes: np.ndarray, times: np.ndarray, lag: int, recorded: np.ndarray) -> np.ndarray:
    """Mean (P,) of changes (M, P, T) `lag` points after each row of `times` (M, T) bool."""
    at = np.arange(times.shape[1]) - lag
    inside = (at >= 0) & (at < times.shape[1]) & recorded
    moved = times[:, at.clip(0, times.shape[1] - 1)] & inside
    values = np.concatenate([x[:, t] for x, t in zip(changes, moved, strict=True)], axis=1)
    return values.mean(axis=1) if values.shape[1] else np.full(len(values), np.nan)
