"""Pictures of the analyses: arrays in, one Matplotlib figure out, as in `figures`.

Values of parcels are drawn at the parcels' centres in nilearn's glass brain. Titles state what
was found. Look and colours are in :mod:`bids_brainfm.reports.style`, which also writes the SVG.
"""

import re
import textwrap
from functools import cache

import numpy as np

from bids_brainfm.reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MISSING,
    MISSING_IN_GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    colour_map,
    headline,
    new_figure,
    shrink,
    styled,
    whole_numbers,
)
from bids_brainfm.signals.paint import COLOURS

# A point hidden from the model: a colour that is no grey and not that of missing parcels
HIDDEN = '#F6DDA0'
FLOOR = -1.0  # R2 has no lower end; what lies below is counted, not drawn
ALPHA = 0.05
LEVELS = 41  # of diverging maps: odd, so that the middle is white

# Across and up in each view of the glass brain, its name, and marks of its left and right end
VIEWS = {
    'l': (1, 2, 'left side', ('A', 'P')),
    'z': (0, 1, 'from above', ('L', 'R')),
    'r': (1, 2, 'right side', ('P', 'A')),
}
HALF = 97.0  # mm, half the height of each view, so that all have one scale


@cache
def _outline(view):
    """nilearn's schematic of the brain in a view of `VIEWS`, in mm.

    Returns
    -------
    strokes : list of (matplotlib.path.Path, float)
        Paths and the width of their line.
    bounds : tuple of 4 float
        Left, right, bottom and top.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.path import Path

    # On import nilearn starts the user's backend, and takes another where there is no display.
    # The dict's own methods neither choose a backend nor start one.
    backend = dict.__getitem__(matplotlib.rcParams, 'backend')
    matplotlib.rcParams['backend'] = 'agg'
    try:
        from nilearn.plotting.glass_brain import plot_brain_schematics
    finally:
        dict.__setitem__(matplotlib.rcParams, 'backend', backend)

    axes = Figure().subplots()
    bounds = plot_brain_schematics(axes, view)
    pieces = {}  # hundreds of strokes of a few widths: one path for each width
    for patch in axes.patches:
        in_mm = patch.get_transform() - axes.transData
        path = in_mm.transform_path(patch.get_path())
        pieces.setdefault(patch.get_linewidth(), []).append(path)
    return [(Path.make_compound_path(*paths), width) for width, paths in pieces.items()], bounds


def _brains(figure, cell, xyz, values, cmap, norm, *, ringed=None, faded=None, starred=None):
    """Values at parcel centres in a glass brain, from the left, from above and from the right.

    In a view from the side only the parcels of that side are drawn (those at x = 0 in both). A
    parcel nearer to the viewer lies on top, a ringed one on top of all others. Parcels without a
    value are small grey dots.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    cell : matplotlib.gridspec.SubplotSpec
        Where the three views go.
    xyz : (P, 3) float
        Centres in mm, RAS+; rows with NaN are not drawn.
    values : (P,) float
        NaN where missing.
    cmap, norm : Matplotlib's
    ringed, faded, starred : (P,) bool, optional
        Parcels with a dark ring, pale ones, and ones under a star.

    Returns
    -------
    list of matplotlib.axes.Axes
        One for each of `VIEWS`.
    """
    from matplotlib.patches import PathPatch

    xyz, values = np.asarray(xyz, float), np.asarray(values, float)
    nowhere = np.zeros(len(values), bool)
    ringed = nowhere if ringed is None else ringed
    starred = nowhere if starred is None else starred
    known = np.isfinite(values)
    colours = cmap(norm(np.where(known, values, norm.vmin)))
    if faded is not None:
        colours[faded, 3] = 0.3
    depth = {'l': -xyz[:, 0], 'z': xyz[:, 2], 'r': xyz[:, 0]}
    there = {'l': xyz[:, 0] <= 0, 'z': np.isfinite(xyz[:, 0]), 'r': xyz[:, 0] >= 0}

    grid = cell.subgridspec(1, 3, width_ratios=(1.3, 1, 1.3), wspace=0)  # widths of the brain
    every = []
    for column, (view, (across, up, name, ends)) in enumerate(VIEWS.items()):
        every.append(axes := figure.add_subplot(grid[column]))
        strokes, (left, right, bottom, top) = _outline(view)
        for path, width in strokes:  # left out of the layout, which would trace each curve
            look = {'facecolor': 'none', 'edgecolor': GREY, 'linewidth': 0.5 * width}
            axes.add_artist(PathPatch(path, zorder=0, in_layout=False, **look))
        on_side = there[view]
        points = xyz[:, [across, up]]
        grey = on_side & ~known
        axes.scatter(*points[grey].T, s=5, color=MISSING, linewidths=0, zorder=1)
        shown = np.flatnonzero(on_side & known)
        shown = shown[np.lexsort((depth[view][shown], ringed[shown]))]
        axes.scatter(
            *points[shown].T, s=27, color=colours[shown], clip_on=False, zorder=2,
            edgecolors=np.where(ringed[shown], INK, GREY),
            linewidths=np.where(ringed[shown], 1.1, 0.25),
        )  # fmt: skip
        star = on_side & starred
        axes.scatter(
            *points[star].T, s=75, marker='*', color=YELLOW, edgecolors=INK, linewidths=0.6,
            clip_on=False, zorder=3,
        )  # fmt: skip
        axes.set_xlim((right, left) if view == 'l' else (left, right))
        middle = (bottom + top) / 2
        axes.set_ylim(middle - HALF, middle + HALF)
        axes.set_aspect('equal')
        axes.set_axis_off()
        axes.text(0.5, 0, name, transform=axes.transAxes, ha='center', va='top', fontsize=8)
        for end, x in zip(ends, (0.03, 0.97), strict=True):
            axes.text(
                x, top, end, transform=axes.get_yaxis_transform(), ha='center', va='top',
                color=GREY,
            )  # fmt: skip
    return every


def _bar(figure, axes, cmap, norm, values, label, ticks=None):
    """Colour bar below glass brains, pointed where values lie beyond the scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    low, high = (values < norm.vmin).any(), (values > norm.vmax).any()
    bar = figure.colorbar(
        ScalarMappable(norm, cmap), ax=axes, location='bottom', shrink=0.45, aspect=28, pad=0.02,
        label=label, extend=('neither', 'min', 'max', 'both')[low + 2 * high],
    )  # fmt: skip
    if ticks is None:
        bar.locator = MaxNLocator(5)
        bar.formatter = '{x:.2g}'  # a common factor would stand on the label
    else:
        bar.set_ticks(ticks, labels=[f'{tick:.2f}' for tick in ticks])
        bar.minorticks_off()


