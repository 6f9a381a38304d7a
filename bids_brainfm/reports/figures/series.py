"""Figures of the parcel series: the carpet before and after denoising, and coverage."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.style import BLUE, GREY, INK, MISSING_IN_GREY, ORANGE, PALE, VERMILION


def _z(series: np.ndarray) -> np.ndarray:
    """Each parcel (column) minus its mean, over its SD; constant parcels become 0."""
    centred = series - series.mean(0)
    spread = centred.std(0)
    return centred / np.where(spread > 1e-6 * (np.abs(series).max(0) + 1e-12), spread, np.inf)


@style.look()
def carpet(before: np.ndarray, after: np.ndarray, tr: float, flagged: np.ndarray,
           order: np.ndarray, order_label: str, start: float = 0.0) -> Figure:  # fmt: skip
    """Parcel series before and after denoising, with their frame-to-frame change above.

    Each parcel is z-scored in each panel, so that a panel shows structure, not amplitude; the
    proportion of variance that denoising left is in the lower panel's title. The trace is the
    root mean square over parcels of the change from volume to volume, in percent of the mean
    signal (DVARS on parcels, after Power et al. 2012, doi:10.1016/j.neuroimage.2011.10.018).

    Parameters
    ----------
    before, after : (T, P) float, parcel series in BOLD units; a missing parcel is NaN throughout
    flagged : (T,) bool, volumes marked as outliers
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    volumes, parcels = before.shape
    end = start + volumes * tr

    figure = style.new_figure(6.2)
    heights = {'height_ratios': [1, 2.3, 2.3]}
    trace, upper, lower = figure.subplots(3, 1, sharex=True, gridspec_kw=heights)
    with np.errstate(invalid='ignore', divide='ignore'):
        level = before.mean(0)
        left = after.var(0) / before.var(0)
    missing = np.isnan(before).all(0) | np.isnan(after).all(0)
    seen = ~missing & (np.abs(level) > 1e-6)
    time = start + tr * np.arange(1, volumes)
    for series, colour, label in ((before, GREY, 'before'), (after, BLUE, 'after')):
        square = (np.diff(series[:, seen], axis=0) / level[seen]) ** 2
        change = np.sqrt(square.sum(1) / max(seen.sum(), 1))
        trace.plot(time, 100 * change, color=colour, linewidth=0.8, label=label)
    for onset in start + tr * np.flatnonzero(flagged):
        trace.axvspan(onset, onset + tr, color=ORANGE, alpha=0.55, linewidth=0)
    trace.set_ylim(bottom=0)
    words = f'{np.sum(flagged)} of {volumes} volumes flagged (orange)'
    trace.set(ylabel='change (%)', title=f'Change from volume to volume; {words}')
    style.legend_above(trace, 'lower right', 0, ncols=2)

    titles = [f'Before denoising: {parcels} parcels', 'After denoising']
    if missing.any():
        titles[0] += f', {missing.sum()} without usable signal (marked at the right)'
    if np.array_equal(before, after, equal_nan=True):
        titles[1] = 'After: unchanged'
    elif np.isfinite(left).any():
        proportion = np.median(left[np.isfinite(left)])
        titles[1] += f': {proportion:.0%} of the variance left (median over parcels)'
    for axes, series, title in zip((upper, lower), (before, after), titles, strict=True):
        picture = axes.imshow(style.shrink(_z(series)[:, order].T, rows=240, columns=900),
                              vmin=-2.5, vmax=2.5,
                              cmap=style.colour_map('gray', 24, MISSING_IN_GREY), aspect='auto',
                              extent=(start, end, parcels, 0))  # fmt: skip
        rows = np.flatnonzero(missing[order]) + 0.5
        if rows.size:  # the box of an empty, unclipped line would push the panels flat
            axes.plot(np.full(len(rows), end), rows, '<', color=BLUE, markersize=3.5,
                      clip_on=False, markeredgewidth=0)  # fmt: skip
        axes.set(title=title, ylabel=f'parcel\n({order_label})')
    lower.set(xlabel='time (s)', xlim=(start, end))
    figure.colorbar(picture, ax=[upper, lower], extend='both', shrink=0.6, aspect=25, pad=0.01,
                    label='z within parcel')  # fmt: skip
    return figure


