"""Figure of what other parcels do when the target is perturbed."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.figures.brain import LEVELS, missing_words, signed_map
from bids_brainfm.reports.fragments import count, shorten
from bids_brainfm.reports.style import INK


@style.look()
def perturbation(xyz: np.ndarray, change: np.ndarray, target: np.ndarray, p: np.ndarray,
                 null_sd: np.ndarray, names: list[str], k_sd: float) -> Figure:  # fmt: skip
    """What the other parcels do when the target is held at another level.

    Parameters
    ----------
    change : (P,) float, of each parcel's reconstruction in its SD; NaN where it has none
    target : (P,) bool, parcels that were held; they are not counted among the changes
    p : (P,) float, proportion of sham targets that change a parcel at least as much
    null_sd : (P,) float, spread of the changes under sham targets, in SD
    k_sd : float, the level of the target, in SD above its mean
    """
    change, p = np.asarray(change, float), np.asarray(p, float)
    others = np.where(target, np.nan, change)
    known = np.isfinite(others)
    tested = known & np.isfinite(p)  # without enough sham targets there is no p
    # With 19 sham targets a change beyond all of them has a p of exactly 1 / 20
    beyond = tested & (p <= style.ALPHA + 1e-9)
    figure, axes = signed_map(xyz, others, 'change (SD); stars: target; rings: p ≤ .05', width=2.3,
                              ringed=beyond, faded=~beyond, starred=target)  # fmt: skip
    _largest(axes, others, null_sd, names)

    held = f'{count(target.sum(), "parcel")} held at {k_sd:+g} SD'
    if not known.any():
        finding = f'{held}: no other parcel could be reconstructed'
    elif not tested.any():
        finding = f'{held}: too few sham targets to tell whether {known.sum()} others change'
    else:
        changed = f'{beyond.sum()} of {tested.sum()} others change beyond the sham null'
        chance = f'p ≤ .05; {style.ALPHA * tested.sum():.0f} expected by chance'
        finding = f'{held}: {changed} ({chance})'
    style.headline(figure, finding + missing_words(change[~target]))
    return figure


def _largest(axes: Axes, change: np.ndarray, null_sd: np.ndarray, names: list[str]) -> None:
    """Bars of the ten largest changes."""
    largest = np.argsort(-np.abs(change), kind='stable')[: min(10, np.isfinite(change).sum())]
    row = np.arange(len(largest))
    if largest.size:
        cmap = style.colour_map('RdBu_r', LEVELS)
        colours = cmap(np.where(change[largest] > 0, 0.72, 0.28))  # the error bars show on it
        axes.barh(row, change[largest], 0.7, linewidth=0, color=colours, ecolor=INK, capsize=2,
                  xerr=np.nan_to_num(null_sd[largest]), error_kw={'linewidth': 0.9})  # fmt: skip
    else:
        style.say_none(axes)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(row, [shorten(names[each]) for each in largest], fontsize=7.5)
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.set(ylim=(9.6, -0.6), xlabel='change ± sham spread (SD)', title='Largest changes')
    axes.locator_params(axis='x', nbins=3)
    axes.xaxis.set_major_formatter('{x:.2g}')