def _about_zero(values, most=np.inf):
    """A scale symmetric about 0 that leaves out the 2% of values farthest from it."""
    from matplotlib.colors import Normalize

    away = np.abs(values[np.isfinite(values)])
    limit = min(np.quantile(away, 0.98), most) if away.size else 0
    limit = limit or (away.max(initial=0) or 1.0)
    return Normalize(-limit, limit)


def _missing(values):
    """Words on parcels without a value, for the end of a title that speaks of the others."""
    missing = int(np.isnan(values).sum())
    return f'; {missing} without a value (grey)' if 0 < missing < len(values) else ''


def _short(name):
    """A name that leaves room for the picture."""
    return name if len(name) <= 26 else name[:25] + '…'


def _share(part):
    """A share in whole percent, without turning a few into none."""
    return '<1%' if 0 < part < 0.01 else f'{part:.0%}'


def _stretches(marked):
    """Start and length of each run of True in (T,) bool."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], marked.astype(int), [0]))))
    return [(start, end - start) for start, end in edges.reshape(-1, 2)]


def _nothing(axes):
    axes.text(0.5, 0.5, 'none', transform=axes.transAxes, ha='center', va='center', color=GREY)


@styled
def reconstruction(
    original, hidden, reconstructed, tr, r2, names, order=None, *, order_label='atlas order',
    start=0.0,
):  # fmt: skip
    """Parcel series as measured, as the model saw them in its first pass, and as it rebuilt them.

    Above, the series of the parcels with the best, the median and the worst R2; below, all of
    them as carpets with one scale.

    Parameters
    ----------
    original : (T, P) float
        In the model's scaled units; a missing parcel is NaN throughout.
    hidden : (T, P) bool
        Points hidden in the first masking pass.
    reconstructed : (T, P) float
        NaN in missing parcels and where a sample lies in no window.
    tr : float
        Repetition time in seconds.
    r2 : (P,) float
        Of each parcel; NaN where it could not be scored.
    names : sequence of P str
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
    from matplotlib.colors import ListedColormap

    original, reconstructed = np.asarray(original, float), np.asarray(reconstructed, float)
    hidden, r2 = np.asarray(hidden, bool), np.asarray(r2, float)
    samples, parcels = original.shape
    order = np.arange(parcels) if order is None else np.asarray(order)
    end = start + samples * tr
    moment = start + tr * (np.arange(samples) + 0.5)  # the middle of a sample's column below

    ranked = np.argsort(-r2, kind='stable')[: np.isfinite(r2).sum()]
    # Of one or two parcels the later words hold
    places = {(len(ranked) - 1) // 2: 'median', len(ranked) - 1: 'worst', 0: 'best'}
    chosen = {ranked[place]: places[place] for place in sorted(places)} if ranked.size else {}

    figure = new_figure(4.6 + 0.85 * len(chosen))
    rows = figure.subplots(
        len(chosen) + 3, 1, sharex=True,
        gridspec_kw={'height_ratios': [0.8] * len(chosen) + [1.5] * 3},
    )  # fmt: skip
    for axes, (parcel, word) in zip(rows, chosen.items(), strict=False):
        spans = [(start + tr * a, tr * n) for a, n in _stretches(hidden[:, parcel])]
        axes.broken_barh(
            spans, (0, 1), transform=axes.get_xaxis_transform(), color=HIDDEN, linewidth=0,
            alpha=0.6, label='hidden in the first pass',
        )  # fmt: skip
        axes.plot(moment, original[:, parcel], color=GREY, linewidth=1.1, label='original')
        axes.plot(moment, reconstructed[:, parcel], color=BLUE, linewidth=1.1, label='rebuilt')
        axes.set_title(f'{word} parcel: {names[parcel]}, R² = {r2[parcel]:z.2f}')
        axes.set_ylabel('scaled')
    if chosen:
        rows[0].legend(
            loc='lower right', bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1, columnspacing=1.2
        )

    seen = original[np.isfinite(original)]
    low, high = np.quantile(seen, [0.02, 0.98]) if seen.size else (-1.0, 1.0)
    if low == high:
        low, high = low - 1, high + 1
    empty = ' (pale blue: none)' if np.isnan(reconstructed).any() else ''
    panels = (
        ('Original', original),
        ('What the model saw in the first pass (hidden points blank)', original),
        ('Rebuilt, each point while it was hidden' + empty, reconstructed),
    )
    carpets = rows[len(chosen) :]
    blank = np.isfinite(original) & hidden
    for number, (axes, (title, series)) in enumerate(zip(carpets, panels, strict=True)):
        extent = (start, end, parcels, 0)
        values = shrink(np.where(blank & (number == 1), np.nan, series)[:, order].T, 450, 600)
        picture = axes.imshow(
            values, cmap=colour_map('gray', 16, MISSING_IN_GREY), vmin=low, vmax=high,
            aspect='auto', extent=extent,
        )  # fmt: skip
        if number == 1:
            covered = shrink(blank[:, order].T.astype(float), 450, 600)
            covered = np.where(np.isnan(values) & (covered > 0), 0.0, np.nan)
            axes.imshow(covered, cmap=ListedColormap([HIDDEN]), aspect='auto', extent=extent)
        axes.set_title(title)
    carpets[1].set_ylabel(f'parcel ({order_label})')
    carpets[-1].set_xlabel('time (s)')
    carpets[-1].set_xlim(start, end)
    bar = figure.colorbar(
        picture, ax=list(carpets), extend='both', shrink=0.6, aspect=30, pad=0.01
    )
    bar.set_label('scaled signal')

    share = blank.sum() / max(seen.size, 1)
    if ranked.size:
        found = f'Median R² {np.nanmedian(r2):z.2f} over {len(ranked)} of {parcels} parcels'
    else:
        found = f'None of {parcels} parcels could be scored'
    headline(figure, f'{found}; {_share(share)} of the points hidden in the first pass')
    return figure


@styled
def r2_map(xyz, scores):
    """R2 of the model in each parcel, and its distribution beside those of the baselines.

    Parameters
    ----------
    xyz : (P, 3) float
        Centres in mm, RAS+.
    scores : dict of (P,) float
        R2 of the model, first, and of each baseline, by name; NaN where it could not be scored.

    Returns
    -------
    matplotlib.figure.Figure
    """
    scores = {name: np.asarray(values, float) for name, values in scores.items()}
    (model, ours), *baselines = scores.items()
    both = np.all([np.isfinite(values) for values in scores.values()], axis=0)
    figure = new_figure(3.2)
    grid = figure.add_gridspec(1, 2, width_ratios=[2.5, 1])
    cmap, norm = colour_map('RdBu_r', LEVELS, MISSING), _about_zero(ours, most=1.0)
    brains = _brains(figure, grid[0], xyz, ours, cmap, norm)
    _bar(figure, brains, cmap, norm, ours, f'R² of the {model}')

    axes = figure.add_subplot(grid[1])
    pooled = np.concatenate([values[np.isfinite(values)] for values in scores.values()])
    if pooled.size:
        axes.set_xlim(max(pooled.min(), FLOOR) - 0.03, min(pooled.max(), 1.0) + 0.03)
    else:
        _nothing(axes)
    looks = [(BLUE, '-'), (ORANGE, '--'), (VERMILION, '-.'), (GREY, ':')]
    for (name, values), (colour, dashes) in zip(scores.items(), looks, strict=False):
        values = np.sort(values[np.isfinite(values)])
        if values.size:
            below = _share((values < FLOOR).mean())
            axes.step(
                np.concatenate(([-1e9], values, [1e9])),  # the curve runs on beyond both ends
                100 * np.concatenate(([0], np.arange(1, len(values) + 1) / len(values), [1])),
                where='post', color=colour, linestyle=dashes, linewidth=1 + (name == model),
                label=name + f' ({below} below {FLOOR:.0f})' * bool((values < FLOOR).any()),
            )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.6, zorder=0)
    axes.set_ylim(0, 101)
    axes.set_xlabel('R²')
    axes.set_ylabel('parcels at or below (%)')
    if pooled.size:
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), borderaxespad=0.2)

    counts = ' and '.join(
        f'above {name} in {(ours > values)[both].sum()}' for name, values in baselines
    )
    if not np.isfinite(ours).any():
        found = f'No parcel has an R² of the {model}'
    elif baselines:
        found = f'R² of the {model} {counts} of {both.sum()} parcels'
    else:
        found = f'R² of the {model} above 0 in {(ours > 0).sum()} of {len(ours)} parcels'
    headline(figure, found + _missing(ours))
    return figure


