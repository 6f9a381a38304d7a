"""BOLD file -> one mean series per parcel.

The run is streamed and reduced as it comes. Everything is linear, so scaling (slope, intercept)
and the removal of voxels without signal are done on the sums at the end.
"""

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.stream import frames, grayordinates, load_image, open_bold

# Where a voxel centre lies exactly between two voxels of the other grid, rounding must not depend
# on the direction in which a grid counts: LAS and RAS copies of the same data would then differ.
# So points are moved a little in millimetres (not in voxels) before rounding.
_TIE_BREAK_MM = 1e-3
_DENSITIES = {91282: '91k', 170494: '170k'}


@dataclass(frozen=True)
class Parcellation:
    """Parcel means of one run.

    Attributes
    ----------
    data : (T, P) float32
        Mean over the voxels of each parcel that vary over the run, in BOLD units; NaN where a
        parcel has none.
    coverage : (P,) float32
        Share of each parcel that lies inside the run's box and varies, 0 to 1.
    brain_mean : float
        Mean over the brain mask's voxels and all volumes, in BOLD units; without a mask, over
        the voxels of the atlas that vary.
    sampling : str
        ``'atlas-to-run'`` (atlas label nearest to each run voxel), ``'run-to-atlas'`` (run voxel
        nearest to each atlas voxel) or ``'grayordinates'``.
    header_tr : float
        Repetition time in the file's header in seconds, 0 where absent.
    n_nonfinite : int
        Voxels of the atlas left out because they hold NaN or infinite values.
    """

    data: np.ndarray
    coverage: np.ndarray
    brain_mean: float
    sampling: str
    header_tr: float
    n_nonfinite: int


@dataclass(frozen=True)
class Sampler:
    """Which voxels of a run make which parcel.

    Attributes
    ----------
    voxels : (N,) int
        Flat indices into a volume in Fortran order, grouped by parcel. A voxel stands there once,
        or as often as it is the nearest to a voxel of the atlas.
    parcels : (K,) int
        The parcels that have voxels, ascending, counted from 0.
    starts : (K,) int
        Where each one's voxels begin.
    inside : (P,) float64
        Share of each parcel's atlas voxels inside the run's box.
    direction : str
        ``'atlas-to-run'`` or ``'run-to-atlas'``.
    """

    voxels: np.ndarray
    parcels: np.ndarray
    starts: np.ndarray
    inside: np.ndarray
    direction: str


def parcellate(bold_path, atlas_path, n_parcels, mask_path=None) -> Parcellation:
    """Mean series of every parcel of an atlas.

    A voxel that is constant over the run is outside the field of view and counts against the
    parcel's coverage, not into its mean. A voxel with a NaN or infinite value anywhere is left
    out altogether; only then is the file read twice.

    Parameters
    ----------
    bold_path : path-like
        A 4-D NIfTI file or a CIFTI dense series (``.dtseries.nii``).
    atlas_path : path-like
        Label image (1 to `n_parcels`, 0 elsewhere) in the run's space, on any grid and in any
        orientation; for CIFTI a ``.dlabel.nii`` on the run's grayordinates.
    n_parcels : int
        Number of parcels P of the atlas.
    mask_path : path-like, optional
        Brain mask on the run's grid (volumes only).

    Returns
    -------
    Parcellation

    Raises
    ------
    BrainfmError
        A file cannot be read, mask or grayordinates are not the run's, the atlas does not lie in
        the run's box, or the run is constant.
    """
    bold = open_bold(bold_path)
    if bold.is_cifti:
        return _from_grayordinates(bold, atlas_path, n_parcels)
    sampler = sampler_of(bold, atlas_path, n_parcels)
    mask = None if mask_path is None else _brain_mask(mask_path, bold)
    return _from_volumes(bold, sampler, mask)


def sampler_of(bold, atlas_path, n_parcels) -> Sampler:
    """Find the voxels of each parcel in a run that is open.

    Raises
    ------
    BrainfmError
        No parcel lies inside the run's box, or the atlas is no image of labels.
    """
    sampler = make_sampler(load_image(atlas_path), n_parcels, bold.shape[:3], bold.affine)
    if not sampler.voxels.size:
        raise BrainfmError(
            f'No parcel of {atlas_path} lies inside the box of {bold.path}; '
            'check that the atlas is in the space of the run.'
        )
    return sampler


