"""From one BOLD file, with its mask and confounds, to parcel series."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nibabel.cifti2 import Cifti2Header

from bids_brainfm.atlases.atlas import Atlas, AtlasImage
from bids_brainfm.bids.tables import ica_tables
from bids_brainfm.errors import BrainfmError
from bids_brainfm.images import load_image
from bids_brainfm.signals import denoise as denoising
from bids_brainfm.signals import parcellate as averaging
from bids_brainfm.signals.confounds import Tables, count_dummy, read_confounds
from bids_brainfm.signals.denoise import Freedom
from bids_brainfm.signals.parcellate import Parcellation
from bids_brainfm.signals.series import ParcelSeries, check_tr
from bids_brainfm.signals.strategy import Strategy, load_strategy, override
from bids_brainfm.signals.stream import open_bold

Series = TypeVar('Series', bound=ParcelSeries)


@dataclass(frozen=True, kw_only=True)
class BoldSeries(ParcelSeries):
    """Parcel series, and what there is to know of how they came about."""

    image: AtlasImage  # the image of the atlas that was used
    found: Parcellation  # the series before denoising, and what the file is like
    denoised: 'Denoised | None' = None  # what denoising did, None before it

    @property
    def names(self) -> tuple[str, ...]:
        """Confounds that were regressed out."""
        return self.denoised.names if self.denoised else ()

    @property
    def dummy(self) -> int:
        """Volumes left out at the start."""
        return self.denoised.dummy if self.denoised else 0

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
    dummy: int | None = None,
) -> BoldSeries:  # fmt: skip
    """As :func:`bids_brainfm.parcellate`, but nothing is looked up next to the file.

    `start` is the time of the first volume in seconds. Level, tSNR and the mean of the brain leave
    out `dummy` volumes at the start, or those that the table `confounds` says are not in steady
    state.
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
    if dummy is None:
        dummy = 0 if confounds is None else count_dummy(confounds, header.n_volumes)
    found = averaging.parcellate(bold, image.path, atlas.n_parcels, mask, voxels, dummy)
    return BoldSeries(
        data=found.data, tr=tr, coverage=found.coverage, flagged=found.empty,
        brain_mean=found.brain_mean, start=start, image=image, found=found,
    )  # fmt: skip


def denoise(
    series: Series, confounds: str | Path | None = None,
    strategy: str | Path | Strategy = 'simple', confounds_json: str | Path | None = None, *,
    custom_confounds: str | Path | None = None, mixing: str | Path | None = None,
    metrics: str | Path | None = None, **options: Any,
) -> Series:  # fmt: skip
    """Regress confounds out of parcel series; leave out dummy volumes, interpolate outliers.

    Parameters
    ----------
    series : ParcelSeries
        All volumes of the run; those that are flagged count as outliers, too.
    confounds : path-like, optional
        fMRIPrep's ``desc-confounds_timeseries.tsv``; the strategy ``'none'`` only looks up
        non-steady-state volumes in it.
    strategy : str, path-like or Strategy, default 'simple'
        A strategy of ``--denoise`` (``'simple'``, ``'scrubbing'``, ``'compcor'``, ``'acompcor'``,
        ``'36P'``, ``'aroma'``, ``'aroma-aggressive'``, ``'tedana'`` or ``'none'``), or its YAML
        file; with ``'+gsr'`` at the end the global signal, too.
    confounds_json : path-like, optional
        Sidecar of the confounds, which CompCor needs; by default the one next to the table.
    custom_confounds : path-like, optional
        Table (TSV) of further regressors, all of which are regressed out.
    mixing, metrics : path-like, optional
        Time courses and classification of the components of ICA-AROMA or tedana; by default those
        next to the confounds.
    **options
        As the options of the command: `bandpass` (two limits in Hz, 0 for none), `fd_threshold`
        (mm) and `dvars_threshold` (0 for none), `scrub`, `dummy_scans` (a number or ``'auto'``),
        `keep_nonsteady`, `motion_filter_type` (``'notch'`` or ``'lp'``), `band_stop_min` and
        `band_stop_max` (breaths per minute), `motion_filter_order`, `head_radius` (mm),
        `min_dof` and `min_minutes`.

    Returns
    -------
    ParcelSeries
        Of the type that was given, without dummy volumes: data (volumes, parcels) in BOLD units,
        ``flagged`` (volumes,) with the outliers, and ``start`` in seconds. A BoldSeries also has
        ``denoised``, with the degrees of freedom that are left.

    Raises
    ------
    BrainfmError
        Confounds are missing, damaged, of another run, or leave too few degrees of freedom; or
        an option has a value that it does not take.

    Warns
    -----
    UserWarning
        Few degrees of freedom or minutes are left, or non-steady volumes could not be found.
    """
    found = strategy if isinstance(strategy, Strategy) else load_strategy(strategy)
    found, table = override(found, **options), _path(confounds)
    sidecar, components = _path(confounds_json), (_path(mixing), _path(metrics))
    if table is not None:
        neighbour = table.with_suffix('.json')
        sidecar = sidecar or (neighbour if neighbour.is_file() else None)
        if found.ica:
            near = ica_tables(table, found.ica)
            components = components[0] or near[0], components[1] or near[1]
    clean, result = clean_series(
        series, Tables(table, sidecar, _path(custom_confounds), *components), found
    )
    for sentence in result.warnings:
        warnings.warn(sentence, stacklevel=2)
    return clean


