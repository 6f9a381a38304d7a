"""What all figures share: their look, the parts that recur, and how they are written.

Figures are made with Matplotlib's objects, not with pyplot, so that nothing global is left behind
and no display is needed.
"""

import base64
import io
import re
import textwrap
from contextlib import _GeneratorContextManager
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bids_brainfm.bids.files import write_text

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which survive colour blindness
BLUE, ORANGE, VERMILION = '#0072B2', '#E69F00', '#D55E00'
SKY, GREEN, YELLOW, PURPLE = '#56B4E9', '#009E73', '#F0E442', '#CC79A7'
INK, GREY, PALE = '#333333', '#999999', '#ECECEC'
# Missing parcels: a grey outside diverging maps; in a grey-scale carpet grey means a value.
MISSING, MISSING_IN_GREY = '#BDBDBD', '#BFD9EA'
WIDTH = 9.0  # inches, the width of the page's column
ALPHA = 0.05  # below it a p or q is called significant
FLOOR = -1.0  # R2 has no lower end; what lies below is counted, not drawn

STYLE: dict[str, Any] = {
    **dict.fromkeys(('axes.edgecolor', 'axes.labelcolor', 'axes.titlecolor'), INK),
    **dict.fromkeys(('text.color', 'xtick.color', 'ytick.color'), INK),
    **dict.fromkeys(('font.size', 'axes.labelsize'), 9),
    **dict.fromkeys(('xtick.labelsize', 'ytick.labelsize', 'legend.fontsize'), 8),
    **dict.fromkeys(('axes.spines.top', 'axes.spines.right', 'legend.frameon'), False),
    **{'axes.titlesize': 9.5, 'axes.titlelocation': 'left', 'axes.titleweight': 'bold'},
    'axes.linewidth': 0.7,
    'text.parse_math': False,  # names of models, groups and parcels may have dollar signs
    'image.interpolation': 'none',  # rasters keep their own pixels, the viewer scales them
    'svg.hashsalt': 'bids_brainfm',  # ids inside the SVG are the same in every process
}


def look() -> _GeneratorContextManager[None]:
    """Our look, whatever the user's matplotlibrc says: as a context, or to decorate a drawing."""
    return matplotlib.style.context(STYLE, after_reset=True)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG, atomically, and return its path; equal figures give equal bytes.

    The name ends in ``.svg``; its folder is created if need be.
    """
    drawn = io.StringIO()
    with look():
        figure.savefig(drawn, format='svg', dpi=150, metadata={'Date': None, 'Creator': None})
    figure.set_layout_engine('none')  # it would move things a little in a second save
    text = re.sub(
        r'(data:image/png;base64,)\s*([A-Za-z0-9+/=\s]+)',
        lambda match: match[1] + _with_palette(match[2]),
        drawn.getvalue(),
    )
    # Matplotlib hashes a clip's place to its id, and the layout solver wavers in the 15th digit
    ids = dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', text))
    numbered = {identity: f'clip{number}' for number, identity in enumerate(ids)}
    text = re.sub(r'\bp[0-9a-f]{10}\b', lambda match: numbered.get(match[0], match[0]), text)
    return write_text(path, text)


def _with_palette(encoded: str) -> str:
    """The same PNG (base64) with one byte per pixel where 256 colours do: half the size."""
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert('RGBA'))
    codes, index = np.unique(pixels.view(np.uint32), return_inverse=True)
    if len(codes) > 256:
        return ''.join(encoded.split())
    colours = codes[:, None].view(np.uint8)
    image = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8))
    image.putpalette(colours[:, :3].tobytes())
    packed = io.BytesIO()
    image.save(packed, format='png', optimize=True, transparency=colours[:, 3].tobytes())
    return base64.b64encode(packed.getvalue()).decode('ascii')


def new_figure(height: float) -> Figure:
    """An empty figure of the page's width, `height` inches high."""
    return Figure(figsize=(WIDTH, height), layout='constrained', facecolor='white')


def colour_map(name: str, levels: int, missing: str = MISSING) -> Colormap:
    """A colour map of few levels: rasters compress better, colour bars have fewer pieces."""
    return matplotlib.colormaps[name].resampled(levels).with_extremes(bad=missing)


def headline(figure: Figure, text: str, warned: bool = False) -> None:
    """Title of a whole figure, at the left, on as many lines as it takes."""
    lines = '\n'.join(textwrap.wrap(text, 112))
    colour = VERMILION if warned else INK
    figure.suptitle(lines, x=0.01, ha='left', fontsize=9.5, fontweight='bold', color=colour)


def whole_numbers(axis: Axis) -> None:
    """Ticks of an axis at whole numbers only."""
    axis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))


def legend_above(
    axes: Axes, loc: Literal['lower left', 'lower right'], pad: float, ncols: int = 1, **look: Any
) -> None:
    """A legend whose corner `loc` is that corner above the axes; `pad` in font sizes."""
    corner = (float(loc == 'lower right'), 1)
    axes.legend(loc=loc, bbox_to_anchor=corner, borderaxespad=pad, ncols=ncols, **look)


def say_none(axes: Axes) -> None:
    """Say in the middle of axes that there is nothing to draw."""
    axes.text(0.5, 0.5, 'none', transform=axes.transAxes, ha='center', va='center', color=GREY)


def shrink(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Average neighbouring rows and columns until at most so many are left.

    NaN is left out of the averages; what is NaN throughout stays so.

    >>> shrink(np.array([[1.0, 3.0, 5.0, np.nan]]), rows=1, columns=2)
    array([[2., 5.]])
    """
    for axis, limit in enumerate((rows, columns)):
        size = values.shape[axis]
        step = -(-size // limit)
        if step > 1:
            starts = np.arange(0, size, step)
            known = np.isfinite(values)
            count = np.add.reduceat(known, starts, axis=axis, dtype=float)
            total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=axis)
            values = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return values
