"""Set parcels to another level and see what the model makes of the others.

BrainLM's authors name such an experiment without a recipe, so this one is ours (specification,
section 9): clamp, reconstruct the others under masks, subtract, compare with sham parcels.
"""

from dataclasses import dataclass

import numpy as np
import torch

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.encoder import Encoder
from bids_brainfm.models.masking import leave_out, masked_tokens

SHAMS = 19  # so that a change beyond all of them has p = 1 / 20


@dataclass(frozen=True)
class Perturbation:
    """What the others do when some parcels are clamped.

    Attributes
    ----------
    target : (P,) bool
        Parcels that were clamped.
    change : (P,) float
        Change of each other parcel's reconstruction, mean over the window, in SD of the parcel;
        NaN for the clamped ones and those that share a token with them.
    null : (N, P) float
        The same for N sham targets.
    """

    target: np.ndarray
    change: np.ndarray
    null: np.ndarray

    @property
    def p(self) -> np.ndarray:
        """Share of sham targets that change a parcel at least as much, (P,), itself counted."""
        known = np.isfinite(self.null)
        beyond = known & (np.abs(np.where(known, self.null, 0)) >= np.abs(self.change))
        share = (1 + beyond.sum(axis=0)) / (1 + known.sum(axis=0))
        return np.where(np.isfinite(self.change), share, np.nan)

    @property
    def null_sd(self) -> np.ndarray:
        """Spread of the sham changes about zero, (P,)."""
        known = np.isfinite(self.null)
        square = (np.where(known, self.null, 0) ** 2).sum(axis=0)
        count = known.sum(axis=0)
        return np.sqrt(np.divide(square, count, out=np.full(len(square), np.nan), where=count > 0))


def perturb(
    encoder: Encoder,
    window: np.ndarray,
    target: np.ndarray,
    mean: np.ndarray,
    sd: np.ndarray,
    k_sd: float,
    ratio: float,
    seed: int = 0,
    shams: int = SHAMS,
    eligible: np.ndarray | None = None,
    progress=None,
) -> Perturbation:
    """Clamp parcels of a window and reconstruct the others, with and without.

    The tokens that hold clamped parcels stay visible; all others are hidden in turn, under the
    same masks with and without the clamp. Sham targets are as many parcels, drawn from the others.

    Parameters
    ----------
    encoder : Encoder
        Of a BrainLM.
    window : (P, T) float32
        In the model's units, atlas order.
    target : (P,) bool
        Parcels to clamp.
    mean, sd : (P,) float
        Of each parcel over the run, in the model's units.
    k_sd : float
        Clamped parcels are held at their mean plus so many SD.
    ratio : float
        Share of tokens hidden in a pass.
    seed : int
        Of masks and sham targets.
    shams : int
        Number of sham targets.
    eligible : (P,) bool, optional
        Parcels that a sham target may consist of; all but the target where not given.
    progress : callable, optional
        Called after each target with the number done.

    Raises
    ------
    BrainfmError
        Nothing is to be clamped, or no token is left that holds none of the clamped parcels.
    """
    target = np.asarray(target, dtype=bool)
    if not target.any() or not np.any(sd[target] > 0):
        raise BrainfmError('there is no parcel with a signal of its own to clamp; name another.')
    others = np.flatnonzero(~target & (True if eligible is None else eligible))
    if shams and len(others) < target.sum():
        raise BrainfmError(
            f'{target.sum()} parcels are to be clamped, and only {len(others)} are left to draw '
            'sham targets from; name fewer.'
        )
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    targets = [target]
    for _ in range(shams):
        sham = np.zeros_like(target)
        sham[random.choice(others, target.sum(), replace=False)] = True
        targets.append(sham)
    changes = []
    for done, each in enumerate(targets, 1):
        change = _change(encoder, window, each, mean + k_sd * sd, ratio, generator)
        with np.errstate(invalid='ignore', divide='ignore'):
            changes.append(np.where(sd > 0, change / sd, np.nan))
        if progress:
            progress(done)
    return Perturbation(target, changes[0], np.array(changes[1:]).reshape(-1, len(target)))


def _change(encoder, window, target, level, ratio, generator) -> np.ndarray:
    """Mean change (P,) of the other parcels' reconstruction when `target` is held at `level`."""
    n_tokens = encoder.network.tokens
    clamped = window.copy()
    clamped[target] = level[target, None]
    visible = encoder.covering(target)
    if not encoder.points(~visible[None]).any():
        raise BrainfmError(
            f'each token of {encoder.name} holds one of the {target.sum()} clamped parcels, so '
            'there is nothing to reconstruct; clamp fewer parcels, or take a model with a token '
            'for each parcel.'
        )
    change = np.full(window.shape, np.nan)
    for keep in leave_out(n_tokens, ratio, generator, visible):
        made = encoder.reconstruct(np.stack([window, clamped]), keep)
        hidden = encoder.points(masked_tokens(keep[None], n_tokens))[0]
        change = np.where(hidden & np.isnan(change), made[1] - made[0], change)
    return change.mean(axis=1)
