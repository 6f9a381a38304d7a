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
from bids_brainfm.models.protocol import Reconstructing

ENOUGH = 19  # sham targets, so that a change beyond all of them has p = 1 / 20
SHAMS = 24  # of which some share tokens with a parcel and say nothing about it


@dataclass(frozen=True)
class Perturbation:
    """Change of each parcel's reconstruction when others are clamped.

    It is a mean over the window, in SD of the parcel; NaN for the clamped parcels and those that
    share a token with them.
    """

    target: np.ndarray  # (P,) bool, parcels that were clamped
    change: np.ndarray  # (P,) float
    null: np.ndarray  # (N, P) float, the same for N sham targets

    @property
    def p(self) -> np.ndarray:
        """Proportion (P,) of targets, shams and this, with as large a change; NaN if few shams."""
        exceeding = np.isfinite(self.null) & (np.abs(self.null) >= np.abs(self.change))
        p = (1 + exceeding.sum(axis=0)) / (1 + self.n_shams)
        return np.where(np.isfinite(self.change) & (self.n_shams >= ENOUGH), p, np.nan)

    @property
    def n_shams(self) -> np.ndarray:
        """Number (P,) of sham targets that have a value for each parcel."""
        return np.isfinite(self.null).sum(axis=0)

    @property
    def null_sd(self) -> np.ndarray:
        """Spread of the sham changes about zero, (P,); NaN where there is none."""
        square = (np.where(np.isfinite(self.null), self.null, 0) ** 2).sum(axis=0)
        empty = np.full(len(square), np.nan)
        return np.sqrt(np.divide(square, self.n_shams, out=empty, where=self.n_shams > 0))


def perturb(
    encoder: Encoder, window: np.ndarray, target: np.ndarray, mean: np.ndarray, sd: np.ndarray,
    k_sd: float, ratio: float, seed: int = 0, shams: int = SHAMS,
    eligible: np.ndarray | None = None, recorded: np.ndarray | None = None,
) -> Perturbation:  # fmt: skip
    """Clamp parcels of a window and reconstruct the others, with and without.

    The tokens that hold clamped parcels stay visible; all others are hidden in turn, under the
    same masks with and without the clamp.

    Parameters
    ----------
    encoder : Encoder, in float32: the change is a small difference of large numbers
    window : (P, T) float32, in the model's units, atlas order
    target : (P,) bool, parcels to clamp, at their mean plus `k_sd` SD
    mean, sd : (P,) float, of each parcel over the run, in the model's units
    ratio : float, proportion of tokens hidden in a pass
    seed : int, of masks and sham targets
    shams : int, number of sham targets, see :func:`sham_targets`
    eligible : (P,) bool, optional, parcels that a sham target may consist of
    recorded : (T,) bool, optional, points over which the change is averaged

    Raises BrainfmError where there is nothing to clamp, or no token without a clamped parcel.
    """
    target = np.asarray(target, dtype=bool)
    if not np.any(sd[target] > 0):
        raise BrainfmError('there is no parcel with a signal of its own to clamp; name another.')
    if not others_left(encoder.reconstructing, target, encoder.order):
        raise BrainfmError(
            f'each token of {encoder.name} holds one of the {target.sum()} clamped parcels, so '
            'there is nothing to reconstruct; clamp fewer parcels, or take a model with a token '
            'for each parcel.'
        )
    eligible = np.ones_like(target) if eligible is None else eligible
    points = slice(None) if recorded is None else recorded
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for parcels in [target, *sham_targets(encoder, target, eligible, shams, seed)]:
        change = _change(encoder, window, parcels, mean + k_sd * sd, ratio, generator)
        with np.errstate(invalid='ignore', divide='ignore'):
            changes.append(np.where(sd > 0, change[:, points].mean(axis=1) / sd, np.nan))
    return Perturbation(target, changes[0], np.array(changes[1:]).reshape(-1, len(target)))


def sham_targets(
    encoder: Encoder, target: np.ndarray, eligible: np.ndarray, shams: int, seed: int
) -> list[np.ndarray]:
    """Draw sham targets (P,) bool: the target moved along the order of the model's rows.

    So they are as many parcels, as near to each other, and share tokens as the target does. Each
    consists of `eligible` parcels. There are fewer than `shams` where not so many leave something
    to reconstruct and are not the target itself.
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


def others_left(
    network: Reconstructing, target: np.ndarray, order: np.ndarray | None = None
) -> bool:
    """Whether any parcel is in tokens that hold none of the target, (P,) bool in atlas order.

    Row i of the network's input is parcel ``order[i]``.
    """
    rows = torch.from_numpy(target if order is None else target[order])
    tokens = network.covering(rows[None, :, None].expand(1, *network.capabilities.window))
    return bool(network.points(~tokens).any())


def _change(
    encoder: Encoder, window: np.ndarray, target: np.ndarray, level: np.ndarray, ratio: float,
    generator: torch.Generator,
) -> np.ndarray:  # fmt: skip
    """Change (P, T) of the other parcels' reconstruction when `target` is held at `level`."""
    n_tokens = encoder.reconstructing.tokens
    clamped = window.copy()
    clamped[target] = level[target, None]
    change = np.full(window.shape, np.nan)
    for keep in leave_out(n_tokens, ratio, generator, encoder.covering(target)):
        without, with_clamp = encoder.reconstruct(np.stack([window, clamped]), keep)
        hidden = encoder.points(masked_tokens(keep[None], n_tokens))[0]
        change = np.where(hidden & np.isnan(change), with_clamp - without, change)
    return change