def make_sampler(atlas_img, n_parcels, shape, affine) -> Sampler:
    """Find the voxels of each parcel on a run's grid, by affine and nearest neighbour.

    Every run voxel takes the atlas label at its centre. Where a coarse grid would so lose a
    parcel, at least half of which lies inside the run's box, the other direction is taken for all
    parcels: every atlas voxel takes the run voxel it lies in, so a run voxel counts as often as
    there are atlas voxels in it.

    Parameters
    ----------
    atlas_img : nibabel image
        3-D label image, 1 to `n_parcels`, 0 elsewhere.
    n_parcels : int
        Number of parcels P.
    shape : (3,) tuple of int
        The run's grid.
    affine : (4, 4) array
        The run's voxel indices to millimetres.

    Returns
    -------
    Sampler

    Raises
    ------
    BrainfmError
        If the image is not 3-D or holds other values than the labels.
    """
    atlas_shape = atlas_img.shape[:3]
    if len(atlas_shape) != 3 or atlas_img.shape[3:] not in {(), (1,)}:
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
        parcel, voxel = of_atlas[in_run >= 0], in_run[in_run >= 0]
        direction = 'run-to-atlas'

    order = np.argsort(parcel, kind='stable')
    parcels, starts = np.unique(parcel[order], return_index=True)
    return Sampler(voxel[order], parcels, starts, inside, direction)


def labels_of(image, n_parcels):
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


def _nearest_voxel(ijk, affine, shape, to_affine):
    """Flat Fortran-order index of the voxel of another grid nearest to each voxel; -1 outside.

    Parameters
    ----------
    ijk : three int arrays that broadcast together
        Voxel indices on the one grid.
    affine, to_affine : (4, 4) array
        Both grids' voxel indices to millimetres.
    shape : (3,) tuple of int
        The other grid.
    """
    nudge = np.eye(4)
    nudge[:3, 3] = _TIE_BREAK_MM
    # Rounded, because terms that are exactly zero can be left out: on parallel grids each place
    # then depends on one index and stays a short vector until the axes are put together.
    step = np.round(np.linalg.inv(to_affine) @ nudge @ affine, 9)
    flat, inside, stride = 0, True, 1
    for (*factors, offset), length in zip(step[:3], shape, strict=True):
        place = sum(factor * index for factor, index in zip(factors, ijk, strict=True) if factor)
        place = np.rint(place + offset).astype(np.int32)
        inside = inside & (place >= 0) & (place < length)
        flat = flat + stride * place
        stride *= length
    return np.where(inside, flat, -1)


def _brain_mask(mask_path, bold):
    """(V,) float32 brain mask on the run's grid, 1 inside, in Fortran order."""
    image = load_image(mask_path)
    if image.shape != bold.shape[:3] or not np.allclose(image.affine, bold.affine, atol=1e-3):
        raise BrainfmError(
            f'The mask {mask_path} is on another grid {image.shape} than the run {bold.path} '
            f'{bold.shape[:3]}; give the brain mask of the same space and resolution.'
        )
    mask = (np.asanyarray(image.dataobj) > 0).ravel(order='F').astype(np.float32)
    if not mask.any():
        raise BrainfmError(f'The mask {mask_path} is empty; run fMRIPrep again for this run.')
    return mask


def _from_volumes(bold, sampler, mask):
    none = np.array([], int)
    sums, brain_sum, constant, first, nonfinite = _stream(bold, sampler, mask, none)
    if nonfinite.size:
        sums, brain_sum, constant, first, _ = _stream(bold, sampler, mask, nonfinite)
    size = np.diff(sampler.starts, append=sampler.voxels.size)
    used = size - np.add.reduceat(constant, sampler.starts, dtype=int)
    sums -= np.add.reduceat(constant * first, sampler.starts)
    if mask is None:
        brain = sums.sum(), used.sum()
    else:
        brain = brain_sum, np.count_nonzero(mask) - np.count_nonzero(mask[nonfinite])

    n_parcels = sampler.inside.size
    by_parcel = np.zeros((len(sums), n_parcels))
    share, n_used = np.zeros((2, n_parcels))
    by_parcel[:, sampler.parcels] = sums
    share[sampler.parcels], n_used[sampler.parcels] = used / size, used
    return _finish(
        bold,
        by_parcel,
        n_used,
        coverage=share * sampler.inside,
        brain=brain,
        sampling=sampler.direction,
        n_nonfinite=np.isin(nonfinite, sampler.voxels).sum(),
    )


