"""NIfTI and CIFTI files: opened with a header that makes sense, and read to the last checksum.

Inflating gzip is what costs time; isal does it about twice as fast as zlib.
"""

import contextlib
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import numpy as np
from isal import isal_zlib

from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import LARGEST

if TYPE_CHECKING:
    import nibabel as nib

    Image: TypeAlias = nib.Nifti1Image | nib.Cifti2Image

# What reading a file that was cut or damaged raises
BROKEN: tuple[type[Exception], ...] = (
    EOFError, zlib.error, cast(type[Exception], isal_zlib.error)
)  # fmt: skip
UNREADABLE: tuple[type[Exception], ...] = (OSError, *BROKEN)
CHUNK = 1 << 17  # bytes of a compressed file that are read at once; longer than a gzip header
MAGIC = b'\x1f\x8b'  # begins each member of a gzip stream
MOST_INFLATED = 1032  # times as many bytes as a deflate stream has, at most (zlib's manual)
MAX_VOXELS = 10**8  # of a volume; a head at 0.5 mm has 50 million
MAX_EXTENSIONS = 64 << 20  # bytes before the data; CIFTI describes 91k grayordinates in 1 MB
VOXEL_MM = (0.01, 100.0)  # edges of voxels that make sense
FARTHEST_MM = 1e5  # of the first voxel from the origin


class GzipReader(io.RawIOBase):
    """What a gzip stream inflates to, by the rules of zlib's ``gzread``.

    Members follow one another, with zeros between or after them, and other bytes after the last
    are ignored. A stream that ends early raises EOFError, one with a wrong checksum or length
    ``isal_zlib.error``.
    """

    def __init__(self, file: io.BufferedReader):
        self._file, self._rest = file, b''
        self._begin(file.read(CHUNK))

    def _begin(self, compressed: bytes) -> None:
        # A whole chunk from its start on: isal reads no header that comes in two parts.
        self._member, self._rest = isal_zlib.decompressobj(16 + zlib.MAX_WBITS), compressed

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, at least in part; returns the number of bytes, 0 at the end."""
        while True:
            if self._member.eof:
                rest = (self._member.unused_data + self._file.read(CHUNK)).lstrip(b'\0')
                while not rest and (more := self._file.read(CHUNK)):
                    rest = more.lstrip(b'\0')
                if not rest.startswith(MAGIC):
                    return 0
                self._begin(rest + self._file.read(CHUNK))
            compressed = self._rest or self._file.read(CHUNK)
            inflated = self._member.decompress(compressed, len(buffer))
            self._rest = self._member.unconsumed_tail
            if inflated:
                buffer[: len(inflated)] = inflated
                return len(inflated)
            if not compressed and not self._member.eof:
                raise EOFError('the gzip stream ends early')


@contextlib.contextmanager
def open_data(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file, or what a gzip file (``.gz``) inflates to, from its start."""
    with Path(path).open('rb') as file:
        is_gzip = Path(path).suffix == '.gz'
        yield io.BufferedReader(GzipReader(file), CHUNK) if is_gzip else file


def load_image(path: Path) -> 'Image':
    """Open a NIfTI or CIFTI image; its data stay on disk.

    Raises BrainfmError: it is absent, damaged, no NIfTI file, or its header cannot be true: more
    values than the file holds, a volume of more than `MAX_VOXELS`, factors beyond `LARGEST`, or no
    place in space.
    """
    import nibabel as nib

    try:
        with contextlib.suppress(*BROKEN):  # found again, and reported, when the data are read
            _check_extensions(path)
        image = cast('Image', nib.load(path))
        stored = cast('nib.arrayproxy.ArrayProxy', image.dataobj)
        offset = int(stored.offset)
    except FileNotFoundError:
        raise BrainfmError(f'{path} does not exist.') from None
    except Exception as error:  # nibabel raises many kinds for a header that makes no sense
        raise BrainfmError(
            f'{path} cannot be read as a NIfTI image ({_reason(error)}); copy the file again.'
        ) from error
    shape, is_cifti = tuple(map(int, stored.shape)), isinstance(image, nib.Cifti2Image)
    if not is_cifti and not isinstance(image, nib.Nifti1Image):  # NIfTI-2 is a subclass
        raise BrainfmError(f'{path} is not a single-file NIfTI image; convert it to .nii.gz.')
    size, needed = Path(path).stat().st_size, offset + math.prod(shape) * stored.dtype.itemsize
    factors, fault = (float(stored.slope), float(stored.inter)), ''
    if not (1 / LARGEST <= abs(factors[0]) <= LARGEST and abs(factors[1]) <= LARGEST):
        fault = 'its values are to be multiplied by {:g}, and {:g} added'.format(*factors)
    elif min(shape, default=0) < 1 or offset < 0:
        fault = f'it claims a shape of {shape}, and data from byte {offset} on'
    elif needed > size * (MOST_INFLATED if Path(path).suffix == '.gz' else 1):
        fault = (
            f'a shape of {shape} takes {needed:,} bytes, and a file of {size:,} cannot hold them'
        )
    elif not is_cifti and math.prod(shape[:3]) > MAX_VOXELS:
        fault = f'a volume of {shape[:3]} has more than {MAX_VOXELS:,} voxels'
    if fault:
        raise BrainfmError(
            f'{path} is truncated or has a damaged header: {fault}; copy the file again.'
        )
    if isinstance(image, nib.Nifti1Image):
        _check_affine(path, image.affine)
    return image


