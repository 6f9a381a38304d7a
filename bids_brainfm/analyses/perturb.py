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

ENOUGH = 19  # sham targets, so that a change beyond all of them has p = 1 / 20
SHAMS = 24  # of which some share tokens with a parcel and say nothing about it


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
        """Share of sham targets that change a parcel at least as much, (P,), itself counted.

        NaN where fewer than `ENOUGH` shams tell of a parcel.
        """
        known = np.isfinite(self.null)
        beyond = known & (np.abs(np.where(known, self.null, 0)) >= np.abs(self.change))
        share = (1 + beyond.sum(axis=0)) / (1 + self.n_shams)
        return np.where(np.isfinite(self.change) & (self.n_shams >= ENOUGH), share, np.nan)

    @property
    def n_shams(self) -> np.ndarray:
        """Sham targets that tell of each parcel, (P,) int."""
        return np.isfinite(self.null).sum(axis=0)

    @property
    def null_sd(self) -> np.ndarray:
        """Spread of the sham changes about zero, (P,)."""
        known = np.isfinite(self.null)
        square = (np.where(known, self.null, 0) ** 2).sum(axis=0)
        mean = np.full(len(square), np.nan)
        return np.sqrt(np.divide(square, self.n_shams, out=mean, where=self.n_shams > 0))


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
    recorded: np.ndarray | None = None,
) -> Perturbation:
    """Clamp parcels of a window and reconstruct the others, with and without.

    The tokens that hold clamped parcels stay visible; all others are hidden in turn, under the
    same masks with and without the clamp.

    Parameters
    ----------
    encoder : Encoder
        Of a BrainLM, in float32: the change is a small difference of large numbers.
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
        Number of sham targets, see :func:`sham_targets`.
    eligible : (P,) bool, optional
        Parcels that a sham target may consist of; all where not given.
    recorded : (T,) bool, optional
        Points over which the change is averaged; all where not given.

    Returns
    -------
    Perturbation

    Raises
    ------
    BrainfmError
        Nothing is to be clamped, or no token is left that holds none of the clamped parcels.
    """
    target = np.asarray(target, dtype=bool)
    if not np.any(sd[target] > 0):
        raise BrainfmError('there is no parcel with a signal of its own to clamp; name another.')
    if not others_left(encoder.network, target, encoder.order):
        raise BrainfmError(
            f'each token of {encoder.name} holds one of the {target.sum()} clamped parcels, so '
            'there is nothing to reconstruct; clamp fewer parcels, or take a model with a token '
            'for each parcel.'
        )
    eligible = np.ones_like(target) if eligible is None else eligible
    recorded = slice(None) if recorded is None else recorded
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for each in [target, *sham_targets(encoder, target, eligible, shams, seed)]:
        change = _change(encoder, window, each, mean + k_sd * sd, ratio, generator)
        with np.errstate(invalid='ignore', divide='ignore'):
            changes.append(np.where(sd > 0, change[:, recorded].mean(axis=1) / sd, np.nan))
    return Perturbation(target, changes[0], np.array(changes[1:]).reshape(-1, len(target)))


def sham_targets(
    encoder: Encoder, target: np.ndarray, eligible: np.ndarray, shams: int, seed: int
) -> list[np.ndarray]:
    """Draw sham targets: the target moved along the parcels, in the order of the model's rows.

    So they are as many parcels, lie as near to each other, and share tokens as the target does.

    Parameters
    ----------
    encoder : Encoder
    target, eligible : (P,) bool
        Parcels to clamp, and those that shams may consist of.
    shams : int
        How many at the most.
    seed : int

    Returns
    -------
    list of (P,) bool
        Fewer than `shams` where there are not so many: of a sham something is left to
        reconstruct, and it is not the target itself.
    """
    order = np.arange(len(target)) if encoder.order is None else encoder.order
    found: list[np.ndarray] = []
    for shift in np.random.default_rng(seed).permutation(np.arange(1, len(target))):
        if len(found) == shams:
            break
        sham = np.zeros_like(target)
        sham[order] = np.roll(target[order], shift)
        sham &= eligible
        left = others_left(encoder.network, sham, encoder.order)
        if sham.any() and not (sham <= target).all() and left:
            found.append(sham)
    return found


def others_left(network, target: np.ndarray, order: np.ndarray | None = None) -> bool:
    """Whether any parcel is in tokens that hold none of the target.

    Parameters
    ----------
    network : nn.Module
        A BrainLM; its weights are not looked at.
    target : (P,) bool
        In atlas order.
    order : (P,) int, optional
        Row i of the network's input is parcel ``order[i]``.
    """
    rows = torch.from_numpy(target if order is None else target[order])
    tokens = network.covering(rows[None, :, None].expand(1, *network.window_shape))
    return bool(network.points(~tokens).any())


def _change(encoder, window, target, level, ratio, generator) -> np.ndarray:
    """Change (P, T) of the other parcels' reconstruction when `target` is held at `level`."""
    n_tokens = encoder.network.tokens
    clamped = window.copy()
    clamped[target] = level[target, None]
    visible = encoder.covering(target)
    change = np.full(window.shape, np.nan)
    for keep in leave_out(n_tokens, ratio, generator, visible):
        made = encoder.reconstruct(np.stack([window, clamped]), keep)
        hidden = encoder.points(masked_tokens(keep[None], n_tokens))[0]
        change = np.where(hidden & np.isnan(change), made[1] - made[0], change)
    return change
