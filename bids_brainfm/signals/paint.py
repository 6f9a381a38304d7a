"""Values of parcels -> images: the way back from :mod:`bids_brainfm.signals.parcellate`.

What lies outside all parcels is zero, as the background of fMRIPrep's images is.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.cifti2 import BrainModelAxis, LabelAxis, ScalarAxis, SeriesAxis
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from bids_brainfm.bids.files import atomic
from bids_brainfm.errors import BrainfmError
from bids_brainfm.images import load_image, read_values
from bids_brainfm.signals.sampling import Sampler, labels_of, matching_labels, sampler_of
from bids_brainfm.signals.stream import open_bold

if TYPE_CHECKING:
    from bids_brainfm.images import Image

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), then Tol's muted ones
# (https://personal.sron.nl/~pault/); the report, too, gives them to networks.
COLOURS = (
    '#E69F00', '#56B4E9', '#009E73', '#0072B2', '#D55E00', '#CC79A7', '#F0E442', '#332288',
    '#882255', '#117733', '#999933', '#44AA99', '#661100', '#CC6677', '#AA4499', '#6699CC',
    '#DDCC77', '#AA4466', '#1B3A4B', '#B8DE6F',
)  # fmt: skip
# Where the header of a NIfTI file says how voxels lie: qform and sform
_ORIENTATION = (
    'qform_code', 'quatern_b', 'quatern_c', 'quatern_d', 'qoffset_x', 'qoffset_y', 'qoffset_z',
    'sform_code', 'srow_x', 'srow_y', 'srow_z',
)  # fmt: skip
_GZIP_LEVEL = 1  # of 0 to 3
_ROWS = 2048  # grayordinates in one block


def paint_map(path: Path, image_path: Path, values: ArrayLike, name: str = 'map') -> None:
    """Write a map of the parcels on the grid of an atlas image.

    A parcel whose value is NaN is NaN in the image and not zero, which is a value of most maps.
    Viewers show NaN as nothing, SPM masks it, and nilearn replaces it by zero with a warning.

    Parameters
    ----------
    path : ``.nii.gz``, or ``.dscalar.nii`` where the atlas image is CIFTI
    image_path : NIfTI image or ``.dlabel.nii`` with the labels 1 to P, 0 outside
    values : (P,) float, written as float32
    name : what Workbench calls the map (CIFTI only)

    Raises
    ------
    BrainfmError : the image is unreadable or of other parcels, or `path` cannot be written
    """
    image = _open_atlas(image_path, np.size(values))
    parcels = labels_of(image, np.size(values)).reshape(image.shape, order='F')
    painted = np.append(0, values).astype(np.float32)[parcels]
    _write_on_atlas(path, image, painted, ScalarAxis([name]), 'ConnDenseScalar')


def paint_labels(
    path: Path, image_path: Path, labels: ArrayLike, names: Sequence[str], name: str = 'labels'
) -> None:
    """Write a grouping of the parcels, such as networks, on the grid of an atlas image.

    Parameters
    ----------
    path, image_path, name : as of :func:`paint_map`, but int16, or ``.dlabel.nii`` for CIFTI
    labels : (P,) int, the group of each parcel, 1 to k; 0 for none
    names : k names of the groups; in CIFTI with their colours, which repeat after the twentieth

    Raises
    ------
    BrainfmError : there are groups without a name, the image is unreadable or of other parcels,
        or `path` cannot be written
    """
    groups = np.asarray(labels)
    if groups.min() < 0 or groups.max() > len(names):
        raise BrainfmError(
            f'Parcels have labels from {groups.min()} to {groups.max()}, and there are '
            f'{len(names)} names; labels must be 1 to {len(names)}, and 0 where there is none.'
        )
    image = _open_atlas(image_path, groups.size)
    parcels = labels_of(image, groups.size).reshape(image.shape, order='F')
    painted = np.append(0, groups).astype(np.int16)[parcels]
    # '???' is Workbench's word for no label
    table: dict[int, tuple[str, tuple[float, ...]]] = {0: ('???', (0, 0, 0, 0))}
    table |= {i + 1: (group, colour(i)) for i, group in enumerate(names)}
    _write_on_atlas(path, image, painted, LabelAxis([name], table), 'ConnDenseLabel')


def paint_series(
    path: Path, bold_path: Path, atlas_path: Path, series: np.ndarray, tr: float
) -> None:
    """Write series of parcels as a BOLD file on the grid of a run, volume by volume.

    A voxel of the run holds the mean of the parcels that it belongs to, by the sampler of
    :func:`~bids_brainfm.signals.parcellate.parcellate` and weighted by the number of atlas voxels
    where several share it. So parcellate gives the series back: exactly with 'atlas-to-run' and
    on grayordinates, blurred between neighbours that share a voxel with 'run-to-atlas'.

    A parcel that is NaN throughout is zero; where it shares a voxel, the others alone count.
    A parcel that is NaN at some points has the mean of its other points there: NaN would break
    filters and cost parcellate the parcel, zero would be a drop by the whole signal, leaving
    volumes out would shift the rest, and interpolation would look like a prediction.

    Parameters
    ----------
    path : ``.nii.gz``, or ``.dtseries.nii`` where the run is CIFTI
    bold_path : the run whose grid and orientation, or grayordinates, are taken over
    atlas_path : atlas image, labels 1 to P in the run's space; ``.dlabel.nii`` for CIFTI
    series, tr : (T, P) float32, where T need not be that of the run; repetition time in seconds

    Raises
    ------
    BrainfmError : a file cannot be read, the atlas has another number of parcels or does not lie
        in the run's box, its grayordinates are not the run's, or `path` cannot be written
    """
    bold = open_bold(bold_path)
    _open_atlas(atlas_path, series.shape[1])
    filled, present = _fill(series)
    if bold.axis is not None:
        labels = matching_labels(atlas_path, series.shape[1], bold)
        _write_grayordinates(path, bold.axis, labels, filled, tr)
        return
    sampler = sampler_of(bold, atlas_path, series.shape[1])
    voxels, counts = _voxel_weights(sampler, present)
    total = counts.sum(axis=1)
    run_header = cast('nib.Nifti1Header', load_image(bold_path).header)
    header = _header(run_header, (*bold.grid, len(series)), tr)
    volume = np.zeros(int(np.prod(bold.grid)), np.float32)
    # Without name and time in the gzip header, equal series give equal files.
    with (
        atomic(path) as temporary,
        temporary.open('wb') as file,
        igzip.IGzipFile('', 'wb', _GZIP_LEVEL, file, mtime=0) as stream,
    ):
        header.write_to(stream)
        for values in filled:
            volume[voxels] = counts @ values / total
            stream.write(volume)


def colour(place: int) -> tuple[float, float, float, float]:
    """RGBA from 0 to 1 of a label counted from 0, opaque."""
    red, green, blue = bytes.fromhex(COLOURS[place % len(COLOURS)][1:])
    return red / 255, green / 255, blue / 255, 1.0


def _open_atlas(path: Path, n_values: int) -> 'Image':
    """An atlas image that has as many parcels as there are values."""
    image = load_image(path)
    highest = read_values(image).max()
    # Values that are no labels at all are refused where the labels are read.
    if highest % 1 == 0 and highest != n_values:
        raise BrainfmError(
            f'There are {n_values} values for the {highest:g} parcels of {path}; give one for '
            'each parcel, in the order of the labels.'
        )
    return image


def _write_on_atlas(
    path: Path, atlas: 'Image', painted: np.ndarray, axis: ScalarAxis | LabelAxis, intent: str
) -> None:
    """Write what was painted on an atlas image, in the kind of file that it is."""
    if isinstance(atlas, nib.Cifti2Image):
        # Labels, too, are float32 in the files of the Human Connectome Project.
        axes = axis, atlas.header.get_axis(1)
        dense = nib.Cifti2Image(painted.astype(np.float32), header=axes)
        dense.nifti_header.set_intent(intent)
        image: Image = dense
    else:
        image = nib.Nifti1Image(painted, atlas.affine)
        image.header.set_xyzt_units('mm')
        for set_form in (image.set_sform, image.set_qform):
            set_form(atlas.affine, 'mni')
    with atomic(path) as temporary:
        image.to_filename(temporary)


def _fill(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Series without gaps, and which parcels are not missing altogether."""
    known = np.isfinite(series)
    values = np.where(known, series, 0)
    mean = values.sum(axis=0, dtype=float) / np.maximum(known.sum(axis=0), 1)
    return np.where(known, values, mean).astype(np.float32), known.any(axis=0)


