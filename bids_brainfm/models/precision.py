"""Precision of matrix products: what a device offers, and how far a lower one is off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bids_brainfm.config import PRECISIONS
from bids_brainfm.errors import BrainfmError

if TYPE_CHECKING:
    from bids_brainfm.models.encoder import Encoder

# Error of an embedding, as a proportion of the SD between windows, above which there is a warning
TOLERATED = 0.05
# Where PyTorch keeps whether products of float32 matrices may be computed in TF32
_PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)


def resolve_precision(name: str | None, device: torch.device) -> str:
    """Return the precision to compute in, by default TF32 where the device has it, else float32.

    Raises BrainfmError: the name is unknown, or the device has no TF32.
    """
    has_tf32 = (
        device.type == 'cuda'
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    if name is None:
        return 'tf32' if has_tf32 else 'float32'
    if name not in PRECISIONS:
        raise BrainfmError(
            f'The precision {name!r} is not known; choose one of {", ".join(PRECISIONS)}.'
        )
    if name == 'tf32' and not has_tf32:
        raise BrainfmError(
            f'The precision tf32 needs an NVIDIA GPU of the Ampere generation or later, and the '
            f'encoder runs on {device.type} without it: choose float32 or bfloat16.'
        )
    return name


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Compute products of float32 matrices in TF32, or in true float32 otherwise.

    PyTorch's own default takes TF32 for convolutions on a GPU.
    """
    before = [place.allow_tf32 for place in _PRODUCTS]
    set_products(precision)
    try:
        yield
    finally:
        for place, allowed in zip(_PRODUCTS, before, strict=True):
            place.allow_tf32 = allowed


def set_products(precision: str) -> None:
    """As :func:`products_in`, for the rest of the process."""
    for place in _PRODUCTS:
        place.allow_tf32 = precision == 'tf32'


class PrecisionCheck:
    """Error of the embeddings of an encoder by its precision, in units of their SD.

    The first windows are encoded in float32 as well. The error of a dimension is the root mean
    square, over these, of the difference between both embeddings; it is divided by the SD of the
    dimension over all windows encoded so far (n - 1), of all runs. The error of the embedding is
    the root mean square of that over the dimensions that vary.

    Parameters
    ----------
    precision : str, of the embeddings that :meth:`add` is given
    exact : callable that returns the encoder in float32
    """

    def __init__(self, precision: str, exact: Callable[[], 'Encoder']) -> None:
        self.precision, self._exact = precision, exact
        self.compared = self.encoded = 0  # windows
        self._origin = self._sum = self._squares = self._error = np.zeros(0)

    def add(self, windows: np.ndarray, summary: np.ndarray) -> None:
        """Take in windows (B, P, T) and their embeddings (B, D); the first are compared."""
        found = np.asarray(summary, float)
        if not self.encoded:
            # one by one, since memory may be why a lower precision was chosen
            parts = [self._exact().encode(window[None]).summary for window in windows]
            self._error = np.sqrt(((found - np.concatenate(parts)) ** 2).mean(axis=0))
            self.compared = len(windows)
            # Embeddings differ by little: sums of squares are taken from one of them
            self._origin = found[0]
        found = found - self._origin
        self._sum = found.sum(axis=0) + (self._sum if self.encoded else 0)
        self._squares = (found**2).sum(axis=0) + (self._squares if self.encoded else 0)
        self.encoded += len(found)

    def errors(self) -> np.ndarray:
        """Error of each dimension that varies, in SD; of none with fewer than two windows."""
        if self.encoded < 2:
            return np.zeros(0)
        variance = (self._squares - self._sum**2 / self.encoded) / (self.encoded - 1)
        varies = variance > 0
        return self._error[varies] / np.sqrt(variance[varies])

    def found(self) -> dict[str, Any]:
        """What a sidecar says, as of now; a warning where the error is above `TOLERATED`."""
        errors = self.errors()
        error = float(np.sqrt((errors**2).mean())) if errors.size else None
        warning = None
        if error is not None and error > TOLERATED:
            warning = (
                f'In {self.precision}, embeddings are off by {error:.1%} of their standard '
                f'deviation between windows ({self.compared} windows compared with float32, '
                f'standard deviation over {self.encoded}): choose a higher precision, such as '
                '--precision float32.'
            )
        return {
            'Description': f'Difference between embeddings in {self.precision} and in float32: '
            'root mean square over the windows compared, divided by the standard deviation over '
            'the windows encoded so far by this command, as a root mean square over dimensions.',
            'RelativeError': error, 'LargestOfDimensions': errors.max() if errors.size else None,
            'WindowsCompared': self.compared, 'WindowsEncoded': self.encoded, 'Warning': warning,
        }  # fmt: skip
