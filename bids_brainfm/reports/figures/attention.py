"""Figure of the attention to each parcel."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.figures.brain import LEVELS, by_token, draw_map, missing_words
from bids_brainfm.reports.style import BLUE, INK


@style.look()
def attention(xyz: np.ndarray, profile: np.ndarray, token: np.ndarray, note: str | None) -> Figure:
    """Attention to each parcel as a multiple of uniform attention.

    Parameters
    ----------
    profile : (P, K) float, of parcels at K time patches: 1 is uniform; NaN where missing
    token : (P,) int, number of the token that holds each parcel
    note : str or None, what has to be known to read the map, printed below the title
    """
    profile = np.asarray(profile, float)
    values = profile.mean(axis=1)
    known, unit = by_token(values, token)
    lines = textwrap.wrap(note or '', 125)
    figure = style.new_figure(3.2 + 0.16 * len(lines))
    rows = [0.16 * len(lines)] * bool(lines) + [3.0]
    grid = figure.add_gridspec(len(rows), 2, width_ratios=(2.5, 1), height_ratios=rows)
    if lines:
        axes = figure.add_subplot(grid[0, :])
        axes.set_axis_off()
        axes.text(0.006, 1, '\n'.join(lines), va='top', fontsize=8.5, transform=axes.transAxes)
    distance = np.abs(np.log(known[known > 0]))
    limit = max(np.exp(np.quantile(distance, 0.98)) if distance.size else 2.0, 1.05)
    bar = draw_map(figure, grid[-1, 0], xyz, np.maximum(values, 1e-9),
                   style.colour_map('PuOr_r', LEVELS), LogNorm(1 / limit, limit),
                   'attention / uniform attention')  # fmt: skip
    ticks = [limit**power for power in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f'{tick:.2f}' for tick in ticks])
    bar.minorticks_off()
    _draw_profile(figure.add_subplot(grid[-1, 1]), profile)

    if not known.size:
        finding = f'None of {len(values)} parcels has a value of attention'
    elif np.ptp(known) <= 1e-6 * np.abs(known).max():
        finding = f'All {known.size} {unit} receive the same attention'
    else:
        above = f'{(known > 1).sum()} of {known.size} {unit} receive more than uniform attention'
        finding = f'{above}; range {known.min():.2f} to {known.max():.2f}'
    style.headline(figure, finding + missing_words(values))
    return figure


def _draw_profile(axes: Axes, profile: np.ndarray) -> None:
    """Mean and spread over parcels of the attention to each time patch."""
    patches = np.arange(profile.shape[1])
    mean, low, high = np.full((3, len(patches)), np.nan)
    for patch in np.flatnonzero(np.isfinite(profile).any(0)):
        mean[patch] = np.nanmean(profile[:, patch])
        low[patch], high[patch] = np.nanquantile(profile[:, patch], [0.1, 0.9])
    label = '80% of the parcels'
    axes.fill_between(patches, low, high, color=BLUE, alpha=0.2, linewidth=0, label=label)
    axes.plot(patches, mean, 'o-', color=BLUE, markersize=3.5, label='mean over parcels')
    axes.axhline(1, color=INK, linewidth=0.8, linestyle='--', zorder=0)
    style.whole_numbers(axes.xaxis)
    axes.margins(0.05)
    axes.set(xlabel='time patch', ylabel='attention / uniform')
    style.legend_above(axes, 'lower left', 0.2)
