"""BOLD file -> one mean series per parcel.

The run is streamed and reduced as it comes: to sums over parcels, and to sums over time for each
voxel. Scaling (slope, intercept) and the removal of voxels without signal are done at the end.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.images import load_image, read_values
from bids_brainfm.signals import stream
from bids_brainfm.signals.denoise import interpolate
from bids_brainfm.signals.empty import sample_of, without_signal
from bids_brainfm.signals.sampling import Sampler, matching_labels, sampler_of
from bids_brainfm.signals.stream import BoldFile, open_bold
from bids_brainfm.validation import LARGEST

VOXELS = ('mask', 'all')  # which voxels of a parcel its mean is taken over
_SAME_PLACE = 0.3  # mm between corners of two grids; headers round
DEMEANED = (
    'The parcels have means of about zero, so the data seem to have been demeaned or denoised '
    'before: denoising them again may distort them, and --scale cohort is refused.'
)


@dataclass(frozen=True)
class Parcellation:
    """Parcel means of one run."""

    # (T, P) float32, mean over the voxels of each parcel that vary over the run and, by default,
    # lie inside the brain mask, in BOLD units; NaN where a parcel has none
    data: np.ndarray
    coverage: np.ndarray  # (P,) float32, proportion that lies inside the brain mask and varies
    level: np.ndarray  # (P,) float32, mean of `data` over time
    # (P,) float32, median over the same voxels of mean / standard deviation over time
    tsnr: np.ndarray
    # Over the brain mask and the volumes of `level`, in BOLD units; without a mask, over the atlas
    brain_mean: float
    sampling: str  # 'atlas-to-run', 'run-to-atlas' (see sampling.make_sampler) or 'grayordinates'
    voxels: str  # the means are over: 'mask', 'all' or 'grayordinates', which have no mask
    header_tr: float  # repetition time in the file's header in seconds, 0 where absent
    n_nonfinite: int  # voxels of the atlas left out because they hold NaN or infinite values
    skip: int  # volumes at the start that level, tSNR and the mean of the brain leave out
    # (T,) bool, volumes without signal (see empty.without_signal), which hold interpolated values
    # in `data` and are left out of all else
    empty: np.ndarray

    @property
    def demeaned(self) -> bool:
        """Whether parcels fluctuate about zero: BOLD fluctuates by percents around its level."""
        spread = self.data[self.skip :].std(axis=0, dtype=float)
        return bool(np.nanmedian(np.abs(self.level)) < np.nanmedian(spread))


def parcellate(
    bold_path: Path, atlas_path: Path, n_parcels: int, mask_path: Path | None = None,
    voxels: str = 'mask', skip: int = 0,
) -> Parcellation:  # fmt: skip
    """Mean series, coverage, mean level and temporal signal-to-noise ratio of every parcel.

    A voxel outside the brain mask, or that is constant over the run (outside the field of view),
    counts against the parcel's coverage and not into its mean. A voxel with a NaN or infinite
    value anywhere is left out altogether. Volumes without signal count for nothing, and their
    values are interpolated. Only where there are such voxels or volumes is the file read again.

    The temporal signal-to-noise ratio of a voxel is its mean over time by its standard deviation
    (of the population), as in MRIQC (Esteban et al. 2017); that of a parcel is the median.

    Parameters
    ----------
    bold_path : a 4-D NIfTI file or a CIFTI dense series (``.dtseries.nii``)
    atlas_path : label image (1 to `n_parcels`, 0 elsewhere) in the run's space, on any grid and
        in any orientation; for CIFTI a ``.dlabel.nii`` on the run's grayordinates
    mask_path : brain mask on the run's grid (volumes only)
    voxels : ``'mask'``, means over voxels inside the brain mask, or ``'all'``, inside and outside;
        without a mask and for CIFTI there is no difference. Coverage counts the mask either way
    skip : volumes at the start, not in steady state, that are left out of level, tSNR and the mean
        of the brain

    Raises
    ------
    BrainfmError : a file cannot be read, mask or grayordinates are not the run's, the atlas does
        not lie in the run's box or inside its mask, the run is constant, or `voxels` is unknown
    """
    if voxels not in VOXELS:
        raise BrainfmError(f'voxels={voxels!r} is unknown: choose {" or ".join(VOXELS)}.')
    bold = open_bold(bold_path)
    skip = min(skip, bold.n_volumes - 1)
    if bold.is_cifti:
        return _from_grayordinates(bold, atlas_path, n_parcels, skip)
    mask = None if mask_path is None else _brain_mask(mask_path, bold)
    sampler = sampler_of(bold, atlas_path, n_parcels)
    return _from_volumes(bold, sampler, mask, voxels, skip)


def _brain_mask(mask_path: Path, bold: BoldFile) -> np.ndarray:
    """(V,) float32 brain mask on the run's grid, 1 inside, in Fortran order."""
    image = load_image(mask_path)
    if isinstance(image, nib.Cifti2Image) or image.shape != bold.grid:
        raise BrainfmError(
            f'The mask {mask_path} is on another grid {image.shape} than the run {bold.path} '
            f'{bold.grid}; give the brain mask of the same space and resolution.'
        )
    corners = np.diag([*(size - 1.0 for size in bold.grid), 1.0])  # at the ends of the three axes
    corners[:, 3] = 1
    apart = np.abs(corners @ (image.affine - bold.affine).T).max()
    if not apart < _SAME_PLACE:
        raise BrainfmError(
            f'The mask {mask_path} is on another grid than the run {bold.path}: both are '
            f'{bold.grid}, but another affine puts its voxels up to {apart:.3g} mm away; give the '
            'brain mask of the same space and resolution.'
        )
    mask = (read_values(image) > 0).ravel(order='F').astype(np.float32)
    if not mask.any():
        raise BrainfmError(f'The mask {mask_path} is empty; run fMRIPrep again for this run.')
    return mask


