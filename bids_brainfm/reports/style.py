"""What all pictures of the report share: look, colours, and how they are written.

Figures are made with Matplotlib's objects, not with pyplot, so that nothing global is left behind
and no display is needed. Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), grey
scales, and diverging or perceptually uniform maps that survive colour blindness.
"""

import base64
import io
import re
import textwrap
from contextlib import contextmanager
from functools import wraps

import numpy as np

from bids_brainfm.bids.files import write_text

BLUE, ORANGE, VERMILION = '#0072B2', '#E69F00', '#D55E00'
SKY, GREEN, YELLOW, PURPLE = '#56B4E9', '#009E73', '#F0E442', '#CC79A7'
INK, GREY, PALE = '#333333', '#999999', '#ECECEC'
# Missing parcels: a grey outside diverging maps; in a grey-scale carpet grey means a value.
MISSING, MISSING_IN_GREY = '#BDBDBD', '#BFD9EA'
WIDTH = 9.0  # inches, the width of the page's column

STYLE = {
    'font.size': 9,
    'axes.titlesize': 9.5,
    'axes.titlelocation': 'left',
    'axes.titleweight': 'bold',
    'axes.labelsize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': INK,
    'axes.labelcolor': INK,
    'axes.titlecolor': INK,
    'axes.linewidth': 0.7,
    'text.color': INK,
    'xtick.color': INK,
    'ytick.color': INK,
    'xtick.labelsize': 8,
    'ytick.labelsize': 8,
    'legend.fontsize': 8,
    'legend.frameon': False,
    'image.interpolation': 'none',  # rasters keep their own pixels, the viewer scales them
    'svg.hashsalt': 'bids_brainfm',  # ids inside the SVG are the same in every process
}


@contextmanager
def style():
    """Our look on top of Matplotlib's defaults, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def styled(draw):
    """Draw in our look: a decorator of pictures."""

    @wraps(draw)
    def drawn(*args, **kwargs):
        with style():
            return draw(*args, **kwargs)

    return drawn


def save(figure, path):
    """Write a figure as SVG, atomically; equal figures give equal bytes.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : path-like
        Ends in ``.svg``; its folder is made if need be.

    Returns
    -------
    pathlib.Path
    """
    drawn = io.StringIO()
    with style():
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


def _with_palette(encoded):
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


def new_figure(height):
    """An empty figure of the page's width, `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout='constrained', facecolor='white')


def colour_map(name, levels, bad):
    """A colour map of few levels: rasters compress better, colour bars have fewer pieces."""
    from matplotlib import colormaps

    return colormaps[name].resampled(levels).with_extremes(bad=bad)


def headline(figure, text, color=INK):
    """Title of a whole figure, at the left, on as many lines as it takes."""
    lines = '\n'.join(textwrap.wrap(text, 112))
    figure.suptitle(lines, x=0.01, ha='left', fontsize=9.5, fontweight='bold', color=color)


def whole_numbers(axis):
    """Ticks of an axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))


def shrink(values, rows, columns):
    """Average neighbouring rows and columns until at most so many are left.

    Parameters
    ----------
    values : (N, M) float
        May hold NaN, which the averages leave out; all NaN stays NaN.
    rows, columns : int
        Largest size of the answer.

    Returns
    -------
    (n, m) float

    Examples
    --------
    >>> shrink(np.array([[1.0, 3.0, 5.0, np.nan]]), rows=1, columns=2)
    array([[2., 5.]])
    """
    for axis, limit in enumerate((rows, columns)):
        size = values.shape[axis]
        step = -(-size // limit)
        if step > 1:
            starts = np.arange(0, size, step)
            there = np.isfinite(values)
            count = np.add.reduceat(there, starts, axis=axis, dtype=float)
            total = np.add.reduceat(np.where(there, values, 0.0), starts, axis=axis)
            values = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return values
