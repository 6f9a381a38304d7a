"""The report's pictures: arrays in, one Matplotlib figure out.

A picture is a function named after what it shows; `save` writes any of them as SVG. Look and
colours are in :mod:`bids_brainfm.reports.style`.
"""

import numpy as np

from bids_brainfm.analyses.order import AS_READ, SHUFFLED, order_warning, proximity
from bids_brainfm.models.connectome import connectome_vector
from bids_brainfm.reports.style import (
    BLUE,
    GREY,
    INK,
    MISSING,
    MISSING_IN_GREY,
    ORANGE,
    PALE,
    VERMILION,
    colour_map,
    headline,
    new_figure,
    save,  # noqa: F401  (for those who draw: figures.save)
    shrink,
    styled,
    whole_numbers,
)


def _z(series):
    """Each parcel (column) minus its mean, over its SD; constant parcels become 0."""
    centred = series - series.mean(0)
    spread = centred.std(0)
    return centred / np.where(spread > 1e-6 * (np.abs(series).max(0) + 1e-12), spread, np.inf)


@styled
def carpet(before, after, tr, flagged, order=None, *, order_label='atlas order', start=0.0):
    """Parcel series before and after denoising, with their frame-to-frame change above.

    Each parcel is z-scored in each panel, so that a panel shows structure, not amplitude; the
    share of variance that denoising left is in the lower panel's title. The trace is the root
    mean square over parcels of the change from volume to volume, in percent of the mean signal
    (DVARS on parcels, after Power et al. 2012, doi:10.1016/j.neuroimage.2011.10.018).

    Parameters
    ----------
    before, after : (T, P) float
        Parcel series in BOLD units; a missing parcel is NaN throughout.
    tr : float
        Repetition time in seconds.
    flagged : (T,) bool
        Volumes marked as outliers.
    order : (P,) int, optional
        Order of the parcels from top to bottom.
    order_label : str
        What that order is.
    start : float
        Time of the first row in seconds since the run's first volume.

    Returns
    -------
    matplotlib.figure.Figure
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    flagged = np.asarray(flagged, bool)
    volumes, parcels = before.shape
    order = np.arange(parcels) if order is None else np.asarray(order)
    end = start + volumes * tr

    figure = new_figure(6.2)
    trace, upper, lower = figure.subplots(
        3, 1, sharex=True, gridspec_kw={'height_ratios': [1, 2.3, 2.3]}
    )
    with np.errstate(invalid='ignore', divide='ignore'):
        level = before.mean(0)
        kept = after.var(0) / before.var(0)
    missing = np.isnan(before).all(0) | np.isnan(after).all(0)
    seen = ~missing & (np.abs(level) > 1e-6)
    moment = start + tr * np.arange(1, volumes)
    for series, colour, label in ((before, GREY, 'before'), (after, BLUE, 'after')):
        square = (np.diff(series[:, seen], axis=0) / level[seen]) ** 2
        change = np.sqrt(square.sum(1) / max(seen.sum(), 1))
        trace.plot(moment, 100 * change, color=colour, linewidth=0.8, label=label)
    for volume in np.flatnonzero(flagged):
        trace.axvspan(
            start + volume * tr, start + (volume + 1) * tr, color=ORANGE, alpha=0.55, linewidth=0
        )
    trace.set_ylim(bottom=0)
    trace.set_ylabel('change (%)')
    trace.set_title(
        f'Change from volume to volume; {flagged.sum()} of {volumes} volumes flagged (orange)'
    )
    trace.legend(loc='upper right', ncols=2, borderaxespad=0)

    titles = [f'Before denoising: {parcels} parcels']
    if missing.any():
        titles[0] += f', {missing.sum()} without usable signal (marked at the right)'
    if np.array_equal(before, after, equal_nan=True):
        titles.append('After: unchanged')
    elif np.isfinite(kept).any():
        share = np.median(kept[np.isfinite(kept)])
        titles.append(f'After denoising: {share:.0%} of the variance left (median over parcels)')
    else:
        titles.append('After denoising')
    for axes, series, title in zip((upper, lower), (before, after), titles, strict=True):
        picture = axes.imshow(
            shrink(_z(series)[:, order].T, rows=240, columns=900),
            cmap=colour_map('gray', 24, MISSING_IN_GREY),
            vmin=-2.5,
            vmax=2.5,
            aspect='auto',
            extent=(start, end, parcels, 0),
        )
        rows = np.flatnonzero(missing[order]) + 0.5
        if rows.size:  # the box of an empty, unclipped line would push the panels flat
            axes.plot(
                np.full(len(rows), end), rows, '<', color=BLUE, markersize=3.5, clip_on=False,
                markeredgewidth=0,
            )  # fmt: skip
        axes.set_title(title)
        axes.set_ylabel(f'parcel\n({order_label})')
    lower.set_xlabel('time (s)')
    lower.set_xlim(start, end)
    bar = figure.colorbar(
        picture, ax=[upper, lower], extend='both', shrink=0.6, aspect=25, pad=0.01
    )
    bar.set_label('z within parcel')
    return figure


MARGIN = 18.0  # mm around the outermost centroids, more than the outline needs


def _silhouette(axes, points):
    """The outline of a cloud of centroids (N, 2) in mm: a smooth band about 9 mm around it."""
    low, high = points.min(0) - MARGIN, points.max(0) + MARGIN
    grid = [np.arange(a, b, 2.0) for a, b in zip(low, high, strict=True)]
    squared = [(g[:, None] - points[:, i]) ** 2 for i, g in enumerate(grid)]
    bump = [np.exp(-s / (2 * 6.0**2)) for s in squared]
    density = bump[1] @ bump[0].T
    axes.contourf(*grid, density, levels=[0.32, np.inf], colors=[PALE])
    axes.contour(*grid, density, levels=[0.32], colors=[GREY], linewidths=0.8)


@styled
def coverage(xyz, coverage, min_coverage):
    """Share of each parcel with signal, at the parcels' centroids and as a histogram.

    Parameters
    ----------
    xyz : (P, 3) float
        Centroids in mm, RAS+; rows with NaN are not drawn.
    coverage : (P,) float
        Share of the parcel's voxels with signal, 0 to 1.
    min_coverage : float
        Parcels below are ringed: they are missing downstream.

    Returns
    -------
    matplotlib.figure.Figure
    """
    xyz, coverage = np.asarray(xyz, float), np.asarray(coverage, float)
    low = coverage < min_coverage
    drawn = np.isfinite(xyz).all(1)
    size = np.ptp(xyz[drawn], axis=0) + 2 * MARGIN
    middle = (xyz[drawn].max(0) + xyz[drawn].min(0)) / 2
    height = size[1:].max()  # of every view, so that all have one scale
    first = np.argsort(-coverage[drawn], kind='stable')  # low coverage on top of high

    figure = new_figure(3.1)
    grid = figure.add_gridspec(1, 4, width_ratios=[*size[[1, 0, 0]], 0.75 * size[0]])
    headline(
        figure,
        f'{low.sum()} of {low.size} parcels below {min_coverage:.0%} coverage'
        + (' (ringed)' if low.any() else ''),
    )
    views = (
        ('from the right', 1, 2, ('P', 'A')),
        ('from behind', 0, 2, ('L', 'R')),
        ('from above', 0, 1, ('L', 'R')),
    )
    maps = []
    for column, (title, across, up, ends) in enumerate(views):
        maps.append(axes := figure.add_subplot(grid[column]))
        points = xyz[drawn][:, [across, up]]
        _silhouette(axes, points)
        dots = axes.scatter(
            *points[first].T, c=coverage[drawn][first], cmap=colour_map('viridis', 20, MISSING),
            vmin=0, vmax=1, s=9, linewidths=0, rasterized=len(points) > 500,
        )  # fmt: skip
        ringed = points[low[drawn]]
        axes.scatter(*ringed.T, s=34, facecolors='none', edgecolors=VERMILION, linewidths=1.1)
        axes.set_xlim(middle[across] + size[across] * np.array([-0.5, 0.5]))
        axes.set_ylim(middle[up] + height * np.array([-0.5, 0.5]))
        axes.set_aspect('equal')
        axes.set_axis_off()
        axes.set_title(title, loc='center', fontweight='normal')
        for end, x in zip(ends, (0.03, 0.97), strict=True):
            axes.text(x, 0.06, end, transform=axes.transAxes, ha='center', color=GREY)
    figure.colorbar(dots, ax=maps, shrink=0.7, aspect=18, label='coverage', pad=0.02)

    axes = figure.add_subplot(grid[3])
    counts, edges = np.histogram(coverage, bins=20, range=(0, 1))
    colours = [VERMILION if edge < min_coverage - 1e-9 else BLUE for edge in edges[:-1]]
    axes.bar(edges[:-1], counts, width=0.05, align='edge', color=colours, linewidth=0)
    axes.axvline(min_coverage, color=INK, linewidth=0.8, linestyle='--')
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    axes.set_yscale('log')  # a few low parcels must be seen beside hundreds of good ones
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter('{x:.0f}')
    axes.set_xlabel('coverage')
    axes.set_ylabel('parcels (log scale)')
    return figure


@styled
def windows(onset, duration, real, flagged, run_duration, motion=None, tr=None):
    """Where the windows lie in the run, and how much of each was recorded and flagged.

    Parameters
    ----------
    onset : (W,) float
        Seconds since the run's first volume.
    duration : (W,) float
        Seconds of recorded signal in the window.
    real : (W,) float
        Share of samples that were recorded, not padded or repeated.
    flagged : (W,) float
        Share of the recorded samples that come from flagged volumes.
    run_duration : float
        Seconds.
    motion : (T,) float, optional
        Framewise displacement in mm; NaN where undefined.
    tr : float, optional
        Seconds between the entries of `motion`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    onset, duration, real, flagged = (
        np.asarray(a, float) for a in (onset, duration, real, flagged)
    )
    count = len(onset)
    length = duration / np.where(real > 0, real, 1.0)
    last = float((onset + duration).max()) if count else 0.0
    # Resampling leaves a fraction of a sample at the end, which is nothing to report.
    left_over = run_duration - last if run_duration - last > 0.005 * run_duration else 0.0
    shown = motion is not None and tr is not None
    bars = float(np.clip(0.26 * count, 0.7, 3.6))
    figure = new_figure(1.0 + bars + 0.9 * shown)
    grid = figure.add_gridspec(
        1 + shown, 2, width_ratios=[3.4, 1], height_ratios=[0.8] * shown + [bars]
    )
    lanes = figure.add_subplot(grid[-1, 0])
    row = np.arange(count)
    even = np.where(row % 2, 0.75, 1.0)
    for each in row:
        lanes.barh(each, duration[each], 0.78, onset[each], color=BLUE, alpha=even[each])
    padded = real < 1
    lanes.barh(
        row[padded], (length - duration)[padded], 0.78, (onset + duration)[padded],
        facecolor='white', edgecolor=GREY, hatch='////', linewidth=0.6,
    )  # fmt: skip
    if left_over:
        lanes.axvspan(last, run_duration, color=PALE, linewidth=0, zorder=0)
    lanes.axvline(run_duration, color=INK, linewidth=0.8, linestyle='--', zorder=0)
    lanes.set_xlim(0, max(run_duration, float((onset + length).max()) if count else 0) * 1.01)
    lanes.set_ylim(count - 0.4, -0.6)
    whole_numbers(lanes.yaxis)
    lanes.set_xlabel('time since the first volume (s)')
    lanes.set_ylabel('window')
    plural = 'window' if count == 1 else 'windows'
    lanes.set_title(
        f'{count} {plural} in {run_duration:.0f} s, '
        + (f'{left_over:.0f} s in no window (grey)' if left_over else 'nothing left over')
    )

    shares = figure.add_subplot(grid[-1, 1], sharey=lanes)
    shares.barh(row - 0.2, 100 * flagged, 0.38, color=ORANGE, label='flagged')
    shares.barh(
        row + 0.2, 100 * (1 - real), 0.38,
        facecolor='white', edgecolor=GREY, hatch='////', linewidth=0.6, label='padded',
    )  # fmt: skip
    if count <= 12:
        for each in row:
            for shift, share in ((-0.2, flagged[each]), (0.2, 1 - real[each])):
                if share > 0:
                    label = f'{share:.0%}' if share >= 0.01 else '<1%'
                    shares.text(100 * share + 2, each + shift, label, va='center', fontsize=7)
    if not flagged.any() and not padded.any():
        shares.text(
            0.5, 0.5, 'none', transform=shares.transAxes, ha='center', va='center', color=GREY
        )
    shares.set_xlim(0, 115)
    shares.set_xticks([0, 50, 100])
    shares.set_xlabel('share of samples (%)')
    shares.tick_params(labelleft=False)
    shares.legend(
        loc='lower right', bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, columnspacing=1
    )

    if shown:
        trace = figure.add_subplot(grid[0, 0], sharex=lanes)
        moment = tr * np.arange(len(motion))
        trace.plot(moment, motion, color=INK, linewidth=0.7)
        trace.set_ylim(bottom=0)
        trace.set_ylabel('FD (mm)')
        trace.set_title('Framewise displacement')
        trace.tick_params(labelbottom=False)
    return figure


