"""Figure of the change of other parcels when the target is perturbed."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.figures.brain import LEVELS, missing_words, signed_map
from bids_brainfm.reports.fragments import count, shorten
from bids_brainfm.reports.style import INK


@style.look()
def perturbation(xyz: np.ndarray, change: np.ndarray, target: np.ndarray, p: np.ndarray,
                 sham_rms: np.ndarray, names: list[str], action: str,
             expected: float) -> Figure:  # fmt: skip
    """Change of the other parcels when the target is perturbed.

    Parameters
    ----------
    change : (P,) float, of each parcel's reconstruction in its SD; NaN where it has none
    target : (P,) bool, perturbed parcels; they are not counted among the changes
    p : (P,) float, of each change among those under sham targets
    sham_rms : (P,) float, root mean square of the changes under sham targets, in SD
    action : str, what was done to the target, for the title
    expected : float, number of parcels with p ≤ .05 that are expected by chance
    """
    change, p = np.asarray(change, float), np.asarray(p, float)
    others = np.where(target, np.nan, change)
    known = np.isfinite(others)
    tested = known & np.isfinite(p)  # without enough sham targets there is no p
    # With 19 sham targets a change beyond all of them has a p of exactly 1 / 20
    beyond = tested & (p <= style.ALPHA + 1e-9)
    figure, axes = signed_map(xyz, others, 'change (SD); stars: target; rings: p ≤ .05', width=2.3,
                              ringed=beyond, faded=~beyond, starred=target)  # fmt: skip
    _largest(axes, others, sham_rms, names)

    done = f'{count(target.sum(), "parcel")} {action}'
    if not known.any():
        finding = f'{done}: no other parcel could be reconstructed'
    elif not tested.any():
        finding = f'{done}: too few sham targets to test the change of {known.sum()} others'
    else:
        changed = f'{beyond.sum()} of {tested.sum()} others change more than under sham targets'
        finding = f'{done}: {changed} (p ≤ .05; {expected:.0f} expected by chance)'
    style.headline(figure, finding + missing_words(change[~target]))
    return figure


def _largest(axes: Axes, change: np.ndarray, sham_rms: np.ndarray, names: list[str]) -> None:
    """Bars of the ten largest changes."""
    largest = np.argsort(-np.abs(change), kind='stable')[: min(10, np.isfinite(change).sum())]
    row = np.arange(len(largest))
    if largest.size:
        cmap = style.colour_map('RdBu_r', LEVELS)
        colours = cmap(np.where(change[largest] > 0, 0.72, 0.28))  # the error bars show on it
        axes.barh(row, change[largest], 0.7, linewidth=0, color=colours, ecolor=INK, capsize=2,
                  xerr=np.nan_to_num(sham_rms[largest]), error_kw={'linewidth': 0.9})  # fmt: skip
    else:
        style.say_none(axes)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(row, [shorten(names[each]) for each in largest], fontsize=7.5)
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.set(ylim=(9.6, -0.6), xlabel='change ± sham RMS (SD)', title='Largest changes')
    axes.locator_params(axis='x', nbins=3)
    axes.xaxis.set_major_formatter('{x:.2g}')
