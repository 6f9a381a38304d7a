"""Values of parcels at their centres in nilearn's glass brain, which several figures draw."""

from functools import cache

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from bids_brainfm.reports import style
from bids_brainfm.reports.style import GREY, INK, MISSING, YELLOW

LEVELS = 41  # of diverging maps: odd, so that the middle is white

# Across and up in each view of the glass brain, its name, and marks of its left and right end
VIEWS = {
    'l': (1, 2, 'left side', ('A', 'P')),
    'z': (0, 1, 'from above', ('L', 'R')),
    'r': (1, 2, 'right side', ('P', 'A')),
}
HALF = 97.0  # mm, half the height of each view, so that all have one scale


@cache
def _outline(view: str) -> tuple[list[tuple[Path, float]], tuple[float, float, float, float]]:
    """nilearn's brain in a view, in mm: paths with their line widths; left, right, bottom, top."""
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
    pieces: dict[float, list[Path]] = {}  # hundreds of strokes of a few widths: a path for each
    for patch in axes.patches:
        path = (patch.get_transform() - axes.transData).transform_path(patch.get_path())
        pieces.setdefault(patch.get_linewidth(), []).append(path)
    return [(Path.make_compound_path(*paths), width) for width, paths in pieces.items()], bounds


def brains(figure: Figure, cell: SubplotSpec, xyz: np.ndarray, values: np.ndarray, cmap: Colormap,
           norm: Normalize, *, ringed: np.ndarray | None = None, faded: np.ndarray | None = None,
           starred: np.ndarray | None = None) -> list[Axes]:  # fmt: skip
    """Values at parcel centres in a glass brain, from the left, from above and from the right.

    In a view from the side only the parcels of that side are drawn (those at x = 0 in both). A
    parcel nearer to the viewer lies on top, a ringed one on top of all others. Parcels without a
    value are small grey dots. Returns the axes of each of `VIEWS`.

    Parameters
    ----------
    xyz : (P, 3) float, centres in mm, RAS+; rows with NaN are not drawn
    values : (P,) float, NaN where missing
    ringed, faded, starred : (P,) bool, parcels with a dark ring, pale ones, ones under a star
    """
    xyz, known = np.asarray(xyz, float), np.isfinite(values)
    none = np.zeros(len(values), bool)
    ringed = none if ringed is None else ringed
    starred = none if starred is None else starred
    colours = np.ones((len(values), 4))
    colours[known] = cmap(norm(values[known]))
    if faded is not None:
        colours[faded, 3] = 0.3
    depth = {'l': -xyz[:, 0], 'z': xyz[:, 2], 'r': xyz[:, 0]}
    in_view = {'l': xyz[:, 0] <= 0, 'z': np.isfinite(xyz[:, 0]), 'r': xyz[:, 0] >= 0}

    grid = cell.subgridspec(1, 3, width_ratios=(1.3, 1, 1.3), wspace=0)  # widths of the brain
    views = []
    for column, (view, (across, up, name, ends)) in enumerate(VIEWS.items()):
        views.append(axes := figure.add_subplot(grid[column]))
        strokes, (left, right, bottom, top) = _outline(view)
        for path, width in strokes:  # left out of the layout, which would trace each curve
            look = {'facecolor': 'none', 'edgecolor': GREY, 'linewidth': 0.5 * width}
            axes.add_artist(PathPatch(path, zorder=0, in_layout=False, **look))
        x, y = xyz[:, across], xyz[:, up]
        grey = in_view[view] & ~known
        axes.scatter(x[grey], y[grey], s=5, color=MISSING, linewidths=0, zorder=1)
        shown = np.flatnonzero(in_view[view] & known)
        shown = shown[np.lexsort((depth[view][shown], ringed[shown]))]
        axes.scatter(x[shown], y[shown], s=27, color=colours[shown], clip_on=False, zorder=2,
                     edgecolors=[INK if ring else GREY for ring in ringed[shown]],
                     linewidths=[1.1 if ring else 0.25 for ring in ringed[shown]])  # fmt: skip
        stars = in_view[view] & starred
        axes.scatter(x[stars], y[stars], s=75, marker='*', color=YELLOW, edgecolors=INK,
                     linewidths=0.6, clip_on=False, zorder=3)  # fmt: skip
        axes.set_xlim((right, left) if view == 'l' else (left, right))
        axes.set_ylim((bottom + top) / 2 - HALF, (bottom + top) / 2 + HALF)
        axes.set_aspect('equal')
        axes.set_axis_off()
        axes.text(0.5, 0, name, transform=axes.transAxes, ha='center', va='top', fontsize=8)
        place = axes.get_yaxis_transform()
        for end, at in zip(ends, (0.03, 0.97), strict=True):
            axes.text(at, top, end, transform=place, ha='center', va='top', color=GREY)
    return views


def draw_map(figure: Figure, cell: SubplotSpec, xyz: np.ndarray, values: np.ndarray,
             cmap: Colormap, norm: Normalize, label: str,
             **marked: np.ndarray) -> Colorbar:  # fmt: skip
    """Glass brains, see :func:`brains`, above a bar pointed where values lie beyond the scale."""
    views = brains(figure, cell, xyz, values, cmap, norm, **marked)
    low, high = (values < norm.vmin).any(), (values > norm.vmax).any()
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=views, location='bottom', shrink=0.45,
                          aspect=28, pad=0.02, label=label,
                          extend=('neither', 'min', 'max', 'both')[low + 2 * high])  # fmt: skip
    bar.locator = MaxNLocator(5)
    bar.ax.xaxis.set_major_formatter('{x:.2g}')  # a common factor would overlap the label
    return bar


def signed_map(xyz: np.ndarray, values: np.ndarray, label: str, *, most: float = np.inf,
               width: float = 2.5, **marked: np.ndarray) -> tuple[Figure, Axes]:  # fmt: skip
    """A figure of values below and above 0 in glass brains, and empty axes at the right.

    The scale is symmetric about 0 and leaves out the 2% of values farthest from it; it ends at
    `most` at the latest. The map is `width` times as wide as the axes.
    """
    figure = style.new_figure(3.2)
    grid = figure.add_gridspec(1, 2, width_ratios=[width, 1])
    size = np.abs(values[np.isfinite(values)])
    limit = min(np.quantile(size, 0.98), most) if size.size else 0
    limit = limit or (size.max(initial=0) or 1.0)
    cmap, norm = style.colour_map('RdBu_r', LEVELS), Normalize(-limit, limit)
    draw_map(figure, grid[0], xyz, values, cmap, norm, label, **marked)
    return figure, figure.add_subplot(grid[1])


def by_token(values: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, str]:
    """Values of tokens from those of their parcels (P,), where there are any, and their name.

    >>> by_token(np.array([2.0, np.nan, 3.0]), np.array([0, 0, 1]))
    (array([2., 3.]), 'tokens')
    """
    known = np.flatnonzero(np.isfinite(values))
    first = np.unique(token[known], return_index=True)[1]
    return values[known[first]], 'tokens' if len(np.unique(token)) < len(token) else 'parcels'


def missing_words(values: np.ndarray) -> str:
    """Words on parcels without a value, for the end of a title that speaks of the others."""
    missing = int(np.isnan(values).sum())
    return f'; {missing} without a value (grey)' if 0 < missing < len(values) else ''
