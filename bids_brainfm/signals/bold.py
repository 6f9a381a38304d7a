"""From one BOLD file to its parcel series: the way in for notebooks, and for the command.

>>> series = parcellate('sub-01_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz', 'A424', mask)
... # doctest: +SKIP
>>> clean = denoise(series, 'sub-01_desc-confounds_timeseries.tsv')  # doctest: +SKIP
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from nibabel.cifti2 import Cifti2Header

from bids_brainfm.atlases.atlas import Atlas, AtlasImage, load_atlas
from bids_brainfm.bids.inputs.fmriprep import run_of
from bids_brainfm.bids.run import repetition_time
from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals import denoise as denoising
from bids_brainfm.signals import parcellate as averaging
from bids_brainfm.signals.denoise import Preset, load_preset, read_confounds
from bids_brainfm.signals.parcellate import Parcellation
from bids_brainfm.signals.series import ParcelSeries
from bids_brainfm.signals.stream import load_image

Series = TypeVar('Series', bound=ParcelSeries)


@dataclass(frozen=True, kw_only=True)
class BoldSeries(ParcelSeries):
    """Parcel series, and what there is to know of how they came about."""

    image: AtlasImage  # the image of the atlas that was used
    found: Parcellation  # the series before denoising, and what the file is like
    names: tuple[str, ...] = ()  # confounds that were regressed out
    dummy: int = 0  # volumes left out at the start


def parcellate(
    bold: str | Path, atlas: Atlas | str | Path, mask: str | Path | None = None,
    space: str | None = None, tr: float | None = None,
) -> BoldSeries:  # fmt: skip
    """Average a BOLD file over the parcels of an atlas.

    Parameters
    ----------
    bold : a preprocessed 4-D NIfTI file or a CIFTI dense series, in a standard space
    atlas : an atlas, or what :func:`bids_brainfm.load_atlas` takes
    mask : brain mask on the run's grid, for the mean of the brain (else of the atlas); no CIFTI
    space : template space; that of the file name (``space-``) where not given
    tr : repetition time in seconds; that of the JSON sidecar, else of the header, where not given

    Returns
    -------
    BoldSeries : all volumes, in BOLD units; NaN for a parcel without a usable voxel

    Raises
    ------
    BrainfmError : the space or the repetition time is not known, the atlas is not at hand in this
        space, or a file cannot be read or is not of the run
    """
    bold = Path(bold)
    run = run_of(bold)
    atlas = atlas if isinstance(atlas, Atlas) else load_atlas(atlas)
    space = space or run.entities.get('space')
    if space is None:
        raise BrainfmError(
            f'The name of {bold.name} has no space- entity, so its template space is unknown: '
            f'give it as space=, such as {atlas.images[0].space}.'
        )
    if tr is None and run.sidecar is not None:
        tr = repetition_time(run)
    image = atlas.image_for(space, voxel_size(bold))
    found = averaging.parcellate(bold, image.path, atlas.n_parcels, Path(mask) if mask else None)
    tr = tr or found.header_tr
    if not tr:
        raise BrainfmError(
            f'{bold.name} has no repetition time in its header and no JSON sidecar next to it: '
            'give it in seconds as tr=.'
        )
    flagged, mean = np.zeros(len(found.data), bool), found.brain_mean
    return BoldSeries(
        data=found.data, tr=tr, coverage=found.coverage, flagged=flagged, brain_mean=mean,
        image=image, found=found,
    )  # fmt: skip


def denoise(
    series: Series, confounds: str | Path | None = None, strategy: str | Path | Preset = 'simple',
    confounds_json: str | Path | None = None,
) -> Series:  # fmt: skip
    """Regress confounds out of parcel series; leave out dummy volumes, interpolate outliers.

    Parameters
    ----------
    series : all volumes of the run
    confounds : fMRIPrep's ``desc-confounds_timeseries.tsv``; not needed for the strategy ``none``
    strategy : a denoising preset, by name (``simple``, ``36P``, ``acompcor``, ``none``) or file
    confounds_json : their sidecar, which CompCor needs; that next to the table where not given

    Returns
    -------
    ParcelSeries : of the type that was given, with ``flagged`` volumes and ``start``

    Raises
    ------
    BrainfmError : the confounds are missing, damaged, of another run, or too many for its volumes
    """
    preset = strategy if isinstance(strategy, Preset) else load_preset(strategy)
    if confounds is None and not preset.touches_nothing:
        raise BrainfmError(
            f'The denoising "{preset.name}" needs the confounds of the run: give its '
            "desc-confounds_timeseries.tsv as confounds=, or choose 'none'."
        )
    table = None if confounds is None else Path(confounds)
    sidecar = None if confounds_json is None else Path(confounds_json)
    if table and not sidecar and table.with_suffix('.json').is_file():
        sidecar = table.with_suffix('.json')
    found = read_confounds(table, sidecar, preset, len(series.data))
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