def principal_components(summary):
    """Scores and share of variance of the principal components over windows.

    The sign of a component is arbitrary; here its largest weight is positive.

    Parameters
    ----------
    summary : (W, D) float

    Returns
    -------
    scores : (W, min(W, D)) float
    explained : (min(W, D),) float
        Shares of the total variance; zeros where the windows are all alike.

    Examples
    --------
    >>> scores, explained = principal_components(np.array([[0.0, 0], [1, 0], [2, 0]]))
    >>> scores[:, 0].round(6).tolist(), explained.round(6).tolist()
    ([-1.0, 0.0, 1.0], [1.0, 0.0])
    """
    centred = summary - summary.mean(0)
    left, size, weights = np.linalg.svd(centred, full_matrices=False)
    largest = np.abs(weights).argmax(1)
    sign = np.sign(weights[np.arange(len(size)), largest])
    total = (size**2).sum()
    alike = total <= 1e-12 * (summary**2).sum()
    return left * size * sign, np.zeros_like(size) if alike else size**2 / total


@styled
def embedding(summary, onset, runs=None):
    """Embedding of each window: PCA over windows and the likeness of each pair of windows.

    With one or two windows, which no PCA can spread out, the values themselves are drawn.

    Parameters
    ----------
    summary : (W, D) float
        One embedding per window.
    onset : (W,) float
        Seconds since the run's first volume.
    runs : (W,) str, optional
        Run of each window, marked by the shape of its dot.

    Returns
    -------
    matplotlib.figure.Figure
    """
    summary, onset = np.asarray(summary, float), np.asarray(onset, float)
    if len(summary) < 3:
        return _few_windows(summary, onset)
    figure = new_figure(3.7)
    axes, beside = figure.subplots(1, 2, gridspec_kw={'width_ratios': [1.5, 1]})

    scores, explained = principal_components(summary)
    second = scores[:, 1] if scores.shape[1] > 1 else np.zeros(len(scores))
    labels = np.zeros(len(summary), str) if runs is None else np.asarray(runs)
    for label, marker in zip(np.unique(labels), 'osD^vP*X' * len(labels), strict=False):
        own = labels == label
        axes.plot(scores[own, 0], second[own], color=GREY, linewidth=0.6, zorder=1)
        dots = axes.scatter(
            scores[own, 0], second[own], c=onset[own], cmap=colour_map('viridis', 64, MISSING),
            marker=marker, s=42,
            vmin=onset.min(), vmax=onset.max(), edgecolors='white', linewidths=0.6,
            label=str(label) or None, zorder=2,
        )  # fmt: skip
    if runs is not None:
        axes.legend()
    if len(summary) <= 20:
        for window, place in enumerate(zip(scores[:, 0], second, strict=True)):
            axes.annotate(
                str(window), place, xytext=(5, 4), textcoords='offset points', fontsize=7
            )
    axes.margins(0.1)
    axes.set_xlabel(f'component 1 ({explained[0]:.0%} of variance)')
    axes.set_ylabel(f'component 2 ({explained[1]:.0%})' if len(explained) > 1 else '')
    axes.set_title(
        f'PCA over {len(summary)} windows of {summary.shape[1]} dimensions'
        if explained.any()
        else 'All windows have the same embedding'
    )
    figure.colorbar(dots, ax=axes, label='window onset (s)', aspect=30, pad=0.01)

    centred = summary - summary.mean(1, keepdims=True)
    size = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(size > 0, size, 1)
    likeness = np.clip(unit @ unit.T, -1, 1)
    off = likeness[~np.eye(len(likeness), dtype=bool)]
    picture = beside.imshow(
        shrink(likeness, 450, 450), cmap=colour_map('cividis', 64, MISSING),
        vmin=off.min(), vmax=max(off.max(), off.min() + 1e-6),
        extent=(-0.5, len(summary) - 0.5, len(summary) - 0.5, -0.5),
    )  # fmt: skip
    whole_numbers(beside.xaxis)
    whole_numbers(beside.yaxis)
    beside.set_xlabel('window')
    beside.set_ylabel('window')
    beside.set_title('Likeness of windows')
    bar = figure.colorbar(picture, ax=beside, shrink=0.8, aspect=25, pad=0.02)
    bar.set_label('correlation of embeddings')
    bar.formatter.set_useOffset(False)
    return figure