@styled
def gain(gains, r2, warned):
    """How well hidden points are predicted when the input is made larger or smaller.

    Parameters
    ----------
    gains : (G,) float
        Factors on the model's input, above 0.
    r2 : (G,) float
        R2 of the hidden points at each gain.
    warned : bool
        Whether the user is warned that another gain would do better.

    Returns
    -------
    matplotlib.figure.Figure
    """
    gains, r2 = np.asarray(gains, float), np.asarray(r2, float)
    order = np.argsort(gains)
    gains, r2 = gains[order], r2[order]
    known = np.isfinite(r2)
    below = known & (r2 < FLOOR)
    plain = np.abs(np.log(gains)).argmin()

    figure = new_figure(2.7)
    axes = figure.subplots()
    axes.axvline(1, color=INK, linewidth=0.9, linestyle='--', zorder=0)
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    axes.plot(gains, r2, 'o-', color=BLUE, markersize=5, linewidth=1.3)
    axes.set_xscale('log', base=2)
    axes.set_xticks(gains, [f'{each:g}' if each >= 1 else f'{each:.3g}' for each in gains])
    axes.minorticks_off()
    axes.set_xlabel('gain on the input (1: as it is)')
    axes.set_ylabel('R² of hidden points')
    if below.any():
        axes.set_ylim(FLOOR, max(np.nanmax(r2), 0) + 0.1)
        axes.plot(
            gains[below], np.full(below.sum(), FLOOR), 'v', color=BLUE, markersize=7,
            clip_on=False,
        )  # fmt: skip
    else:
        axes.margins(y=0.15)
    if not known.any():
        _nothing(axes)
        headline(figure, f'R² could not be computed at any of {len(gains)} gains')
        return figure
    best = np.nanargmax(r2)
    at_best, at_one = (
        f'R² is {r2[best]:z.2f} at gain {gains[best]:g}',
        f'{r2[plain]:z.2f} at gain 1',
    )
    if r2[best] <= 0:
        found = f'At no gain is the model nearer than the mean: {at_best}, {at_one}'
    elif warned:
        found = f'{at_best}, against {at_one}: the input is not on the scale that the model knows'
    elif best == plain:
        found = f'R² is highest at gain 1, {r2[plain]:z.2f}'
    else:
        found = f'{at_best}, against {at_one}: the input is on the scale that the model knows'
    if below.any():
        found += f'; {below.sum()} of {len(r2)} points lie below {FLOOR:.0f} (triangles)'
    headline(figure, found, color=VERMILION if warned else INK)
    return figure


