"""Label images of an atlas: reading them, and whether each label lies where it should."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from bids_brainfm.atlases.faults import Places
from bids_brainfm.errors import BrainfmError
from bids_brainfm.images import brain_models, load_image, read_values

if TYPE_CHECKING:
    import nibabel as nib

LabelImage: TypeAlias = 'nib.spatialimages.SpatialImage | nib.Cifti2Image'


def misfit(path: Path, name: str, fault: str) -> BrainfmError:
    """The refusal of a file that is not the atlas of that name, with its fault in words."""
    return BrainfmError(
        f'{path} does not show atlas {name} as it must be ({fault}): use the file that the card '
        'of the atlas names.'
    )


def read_labels(path: Path, name: str) -> tuple[LabelImage, np.ndarray]:
    """Read a label image of an atlas, and its labels, int32 in the image's shape."""
    try:
        image = load_image(path)
        values = read_values(image)
    except BrainfmError as error:
        raise BrainfmError(f'The image of atlas {name}: {error}') from None
    with np.errstate(invalid='ignore'):  # NaN is no label; the next line says so
        labels = np.rint(values).astype(np.int32)
    if not np.array_equal(labels, values):
        raise BrainfmError(
            f'{path} of atlas {name} holds values that are not whole numbers: labels must be '
            'resampled by nearest neighbour.'
        )
    return image, labels


def check_complete(labels: np.ndarray, path: Path, name: str, n_parcels: int) -> None:
    """Refuse labels other than 0..P, or not all of them."""
    absent = np.setdiff1d(np.arange(1, n_parcels + 1), labels)
    if absent.size:
        shown = ', '.join(map(str, absent[:5])) + (' ...' if absent.size > 5 else '')
        raise BrainfmError(
            f'{path} lacks {absent.size} of the {n_parcels} labels of atlas {name} ({shown}): '
            f'use the file that the atlas card names.'
        )
    if labels.min() < 0 or labels.max() > n_parcels:
        raise BrainfmError(
            f'{path} has labels from {labels.min()} to {labels.max()} where atlas {name} has 1 '
            f'to {n_parcels}: it shows another atlas.'
        )


def label_centres(labels: np.ndarray, affine: np.ndarray, n_labels: int) -> np.ndarray:
    """Centre of mass of each label 1..L in mm, (L, 3) float32; NaN where a label is absent."""
    import nibabel as nib

    where = np.nonzero(labels)
    label = labels[where]
    counts = np.bincount(label, minlength=n_labels + 1)[1 : n_labels + 1]
    with np.errstate(invalid='ignore'):
        ijk = [np.bincount(label, axis, n_labels + 1)[1 : n_labels + 1] / counts for axis in where]
    return nib.affines.apply_affine(affine, np.stack(ijk, axis=1)).astype(np.float32)


def in_voxels(image: LabelImage, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels on a grid and its affine; of a CIFTI file those grayordinates that are voxels."""
    from nibabel import Cifti2Image

    if not isinstance(image, Cifti2Image):
        return labels, image.affine
    axis = brain_models(image)
    inside = axis.volume_mask
    if not inside.any():
        return np.zeros((1, 1, 1), labels.dtype), np.eye(4)
    volume = np.zeros(axis.volume_shape, labels.dtype)
    volume[tuple(axis.voxel[inside].T)] = labels.ravel()[inside]
    return volume, axis.affine


def check_image(path: Path, name: str, places: Places, rows: np.ndarray | None = None) -> None:
    """Refuse an image that does not show an atlas, or the parcels `rows` of it.

    Labels must be the whole numbers 0..P, all present, and lie where the atlas says (of a CIFTI
    file the voxels: vertices have no place without their surface).
    """
    image, labels = read_labels(path, name)
    lacking = None
    if rows is None:
        rows = np.arange(len(places.xyz))
        for structure in dict.fromkeys(places.structures or ()):
            kept = places.kept_without(structure)
            if labels.min() == 0 and labels.max() == kept.size:
                rows, lacking = kept, places.lacking(structure)
    if not lacking:
        check_complete(labels, path, name, rows.size)
    fault = places.fault(label_centres(*in_voxels(image, labels), rows.size), rows)
    if fault or lacking:
        raise misfit(path, name, ', '.join(filter(None, (fault, lacking))))