def _few_windows(summary, onset):
    figure = new_figure(2.2)
    axes = figure.subplots()
    dimensions = np.arange(summary.shape[1])
    for window, (values, begin) in enumerate(zip(summary, onset, strict=True)):
        axes.plot(
            dimensions, values, color=(BLUE, ORANGE)[window], linewidth=0.7,
            label=f'window {window} (from {begin:.0f} s)',
        )  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    axes.set_xlim(0, max(summary.shape[1] - 1, 1))
    axes.set_xlabel('embedding dimension')
    axes.set_ylabel('value')
    alike = ''
    if len(summary) == 2 and summary.std(1).all():
        alike = f'; their correlation is {np.corrcoef(summary)[0, 1]:.3f}'
    plural = 'One window' if len(summary) == 1 else 'Two windows'
    axes.set_title(f'{plural}: too few for a PCA, so these are the values{alike}')
    axes.legend(
        loc='upper right', ncols=2, frameon=True, framealpha=0.9, edgecolor='none',
        borderaxespad=0.3,
    )  # fmt: skip
    return figure


@styled
def connectivity(relmat, order=None, *, order_label='atlas order'):
    """Functional connectivity: the matrix and the distribution of its values.

    Parameters
    ----------
    relmat : (P, P) float
        Pearson correlations; rows and columns of missing parcels are NaN.
    order : (P,) int, optional
        Order of the parcels.
    order_label : str
        What that order is.

    Returns
    -------
    matplotlib.figure.Figure
    """
    relmat = np.asarray(relmat, float)
    parcels = len(relmat)
    order = np.arange(parcels) if order is None else np.asarray(order)
    missing = int(np.isnan(np.where(np.eye(parcels, dtype=bool), np.nan, relmat)).all(1).sum())
    figure = new_figure(5.4)
    axes, beside = figure.subplots(1, 2, gridspec_kw={'width_ratios': [2.4, 1]})
    picture = axes.imshow(
        shrink(relmat[np.ix_(order, order)], 450, 450), cmap=colour_map('RdBu_r', 51, MISSING),
        vmin=-1, vmax=1, extent=(0, parcels, parcels, 0),
    )  # fmt: skip
    axes.set_xlabel(f'parcel ({order_label})')
    axes.set_ylabel('parcel')
    axes.set_title(
        f'{parcels} parcels' + (f', {missing} without signal (grey)' if missing else '')
    )
    figure.colorbar(picture, ax=axes, shrink=0.8, aspect=30, pad=0.02, label='Pearson r')

    values = relmat[np.triu_indices(parcels, 1)]
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, bins=50, range=(-1, 1))
    density = counts / max(counts.sum(), 1)
    beside.bar(edges[:-1], 100 * density, width=0.04, align='edge', color=BLUE, linewidth=0)
    beside.axvline(0, color=INK, linewidth=0.8)
    beside.set_xlim(-1, 1)
    beside.set_xlabel('Pearson r')
    beside.set_ylabel('pairs of parcels (%)')
    if values.size:
        beside.axvline(np.median(values), color=VERMILION, linewidth=1, linestyle='--')
        beside.set_title(f'Median r = {np.median(values):.2f}')
    beside.set_anchor('S')
    beside.set_box_aspect(1.2)
    return figure