WAYS = {  # of forecasting: colour, line and width
    'model': (BLUE, '-', 2.4),
    'persistence': (ORANGE, '--', 1.3),
    'mean': (GREY, '-', 1.3),
    'ar': (VERMILION, '-.', 1.3),
}
MEASURES = {'mse': 'MSE', 'r2': 'R²', 'r': 'r', 'ar': 'AR'}


@styled
def forecast(steps_s, scores, examples):
    """Rolling forecasts of a few parcels with their fan, and the scores of each step.

    Parameters
    ----------
    steps_s : (n,) float
        Time of each step since the last sample that the model saw, in seconds.
    scores : dict of dict of (n,) float
        'mse', 'r2' and 'r' of each step for 'model', 'persistence', 'mean' and 'AR'.
    examples : list of dict
        Up to three parcels are drawn: ``name``; ``time`` (T,) in seconds; ``observed`` (T,) in
        the model's scaled units; and ``origins``, a list of (time (n,), prediction (n,), spread
        (n,)), where the spread is the RMS error at that step.

    Returns
    -------
    matplotlib.figure.Figure
    """
    steps_s = np.asarray(steps_s, float)
    examples = examples[:3]
    measures = list(dict.fromkeys(measure for way in scores.values() for measure in way))
    figure = new_figure(2.7 + 1.25 * len(examples))
    grid = figure.add_gridspec(
        len(examples) + 1, max(len(measures), 1), height_ratios=[1.0] * len(examples) + [1.7]
    )
    first = None
    for row, example in enumerate(examples):
        axes = figure.add_subplot(grid[row, :], sharex=first)
        first = first or axes
        axes.plot(example['time'], example['observed'], color=INK, linewidth=0.8, label='observed')
        for number, (time, prediction, spread) in enumerate(example['origins']):
            time, prediction, spread = (np.asarray(a, float) for a in (time, prediction, spread))
            for width in (2, 1):
                axes.fill_between(
                    time, prediction - width * spread, prediction + width * spread, color=BLUE,
                    alpha=0.16, linewidth=0, label='± 1 and 2 RMS errors' * (number + width == 1),
                )  # fmt: skip
            axes.plot(
                time, prediction, color=BLUE, linewidth=1.5, label='forecast' * (number == 0)
            )
            if time.size:
                axes.axvline(time[0], color=GREY, linewidth=0.5, linestyle=':', zorder=0)
        axes.margins(x=0)
        axes.set_ylabel('scaled')
        axes.set_title(example['name'])
        if row == 0:
            axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
        if row == len(examples) - 1:
            axes.set_xlabel('time (s)')
        else:
            axes.tick_params(labelbottom=False)

    spare = iter(((GREEN, ':', 1.3), (PURPLE, ':', 1.3), (SKY, ':', 1.3)))
    looks = {way: WAYS.get(way.lower()) or next(spare, (INK, ':', 1.3)) for way in scores}
    for column, measure in enumerate(measures):
        axes = figure.add_subplot(grid[-1, column])
        for way, (colour, dashes, width) in looks.items():
            values = np.asarray(scores[way].get(measure, np.full(len(steps_s), np.nan)), float)
            axes.plot(
                steps_s, values, color=colour, linestyle=dashes, linewidth=width,
                marker='o' if len(steps_s) <= 3 else '', markersize=4,
                label=MEASURES.get(way.lower(), way), zorder=2 + (way == 'model'),
            )  # fmt: skip
        axes.set_xlabel('time ahead (s)')
        title = MEASURES.get(measure.lower(), measure)
        drawn = [line.get_ydata() for line in axes.lines]
        lowest = np.nanmin(drawn) if np.isfinite(drawn).any() else 0
        if title == 'R²' and lowest < FLOOR:
            axes.set_ylim(FLOOR, max(np.nanmax(drawn), 0) + 0.1)
            title += f' (cut off at {FLOOR:.0f})'
        elif title == 'MSE':
            axes.set_ylim(bottom=0)
        if lowest < 0:
            axes.axhline(0, color=INK, linewidth=0.6, zorder=0)
        axes.set_title(title)
    if measures:
        lines = figure.axes[-1].lines[: len(looks)]
        figure.legend(handles=lines, loc='outside lower center', ncols=len(looks), handlelength=3)
    headline(figure, _lowest_error(scores))
    return figure


