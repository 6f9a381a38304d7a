"""Figure of functional connectivity."""

import numpy as np
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.style import BLUE, INK, VERMILION
from bids_brainfm.signals.connectome import connectome_vector


@style.look()
def connectivity(relmat: np.ndarray, order: np.ndarray, order_label: str) -> Figure:
    """Functional connectivity: the matrix and the distribution of its values.

    Parameters
    ----------
    relmat : (P, P) float, Pearson correlations; rows and columns of missing parcels are NaN
    """
    relmat = np.asarray(relmat, float)
    parcels = len(relmat)
    missing = int(np.isnan(np.where(np.eye(parcels, dtype=bool), np.nan, relmat)).all(1).sum())
    figure = style.new_figure(5.4)
    axes, right = figure.subplots(1, 2, gridspec_kw={'width_ratios': [2.4, 1]})
    picture = axes.imshow(style.shrink(relmat[np.ix_(order, order)], 450, 450),
                          cmap=style.colour_map('RdBu_r', 51), vmin=-1, vmax=1,
                          extent=(0, parcels, parcels, 0))  # fmt: skip
    axes.set(xlabel=f'parcel ({order_label})', ylabel='parcel')
    grey = f', {missing} without signal (grey)' if missing else ''
    axes.set_title(f'{parcels} parcels{grey}')
    figure.colorbar(picture, ax=axes, shrink=0.8, aspect=30, pad=0.02, label='Pearson r')

    values = connectome_vector(relmat)
    values = values[np.isfinite(values)]
    percent = np.full(len(values), 100 / max(len(values), 1))
    right.hist(values, bins=50, range=(-1, 1), weights=percent, color=BLUE, linewidth=0)
    right.axvline(0, color=INK, linewidth=0.8)
    right.set(xlim=(-1, 1), xlabel='Pearson r', ylabel='pairs of parcels (%)')
    if values.size:
        median = np.median(values)
        right.axvline(median, color=VERMILION, linewidth=1, linestyle='--')
        right.set_title(f'Median r = {median:.2f}')
    right.set_anchor('S')
    right.set_box_aspect(1.2)
    return figure