@styled
def order_check(found, gradients, fc, expected=None):
    """Whether parcels that are near in gradient space are strongly connected.

    Parameters
    ----------
    found : dict of float
        What :func:`bids_brainfm.analyses.order.order_check` answers.
    gradients : (P, G) float
        Row i is of parcel i.
    fc : (P, P) float
        Connectivity; NaN where parcels are missing.
    expected : dict of float, optional
        What a group gives with this table, by the name of the order.

    Returns
    -------
    matplotlib.figure.Figure
    """
    near, values = proximity(gradients), connectome_vector(np.asarray(fc, float))
    near, values = near[np.isfinite(values)], values[np.isfinite(values)]
    figure = new_figure(3.3)
    axes, beside = figure.subplots(1, 2, gridspec_kw={'width_ratios': [1.25, 1]})

    counts, across, up = np.histogram2d(near, values, bins=(70, 50))
    picture = axes.imshow(
        np.where(counts > 0, counts, np.nan).T, origin='lower', aspect='auto', norm='log',
        cmap=colour_map('Blues', 24, 'white'), extent=(across[0], across[-1], up[0], up[-1]),
    )  # fmt: skip
    step = np.quantile(near, np.linspace(0, 1, 21))
    bin_of = np.clip(np.searchsorted(step, near, side='right') - 1, 0, 19)
    filled = np.unique(bin_of)
    mean_of = lambda what: [what[bin_of == each].mean() for each in filled]
    axes.plot(
        mean_of(near), mean_of(values), 'o-', color=VERMILION, markersize=3, linewidth=1,
        label='mean per 5% of the pairs',
    )  # fmt: skip
    axes.legend(loc='upper left', handlelength=1.5, borderaxespad=0.2)
    axes.set_xlabel('proximity in gradient space (minus the distance)')
    axes.set_ylabel('connectivity (Pearson r)')
    axes.set_title(f'{len(values)} pairs of parcels: r = {found[AS_READ]:.2f}')
    figure.colorbar(picture, ax=axes, shrink=0.8, aspect=25, pad=0.01, label='pairs')

    row = np.arange(len(found))
    colours = {AS_READ: BLUE, SHUFFLED: GREY}
    beside.barh(row, found.values(), 0.6, color=[colours.get(name, ORANGE) for name in found])
    for each, r in zip(row, found.values(), strict=True):
        beside.text(
            max(r, 0) + 0.01, each, f'{r:z.2f}', va='center', fontsize=8,
            bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5},
        )  # fmt: skip
    beside.set_yticks(row, found)
    beside.tick_params(axis='y', length=0)
    beside.set_ylim(max(len(found), 4) - 0.5, -0.5)  # two bars would be walls
    beside.axvline(0, color=INK, linewidth=0.8)
    expected = expected or {}
    for name, r in expected.items():
        beside.axvline(r, color=INK, linewidth=0.8, linestyle='--', zorder=0)
        beside.annotate(
            f'expected of a group,\n{name}: {r:.2f}', (r, 1), xytext=(0, 3), fontsize=7,
            xycoords=('data', 'axes fraction'), textcoords='offset points', ha='center',
        )  # fmt: skip
    largest = max(*found.values(), *expected.values())
    beside.set_xlabel('correlation over pairs')
    beside.set_xlim(min(0, *found.values()) * 1.1, largest + 0.1)
    warned = order_warning(found) is not None
    verdict = 'does not bear out' if warned else 'fits'
    headline(
        figure,
        f'The connectivity {verdict} the order as read',
        color=VERMILION if warned else INK,
    )
    return figure