def _path(text: str | Path | None) -> Path | None:
    return None if text is None else Path(text)


@dataclass(frozen=True)
class Denoised:
    """What denoising did to a run."""

    freedom: Freedom
    warnings: tuple[str, ...]  # sentences
    names: tuple[str, ...]  # confounds that were regressed out
    dummy: int  # volumes left out at the start
    displacement: np.ndarray | None  # of `Confounds`, without the volumes left out
    left_out: int = 0  # volumes without signal at the end


def clean_series(series: Series, tables: Tables, strategy: Strategy) -> tuple[Series, Denoised]:
    """As :func:`denoise`, with all that is known of it; nothing is looked up."""
    found = read_confounds(tables, strategy, len(series.data), series.tr)
    marked, stop = series.flagged.astype(bool), len(series.data)
    if isinstance(series, BoldSeries) and series.denoised is None:
        stop -= int(np.argmin(series.found.empty[::-1]))  # those at the end
        if found.dummy >= stop:
            raise BrainfmError(
                f'The {stop} volumes that hold signal would all be dropped at the start of the '
                'run: leave this run out, or check --dummy-scans.'
            )
        found, marked = found.until(stop), marked[:stop]
    if strategy.regresses or strategy.outliers or tables.custom is not None:
        found = dataclasses.replace(found, flagged=found.flagged | marked)
    data, freedom = denoising.denoise(series.data[:stop], found, strategy, series.tr)
    sentences = freedom.warnings(strategy)
    if strategy.finds_dummies and tables.confounds is None:
        sentences.append(
            'There is no confounds table, so volumes before the steady state could not be found, '
            'and none was left out.'
        )
    sentences += _lost(series, found.dummy, stop)
    moved = None if found.displacement is None else found.displacement[found.dummy :]
    names = found.names + found.noise_names
    left_out = len(series.data) - stop
    done = Denoised(freedom, tuple(sentences), names, found.dummy, moved, left_out)
    clean = dataclasses.replace(
        series, data=data, flagged=(found.flagged | marked)[found.dummy :],
        start=series.start + found.dummy * series.tr,
    )  # fmt: skip
    if isinstance(clean, BoldSeries):
        clean = dataclasses.replace(clean, denoised=done)
    return clean, done


def _lost(series: ParcelSeries, start: int, stop: int) -> list[str]:
    """Say which volumes without signal were flagged, or left out at the end."""
    if not isinstance(series, BoldSeries) or series.denoised is not None:
        return []
    inside, end = int(series.found.empty[start:stop].sum()), len(series.data) - stop
    done = [f'{end} at the end were left out'] * (end > 0)
    done += [f'{inside} were flagged and interpolated'] * (inside > 0)
    if not done:
        return []
    text = 'Volumes hold no signal (empty, constant, NaN, cut off, or equal to the volume before)'
    return [f'{text}: {" and ".join(done)}.']


def voxel_size(bold: Path) -> float | None:
    """Geometric mean of the voxel's edges in mm, None for grayordinates."""
    try:
        header = load_image(bold).header
    except Exception:  # the reader of the volumes gives a clearer error
        return None
    if isinstance(header, Cifti2Header):
        return None
    return float(np.prod(header.get_zooms()[:3]) ** (1 / 3))
