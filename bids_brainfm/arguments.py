"""Types of command line arguments: text in, a checked value out; standard library only."""

import argparse
import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar('T', int, float)


def label(prefix: str) -> Callable[[str], str]:
    """Argument type that takes a label with or without its BIDS prefix.

    >>> label('sub')('sub-01'), label('sub')('01')
    ('01', '01')
    """

    def read(text: str) -> str:
        bare = text.removeprefix(f'{prefix}-')
        if not re.fullmatch(r'[a-zA-Z0-9+]+', bare):
            raise argparse.ArgumentTypeError(
                f'{text!r} is not a BIDS label (letters and digits only)'
            )
        return bare

    return read


def memory_gb(text: str) -> float:
    """Memory in GB; a bare number is in MB, as in fMRIPrep.

    >>> memory_gb('8G'), memory_gb('1.5GB'), memory_gb('8000')
    (8.0, 1.5, 8.0)
    """
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([kMGT]?)B?\s*', text, flags=re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r} is not an amount of memory such as 8G or 8000')
    factor = {'K': 1e-6, '': 1e-3, 'M': 1e-3, 'G': 1.0, 'T': 1e3}[match[2].upper()]
    return float(match[1]) * factor


def number(kind: type[T], valid: Callable[[T], bool], words: str) -> Callable[[str], T]:
    """Argument type for a number that is valid; `words` say what it must be.

    >>> number(float, lambda v: 0 <= v <= 1, 'a proportion from 0 to 1')('0.5')
    0.5
    """

    def read(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f'{text!r} is not {words}')
        return value

    return read


def positive(kind: type[T]) -> Callable[[str], T]:
    """Argument type for a number above zero."""
    return number(kind, lambda value: value > 0, 'a number above zero')


proportion = number(float, lambda value: 0 <= value <= 1, 'a proportion from 0 to 1')
ratio = number(float, lambda value: 0 < value < 1, 'a number between 0 and 1')
not_negative = number(float, lambda v: 0 <= v < float('inf'), 'a number of 0 or above')
count = number(int, lambda value: value >= 0, 'a whole number of 0 or above')
finite = number(float, lambda v: 0 < abs(v) < float('inf'), 'a number other than zero')
# What NumPy takes
seed = number(int, lambda value: 0 <= value < 2**32, 'a whole number from 0 to 2**32 - 1')


def dummies(text: str) -> str:
    """Argument type for a number of volumes to drop, or auto.

    >>> dummies('4'), dummies('auto')
    ('4', 'auto')
    """
    if text != 'auto' and not text.isdigit():
        raise argparse.ArgumentTypeError(f'{text!r} is not auto or a whole number of 0 or above')
    return text


def clusters(text: str) -> str:
    """Argument type for a number of clusters, or auto.

    >>> clusters('7'), clusters('auto')
    ('7', 'auto')
    """
    if text != 'auto' and not (text.isdigit() and int(text) > 1):
        raise argparse.ArgumentTypeError(f'{text!r} is not auto or a number above 1')
    return text