def _stream(bold, sampler, mask, nonfinite):
    """One pass over the volumes.

    Parameters
    ----------
    mask : (V,) float32 or None
        Brain mask.
    nonfinite : (M,) int
        Flat indices of voxels to read as zero throughout, which makes them constant.

    Returns
    -------
    sums : (T, K) float64
        Over each parcel's voxels, constant ones included.
    brain_sum : float
        Sum over the mask and all volumes.
    constant : (N,) bool
        Voxels of the sampler that never changed.
    first : (N,) float64
        Their values in the first volume.
    nonfinite : (M,) int
        Flat indices of voxels with NaN or infinite values, in the volumes where one of these
        reached a sum.
    """
    values = np.empty(sampler.voxels.size, bold.dtype)
    sums = np.empty((bold.n_volumes, sampler.starts.size))
    bad = np.zeros(int(np.prod(bold.shape[:3])), bool)
    unchanged = np.arange(values.size)
    brain_sum = 0.0
    for t, frame in enumerate(frames(bold)):
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


def _from_grayordinates(bold, atlas_path, n_parcels):
    labels = matching_labels(atlas_path, n_parcels, bold)
    sums, n_used = np.zeros((n_parcels, bold.n_volumes)), np.zeros(n_parcels)
    start, brain_sum, n_brain, n_nonfinite = 0, 0.0, 0, 0
    for block in grayordinates(bold):
        label = labels[start : start + len(block)]
        start += len(block)
        finite = np.isfinite(block).all(axis=1)
        n_nonfinite += np.count_nonzero(~finite & (label > 0))
        usable = finite & (block != block[:, :1]).any(axis=1)
        brain_sum += block[usable].sum(dtype=float)
        n_brain += np.count_nonzero(usable)

        rows = np.flatnonzero(usable & (label > 0))
        if rows.size:
            rows = rows[np.argsort(label[rows], kind='stable')]
            found, starts, counts = np.unique(label[rows], return_index=True, return_counts=True)
            sums[found - 1] += np.add.reduceat(block[rows], starts, axis=0, dtype=float)
            n_used[found - 1] += counts
    total = np.bincount(labels, minlength=n_parcels + 1)[1:]
    return _finish(
        bold,
        sums.T,
        n_used,
        coverage=n_used / np.maximum(total, 1),
        brain=(brain_sum, n_brain),
        sampling='grayordinates',
        n_nonfinite=n_nonfinite,
    )


def matching_labels(atlas_path, n_parcels, bold):
    """(G,) labels of a dlabel file whose grayordinates are those of the run."""
    image = load_image(atlas_path)
    if not isinstance(image, nib.Cifti2Image):
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


def _finish(bold, sums, n_used, coverage, brain, sampling, n_nonfinite):
    """Sums to means in BOLD units.

    Parameters
    ----------
    sums : (T, P) float64
        Over the usable voxels, as stored.
    n_used : (P,) float64
        Number of usable voxels.
    brain : tuple of float
        Sum over the brain and all volumes, number of its voxels.
    """
    if not n_used.any():
        why = 'finite and ' if n_nonfinite else ''
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
    brain_mean = brain_sum / (n_brain * bold.n_volumes)
    return Parcellation(
        data=(means * bold.slope + bold.inter).astype(np.float32),
        coverage=coverage.astype(np.float32),
        brain_mean=float(brain_mean * bold.slope + bold.inter),
        sampling=sampling,
        header_tr=bold.tr,
        n_nonfinite=int(n_nonfinite),
    )
