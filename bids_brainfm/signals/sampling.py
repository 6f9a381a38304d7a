"""Which voxels of a run, or grayordinates, make which parcel of an atlas."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.images import brain_models, load_image, read_values
from bids_brainfm.signals.stream import BoldFile

if TYPE_CHECKING:
    from bids_brainfm.images import Image

# Where a voxel centre lies exactly between two others, LAS and RAS copies of the same data must
# be rounded alike: points are moved a little in millimetres (not in voxels) before rounding.
_TIE_BREAK_MM = 1e-3
_DENSITIES = {91282: '91k', 170494: '170k'}


@dataclass(frozen=True)
class Sampler:
    """Which voxels of a run make which parcel."""

    # (N,) int, flat Fortran-order indices, grouped by parcel, each as often as it counts
    voxels: np.ndarray
    parcels: np.ndarray  # (K,) int, the parcels that have voxels, ascending, counted from 0
    starts: np.ndarray  # (K,) int, where each one's voxels begin
    inside: np.ndarray  # (P,) float64, proportion of a parcel's atlas voxels inside the run's box
    direction: str  # 'atlas-to-run' or 'run-to-atlas'

    @property
    def parcel(self) -> np.ndarray:
        """Parcel of each of the (N,) voxels, counted from 0."""
        return np.repeat(self.parcels, np.diff(self.starts, append=self.voxels.size))

    def within(self, mask: np.ndarray) -> 'Sampler':
        """Return the part of it inside a mask (V,) of the run."""
        kept = mask[self.voxels] > 0
        parcels, starts = np.unique(self.parcel[kept], return_index=True)
        return replace(self, voxels=self.voxels[kept], parcels=parcels, starts=starts)


def sampler_of(bold: BoldFile, atlas_path: Path, n_parcels: int) -> Sampler:
    """Find the voxels of each parcel in an open run; refused if none lies inside its box."""
    sampler = make_sampler(load_image(atlas_path), n_parcels, bold.grid, bold.affine)
    if not sampler.voxels.size:
        raise BrainfmError(
            f'No parcel of {atlas_path} lies inside the box of {bold.path}; '
            'check that the atlas is in the space of the run.'
        )
    return sampler


def make_sampler(
    atlas_img: 'Image', n_parcels: int, shape: tuple[int, ...], affine: np.ndarray
) -> Sampler:
    """Find the voxels of each parcel on a run's grid, by affine and nearest neighbour.

    Every run voxel takes the atlas label at its centre. Where a coarse grid would so lose a
    parcel, at least half of which lies inside the run's box, the other direction is taken for all:
    every atlas voxel takes the run voxel it lies in, which then counts as often as atlas voxels
    lie in it. The image is 3-D with labels 1 to `n_parcels`, 0 elsewhere, or refused; `shape` and
    `affine` are of the run.
    """
    atlas_shape = atlas_img.shape[:3]
    is_volume = len(atlas_shape) == 3 and atlas_img.shape[3:] in {(), (1,)}
    if isinstance(atlas_img, nib.Cifti2Image) or not is_volume:
        raise BrainfmError(
            f'{atlas_img.get_filename() or "The atlas"} has shape {atlas_img.shape}; '
            'an atlas for volumes is a 3-D image of labels.'
        )
    labels = labels_of(atlas_img, n_parcels)

    labelled = np.flatnonzero(labels)
    of_atlas = labels[labelled] - 1
    in_run = _nearest_voxel(
        np.unravel_index(labelled, atlas_shape, order='F'), atlas_img.affine, shape, affine
    )
    total = np.bincount(of_atlas, minlength=n_parcels)
    inside = np.bincount(of_atlas, in_run >= 0, minlength=n_parcels) / np.maximum(total, 1)

    # Axes reversed, so that the open grid unrolls in Fortran order like the volumes on disk.
    grid = [axis.T for axis in np.ogrid[tuple(slice(n) for n in shape)]]
    in_atlas = _nearest_voxel(grid, affine, atlas_shape, atlas_img.affine).ravel()
    sampled = np.append(labels, labels.dtype.type(0))[in_atlas]  # outside, -1, there is the last
    voxel = np.flatnonzero(sampled)
    parcel, direction = sampled[voxel] - 1, 'atlas-to-run'

    if ((np.bincount(parcel, minlength=n_parcels) == 0) & (inside >= 0.5)).any():
        parcel, voxel, direction = of_atlas[in_run >= 0], in_run[in_run >= 0], 'run-to-atlas'

    order = np.argsort(parcel, kind='stable')
    parcels, starts = np.unique(parcel[order], return_index=True)
    return Sampler(voxel[order], parcels, starts, inside, direction)


def labels_of(image: 'Image', n_parcels: int) -> np.ndarray:
    """Labels of an atlas image, checked, flat in Fortran order, in the smallest fitting type."""
    labels = read_values(image).ravel(order='F')
    low, high = labels.min(), labels.max()
    with np.errstate(invalid='ignore'):  # NaN is no label; the next line says so
        whole = labels.astype(np.min_scalar_type(n_parcels))
    if not (low >= 0 and 0 < high <= n_parcels and (whole == labels).all()):
        raise BrainfmError(
            f'{image.get_filename() or "The atlas"} holds values from {low:g} to {high:g}; '
            f'labels must be whole numbers from 1 to {n_parcels}, and 0 where there is no parcel.'
        )
    return whole


def _nearest_voxel(
    ijk: Sequence[np.ndarray], affine: np.ndarray, shape: tuple[int, ...], to_affine: np.ndarray
) -> np.ndarray:
    """Flat Fortran-order index of the voxel of another grid nearest to each `ijk`; -1 outside."""
    nudge = np.eye(4)
    nudge[:3, 3] = _TIE_BREAK_MM
    # Rounded, as zeros can be left out: on parallel grids each place then depends on one index
    # and stays a short vector until the axes are put together.
    step = np.round(np.linalg.inv(to_affine) @ nudge @ affine, 9)
    flat, inside, stride = np.array(0), np.array(True), 1
    for (*factors, offset), length in zip(step[:3], shape, strict=True):
        place = sum(factor * index for factor, index in zip(factors, ijk, strict=True) if factor)
        place = np.rint(place + offset).astype(np.int32)
        inside = inside & (place >= 0) & (place < length)
        flat = flat + stride * place
        stride *= length
    return np.where(inside, flat, -1)


def matching_labels(atlas_path: Path, n_parcels: int, bold: BoldFile) -> np.ndarray:
    """(G,) labels of a dlabel file whose grayordinates are those of the run."""
    image = load_image(atlas_path)
    if not isinstance(image, nib.Cifti2Image) or bold.axis is None:
        raise BrainfmError(
            f'{bold.path} is a CIFTI series but the atlas {atlas_path} is not a .dlabel.nii file.'
        )
    axis, labels = brain_models(image), labels_of(image, n_parcels)
    in_volume = axis.volume_mask
    subcortical = np.setdiff1d(labels[in_volume], labels[~in_volume])
    n_lost = np.count_nonzero(subcortical)
    if n_lost and not bold.axis.volume_mask.any():
        raise BrainfmError(
            f'{bold.path} has cortex only ({len(bold.axis)} grayordinates), so the {n_lost} '
            f'parcels of the atlas {atlas_path} that lie in subcortical volumes would be missing; '
            'run fMRIPrep with --cifti-output 91k.'
        )
    if axis != bold.axis:
        run, atlas = (
            f'{len(a)} grayordinates ({_DENSITIES.get(len(a), "no standard density")})'
            for a in (bold.axis, axis)
        )
        raise BrainfmError(
            f'{bold.path} has {run} and the atlas {atlas_path} has {atlas}, which are not the '
            'same vertices and voxels; run fMRIPrep with --cifti-output 91k.'
        )
    return labels