MARGIN = 18.0  # mm around the outermost centroids, more than the outline needs
VIEWS = (  # title, dimensions across and up, marks of the left and right end
    ('from the right', 1, 2, ('P', 'A')),
    ('from behind', 0, 2, ('L', 'R')),
    ('from above', 0, 1, ('L', 'R')),
)


def _silhouette(axes: Axes, points: np.ndarray) -> None:
    """The outline of a cloud of centroids (N, 2) in mm: a smooth band about 9 mm around it."""
    low, high = points.min(0) - MARGIN, points.max(0) + MARGIN
    grid = [np.arange(a, b, 2.0) for a, b in zip(low, high, strict=True)]
    squared = [(g[:, None] - points[:, i]) ** 2 for i, g in enumerate(grid)]
    bump = [np.exp(-s / (2 * 6.0**2)) for s in squared]
    density = bump[1] @ bump[0].T
    axes.contourf(*grid, density, levels=[0.32, np.inf], colors=[PALE])
    axes.contour(*grid, density, levels=[0.32], colors=[GREY], linewidths=0.8)


@style.look()
def coverage(xyz: np.ndarray, coverage: np.ndarray, min_coverage: float) -> Figure:
    """Proportion of each parcel inside the mask and varying, at centroids and as a histogram.

    Parameters
    ----------
    coverage : (P,) float, proportion of voxels inside the brain mask and varying, 0 to 1
    min_coverage : float, parcels below are ringed: they are missing downstream
    """
    low = coverage < min_coverage
    drawn = np.isfinite(xyz).all(1)
    size = np.ptp(xyz[drawn], axis=0) + 2 * MARGIN
    middle = (xyz[drawn].max(0) + xyz[drawn].min(0)) / 2
    height = size[1:].max()  # of every view, so that all have one scale
    first = np.argsort(-coverage[drawn], kind='stable')  # low coverage on top of high

    figure = style.new_figure(3.1)
    grid = figure.add_gridspec(1, 4, width_ratios=[*size[[1, 0, 0]], 0.75 * size[0]])
    title = f'{low.sum()} of {low.size} parcels below {min_coverage:.0%} coverage'
    style.headline(figure, title + (' (ringed)' if low.any() else ''))
    maps = []
    for column, (title, across, up, ends) in enumerate(VIEWS):
        maps.append(axes := figure.add_subplot(grid[column]))
        x, y = xyz[drawn, across], xyz[drawn, up]
        _silhouette(axes, np.stack([x, y], axis=1))
        dots = axes.scatter(x[first], y[first], c=coverage[drawn][first],
                            cmap=style.colour_map('viridis', 20), vmin=0, vmax=1, s=9,
                            linewidths=0, rasterized=len(x) > 500)  # fmt: skip
        axes.scatter(x[low[drawn]], y[low[drawn]], s=34, facecolors='none', edgecolors=VERMILION,
                     linewidths=1.1)  # fmt: skip
        axes.set_xlim(middle[across] + size[across] * np.array([-0.5, 0.5]))
        axes.set_ylim(middle[up] + height * np.array([-0.5, 0.5]))
        axes.set_aspect('equal')
        axes.set_axis_off()
        axes.set_title(title, loc='center', fontweight='normal')
        for end, x in zip(ends, (0.03, 0.97), strict=True):
            axes.text(x, 0.06, end, transform=axes.transAxes, ha='center', color=GREY)
    figure.colorbar(dots, ax=maps, shrink=0.7, aspect=18, label='coverage', pad=0.02)

    axes = figure.add_subplot(grid[3])
    _, edges, _ = axes.hist(coverage, bins=20, range=(0, 1), linewidth=0)
    for edge, bar in zip(edges, axes.patches, strict=False):
        bar.set_color(VERMILION if edge < min_coverage - 1e-9 else BLUE)
    axes.axvline(min_coverage, color=INK, linewidth=0.8, linestyle='--')
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], xlabel='coverage', ylabel='parcels (log scale)')
    axes.set_yscale('log')  # a few low parcels must be seen next to hundreds of good ones
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter('{x:.0f}')
    axes.yaxis.set_minor_formatter('')
    return figure
