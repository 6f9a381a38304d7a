"""The table of brain gradients that gives a network the position of each parcel."""

import warnings
from pathlib import Path

import numpy as np

from bids_brainfm.documents import ENCODING
from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import LARGEST


def read_gradients(path: str | Path) -> np.ndarray:
    """Read a table of gradients (P, G) float32, parcels in the order of the atlas.

    Raises BrainfmError: it cannot be read, is no table of numbers, or has NaN or infinite ones.
    """
    try:
        with warnings.catch_warnings():  # of an empty file, which is refused below
            warnings.simplefilter('ignore')
            table = np.loadtxt(path, delimiter=',', ndmin=2, dtype=np.float32, encoding=ENCODING)
    except OSError as error:
        raise BrainfmError(
            f'The table of gradients {path} cannot be read ({error}): check the path.'
        ) from None
    except ValueError as error:
        raise BrainfmError(
            f'{path} is no table of gradients ({str(error).rstrip(".")}): it must be a CSV file '
            f'of numbers without a header, a row a parcel and a column a gradient.'
        ) from None
    if not (np.abs(table) <= LARGEST).all() or not table.size:  # NaN is not, either
        raise BrainfmError(
            f'The table of gradients {path} is empty, or holds NaN or values beyond {LARGEST:g}: '
            'get it anew.'
        )
    return table


def write_gradients(path: str | Path, gradients: np.ndarray) -> None:
    """Write a table (P, G) that :func:`read_gradients` reads, to six significant digits."""
    np.savetxt(path, gradients, delimiter=',', fmt='%.6g')
