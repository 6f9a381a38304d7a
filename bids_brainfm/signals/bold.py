"""From one BOLD file, with its mask and confounds, to parcel series."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from nibabel.cifti2 import Cifti2Header

from bids_brainfm.atlases.atlas import Atlas, AtlasImage
from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals import denoise as denoising
from bids_brainfm.signals import parcellate as averaging
from bids_brainfm.signals.denoise import Preset, count_dummy, load_preset, read_confounds
from bids_brainfm.signals.parcellate import Parcellation
from bids_brainfm.signals.series import ParcelSeries, check_tr
from bids_brainfm.signals.stream import load_image, open_bold

Series = TypeVar('Series', bound=ParcelSeries)


@dataclass(frozen=True, kw_only=True)
class BoldSeries(ParcelSeries):
    """Parcel series, and what there is to know of how they came about."""

    image: AtlasImage  # the image of the atlas that was used
    found: Parcellation  # the series before denoising, and what the file is like
    names: tuple[str, ...] = ()  # confounds that were regressed out
    dummy: int = 0  # volumes left out at the start

    @property
    def level(self) -> np.ndarray:
        """Mean of each parcel over time before denoising, (P,) float32 in BOLD units."""
        return self.found.level

    @property
    def tsnr(self) -> np.ndarray:
        """Temporal signal-to-noise ratio of each parcel before denoising, (P,) float32."""
        return self.found.tsnr


def parcellate(
    bold: Path, atlas: Atlas, mask: Path | None, space: str, tr: float | None = None,
    start: float = 0.0, voxels: str = 'mask', confounds: Path | None = None,
) -> BoldSeries:  # fmt: skip
    """As :func:`bids_brainfm.parcellate`, but nothing is looked up next to the file.

    `start` is the time of the first volume in seconds; `confounds` is the table that says which
    volumes at the start are not in steady state, and are left out of level and tSNR.
    """
    image, header = atlas.image_for(space, voxel_size(bold)), open_bold(bold)
    if mask is None and not header.is_cifti:
        warnings.warn(
            f'{bold.name} comes without a brain mask, so parcels and coverage include voxels '
            'outside the brain, and the mean of the brain is taken over the whole atlas: give the '
            'desc-brain_mask of the run as mask=.',
            stacklevel=3,
        )
    tr = check_tr(header.tr, f' in the header of {bold.name}') if tr is None else check_tr(tr)
    skip = 0 if confounds is None else count_dummy(confounds, header.n_volumes)
    found = averaging.parcellate(bold, image.path, atlas.n_parcels, mask, voxels, skip)
    return BoldSeries(
        data=found.data, tr=tr, coverage=found.coverage, flagged=np.zeros(len(found.data), bool),
        brain_mean=found.brain_mean, start=start, image=image, found=found,
    )  # fmt: skip


def denoise(
    series: Series, confounds: str | Path | None = None, strategy: str | Path | Preset = 'simple',
    confounds_json: str | Path | None = None,
) -> Series:  # fmt: skip
    """Regress confounds out of parcel series; leave out dummy volumes, interpolate outliers.

    Parameters
    ----------
    series : ParcelSeries
        All volumes of the run; those that are flagged count as outliers, too.
    confounds : path-like, optional
        fMRIPrep's ``desc-confounds_timeseries.tsv``; not needed for the strategy ``'none'``.
    strategy : str, path-like or Preset, default 'simple'
        A denoising preset (``'simple'``, ``'36P'``, ``'acompcor'`` or ``'none'``), or its file.
    confounds_json : path-like, optional
        Sidecar of the confounds, which CompCor needs; by default the one next to the table.

    Returns
    -------
    ParcelSeries
        Of the type that was given, without dummy volumes: data (volumes, parcels) in BOLD units,
        ``flagged`` (volumes,) with the outliers, and ``start`` in seconds.

    Raises
    ------
    BrainfmError
        The confounds are missing, damaged, of another run, or too many for its volumes.
    """
    preset = strategy if isinstance(strategy, Preset) else load_preset(strategy)
    if preset.touches_nothing:
        return series
    if confounds is None:
        raise BrainfmError(
            f'The denoising "{preset.name}" needs the confounds of the run: give its '
            "desc-confounds_timeseries.tsv as confounds=, or choose 'none'."
        )
    table = Path(confounds)
    sidecar = None if confounds_json is None else Path(confounds_json)
    if not sidecar and table.with_suffix('.json').is_file():
        sidecar = table.with_suffix('.json')
    found = read_confounds(table, sidecar, preset, len(series.data))
    found = dataclasses.replace(found, flagged=found.flagged | series.flagged.astype(bool))
    data, flagged = denoising.denoise(series.data, found), found.flagged[found.dummy :]
    start = series.start + found.dummy * series.tr
    clean = dataclasses.replace(series, data=data, flagged=flagged, start=start)
    if isinstance(clean, BoldSeries):
        return dataclasses.replace(clean, names=tuple(found.names), dummy=found.dummy)
    return clean


def voxel_size(bold: Path) -> float | None:
    """Geometric mean of the voxel's edges in mm, None for grayordinates."""
    try:
        header = load_image(bold).header
    except Exception:  # the reader of the volumes gives a clearer error
        return None
    if isinstance(header, Cifti2Header):
        return None
    return float(np.prod(header.get_zooms()[:3]) ** (1 / 3))