def _from_volumes(
    bold: BoldFile, sampler: Sampler, mask: np.ndarray | None, voxels: str, skip: int
) -> Parcellation:
    n_parcels = sampler.inside.size
    size = np.maximum(np.bincount(sampler.parcel, minlength=n_parcels), 1)
    if mask is None:
        voxels = 'all'
    elif voxels == 'mask':
        sampler = sampler.within(mask)
        if not sampler.voxels.size:
            raise BrainfmError(
                f'No parcel of the atlas lies inside the brain mask of {bold.path}; check that '
                'mask and atlas are in the same space.'
            )
    nothing = np.array([], int)
    found = _stream(bold, sampler, mask, nothing, np.ones(bold.n_volumes, bool), skip)
    used = ~without_signal(found.sample)
    if not used.all():
        found = _stream(bold, sampler, mask, nothing, used, skip)
    nonfinite = found.nonfinite
    if nonfinite.size:
        found = _stream(bold, sampler, mask, nonfinite, used, skip)

    parcel, varies, steady = sampler.parcel, found.varies, _steady(used, skip)
    n_used = np.bincount(parcel[varies], minlength=n_parcels)
    sums = np.zeros((bold.n_volumes, n_parcels))
    sums[:, sampler.parcels] = found.changes
    sums += np.bincount(parcel[varies], found.first[varies], minlength=n_parcels)
    if mask is None:
        n_covered, brain = n_used, (sums[steady].sum(), n_used.sum())
    else:
        n_covered = np.bincount(parcel[varies & (mask[sampler.voxels] > 0)], minlength=n_parcels)
        brain = found.brain_sum, np.count_nonzero(mask) - np.count_nonzero(mask[nonfinite])
    brain = brain[0] / np.count_nonzero(steady), brain[1]
    n_bad = int(np.isin(nonfinite, sampler.voxels).sum())
    data, brain_mean = _means(bold, sums, n_used, brain, n_bad)
    ratio = _ratio(bold, found.first + found.mean_change, found.variance)
    return Parcellation(
        interpolate(data, used), (n_covered / size * sampler.inside).astype(np.float32),
        _level(data[steady]), _medians(ratio[varies], parcel[varies], n_parcels), brain_mean,
        sampler.direction, voxels, bold.tr, n_bad, skip, ~used,
    )  # fmt: skip