def _lowest_error(scores):
    """At how many steps the model has the lowest error, in words."""
    ours = np.asarray(scores['model']['mse'], float)
    others = [np.asarray(way['mse'], float) for name, way in scores.items() if name != 'model']
    known = np.isfinite(ours) & np.all([np.isfinite(each) for each in others], axis=0)
    if not known.any():
        return 'No step of the forecast could be scored'
    best = np.all([ours < each for each in others], axis=0) & known
    return f'The model has the lowest error at {best.sum()} of {known.sum()} steps'


@styled
def networks(xyz, labels, names, reference, confidence, agreement):
    """Networks found in a run beside those of a reference, a colour for each network.

    Parameters
    ----------
    xyz : (P, 3) float
        Centres in mm, RAS+.
    labels : (P,) int
        Cluster 1 to k of each parcel; 0 where missing.
    names : sequence of k str
        Network of the reference that each cluster matches. Clusters that match the same are
        shades of its colour.
    reference : (P,) str or None
        Network of each parcel; empty or 'n/a' where it has none.
    confidence : (P,) float
        Of the assignment; NaN where missing.
    agreement : dict of float or None
        Measures of agreement with the reference by name.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.colors import to_rgb
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    labels, confidence = np.asarray(labels, int), np.asarray(confidence, float)
    names = [str(name) for name in names]
    theirs = [] if reference is None else [str(each) for each in reference]
    # by the reference, so that a network has one colour in all figures
    known = dict.fromkeys([*sorted(set(theirs) - {'', 'n/a'}), *names])
    base = {name: to_rgb(COLOURS[place % len(COLOURS)]) for place, name in enumerate(known)}
    shades = []
    for cluster, name in enumerate(names):
        paler = 0.65 * names[:cluster].count(name) / max(names.count(name) - 1, 1)
        shades.append(tuple((1 - paler) * part + paler for part in base[name]))

    maps = [('Found', labels - 1.0, shades)]
    if reference is not None:
        place = {name: number for number, name in enumerate(base)}
        maps.append(
            ('Reference', np.array([place.get(each, -1) for each in theirs]), list(base.values()))
        )
    figure = new_figure(max(2.35 * len(maps) + 0.4, 2.1 + 0.17 * len(base)))
    grid = figure.add_gridspec(1, 2, width_ratios=[2.4, 1])
    left = grid[0].subgridspec(len(maps), 1)
    for row, (title, values, palette) in enumerate(maps):
        values = np.where(values < 0, np.nan, values)
        brains = _brains(figure, left[row], xyz, values, *_categories(palette))
        brains[0].set_title(title)

    right = grid[1].subgridspec(2, 1, height_ratios=[0.17 * len(base) + 0.2, 1.2])
    legend = figure.add_subplot(right[0])
    legend.set_axis_off()
    handles, words = [], []
    for name in base:
        own = [cluster for cluster, each in enumerate(names) if each == name]
        handles.append(tuple(Patch(color=shades[cluster]) for cluster in own) or (
            Patch(color=base[name]),
        ))  # fmt: skip
        count = int(np.isin(labels - 1, own).sum())
        words.append(f'{_short(name)} ({count})' if own else f'{_short(name)} (not found)')
    legend.legend(
        handles, words, loc='upper left', borderaxespad=0, fontsize=7.5, labelspacing=0.35,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}, handlelength=2.2,
        title='network (parcels found)', title_fontsize=8, alignment='left',
    )  # fmt: skip

    axes = figure.add_subplot(right[1])
    sure = confidence[np.isfinite(confidence)]
    within = not sure.size or (sure.min() >= 0 and sure.max() <= 1)
    counts, edges = np.histogram(sure, bins=25, range=(0, 1) if within else None)
    axes.bar(edges[:-1], counts, np.diff(edges), align='edge', color=BLUE, linewidth=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel('confidence')
    axes.set_ylabel('parcels')
    if sure.size:
        axes.axvline(np.median(sure), color=VERMILION, linewidth=1, linestyle='--')
        axes.set_title(f'Median confidence {np.median(sure):z.2f}')
    else:
        _nothing(axes)

    plural = 'cluster' if len(names) == 1 else 'clusters'
    found = f'{len(names)} {plural} in {(labels > 0).sum()} of {len(labels)} parcels'
    if not (labels > 0).any():
        found = f'No network was found in {len(labels)} parcels'
    if agreement:
        pairs = ', '.join(f'{_words(name)} {value:z.2f}' for name, value in agreement.items())
        found += f'; agreement with the reference: {pairs}'
    headline(figure, found)
    return figure


def _words(name):
    """Words of a name in capitals.

    >>> _words('AdjustedRandIndex'), _words('ARI')
    ('adjusted Rand index', 'ARI')
    """
    if name.isupper():
        return name
    return re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', name).lower().replace('rand', 'Rand')


def _categories(palette):
    """Colour map and norm by which the value i has colour i of a list."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    palette = palette or [MISSING]
    norm = BoundaryNorm(np.arange(len(palette) + 1) - 0.5, len(palette))
    return ListedColormap(palette), norm


