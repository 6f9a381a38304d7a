"""BOLD files read piece by piece: one volume, or one block of grayordinates, at a time.

A run of one gigabyte never stands in memory whole: a buffer of one volume is enough. Inflating
gzip is what costs time; isal does it about twice as fast as zlib.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from bids_brainfm.errors import BrainfmError

_UNREADABLE = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error)
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error, isal_zlib.error)
_SECONDS = {'sec': 1.0, 'msec': 1e-3, 'usec': 1e-6}


@dataclass(frozen=True)
class BoldFile:
    """What the header of a BOLD file says.

    Attributes
    ----------
    path : Path
        The file, NIfTI-1 or -2, gzipped or not.
    shape : tuple of int
        Volumes: (X, Y, Z, T). CIFTI: (T, G), time by grayordinate.
    affine : (4, 4) float64 or None
        Voxel indices to millimetres; None for CIFTI.
    dtype : numpy.dtype
        Type and byte order on disk.
    offset : int
        First byte of the data.
    slope, inter : float
        Value = stored * slope + inter.
    tr : float
        Repetition time of the header in seconds; 0 where the header has none.
    axis : nibabel.cifti2.BrainModelAxis or None
        The grayordinates of a CIFTI file.
    """

    path: Path
    shape: tuple[int, ...]
    affine: np.ndarray | None
    dtype: np.dtype
    offset: int
    slope: float
    inter: float
    tr: float
    axis: object = None

    @property
    def is_cifti(self) -> bool:
        """Whether this is a dense CIFTI series rather than volumes."""
        return self.axis is not None

    @property
    def n_volumes(self) -> int:
        """Number of time points."""
        return self.shape[0] if self.is_cifti else self.shape[3]


def load_image(path):
    """Open a NIfTI or CIFTI image; data stay on disk.

    Raises
    ------
    BrainfmError
        If there is no such file or it is not a NIfTI image.
    """
    try:
        return nib.load(path)
    except FileNotFoundError:
        raise BrainfmError(f'{path} does not exist.') from None
    except _UNREADABLE as error:
        raise BrainfmError(
            f'{path} cannot be read as a NIfTI image ({error}); copy the file again.'
        ) from error


def open_bold(path) -> BoldFile:
    """Read the header of a BOLD run and check that it is one.

    Parameters
    ----------
    path : path-like
        A 4-D NIfTI-1 or NIfTI-2 file (``.nii`` or ``.nii.gz``) or a CIFTI dense series
        (``.dtseries.nii``).

    Returns
    -------
    BoldFile

    Raises
    ------
    BrainfmError
        Not a NIfTI file, not 4-D, complex or RGB values, or no orientation in the header.
    """
    image = load_image(path)
    path = Path(path)
    stored = image.dataobj
    if isinstance(image, nib.Cifti2Image):
        time, axis = (image.header.get_axis(i) for i in range(2))
        if not isinstance(time, nib.cifti2.SeriesAxis):
            raise BrainfmError(f'{path} is a CIFTI file but not a dense time series (dtseries).')
        affine, tr = None, float(time.step) if time.unit == 'SECOND' else 0.0
    elif isinstance(image, nib.Nifti1Image):  # NIfTI-2 is a subclass
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
        unit = _SECONDS.get(image.header.get_xyzt_units()[1], 1.0)
        tr = float(image.header.get_zooms()[3]) * unit
    else:
        raise BrainfmError(f'{path} is not a single-file NIfTI image; convert it to .nii.gz.')
    if stored.dtype.kind not in 'iuf':
        raise BrainfmError(
            f'{path} holds values of type {stored.dtype}, not plain numbers; '
            'give the magnitude series.'
        )
    return BoldFile(
        path=path,
        shape=tuple(stored.shape),
        affine=affine,
        dtype=stored.dtype,
        offset=stored.offset,
        slope=float(stored.slope),
        inter=float(stored.inter),
        tr=tr,
        axis=axis,
    )


def frames(bold: BoldFile) -> Iterator[np.ndarray]:
    """Volumes of a 4-D run, one after the other.

    Parameters
    ----------
    bold : BoldFile
        From :func:`open_bold`.

    Yields
    ------
    (V,) array in the on-disk type
        One volume, voxels in Fortran order (first axis fastest), unscaled. The buffer is used
        again for the next volume; until then the caller may change it.

    Raises
    ------
    BrainfmError
        If the file ends early or its gzip stream is broken.
    """
    size = int(np.prod(bold.shape[:3]))
    yield from _chunks(bold, [size] * bold.n_volumes, 'volumes')


def grayordinates(bold: BoldFile, rows: int = 2048) -> Iterator[np.ndarray]:
    """Blocks of whole time courses of a CIFTI series, in the order of its brain models.

    On disk the time points of one grayordinate follow one another, so a block of grayordinates,
    not a volume, is what can be read in one piece.

    Parameters
    ----------
    bold : BoldFile
        A CIFTI series from :func:`open_bold`.
    rows : int
        Grayordinates in one block (the last one may have fewer).

    Yields
    ------
    (B, T) array in the on-disk type
        Valid until the next block is asked for.

    Raises
    ------
    BrainfmError
        If the file ends early.
    """
    n_volumes, total = bold.shape
    sizes = [min(rows, total - start) * n_volumes for start in range(0, total, rows)]
    for block in _chunks(bold, sizes, f'blocks of {rows} grayordinates'):
        yield block.reshape(-1, n_volumes)


def _chunks(bold, sizes, what):
    """Yield successive pieces of the data, all in one buffer."""
    buffer = np.empty(max(sizes), bold.dtype)
    opener = igzip.open if bold.path.suffix == '.gz' else open
    done = 0
    try:
        with opener(bold.path, 'rb') as stream:
            stream.seek(bold.offset)
            for size in sizes:
                piece = buffer[:size]
                if stream.readinto(piece.view(np.uint8)) < piece.nbytes:
                    raise EOFError
                yield piece
                done += 1
            stream.read(1)  # at its end gzip compares its checksum
    except _BROKEN_GZIP as error:
        raise BrainfmError(
            f'{bold.path} is truncated or damaged: {done} of {len(sizes)} {what} could be read; '
            'copy the file again, or run fMRIPrep again for this run.'
        ) from error
