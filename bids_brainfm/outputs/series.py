"""Parcel series of a run: from a BOLD file to denoised series with their coverage."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.files import write_matrix, write_table
from bids_brainfm.bids.freshness import (
    check_unchanged,
    input_fingerprints,
    read_sidecar,
    sidecar_path,
)
from bids_brainfm.bids.run import (
    BoldRun,
    check_companions,
    metadata,
    repetition_time,
    start_time,
)
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs import products, quality
from bids_brainfm.outputs.outcome import Outcome, attempt
from bids_brainfm.outputs.registry import BY_NAME, OF_SERIES
from bids_brainfm.outputs.series_context import SeriesContext
from bids_brainfm.outputs.tasks import Place, SeriesTask
from bids_brainfm.reports.report import Figure
from bids_brainfm.signals.denoise import Freedom
from bids_brainfm.signals.series import coverage_path
from bids_brainfm.signals.strategy import Strategy, describe

if TYPE_CHECKING:
    from bids_brainfm.signals.bold import BoldSeries

# Field of the sidecar: volumes left out at the start, by whom
DISCARDED, BY = 'NumberOfVolumesDiscardedBy', ('NonsteadyStatesDetector', 'User')
# and at the end, because they hold no signal
LEFT_OUT = 'NumberOfVolumesLeftOutAtEnd'
FIGURES = {
    'carpet': Figure('Parcel series before and after denoising',
        'Each row is a parcel, z-scored within its panel; dark and light vertical bands are '
        'events that many parcels share. Orange marks volumes flagged as outliers, whose values '
        'are interpolated unless denoising was switched off. The trace above is the root mean '
        "square over parcels of the change from volume to volume, in percent of the parcel's "
        'mean.'),
    'coverage': Figure('Coverage of the atlas',
        "Proportion of each parcel's voxels that are inside the brain mask and vary over time, "
        "at the parcel's centroid; grayordinates have no mask and need only vary. Ringed parcels "
        'are below the limit (dashed line): they are n/a in the series and are filled before the '
        'encoder. Left is left.'),
}  # fmt: skip


def compute_series(run: BoldRun, task: SeriesTask) -> SeriesContext:
    """Parcellate and denoise one run; refuse files that are missing, damaged or contradictory."""
    from bids_brainfm.signals.bold import clean_series, parcellate
    from bids_brainfm.signals.confounds import Tables
    from bids_brainfm.signals.stream import open_bold

    inputs = input_fingerprints(run)
    tr = repetition_time(run, open_bold(run.bold).tr)
    start, strategy = start_time(run), task.strategy
    check_companions(run, strategy.name if strategy.needs_table else None)
    if task.custom_confounds and run.custom is None and not (strategy.ica and run.mixing):
        raise BrainfmError(
            f'{run.name}: there is no table of this run in {task.custom_confounds} '
            '(--custom-confounds): put one there with the name of its confounds table, or leave '
            'this run out.'
        )
    atlas = load_atlas(task.card, task.home)
    raw = parcellate(
        run.bold, atlas, run.mask, run.space, tr, start or 0.0, task.parcel_voxels, run.confounds,
        strategy.dummy_scans,
    )  # fmt: skip
    tables = Tables(run.confounds, run.confounds_json, run.custom, run.mixing, run.metrics)
    series, _ = clean_series(raw, tables, strategy)
    check_unchanged(run, inputs)
    covered = (series.coverage >= task.min_coverage) & np.isfinite(series.data).all(axis=0)
    data = np.where(covered, series.data, np.nan).astype(np.float32)
    return SeriesContext(run, task, atlas, dataclasses.replace(series, data=data), inputs)


def series_current(run: BoldRun, task: SeriesTask, contents: bool = False) -> bool:
    """Whether series and connectome of a run exist, fit the inputs, and have enough data left.

    With `contents`, files are compared with their checksums.
    """
    inputs = input_fingerprints(run)
    current = all(
        products.product_current(BY_NAME[name], run, task, inputs, contents)
        for name in task.parameters
    )
    return current and _enough_left(task.place.table(run, 'series'), task.strategy)


def _enough_left(series: Path, strategy: Strategy) -> bool:
    """Whether denoising left of a run what the limits ask for, which may be others now."""
    sidecar = read_sidecar(sidecar_path(series)) or {}
    try:
        found = sidecar['Denoising']
        if 'DegreesOfFreedom' not in found:  # denoised by its pipeline
            return True
        Freedom(
            volumes=sidecar['NumberOfVolumes'] - _discarded(sidecar) - sidecar.get(LEFT_OUT, 0),
            unflagged=found['NumberOfVolumesUnflagged'], regressors=found['NumberOfRegressors'],
            nuisance_rank=found['RankOfRegressors'],
            total_rank=found['RankOfRegressorsAndFilter'], minutes=found['MinutesUnflagged'],
        ).refuse(strategy)  # fmt: skip
    # the latter of a sidecar that somebody edited
    except (BrainfmError, LookupError, TypeError, AttributeError, StopIteration):
        return False
    return True


def _discarded(sidecar: dict[str, Any]) -> int:
    """Number of volumes that were left out at the start."""
    return int(next(sidecar[f'{DISCARDED}{by}'] for by in BY if f'{DISCARDED}{by}' in sidecar))


def make_series(run: BoldRun, task: SeriesTask, stop: bool = False) -> Outcome:
    """Write the parcel series of one run; `stop` raises a failure after it was recorded."""

    def work() -> None:
        context = compute_series(run, task)
        products.write_products(OF_SERIES, run, task, task.parameters, context)

    return attempt(task.place.output, run, task.place.step, work, stop)


def companions(run: BoldRun, place: Place, task: SeriesTask | None = None) -> list[Path]:
    """The table of coverage, mean level and tSNR."""
    return [coverage_path(place.table(run, 'series'))]


def settings(task: SeriesTask) -> dict[str, Any]:
    """Denoising, voxels of the parcels, and limit of coverage.

    What does not change values is left out: the wording, and limits below which a run fails, which
    are checked anew each time.
    """
    rules = dataclasses.asdict(task.strategy)
    aside = ('name', 'description', 'min_dof', 'min_minutes')
    found = {
        'denoise': rules['name'], 'min_coverage': task.min_coverage,
        'parcel_voxels': task.parcel_voxels, 'max_flagged': task.max_flagged,
    }  # fmt: skip
    default = dataclasses.asdict(Strategy('none'))
    found |= {
        f'denoise_{key}': v for key, v in rules.items() if v != default[key] and key not in aside
    }
    found |= {'custom_confounds': True} if task.custom_confounds else {}
    return found | ({'denoised_by_pipeline': True} if task.denoised else {})


def _denoising(task: SeriesTask) -> str:
    """What was removed from the series, as sentences."""
    if task.denoised:
        return (
            'The data had been denoised by the pipeline that preprocessed them; no further '
            'confound was regressed out, no volume was dropped and none was interpolated.'
        )
    custom = ' Further confounds, from tables of the user, were regressors of the same model.'
    return describe(task.strategy) + custom * bool(task.custom_confounds)


def methods(task: SeriesTask) -> str:
    """Sentences on parcels, denoising and connectivity."""
    steady = 'Volumes before the steady state, as found by fMRIPrep, were left out. '
    dropped = steady if task.strategy.finds_dummies else ''
    if number := task.strategy.dummy_scans:
        dropped = f'The first {number} volumes of each run were left out. '
    inside = ' and lie inside the brain mask' if task.parcel_voxels == 'mask' else ''
    return (
        f'The mean BOLD signal of each parcel of the {task.place.atlas} atlas was computed over '
        f'the voxels of the parcel that vary over the run{inside}, or over its grayordinates that '
        'vary, which have no mask. Atlas and data were matched by their affines: each voxel took '
        'the label nearest to it or, where the data are too coarse for that, each voxel of the '
        'atlas took the voxel of the data nearest to it. Parcels of which less than '
        f'{task.min_coverage:.0%} of the voxels lie inside the brain mask and vary were set to '
        'n/a. The temporal signal-to-noise ratio (mean by standard deviation over time) was '
        'computed for each voxel of the preprocessed series and its median taken over each parcel '
        f'(Esteban et al. 2017). {dropped}{_denoising(task)} Functional connectivity (Pearson '
        'correlation between the denoised parcel series over the volumes that were not flagged) '
        'was computed as the baseline to compare embeddings with.\n\n'
    )


def compute(context: SeriesContext) -> 'BoldSeries':
    """Series of the run, computed with the context."""
    return context.series


def write(context: SeriesContext, result: 'BoldSeries') -> None:
    """Write series and coverage, their figures and sidecars."""
    from bids_brainfm.reports.figures import series as figures

    run, place, atlas, series = context.run, context.task.place, context.atlas, result
    table, (coverage,) = place.table(run, 'series'), companions(run, place)
    columns = {'coverage': series.coverage, 'mean': series.level, 'tsnr': series.tsnr}
    write_table(coverage, {'Node': list(atlas.names)} | columns)
    write_matrix(table, series.data, list(atlas.names))
    order, label = products.display_order(atlas.xyz)
    raw = series.found.data[series.dummy :][: len(series.data)]
    carpet = figures.carpet(
        raw, series.data, series.tr, series.flagged, order,
        order_label=label, start=series.start,
    )  # fmt: skip
    products.save_figure(carpet, place.figure(run, 'carpet'))
    drawn = figures.coverage(atlas.xyz, series.coverage, context.task.min_coverage)
    products.save_figure(drawn, place.figure(run, 'coverage'))
    content = {
        'Description': 'Coverage, mean level and temporal signal-to-noise ratio of each parcel, '
        'from the preprocessed series before denoising.',
        'ParcelVoxels': series.found.voxels,
        'NumberOfVolumesLeftOut': series.found.skip,
        'Node': {'Description': f'Parcel of {atlas.name}'},
        'coverage': {'Description': f'Proportion of {context.voxels}', 'Units': 'arbitrary'},
        'mean': {
            'Description': 'Mean over the voxels of the parcel series and over volumes',
            'Units': 'arbitrary',
        },
        'tsnr': {
            'LongName': 'Temporal signal-to-noise ratio',
            'Description': 'Mean by standard deviation over time of each voxel of the parcel '
            'series; median over voxels',
            'Units': 'arbitrary',
        },
    }
    context.write_sidecar(coverage, content, from_series=False)
    context.write_sidecar(table, _describe(context), from_series=False)


def _describe(context: SeriesContext) -> dict[str, Any]:
    """Sidecar of the series."""
    atlas, series, strategy = context.atlas, context.series, context.task.strategy
    by = BY[0] if strategy.finds_dummies else BY[1]
    return {
        'Description': f'Mean BOLD signal of each parcel of {atlas.name}, in BOLD units.',
        'RepetitionTime': series.tr, 'SamplingFrequency': 1 / series.tr, 'StartTime': series.start,
        'InputStartTime': start_time(context.run),
        'SliceTimingCorrected': metadata(context.run).get('SliceTimingCorrected'),
        'NumberOfVolumes': len(series.found.data),
        f'{DISCARDED}{by}': series.dummy,
        'NumberOfVolumesWithoutSignal': int(series.found.empty.sum()),
        LEFT_OUT: series.denoised.left_out if series.denoised else 0,
        'NumberOfVolumesFlagged': int(series.flagged.sum()) if context.assessed else None,
        'FlaggedVolumes': np.flatnonzero(series.flagged),
        'MaxFlagged': context.task.max_flagged,
        'FlaggedVolumesInterpolated': context.assessed,
        'Denoising': _describe_denoising(context),
        'Atlas': {
            'Name': atlas.name, 'Image': series.image.path.name,
            'Provenance': series.image.provenance, 'License': atlas.licence,
            'Citation': ' '.join(atlas.citation),
        },
        'Space': context.run.space, 'Resolution': context.run.entities.get('res'),
        'Sampling': series.found.sampling, 'ParcelVoxels': series.found.voxels,
        'BrainMean': series.found.brain_mean, 'Quality': context.quality,
        'MinimumCoverage': context.task.min_coverage,
        'ParcelsBelowMinimumCoverage': context.uncovered, 'Warnings': context.warnings,
    }  # fmt: skip


def _describe_denoising(context: SeriesContext) -> dict[str, Any]:
    """What was removed, and how much it left."""
    strategy, done = context.task.strategy, context.series.denoised
    assert done is not None
    freedom = done.freedom
    moved = done.displacement if strategy.motion_filter or strategy.head_radius else None
    found = {
        'Name': strategy.name, 'Description': _denoising(context.task),
        'ConfoundRegressors': done.names,
        'MeanAddedBack': strategy.regresses or bool(done.names),
        'BandPassFilter': strategy.bandpass,
        'MotionFilter': strategy.motion_filter and dataclasses.asdict(strategy.motion_filter),
        # as computed anew from the motion parameters
        'MeanFramewiseDisplacement': None if moved is None else np.nanmean(moved),
        'OutlierThresholds': strategy.outliers or None,
        'ShortestSegment': strategy.scrub or None,
        'NumberOfVolumesUnflagged': freedom.unflagged, 'MinutesUnflagged': freedom.minutes,
    }  # fmt: skip
    if not context.task.denoised:  # nothing is known of what the pipeline regressed out
        found |= {
            'NumberOfRegressors': freedom.regressors,
            # on unflagged volumes, with the mean
            'RankOfRegressors': freedom.nuisance_rank,
            'RankOfRegressorsAndFilter': freedom.total_rank,
            'DegreesOfFreedom': freedom.residual,
        }
    return {key: value for key, value in found.items() if value is not None}


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """What was read and what was done to it."""
    denoising = sidecar['Denoising']
    found = {
        'BOLD': sidecar['Sources'][0],
        'Space': f'{sidecar["Space"]}, atlas image: {sidecar["Atlas"]["Provenance"]}',
        'Volumes': f'{sidecar["NumberOfVolumes"]} at a repetition time of '
        f'{sidecar["RepetitionTime"]:g} s',
        'Left out at the start': f'{_discarded(sidecar)} volumes',
        'First row at': f'{sidecar["StartTime"]:g} s',
        'Flagged volumes': f'{sidecar["NumberOfVolumesFlagged"]} (interpolated)'
        if sidecar['FlaggedVolumesInterpolated']
        else 'not assessed',
        'Denoising': f'{denoising["Name"]}, {len(denoising["ConfoundRegressors"])} confounds '
        f'regressed out',
        'Mean brain signal': f'{sidecar["BrainMean"]:.1f} (BOLD units)',
        'Parcels below coverage': f'{len(sidecar["ParcelsBelowMinimumCoverage"])} '
        f'(limit {sidecar["MinimumCoverage"]:g})',
    } | quality.lines(sidecar['Quality'])
    found['Unflagged data'] = (
        f'{denoising["MinutesUnflagged"]:.1f} minutes '
        f'({denoising["NumberOfVolumesUnflagged"]} volumes)'
    )
    if 'DegreesOfFreedom' in denoising:
        found['Degrees of freedom left'] = (
            f'{denoising["DegreesOfFreedom"]} (regressors of rank '
            f'{denoising["RankOfRegressorsAndFilter"]})'
        )
    return found