@styled
def knn(scores, null):
    """How well a parcel's nearest neighbours tell its network, against what would do as well.

    Parameters
    ----------
    scores : dict of objects
        Each with ``accuracy``, ``balanced_accuracy`` and ``p`` (None or NaN where there is no
        test), by name; what is tested comes first.
    null : (N,) float
        Accuracy of each spatial surrogate.

    Returns
    -------
    matplotlib.figure.Figure
    """
    null = np.asarray(null, float)
    null = null[np.isfinite(null)]
    names = list(scores)
    if null.size and 'spatial null' not in scores:
        names.append('spatial null')
    figure = new_figure(3.0)
    axes = figure.subplots()
    for place, name in enumerate(names):
        colour = BLUE if place == 0 else GREY
        values = [np.mean(null) if null.size else np.nan, np.nan]
        if name in scores:
            values = [scores[name].accuracy, scores[name].balanced_accuracy]
        for shift, value, strength in zip((-0.2, 0.2), values, (1.0, 0.5), strict=True):
            axes.bar(place + shift, value, 0.36, color=colour, alpha=strength, linewidth=0)
            dotted = name == 'spatial null' and shift < 0
            top = max(value, null.max()) if dotted and null.size else value
            if np.isfinite(value):
                axes.annotate(
                    f'{value:z.2f}', (place + shift, top), xytext=(0, 2), ha='center',
                    textcoords='offset points', fontsize=8, zorder=4,
                    bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.6, 'alpha': 0.8},
                )  # fmt: skip
        if name == 'spatial null' and null.size:
            # Spread by the golden ratio: even, and the same in every run
            across = place - 0.2 + 0.3 * ((np.arange(null.size) * 0.618034) % 1 - 0.5)
            axes.scatter(
                across, null, s=5, color=VERMILION, alpha=0.5, linewidths=0, zorder=3,
                rasterized=null.size > 300, label=f'{null.size} surrogates',
            )  # fmt: skip
            axes.axhline(
                np.quantile(null, 1 - ALPHA), color=VERMILION, linewidth=0.9, linestyle='--',
                zorder=3, label=f'{1 - ALPHA:.0%} of them lie below',
            )  # fmt: skip
    for strength, label in ((1.0, 'accuracy'), (0.5, 'balanced accuracy')):
        axes.bar(0, 0, color=INK, alpha=strength, label=label)
    axes.legend(
        loc='lower right', bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.1, markerscale=2
    )
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis='x', length=0, labelsize=9)
    axes.set_xlim(-0.6, max(len(names), 3) - 0.4)
    axes.set_ylim(0, min(1.05, 1.15 * axes.dataLim.ymax) or 1)
    axes.set_ylabel('share of parcels told right')

    tested = scores[names[0]]
    p = np.nan if tested.p is None else float(tested.p)
    found = f'Accuracy of {names[0]} {tested.accuracy:.2f}'
    if null.size and np.isfinite(p):
        verdict = 'above' if p < ALPHA else 'not above'
        found += f', {verdict} the spatial null (mean {null.mean():.2f}, {_say_p(p)})'
    elif np.isnan(tested.accuracy):
        found = f'{names[0]}: no parcel could be told'
    headline(figure, found)
    return figure


