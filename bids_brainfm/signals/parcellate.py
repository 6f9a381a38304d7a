"""BOLD file -> one mean series per parcel.

The run is streamed and reduced as it comes. Everything is linear, so scaling (slope, intercept)
and the removal of voxels without signal are done on the sums at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals import stream
from bids_brainfm.signals.stream import BoldFile, Image, load_image, open_bold

# Where a voxel centre lies exactly between two others, LAS and RAS copies of the same data must
# be rounded alike: points are moved a little in millimetres (not in voxels) before rounding.
_TIE_BREAK_MM = 1e-3
_DENSITIES = {91282: '91k', 170494: '170k'}


@dataclass(frozen=True)
class Parcellation:
    """Parcel means of one run."""

    # (T, P) float32, mean over the voxels of each parcel that vary over the run, in BOLD units;
    # NaN where a parcel has none
    data: np.ndarray
    coverage: np.ndarray  # (P,) float32, proportion that lies inside the run's box and varies
    # Over the brain mask and all volumes, in BOLD units; without a mask, over the atlas
    brain_mean: float
    sampling: str  # 'atlas-to-run', 'run-to-atlas' (see make_sampler) or 'grayordinates'
    header_tr: float  # repetition time in the file's header in seconds, 0 where absent
    n_nonfinite: int  # voxels of the atlas left out because they hold NaN or infinite values


@dataclass(frozen=True)
class Sampler:
    """Which voxels of a run make which parcel."""

    # (N,) int, flat Fortran-order indices, grouped by parcel, each as often as it counts
    voxels: np.ndarray
    parcels: np.ndarray  # (K,) int, the parcels that have voxels, ascending, counted from 0
    starts: np.ndarray  # (K,) int, where each one's voxels begin
    inside: np.ndarray  # (P,) float64, proportion of a parcel's atlas voxels inside the run's box
    direction: str  # 'atlas-to-run' or 'run-to-atlas'


def parcellate(
    bold_path: Path, atlas_path: Path, n_parcels: int, mask_path: Path | None = None
) -> Parcellation:
    """Mean series of every parcel of an atlas.

    A voxel that is constant over the run is outside the field of view and counts against the
    parcel's coverage, not into its mean. A voxel with a NaN or infinite value anywhere is left
    out altogether; only then is the file read twice.

    Parameters
    ----------
    bold_path : a 4-D NIfTI file or a CIFTI dense series (``.dtseries.nii``)
    atlas_path : label image (1 to `n_parcels`, 0 elsewhere) in the run's space, on any grid and
        in any orientation; for CIFTI a ``.dlabel.nii`` on the run's grayordinates
    mask_path : brain mask on the run's grid (volumes only)

    Raises
    ------
    BrainfmError : a file cannot be read, mask or grayordinates are not the run's, the atlas does
        not lie in the run's box, or the run is constant
    """
    bold = open_bold(bold_path)
    if bold.is_cifti:
        return _from_grayordinates(bold, atlas_path, n_parcels)
    sampler = sampler_of(bold, atlas_path, n_parcels)
    mask = None if mask_path is None else _brain_mask(mask_path, bold)
    return _from_volumes(bold, sampler, mask)


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
    atlas_img: Image, n_parcels: int, shape: tuple[int, ...], affine: np.ndarray
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


def labels_of(image: Image, n_parcels: int) -> np.ndarray:
    """Labels of an atlas image, checked, flat in Fortran order, in the smallest fitting type."""
    labels = np.asanyarray(image.dataobj).ravel(order='F')
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


def _brain_mask(mask_path: Path, bold: BoldFile) -> np.ndarray:
    """(V,) float32 brain mask on the run's grid, 1 inside, in Fortran order."""
    image = load_image(mask_path)
    if (
        isinstance(image, nib.Cifti2Image)
        or image.shape != bold.grid
        or not np.allclose(image.affine, bold.affine, atol=1e-3)
    ):
        raise BrainfmError(
            f'The mask {mask_path} is on another grid {image.shape} than the run {bold.path} '
            f'{bold.grid}; give the brain mask of the same space and resolution.'
        )
    mask = (np.asanyarray(image.dataobj) > 0).ravel(order='F').astype(np.float32)
    if not mask.any():
        raise BrainfmError(f'The mask {mask_path} is empty; run fMRIPrep again for this run.')
    return mask


def _from_volumes(bold: BoldFile, sampler: Sampler, mask: np.ndarray | None) -> Parcellation:
    sums, brain_sum, constant, first, nonfinite = _stream(bold, sampler, mask, np.array([], int))
    if nonfinite.size:
        sums, brain_sum, constant, first, _ = _stream(bold, sampler, mask, nonfinite)
    size = np.diff(sampler.starts, append=sampler.voxels.size)
    used = size - np.add.reduceat(constant, sampler.starts, dtype=int)
    sums -= np.add.reduceat(constant * first, sampler.starts)
    brain = sums.sum(), used.sum()
    if mask is not None:
        brain = brain_sum, np.count_nonzero(mask) - np.count_nonzero(mask[nonfinite])
    n_parcels = sampler.inside.size
    by_parcel = np.zeros((len(sums), n_parcels))
    varying, n_used = np.zeros((2, n_parcels))
    by_parcel[:, sampler.parcels] = sums
    varying[sampler.parcels], n_used[sampler.parcels] = used / size, used
    n_bad = int(np.isin(nonfinite, sampler.voxels).sum())
    data, brain_mean = _means(bold, by_parcel, n_used, brain, n_bad)
    coverage = (varying * sampler.inside).astype(np.float32)
    return Parcellation(data, coverage, brain_mean, sampler.direction, bold.tr, n_bad)