def _voxel_weights(sampler: Sampler, present: np.ndarray) -> tuple[np.ndarray, csr_array]:
    """Flat indices (N,) of the voxels of `present` parcels, and how often each counts (N, P)."""
    parcel = sampler.parcel
    painted = present[parcel]
    voxels, row = np.unique(sampler.voxels[painted], return_inverse=True)
    ones = np.ones(row.size)  # equal places are added up
    return voxels, csr_array((ones, (row, parcel[painted])), (voxels.size, present.size))


def _header(run: nib.Nifti1Header, shape: tuple[int, ...], tr: float) -> nib.Nifti1Header:
    """Header of float32 volumes that lie as those of a run; nothing else of it is kept."""
    header = type(run)()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float32)
    for field in _ORIENTATION:
        header[field] = run[field]
    header['pixdim'][:4] = run['pixdim'][:4]  # the first is part of the qform
    header['pixdim'][4] = tr
    header.set_xyzt_units('mm', 'sec')
    return header


def _write_grayordinates(
    path: Path, axis: BrainModelAxis, labels: np.ndarray, series: np.ndarray, tr: float
) -> None:
    """Write a dense series (T, P) block by block, each the whole time courses of its rows."""
    # Zeros that take no memory: nibabel writes the headers, and the data are then written over.
    zeros = np.broadcast_to(np.float32(0), (len(series), len(axis)))
    image = nib.Cifti2Image(zeros, header=(SeriesAxis(0, tr, len(series)), axis))
    image.nifti_header.set_intent('ConnDenseSeries')
    courses = np.concatenate([np.zeros((1, len(series)), np.float32), series.T])
    with atomic(path) as temporary:
        image.to_filename(temporary)
        with temporary.open('r+b') as file:
            file.seek(-zeros.nbytes, os.SEEK_END)
            for start in range(0, len(labels), _ROWS):
                file.write(courses[labels[start : start + _ROWS]])