def _check_extensions(path: Path) -> None:
    """Raise ValueError where what lies between header and data would take memory without end.

    nibabel reads all of it. Of CIFTI files it is the description of the grayordinates.
    """
    import nibabel as nib

    with open_data(path) as stream:
        start = stream.read(nib.Nifti2Header.sizeof_hdr)
    kinds = (nib.Nifti1Header, nib.Nifti2Header)
    kind = next((kind for kind in kinds if kind.may_contain_header(start)), None)
    if kind is None:  # no NIfTI file, which nibabel explains better
        return
    header = kind(start[: kind.sizeof_hdr], check=False)
    position, end = kind.sizeof_hdr + 4, float(header['vox_offset'])
    if not end <= MAX_EXTENSIONS:
        raise ValueError(f'its data begin at byte {end:g}')
    order: Literal['little', 'big'] = 'little' if header.endianness == '<' else 'big'
    with open_data(path) as stream:
        skip(stream, position)
        while position + 16 <= end:
            size = int.from_bytes(stream.read(4), order)
            if not 8 <= size <= end - position:
                raise ValueError(f'a header extension has {size} bytes')
            skip(stream, size - 4)
            position += size


def read_values(image: 'Image') -> np.ndarray:
    """Read all values of an open image, scaled, in its shape; refused where it is cut or damaged.

    nibabel stops before the checksum at the end of a gzip file, so that it misses damage.
    """
    path, stored = (
        Path(image.get_filename() or ''),
        cast('nib.arrayproxy.ArrayProxy', image.dataobj),
    )
    if isinstance(stored, np.ndarray):  # of an image that was made, not read
        return stored
    values = np.empty(math.prod(stored.shape), stored.dtype)
    try:
        with open_data(path) as stream:
            skip(stream, int(stored.offset))
            if stream.readinto(values.view(np.uint8).data) < values.nbytes:
                raise EOFError('it ends early')
            drain(stream)
    except UNREADABLE as error:
        raise BrainfmError(
            f'{path} is truncated or damaged ({_reason(error)}); copy the file again.'
        ) from error
    values = values.reshape(stored.shape, order='F')
    slope, inter = float(stored.slope), float(stored.inter)
    return values if (slope, inter) == (1, 0) else values * slope + inter


def brain_models(image: 'nib.Cifti2Image') -> 'nib.cifti2.BrainModelAxis':
    """Return the grayordinates of a dense CIFTI file; refused where their header is damaged."""
    from nibabel.cifti2 import BrainModelAxis

    axis = axis_of(image, 1)
    if not isinstance(axis, BrainModelAxis):
        raise BrainfmError(
            f'{image.get_filename()} is a CIFTI file of {type(axis).__name__}, not of '
            'grayordinates; give a dense one (dtseries, dlabel).'
        )
    return axis


def axis_of(image: 'nib.Cifti2Image', number: int) -> 'nib.cifti2.cifti2_axes.Axis':
    """Return an axis of a CIFTI file, refused where its description is damaged."""
    try:
        return image.header.get_axis(number)
    except Exception as error:  # nibabel raises many kinds
        raise BrainfmError(
            f'{image.get_filename()} has a damaged CIFTI header ({_reason(error)}); copy the file '
            'again.'
        ) from error


def skip(stream: io.BufferedReader, size: int) -> None:
    """Read bytes and forget them, some at a time."""
    while size and (some := stream.read(min(size, CHUNK))):
        size -= len(some)


def drain(stream: io.BufferedReader) -> None:
    """Read to the end, where gzip compares its checksum."""
    while stream.read(CHUNK):
        pass


def _reason(error: Exception) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__


def _check_affine(path: Path, affine: np.ndarray) -> None:
    """Refuse an affine that gives voxels no place: no edges, no volume, or far away."""
    edges = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    low, high = VOXEL_MM
    # not <: NaN must fail, too
    sound = (edges >= low).all() and (edges <= high).all()
    sound = sound and (np.abs(affine[:3, 3]) <= FARTHEST_MM).all()
    if not (sound and abs(np.linalg.det(affine[:3, :3] / edges)) > 1e-3):
        raise BrainfmError(
            f'{path} has an affine that gives its voxels no place in space (edges of '
            f'{" × ".join(f"{edge:.3g}" for edge in edges)} mm, first voxel at '
            f'{", ".join(f"{x:.3g}" for x in affine[:3, 3])} mm): copy the file again, or correct '
            'sform and qform in its header.'
        )
