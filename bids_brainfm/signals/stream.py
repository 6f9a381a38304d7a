"""BOLD files read piece by piece: one volume, or one block of grayordinates, at a time.

A run of one gigabyte is never in memory whole: a buffer of one volume is enough.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.images import BROKEN, axis_of, brain_models, drain, load_image, open_data, skip

_SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6}  # unit codes of time


@dataclass(frozen=True)
class BoldFile:
    """What the header of a BOLD file says."""

    path: Path  # NIfTI-1 or -2, gzipped or not
    shape: tuple[int, ...]  # volumes: (X, Y, Z, T); CIFTI: (T, G), time by grayordinate
    affine: np.ndarray  # (4, 4) float64, voxel indices to millimetres; without meaning for CIFTI
    dtype: np.dtype  # type and byte order on disk
    offset: int  # first byte of the data
    slope: float  # value = stored * slope + inter
    inter: float
    tr: float  # repetition time of the header in seconds; 0 where the header has none
    axis: nib.cifti2.BrainModelAxis | None = None  # the grayordinates of a CIFTI file

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of a volume."""
        return self.shape[:3]

    @property
    def is_cifti(self) -> bool:
        """Whether this is a dense CIFTI series rather than volumes."""
        return self.axis is not None

    @property
    def n_volumes(self) -> int:
        """Number of time points."""
        return self.shape[0] if self.is_cifti else self.shape[3]


def open_bold(path: Path) -> BoldFile:
    """Read the header of a BOLD run and check that it is one.

    It is a 4-D NIfTI-1 or NIfTI-2 file (``.nii`` or ``.nii.gz``) or a CIFTI dense series
    (``.dtseries.nii``); other shapes, complex or RGB values and no orientation are refused.
    """
    image = load_image(path)
    path = Path(path)
    stored = cast('nib.arrayproxy.ArrayProxy', image.dataobj)
    if isinstance(image, nib.Cifti2Image):
        time, axis = axis_of(image, 0), brain_models(image)
        if not isinstance(time, nib.cifti2.SeriesAxis):
            raise BrainfmError(f'{path} is a CIFTI file but not a dense time series (dtseries).')
        if stored.shape != (len(time), len(axis)):
            raise BrainfmError(
                f'{path} describes {len(time)} volumes of {len(axis)} grayordinates, but its data '
                f'are of shape {stored.shape}; copy the file again.'
            )
        affine, tr = np.eye(4), float(time.step) if time.unit == 'SECOND' else 0.0
    else:
        axis, affine = None, image.affine
        if len(image.shape) != 4 or image.shape[3] < 2:
            raise BrainfmError(
                f'{path} is not a 4-D BOLD run but an image of shape {image.shape}; '
                'give the preprocessed series, or run fMRIPrep again for this run.'
            )
        if not (int(image.header['sform_code']) or int(image.header['qform_code'])):
            raise BrainfmError(
                f'{path} has neither sform nor qform in its header, so left and right cannot be '
                'told apart; set one of them, or run fMRIPrep again for this run.'
            )
        unit = _SECONDS.get(int(image.header['xyzt_units']) & 0x38, 1.0)
        tr = float(image.header.get_zooms()[3]) * unit
    if stored.dtype.kind not in 'iuf':
        raise BrainfmError(
            f'{path} holds values of type {stored.dtype}, not plain numbers; '
            'give the magnitude series.'
        )
    shape, slope, inter = tuple(stored.shape), float(stored.slope), float(stored.inter)
    return BoldFile(path, shape, affine, stored.dtype, stored.offset, slope, inter, tr, axis)


def frames(bold: BoldFile) -> Iterator[np.ndarray]:
    """Volumes (V,) of a 4-D run, one after the other, in the on-disk type and unscaled.

    Voxels are in Fortran order (first axis fastest). The buffer is used again for the next volume;
    until then the caller may change it. A file that ends early or is damaged is refused.
    """
    yield from _chunks(bold, [int(np.prod(bold.grid))] * bold.n_volumes, 'volumes')


def grayordinates(bold: BoldFile, rows: int = 2048) -> Iterator[np.ndarray]:
    """Blocks (B, T) of whole time courses of a CIFTI series, in the order of its brain models.

    On disk the time points of one grayordinate follow one another. Blocks have at most `rows`
    grayordinates, in the on-disk type, and are valid until the next one is asked for.
    """
    n_volumes, total = bold.shape
    sizes = [min(rows, total - start) * n_volumes for start in range(0, total, rows)]
    for block in _chunks(bold, sizes, f'blocks of {rows} grayordinates'):
        yield block.reshape(-1, n_volumes)


def _chunks(bold: BoldFile, sizes: list[int], what: str) -> Iterator[np.ndarray]:
    """Yield successive pieces of the data, all in one buffer."""
    buffer = np.empty(max(sizes), bold.dtype)
    done = 0
    try:
        with open_data(bold.path) as stream:
            skip(stream, bold.offset)
            for size in sizes:
                piece = buffer[:size]
                if stream.readinto(piece.view(np.uint8).data) < piece.nbytes:
                    raise EOFError
                yield piece
                done += 1
            drain(stream)
    except BROKEN as error:
        raise BrainfmError(
            f'{bold.path} is truncated or damaged: {done} of {len(sizes)} {what} could be read; '
            'copy the file again, or run fMRIPrep again for this run.'
        ) from error
