"""Figures of networks: those found in a run, and those of held-out parcels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from bids_brainfm.reports import style
from bids_brainfm.reports.figures.brain import brains
from bids_brainfm.reports.fragments import count, shorten
from bids_brainfm.reports.style import BLUE, GREY, INK, MISSING, VERMILION
from bids_brainfm.signals.paint import COLOURS

if TYPE_CHECKING:
    from bids_brainfm.analyses.knn import KnnScore

Colour = tuple[float, float, float]
NULL = 'spatial null'


@style.look()
def networks(xyz: np.ndarray, labels: np.ndarray, names: list[str],
             reference: Sequence[str] | None, confidence: np.ndarray,
             agreement: dict[str, float] | None) -> Figure:  # fmt: skip
    """Networks found in a run and those of a reference, one colour for each network.

    Parameters
    ----------
    labels : (P,) int, cluster 1 to k of each parcel; 0 where missing
    names : list of k str, reference network of each cluster; of the same one, shades of its colour
    reference : (P,) str or None, network of each parcel; empty or 'n/a' where it has none
    confidence : (P,) float, of the assignment; NaN where missing
    agreement : dict of float or None, measures of agreement with the reference by name
    """
    names = [str(name) for name in names]
    expected = [] if reference is None else [str(name) for name in reference]
    # by the reference, so that a network has one colour in all figures
    known = list(dict.fromkeys([*sorted(set(expected) - {'', 'n/a'}), *names]))
    base = {name: to_rgb(COLOURS[i % len(COLOURS)]) for i, name in enumerate(known)}
    shades = []
    for cluster, name in enumerate(names):
        paler = 0.65 * names[:cluster].count(name) / max(names.count(name) - 1, 1)
        red, green, blue = ((1 - paler) * part + paler for part in base[name])
        shades.append((red, green, blue))

    maps: list[tuple[str, np.ndarray, list[Colour]]] = [('Found', labels - 1, shades)]
    if reference is not None:
        numbers = [known.index(name) if name in base else -1 for name in expected]
        maps.append(('Reference', np.array(numbers), list(base.values())))
    figure = style.new_figure(max(2.35 * len(maps) + 0.4, 2.1 + 0.17 * len(base)))
    grid = figure.add_gridspec(1, 2, width_ratios=[2.4, 1])
    left = grid[0].subgridspec(len(maps), 1)
    for row, (title, values, palette) in enumerate(maps):
        palette = palette or [to_rgb(MISSING)]
        norm = BoundaryNorm(np.arange(len(palette) + 1) - 0.5, len(palette))
        values = np.where(values < 0, np.nan, values)
        views = brains(figure, left[row], xyz, values, ListedColormap(palette), norm)
        views[0].set_title(title)

    right = grid[1].subgridspec(2, 1, height_ratios=[0.17 * len(base) + 0.2, 1.2])
    _network_legend(figure.add_subplot(right[0]), labels, names, base, shades)
    _confidence(figure.add_subplot(right[1]), confidence[np.isfinite(confidence)])

    found = labels > 0
    finding = f'{count(len(names), "cluster")} in {found.sum()} of {len(labels)} parcels'
    if not found.any():
        finding = f'No network was found in {len(labels)} parcels'
    if agreement:
        pairs = ', '.join(f'{_words(name)} {value:z.2f}' for name, value in agreement.items())
        finding += f'; agreement with the reference: {pairs}'
    style.headline(figure, finding)
    return figure


def _network_legend(
    axes: Axes, labels: np.ndarray, names: list[str], base: dict[str, Colour], shades: list[Colour]
) -> None:
    """Each network with the shades of its clusters and the number of their parcels."""
    axes.set_axis_off()
    handles, entries = [], []
    for name, colour in base.items():
        own = [cluster for cluster, match in enumerate(names) if match == name]
        colours = [shades[cluster] for cluster in own] or [colour]
        handles.append(tuple(Patch(color=each) for each in colours))
        parcels = np.isin(labels - 1, own).sum() if own else 'not found'
        entries.append(f'{shorten(name)} ({parcels})')
    axes.legend(handles, entries, loc='upper left', borderaxespad=0, fontsize=7.5,
                labelspacing=0.35, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
                handlelength=2.2, title='network (parcels found)', title_fontsize=8,
                alignment='left')  # fmt: skip


def _confidence(axes: Axes, values: np.ndarray) -> None:
    """Histogram of confidence, from 0 to 1 where that holds all of it."""
    within = not values.size or (values.min() >= 0 and values.max() <= 1)
    limits = (0, 1) if within else None
    _, edges, _ = axes.hist(values, bins=25, range=limits, color=BLUE, linewidth=0)
    axes.set(xlim=(edges[0], edges[-1]), xlabel='confidence', ylabel='parcels')
    if values.size:
        median = np.median(values)
        axes.axvline(median, color=VERMILION, linewidth=1, linestyle='--')
        axes.set_title(f'Median confidence {median:z.2f}')
    else:
        style.say_none(axes)


def _words(name: str) -> str:
    """Words of a name in capitals.

    >>> _words('AdjustedRandIndex'), _words('ARI')
    ('adjusted Rand index', 'ARI')
    """
    if name.isupper():
        return name
    return re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', name).lower().replace('rand', 'Rand')


@style.look()
def knn(scores: dict[str, KnnScore], null: np.ndarray) -> Figure:
    """How well a parcel's nearest neighbours tell its network, against what would do as well.

    Parameters
    ----------
    scores : dict of KnnScore, by name: what is tested comes first, the spatial null is among them
    null : (N,) float, accuracy of each spatial surrogate
    """
    null = null[np.isfinite(null)]
    figure = style.new_figure(3.0)
    axes = figure.subplots()
    for place, (name, score) in enumerate(scores.items()):
        bars = ((-0.2, score.accuracy, 1.0), (0.2, score.balanced_accuracy, 0.5))
        for shift, value, alpha in bars:
            colour = BLUE if place == 0 else GREY
            axes.bar(place + shift, value, 0.36, color=colour, alpha=alpha, linewidth=0)
            top = max(value, *null) if name == NULL and shift < 0 and null.size else value
            if np.isfinite(value):
                axes.annotate(
                    f'{value:z.2f}', (place + shift, top), xytext=(0, 2), ha='center',
                    textcoords='offset points', fontsize=8, zorder=4,
                    bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.6, 'alpha': 0.8},
                )  # fmt: skip
        if name == NULL and null.size:
            # Spread by the golden ratio: even, and the same in every run
            across = place - 0.2 + 0.3 * ((np.arange(null.size) * 0.618034) % 1 - 0.5)
            axes.scatter(across, null, s=5, color=VERMILION, alpha=0.5, linewidths=0, zorder=3,
                         rasterized=null.size > 300, label=f'{null.size} surrogates')  # fmt: skip
            axes.axhline(np.quantile(null, 1 - style.ALPHA), color=VERMILION, linewidth=0.9,
                         linestyle='--', zorder=3,
                         label=f'{1 - style.ALPHA:.0%} of them lie below')  # fmt: skip
    for alpha, label in ((1.0, 'accuracy'), (0.5, 'balanced accuracy')):
        axes.bar(0, 0, color=INK, alpha=alpha, label=label)
    style.legend_above(axes, 'lower right', 0.1, ncols=4, markerscale=2)
    axes.set_xticks(range(len(scores)), list(scores))
    axes.tick_params(axis='x', length=0, labelsize=9)
    axes.set_xlim(-0.6, max(len(scores), 3) - 0.4)
    axes.set_ylim(0, min(1.05, 1.15 * axes.dataLim.ymax) or 1)
    axes.set_ylabel('proportion of parcels correct')

    name, tested = next(iter(scores.items()))
    finding = f'Accuracy of {name} {tested.accuracy:.2f}'
    if null.size and np.isfinite(tested.p):
        verdict = 'above' if tested.p < style.ALPHA else 'not above'
        p = 'p < 0.001' if tested.p < 0.001 else f'p = {tested.p:.3f}'
        finding += f', {verdict} the spatial null (mean {null.mean():.2f}, {p})'
    elif np.isnan(tested.accuracy):
        finding = f'{name}: no parcel could be classified'
    style.headline(figure, finding)
    return figure
