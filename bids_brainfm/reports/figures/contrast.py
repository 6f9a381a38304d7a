"""Figure of the difference between two groups or conditions."""

import numpy as np
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.figures.brain import missing_words, signed_map
from bids_brainfm.reports.style import BLUE, INK, MISSING


@style.look()
def contrast(xyz: np.ndarray, difference: np.ndarray, q: np.ndarray, label_a: str, label_b: str,
             n_a: int, n_b: int) -> Figure:  # fmt: skip
    """Difference of two groups or conditions in each parcel.

    Parameters
    ----------
    difference : (P,) float, A minus B; NaN where missing
    q : (P,) float, false discovery rate at which the parcel differs
    n_a, n_b : int, number of observations in each
    """
    difference, q = np.asarray(difference, float), np.asarray(q, float)
    known = np.isfinite(difference)
    differs = known & (q < style.ALPHA)
    label = f'{label_a} minus {label_b} (rings: q < .05)'
    figure, axes = signed_map(xyz, difference, label, ringed=differs)
    if known.any():
        edges = np.histogram_bin_edges(difference[known], bins=30).tolist()
        axes.hist(difference[known], edges, color=MISSING, linewidth=0, label='all parcels')
        axes.hist(difference[differs], edges, color=BLUE, linewidth=0, label='q < .05')
        style.legend_above(axes, 'lower left', 0.2, ncols=2)
    else:
        style.say_none(axes)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel='difference', ylabel='parcels')

    sizes = f'{label_a} (n = {n_a}) and {label_b} (n = {n_b})'
    if not known.any():
        finding = f'{sizes} could be compared in no parcel'
    elif not np.isfinite(q).any():
        finding = f'{sizes}: too few participants for a test'
    elif not differs.any():
        finding = f'{sizes} differ in none of {known.sum()} parcels at q < .05'
    else:
        above = (differs & (difference > 0)).sum()
        counts = f'{above} and below in {differs.sum() - above} of {known.sum()} parcels'
        finding = f'{label_a} (n = {n_a}) above {label_b} (n = {n_b}) in {counts} at q < .05'
    style.headline(figure, finding + missing_words(difference))
    return figure