def _steady(used: np.ndarray, skip: int) -> np.ndarray:
    """Volumes (T,) bool that are used and in steady state; those used, if none is."""
    steady = used & (np.arange(used.size) >= skip)
    return steady if steady.any() else used


class _Streamed(NamedTuple):
    """What one pass over the N voxels of a sampler gives, in the units on disk."""

    changes: np.ndarray  # (T, K) sums over each parcel's voxels of the change since volume 0
    first: np.ndarray  # (N,) volume 0
    varies: np.ndarray  # (N,) bool, changes at least once
    mean_change: np.ndarray  # (N,) since volume 0, over the volumes in steady state
    variance: np.ndarray  # (N,) over the volumes in steady state
    brain_sum: float  # over the mask and the volumes in steady state
    nonfinite: np.ndarray  # (M,) int, voxels with NaN or infinite values that reached a sum
    sample: np.ndarray  # (T, S) values of some of the voxels, in BOLD units


def _stream(
    bold: BoldFile, sampler: Sampler, mask: np.ndarray | None, nonfinite: np.ndarray,
    used: np.ndarray, skip: int,
) -> _Streamed:  # fmt: skip
    """One pass over the volumes that are `used`, (T,) bool.

    Voxels `nonfinite` are read as zero, which makes them constant. Sums are of the change since
    the first volume, so that squares of values far from zero do not cost the variance its digits.
    """
    values = np.empty(sampler.voxels.size, bold.dtype)
    changes = np.zeros((bold.n_volumes, sampler.starts.size))
    first, change, total, squares = np.zeros((4, values.size))
    bad, brain_sum = np.zeros(int(np.prod(bold.grid)), bool), 0.0
    unchanged, steady, some = np.arange(values.size), _steady(used, skip), sample_of(values.size)
    start = np.argmax(used)
    sample = np.zeros((bold.n_volumes, values[some].size), np.float32)
    for t, frame in enumerate(stream.frames(bold)):
        if not used[t]:
            continue
        frame[nonfinite] = 0
        np.take(frame, sampler.voxels, out=values, mode='wrap')  # 'raise' would make a copy
        if t == start:
            first[:] = values
        with np.errstate(invalid='ignore', over='ignore'):
            sample[t] = values[some] * bold.slope + bold.inter
            np.subtract(values, first, out=change)
            # A product with the mask as numbers is several times faster than picking its voxels.
            in_brain = 0.0 if mask is None else float(frame @ mask)
            np.add.reduceat(change, sampler.starts, out=changes[t])
            # Nearly every voxel has changed after a few volumes, so this soon costs nothing.
            unchanged = unchanged[change[unchanged] == 0]
            if steady[t]:
                total += change
                squares += np.multiply(change, change, out=change)
                brain_sum += in_brain
        if not (np.isfinite(changes[t]).all() and np.isfinite(in_brain)):
            bad |= ~np.isfinite(frame)
    varies = np.ones(values.size, bool)
    varies[unchanged] = False
    total /= np.count_nonzero(steady)
    squares /= np.count_nonzero(steady)
    with np.errstate(invalid='ignore'):
        variance = squares - total**2
        # What rounding leaves of the variance of a voxel that is constant in steady state is zero.
        variance[variance < 1e-12 * squares] = 0
    bad_voxels = np.flatnonzero(bad)
    return _Streamed(changes, first, varies, total, variance, brain_sum, bad_voxels, sample)


