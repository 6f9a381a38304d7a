"""Figure of the attention that falls on each parcel."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.figures.brain import LEVELS, draw_map, missing_words
from bids_brainfm.reports.style import BLUE, INK


@style.look()
def attention(
    xyz: np.ndarray, values: np.ndarray, profile: np.ndarray, note: str | None
) -> Figure:
    """Attention that each parcel gets, as a multiple of an equal proportion.

    Parameters
    ----------
    values : (P,) float, attention over an equal proportion of it: 1 is equal; NaN where missing
    profile : (P, K) float, attention on parcels at K time patches in any unit, drawn over its mean
    note : str or None, what has to be known to read the map, printed below the title
    """
    values, profile = np.asarray(values, float), np.asarray(profile, float)
    known = values[np.isfinite(values)]
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
                   'share of attention over an equal share')  # fmt: skip
    ticks = [limit**power for power in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f'{tick:.2f}' for tick in ticks])
    bar.minorticks_off()
    _draw_profile(figure.add_subplot(grid[-1, 1]), profile)

    if not known.size:
        finding = f'No parcel of {len(values)} has a share of attention'
    elif np.ptp(known) <= 1e-6 * np.abs(known).max():
        finding = f'All {known.size} parcels get the same share of attention'
    else:
        top = np.sort(known)[::-1][: max(1, round(known.size / 10))]
        more = f'{(known > 1).sum()} of {known.size} parcels get more than an equal share'
        most = f'the {len(top)} that get most hold {top.sum() / known.sum():.0%} of it'
        finding = f'{more} of attention; {most}'
    style.headline(figure, finding + missing_words(values))
    return figure


def _draw_profile(axes: Axes, profile: np.ndarray) -> None:
    """Mean and spread over parcels of the attention on each time patch."""
    patches = np.arange(profile.shape[1])
    mean, low, high = np.full((3, len(patches)), np.nan)
    level = np.nanmean(profile) if np.isfinite(profile).any() else 1.0
    for patch in np.flatnonzero(np.isfinite(profile).any(0)):
        relative = profile[:, patch] / (level or 1.0)
        mean[patch] = np.nanmean(relative)
        low[patch], high[patch] = np.nanquantile(relative, [0.1, 0.9])
    label = '80% of the parcels'
    axes.fill_between(patches, low, high, color=BLUE, alpha=0.2, linewidth=0, label=label)
    axes.plot(patches, mean, 'o-', color=BLUE, markersize=3.5, label='mean over parcels')
    axes.axhline(1, color=INK, linewidth=0.8, linestyle='--', zorder=0)
    style.whole_numbers(axes.xaxis)
    axes.margins(0.05)
    axes.set(xlabel='time patch', ylabel='over an equal share')
    style.legend_above(axes, 'lower left', 0.2)
