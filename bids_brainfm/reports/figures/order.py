"""Figure of the order of the parcels, held against the run's connectivity."""

import numpy as np
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.style import BLUE, GREY, INK, ORANGE, VERMILION
from bids_brainfm.signals.connectome import connectome_vector
from bids_brainfm.signals.order import AS_READ, SHUFFLED, order_warning, proximity


@style.look()
def order_check(correlations: dict[str, float], gradients: np.ndarray, fc: np.ndarray,
                expected: dict[str, float] | None = None) -> Figure:  # fmt: skip
    """Whether parcels that are near in gradient space are strongly connected.

    Parameters
    ----------
    correlations : dict of float, what :func:`bids_brainfm.signals.order.order_check` returns
    gradients : (P, G) float, row i is of parcel i
    fc : (P, P) float, connectivity; NaN where parcels are missing
    expected : dict of float, optional, what a group gives with this table, by name of the order
    """
    near, values = proximity(gradients), connectome_vector(np.asarray(fc, float))
    near, values = near[np.isfinite(values)], values[np.isfinite(values)]
    figure = style.new_figure(3.3)
    axes, right = figure.subplots(1, 2, gridspec_kw={'width_ratios': [1.25, 1]})

    counts, across, up = np.histogram2d(near, values, bins=(70, 50))
    picture = axes.imshow(np.where(counts > 0, counts, np.nan).T, origin='lower', aspect='auto',
                          norm='log', cmap=style.colour_map('Blues', 24, 'white'),
                          extent=(across[0], across[-1], up[0], up[-1]))  # fmt: skip
    step = np.quantile(near, np.linspace(0, 1, 21))
    bin_of = np.clip(np.searchsorted(step, near, side='right') - 1, 0, 19)
    bins = [bin_of == each for each in np.unique(bin_of)]
    axes.plot([near[inside].mean() for inside in bins], [values[inside].mean() for inside in bins],
              'o-', color=VERMILION, markersize=3, linewidth=1,
              label='mean per 5% of the pairs')  # fmt: skip
    axes.legend(loc='upper left', handlelength=1.5, borderaxespad=0.2)
    title = f'{len(values)} pairs of parcels: r = {correlations[AS_READ]:.2f}'
    axes.set(xlabel='proximity in gradient space (minus the distance)', title=title)
    axes.set_ylabel('connectivity (Pearson r)')
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, aspect=25, pad=0.01, label='pairs',
                          format='{x:.0f}')  # fmt: skip
    bar.ax.yaxis.set_minor_formatter('')  # Matplotlib's own writes powers of ten as formulas

    names, heights = list(correlations), list(correlations.values())
    row = np.arange(len(names))
    colours = {AS_READ: BLUE, SHUFFLED: GREY}
    right.barh(row, heights, 0.6, color=[colours.get(name, ORANGE) for name in names])
    for each, r in enumerate(heights):
        right.text(max(r, 0) + 0.01, each, f'{r:z.2f}', va='center', fontsize=8,
                   bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5})  # fmt: skip
    right.set_yticks(row, names)
    right.tick_params(axis='y', length=0)
    right.set_ylim(max(len(names), 4) - 0.5, -0.5)  # two bars would be walls
    right.axvline(0, color=INK, linewidth=0.8)
    expected = expected or {}
    for name, r in expected.items():
        right.axvline(r, color=INK, linewidth=0.8, linestyle='--', zorder=0)
        right.annotate(f'expected of a group,\n{name}: {r:.2f}', (r, 1), xytext=(0, 3), fontsize=7,
                       xycoords=('data', 'axes fraction'), textcoords='offset points',
                       ha='center')  # fmt: skip
    right.set_xlabel('correlation over pairs')
    right.set_xlim(min(0, *heights) * 1.1, max(*heights, *expected.values()) + 0.1)
    warned = order_warning(correlations) is not None
    verdict = 'does not bear out' if warned else 'fits'
    style.headline(figure, f'The connectivity {verdict} the order as read', warned)
    return figure