@np.errstate(over='ignore', invalid='ignore')  # what is beyond bounds is refused at the end
def _from_grayordinates(
    bold: BoldFile, atlas_path: Path, n_parcels: int, skip: int
) -> Parcellation:
    labels = matching_labels(atlas_path, n_parcels, bold)
    some = sample_of(labels.size)
    sample = np.concatenate([block[some].T for block in stream.grayordinates(bold)], axis=1)
    used = ~without_signal(sample * bold.slope + bold.inter)
    steady = _steady(used, skip)[used]
    sums, n_used = np.zeros((n_parcels, bold.n_volumes)), np.zeros(n_parcels)
    ratio = np.full(labels.size, np.nan)
    start, brain_sum, n_brain, n_bad = 0, 0.0, 0, 0
    for block in stream.grayordinates(bold):
        label = labels[start : start + len(block)]
        if not used.all():
            block = block[:, used]
        finite = np.isfinite(block).all(axis=1)
        n_bad += int(np.count_nonzero(~finite & (label > 0)))
        usable = finite & (block != block[:, :1]).any(axis=1)
        brain_sum += block[usable][:, steady].mean(axis=1, dtype=float).sum()
        n_brain += int(np.count_nonzero(usable))

        rows = np.flatnonzero(usable & (label > 0))
        if rows.size:
            rows = rows[np.argsort(label[rows], kind='stable')]
            found, starts, counts = np.unique(label[rows], return_index=True, return_counts=True)
            chosen = block[rows].astype(float)
            sums[np.ix_(found - 1, used)] += np.add.reduceat(chosen, starts, axis=0)
            n_used[found - 1] += counts
            chosen = chosen[:, steady]
            ratio[start + rows] = _ratio(bold, chosen.mean(axis=1), chosen.var(axis=1))
        start += len(block)
    coverage = n_used / np.maximum(np.bincount(labels, minlength=n_parcels + 1)[1:], 1)
    data, brain_mean = _means(bold, sums.T, n_used, (brain_sum, n_brain), n_bad)
    tsnr = _medians(ratio[labels > 0], labels[labels > 0] - 1, n_parcels)
    return Parcellation(
        interpolate(data, used), coverage.astype(np.float32), _level(data[_steady(used, skip)]),
        tsnr, brain_mean, 'grayordinates', 'grayordinates', bold.tr, n_bad, skip, ~used,
    )  # fmt: skip


def _ratio(bold: BoldFile, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Mean by standard deviation, of values as stored; NaN for constant ones."""
    spread = np.abs(bold.slope) * np.sqrt(np.where(variance > 0, variance, np.nan))
    return (mean * bold.slope + bold.inter) / spread


def _medians(values: np.ndarray, parcel: np.ndarray, n_parcels: int) -> np.ndarray:
    """(P,) float32 median over the voxels (N,) of each parcel that are not NaN."""
    known = ~np.isnan(values)
    order = np.argsort(parcel[known], kind='stable')
    parcels, starts = np.unique(parcel[known][order], return_index=True)
    medians = np.full(n_parcels, np.nan, np.float32)
    medians[parcels] = [np.median(part) for part in np.split(values[known][order], starts[1:])]
    return medians


def _level(data: np.ndarray) -> np.ndarray:
    """(P,) float32 mean over time."""
    return data.mean(axis=0, dtype=float).astype(np.float32)


def _means(
    bold: BoldFile, sums: np.ndarray, n_used: np.ndarray, brain: tuple[float, int], n_bad: int
) -> tuple[np.ndarray, float]:
    """Sums (T, P) of usable voxels, and of means of the brain's, as stored, to BOLD units."""
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
    brain_mean = float(brain_sum / n_brain * bold.slope + bold.inter)
    with np.errstate(over='ignore', invalid='ignore'):
        data = (means * bold.slope + bold.inter).astype(np.float32)
    largest = max(abs(brain_mean), np.abs(data[:, n_used > 0]).max())
    if not 1 / LARGEST <= largest <= LARGEST:  # NaN is not, either
        raise BrainfmError(
            f'{bold.path} has values up to {largest:.3g}, which are no BOLD signal; check the '
            'scaling (scl_slope, scl_inter) in its header, or run fMRIPrep again for this run.'
        )
    return data, brain_mean
