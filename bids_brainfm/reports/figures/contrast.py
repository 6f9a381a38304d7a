"""Figure of the difference between two groups or conditions."""

import numpy as np
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.figures.brain import by_token, missing_words, signed_map
from bids_brainfm.reports.style import BLUE, INK, MISSING


@style.look()
def contrast(xyz: np.ndarray, difference: np.ndarray, q: np.ndarray, token: np.ndarray,
             label_a: str, label_b: str, n_a: int, n_b: int) -> Figure:  # fmt: skip
    """Difference of two groups or conditions: tested for each token, shown at its parcels.

    Parameters
    ----------
    difference : (P,) float, A minus B; NaN where missing
    q : (P,) float, false discovery rate at which the token of the parcel differs
    token : (P,) int, number of the token that holds each parcel
    n_a, n_b : int, number of observations in each
    """
    difference, q = np.asarray(difference, float), np.asarray(q, float)
    known = np.isfinite(difference)
    differs = known & (q < style.ALPHA)
    label = f'{label_a} minus {label_b} (rings: q < .05)'
    figure, axes = signed_map(xyz, difference, label, ringed=differs)
    tested, unit = by_token(difference, token)
    found, _ = by_token(np.where(differs, difference, np.nan), token)
    if known.any():
        edges = np.histogram_bin_edges(tested, bins=30).tolist()
        axes.hist(tested, edges, color=MISSING, linewidth=0, label=f'all {unit}')
        axes.hist(found, edges, color=BLUE, linewidth=0, label='q < .05')
        style.legend_above(axes, 'lower left', 0.2, ncols=2)
    else:
        style.say_none(axes)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel='difference', ylabel=unit)

    sizes = f'{label_a} (n = {n_a}) and {label_b} (n = {n_b})'
    if not known.any():
        finding = f'{sizes} could be compared in no parcel'
    elif not np.isfinite(q).any():
        finding = f'{sizes}: too few participants for a test'
    elif not differs.any():
        finding = f'{sizes} differ in none of {tested.size} {unit} at q < .05'
    else:
        above = (found > 0).sum()
        counts = f'{above} and below in {found.size - above} of {tested.size} {unit}'
        finding = f'{label_a} (n = {n_a}) above {label_b} (n = {n_b}) in {counts} at q < .05'
    style.headline(figure, finding + missing_words(difference))
    return figure