def _say_p(p):
    return 'p < 0.001' if p < 0.001 else f'p = {p:.3f}'


@styled
def attention(xyz, values, profile, note):
    """Attention that each parcel gets, as a multiple of an equal share.

    Parameters
    ----------
    xyz : (P, 3) float
        Centres in mm, RAS+.
    values : (P,) float
        Share of attention over an equal share: 1 is equal; NaN where missing.
    profile : (P, K) float or None
        Attention on each parcel at each of K time patches in any unit, drawn over its mean.
    note : str or None
        What has to be known to read the map, printed below the title.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.colors import LogNorm

    values = np.asarray(values, float)
    known = values[np.isfinite(values)]
    lines = textwrap.wrap(note or '', 125)
    figure = new_figure(3.2 + 0.16 * len(lines))
    panels = 1 + (profile is not None)
    rows = [0.16 * len(lines)] * bool(lines) + [3.0]
    grid = figure.add_gridspec(
        len(rows), panels, width_ratios=(2.5, 1)[:panels], height_ratios=rows
    )
    if lines:
        axes = figure.add_subplot(grid[0, :])
        axes.set_axis_off()
        axes.text(0.006, 1, '\n'.join(lines), va='top', fontsize=8.5, transform=axes.transAxes)
    away = np.abs(np.log(known[known > 0]))
    limit = max(np.exp(np.quantile(away, 0.98)) if away.size else 2.0, 1.05)
    cmap, norm = colour_map('PuOr_r', LEVELS, MISSING), LogNorm(1 / limit, limit)
    brains = _brains(figure, grid[-1, 0], xyz, np.maximum(values, 1e-9), cmap, norm)
    _bar(
        figure, brains, cmap, norm, values, 'share of attention over an equal share',
        ticks=limit ** np.array([-1, -0.5, 0, 0.5, 1]),
    )  # fmt: skip

    if profile is not None:
        profile = np.asarray(profile, float)
        axes = figure.add_subplot(grid[-1, 1])
        patches = np.arange(profile.shape[1])
        mean, low, high = np.full((3, len(patches)), np.nan)
        level = np.nanmean(profile) if np.isfinite(profile).any() else 1.0
        for patch in np.flatnonzero(np.isfinite(profile).any(0)):
            here = profile[:, patch] / (level or 1.0)
            mean[patch] = np.nanmean(here)
            low[patch], high[patch] = np.nanquantile(here, [0.1, 0.9])
        axes.fill_between(
            patches, low, high, color=BLUE, alpha=0.2, linewidth=0, label='80% of the parcels'
        )
        axes.plot(patches, mean, 'o-', color=BLUE, markersize=3.5, label='mean over parcels')
        axes.axhline(1, color=INK, linewidth=0.8, linestyle='--', zorder=0)
        whole_numbers(axes.xaxis)
        axes.margins(0.05)
        axes.set_xlabel('time patch')
        axes.set_ylabel('over an equal share')
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), borderaxespad=0.2)

    above = int((known > 1).sum())
    if not known.size:
        found = f'No parcel of {len(values)} has a share of attention'
    elif np.ptp(known) <= 1e-6 * np.abs(known).max():
        found = f'All {known.size} parcels get the same share of attention'
    else:
        top = np.sort(known)[::-1][: max(1, round(known.size / 10))]
        found = (
            f'{above} of {known.size} parcels get more than an equal share of attention; the '
            f'{len(top)} that get most hold {top.sum() / known.sum():.0%} of it'
        )
    headline(figure, found + _missing(values))
    return figure


@styled
def perturbation(xyz, change, target, p, null_sd, names, k_sd):
    """What the other parcels do when the target is held at another level.

    Parameters
    ----------
    xyz : (P, 3) float
        Centres in mm, RAS+.
    change : (P,) float
        Change of each parcel's reconstruction in its SD; NaN where not reconstructable.
    target : (P,) bool
        Parcels that were held; they are not counted among the changes.
    p : (P,) float
        Share of sham targets that change a parcel at least as much.
    null_sd : (P,) float
        Spread of the changes under sham targets, in SD.
    names : sequence of P str
    k_sd : float
        The level of the target, in SD above its mean.

    Returns
    -------
    matplotlib.figure.Figure
    """
    change, p, null_sd = (np.asarray(a, float) for a in (change, p, null_sd))
    target = np.asarray(target, bool)
    others = np.where(target, np.nan, change)
    known = np.isfinite(others)
    tested = known & np.isfinite(p)  # without enough sham targets there is no p
    # With 19 sham targets a change beyond all of them has a p of exactly 1 / 20
    beyond = tested & (p <= ALPHA + 1e-9)

    figure = new_figure(3.2)
    grid = figure.add_gridspec(1, 2, width_ratios=[2.3, 1])
    cmap, norm = colour_map('RdBu_r', LEVELS, MISSING), _about_zero(others)
    brains = _brains(
        figure, grid[0], xyz, others, cmap, norm, ringed=beyond, faded=~beyond, starred=target
    )
    _bar(figure, brains, cmap, norm, others, 'change (SD); stars: target; rings: p ≤ .05')

    axes = figure.add_subplot(grid[1])
    largest = np.flatnonzero(known)
    largest = largest[np.argsort(-np.abs(others[largest]), kind='stable')][:10]
    row = np.arange(len(largest))
    if largest.size:
        axes.barh(
            row, others[largest], 0.7, linewidth=0,
            color=cmap(np.where(others[largest] > 0, 0.72, 0.28)),  # the error bars show on it
            xerr=np.nan_to_num(null_sd[largest]), error_kw={'linewidth': 0.9}, ecolor=INK,
            capsize=2,
        )  # fmt: skip
    else:
        _nothing(axes)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(row, [_short(names[each]) for each in largest], fontsize=7.5)
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.set_ylim(9.6, -0.6)
    axes.set_xlabel('change ± sham spread (SD)')
    axes.locator_params(axis='x', nbins=3)
    axes.xaxis.set_major_formatter('{x:.2g}')
    axes.set_title('Largest changes')

    plural = 'parcel' if target.sum() == 1 else 'parcels'
    held = f'{target.sum()} {plural} held at {k_sd:+g} SD'
    if known.any() and not tested.any():
        found = f'{held}: too few sham targets to tell whether {known.sum()} others change'
    elif known.any():
        found = (
            f'{held}: {beyond.sum()} of {tested.sum()} others change beyond the sham null '
            f'(p ≤ .05; {ALPHA * tested.sum():.0f} expected by chance)'
        )
    else:
        found = f'{held}: no other parcel could be reconstructed'
    headline(figure, found + _missing(change[~target]))
    return figure


@styled
def contrast(xyz, difference, q, label_a, label_b, n_a, n_b):
    """Difference of two groups or conditions in each parcel.

    Parameters
    ----------
    xyz : (P, 3) float
        Centres in mm, RAS+.
    difference : (P,) float
        A minus B; NaN where missing.
    q : (P,) float
        False discovery rate at which the parcel differs.
    label_a, label_b : str
    n_a, n_b : int
        Number of observations in each.

    Returns
    -------
    matplotlib.figure.Figure
    """
    difference, q = np.asarray(difference, float), np.asarray(q, float)
    known = np.isfinite(difference)
    differs = known & (q < ALPHA)
    figure = new_figure(3.2)
    grid = figure.add_gridspec(1, 2, width_ratios=[2.5, 1])
    cmap, norm = colour_map('RdBu_r', LEVELS, MISSING), _about_zero(difference)
    brains = _brains(figure, grid[0], xyz, difference, cmap, norm, ringed=differs)
    _bar(figure, brains, cmap, norm, difference, f'{label_a} minus {label_b} (rings: q < .05)')

    axes = figure.add_subplot(grid[1])
    if known.any():
        edges = np.histogram_bin_edges(difference[known], bins=30)
        for values, colour, label in (
            (difference[known], MISSING, 'all parcels'),
            (difference[differs], BLUE, 'q < .05'),
        ):
            counts, _ = np.histogram(values, bins=edges)
            axes.bar(
                edges[:-1], counts, np.diff(edges), align='edge', color=colour, linewidth=0,
                label=label,
            )  # fmt: skip
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    else:
        _nothing(axes)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel('difference')
    axes.set_ylabel('parcels')

    sizes = f'{label_a} (n = {n_a}) and {label_b} (n = {n_b})'
    if not known.any():
        found = f'{sizes} could be compared in no parcel'
    elif not np.isfinite(q).any():
        found = f'{sizes}: too few participants for a test'
    elif not differs.any():
        found = f'{sizes} differ in none of {known.sum()} parcels at q < .05'
    else:
        above = (differs & (difference > 0)).sum()
        found = (
            f'{label_a} (n = {n_a}) above {label_b} (n = {n_b}) in {above} and below in '
            f'{differs.sum() - above} of {known.sum()} parcels at q < .05'
        )
    headline(figure, found + _missing(difference))
    return figure