def _stream(
    bold: BoldFile, sampler: Sampler, mask: np.ndarray | None, nonfinite: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray, np.ndarray]:
    """One pass over the volumes; voxels `nonfinite` are read as zero, which makes them constant.

    Returns sums (T, K) over each parcel's voxels, constant ones included; the sum over the mask
    and all volumes; which of the (N,) voxels never changed, and their first values; voxels (M,)
    with NaN or infinite values where one of these reached a sum.
    """
    values = np.empty(sampler.voxels.size, bold.dtype)
    sums = np.empty((bold.n_volumes, sampler.starts.size))
    bad, brain_sum = np.zeros(int(np.prod(bold.grid)), bool), 0.0
    unchanged = np.arange(values.size)
    for t, frame in enumerate(stream.frames(bold)):
        frame[nonfinite] = 0
        np.take(frame, sampler.voxels, out=values, mode='wrap')  # 'raise' would make a copy
        if t == 0:
            first = values.astype(float)
        # Nearly every voxel has changed after a few volumes, so this soon costs nothing.
        unchanged = unchanged[values[unchanged] == first[unchanged]]
        np.add.reduceat(values, sampler.starts, dtype=float, out=sums[t])
        # A product with the mask as numbers is several times faster than picking its voxels.
        with np.errstate(invalid='ignore'):
            in_brain = 0.0 if mask is None else float(frame @ mask)
        brain_sum += in_brain
        if not (np.isfinite(sums[t]).all() and np.isfinite(in_brain)):
            bad |= ~np.isfinite(frame)
    constant = np.zeros(values.size, bool)
    constant[unchanged] = True
    return sums, brain_sum, constant, first, np.flatnonzero(bad)


def _from_grayordinates(bold: BoldFile, atlas_path: Path, n_parcels: int) -> Parcellation:
    labels = matching_labels(atlas_path, n_parcels, bold)
    sums, n_used = np.zeros((n_parcels, bold.n_volumes)), np.zeros(n_parcels)
    start, brain_sum, n_brain, n_bad = 0, 0.0, 0, 0
    for block in stream.grayordinates(bold):
        label = labels[start : start + len(block)]
        start += len(block)
        finite = np.isfinite(block).all(axis=1)
        n_bad += int(np.count_nonzero(~finite & (label > 0)))
        usable = finite & (block != block[:, :1]).any(axis=1)
        brain_sum += block[usable].sum(dtype=float)
        n_brain += int(np.count_nonzero(usable))

        rows = np.flatnonzero(usable & (label > 0))
        if rows.size:
            rows = rows[np.argsort(label[rows], kind='stable')]
            found, starts, counts = np.unique(label[rows], return_index=True, return_counts=True)
            sums[found - 1] += np.add.reduceat(block[rows], starts, axis=0, dtype=float)
            n_used[found - 1] += counts
    coverage = n_used / np.maximum(np.bincount(labels, minlength=n_parcels + 1)[1:], 1)
    data, brain_mean = _means(bold, sums.T, n_used, (brain_sum, n_brain), n_bad)
    return Parcellation(
        data, coverage.astype(np.float32), brain_mean, 'grayordinates', bold.tr, n_bad
    )


def matching_labels(atlas_path: Path, n_parcels: int, bold: BoldFile) -> np.ndarray:
    """(G,) labels of a dlabel file whose grayordinates are those of the run."""
    image = load_image(atlas_path)
    if not isinstance(image, nib.Cifti2Image) or bold.axis is None:
        raise BrainfmError(
            f'{bold.path} is a CIFTI series but the atlas {atlas_path} is not a .dlabel.nii file.'
        )
    axis, labels = image.header.get_axis(1), labels_of(image, n_parcels)
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


def _means(
    bold: BoldFile, sums: np.ndarray, n_used: np.ndarray, brain: tuple[float, int], n_bad: int
) -> tuple[np.ndarray, float]:
    """Sums (T, P) of the usable voxels, as stored, and of the brain to means in BOLD units."""
    if not n_used.any():
        why = 'finite and ' if n_bad else ''
        raise BrainfmError(
            f'{bold.path} is constant: no voxel of the atlas is {why}changing over its '
            f'{bold.n_volumes} volumes; run fMRIPrep again for this run.'
        )
    with np.errstate(invalid='ignore'):
        means = sums / n_used  # 0 / 0 is the NaN of a parcel without signal
    brain_sum, n_brain = brain
    if not n_brain:
        raise BrainfmError(
            f'{bold.path} has NaN or infinite values in every voxel of the brain mask; '
            'run fMRIPrep again for this run.'
        )
    brain_mean = float(brain_sum / (n_brain * bold.n_volumes) * bold.slope + bold.inter)
    return (means * bold.slope + bold.inter).astype(np.float32), brain_mean