@styled
def latent_error(error, baseline, order=None, *, order_label='atlas order'):
    """How well the latents of parcels and time patches are predicted from the others.

    Parameters
    ----------
    error, baseline : (W, P, K) float
        Error of the prediction and of a guess without a model, per window, parcel and time
        patch; NaN where the patch was context, the same in every window.
    order : (P,) int, optional
        Order of the parcels from top to bottom; those that were context throughout come last.
    order_label : str
        What that order is.

    Returns
    -------
    matplotlib.figure.Figure
    """
    error, baseline = np.asarray(error, float), np.asarray(baseline, float)
    count, parcels, patches = error.shape
    order = np.arange(parcels) if order is None else np.asarray(order)
    mean = error.mean(0)
    targets = np.isfinite(mean).any(1)
    order = order[np.argsort(~targets[order], kind='stable')]  # parcels of context last
    figure = new_figure(4.2 + 0.6 * (count > 1))
    grid = figure.add_gridspec(1 + (count > 1), 2, width_ratios=[1.35, 1])

    axes = figure.add_subplot(grid[:, 0])
    low, high = np.quantile(mean[np.isfinite(mean)], [0.02, 0.98])
    picture = axes.imshow(
        shrink(mean[order], rows=450, columns=patches), cmap=colour_map('viridis', 64, MISSING),
        vmin=low, vmax=high, aspect='auto', extent=(-0.5, patches - 0.5, parcels, 0),
    )  # fmt: skip
    whole_numbers(axes.xaxis)
    axes.set_xlabel('time patch')
    axes.set_ylabel(f'parcel ({order_label})')
    axes.set_title(
        'Error of prediction' + (f', mean of {count} windows' if count > 1 else '')
        + ' (grey: context)'
    )  # fmt: skip
    bar = figure.colorbar(picture, ax=axes, extend='both', shrink=0.8, aspect=30, pad=0.01)
    bar.set_label('smooth L1 error')

    beside = figure.add_subplot(grid[0, 1])
    guess, made = (np.nanmean(values.mean(0)[targets], axis=1) for values in (baseline, error))
    ends = [min(guess.min(), made.min()), max(guess.max(), made.max())]
    beside.plot(ends, ends, color=INK, linewidth=0.8, linestyle='--', zorder=0)
    beside.scatter(
        guess, made, s=9, color=np.where(made < guess, BLUE, VERMILION), alpha=0.7, linewidths=0,
        rasterized=len(made) > 500,
    )  # fmt: skip
    beside.set_xlabel('error of the mean context latent (baseline)')
    beside.set_ylabel('error of the prediction')
    beside.set_title(f'{(made < guess).sum()} of {len(made)} parcels below the baseline')

    if count > 1:
        below = figure.add_subplot(grid[1, 1])
        for values, colour, label in ((baseline, GREY, 'baseline'), (error, BLUE, 'prediction')):
            below.plot(
                np.nanmean(values, axis=(1, 2)), 'o-', color=colour, markersize=3.5, linewidth=1,
                label=label,
            )  # fmt: skip
        whole_numbers(below.xaxis)
        below.set_ylim(0, 1.1 * below.dataLim.ymax)
        below.set_xlabel('window')
        below.set_ylabel('mean error')
        below.legend(loc='lower left', ncols=2)
    return figure
