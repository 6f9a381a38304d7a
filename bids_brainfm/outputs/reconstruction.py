"""``--outputs reconstruction``: the run as a model rebuilds it, its scores, the gain check."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bids_brainfm.analyses.scores import Score, score
from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.bids.files import write_matrix
from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.bids.naming import derivative_path
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.config import Settings
from bids_brainfm.models.protocol import Reconstructing
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.covariance import CohortCorrelation, choose, load
from bids_brainfm.outputs.products import Context, display_order
from bids_brainfm.outputs.tasks import ModelTask, Place
from bids_brainfm.outputs.words import described, pooled_scores, score_metadata
from bids_brainfm.reports.report import Figure
from bids_brainfm.resources import sha256_of

if TYPE_CHECKING:
    from bids_brainfm.analyses.reconstruct import GainCheck, Reconstruction

NAME = 'reconstruction'
FIGURES = {
    'reconstruction': Figure('Reconstruction',
        'Traces of the parcels with the highest, the median and the lowest R2, in the '
        "model's units: shaded stretches were hidden from it in the first pass. Below, all "
        'parcels as they are, as the model saw them in that pass, and as it reconstructed them, '
        'each point from windows in which it was hidden.'),
    'r2': Figure('Where the reconstruction holds',
        'Proportion of variance explained (R2) of hidden points, not floored: below 0, the '
        'mean of the parcel is the better prediction. The baselines fill the same points with the '
        'mean of what was visible of the parcel, by linear interpolation in time, and with the '
        'conditional mean given the parcels visible at that instant, from the covariance between '
        'parcels.'),
    'gain': Figure('Gain check',
        'R2 of hidden points of the first window when the input is made smaller or larger. It '
        'needs no labels. A model reconstructs best what has the amplitude of its training data, '
        "so a best gain far from 1 means that these data do not lie in the model's range."),
}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """How runs are reconstructed, as in :func:`bids_brainfm.analyses.reconstruct.reconstruct`."""

    mask_ratio: float  # proportion of tokens that a pass hides
    seed: int  # of the masks
    aggregate: str = 'first'
    bold: bool = False  # whether the reconstruction is written as BOLD, too
    covariance: Path | None = None  # of a cohort, for the baseline; else that of the run


def network_of(spec: ModelSpec) -> Reconstructing:
    """Network of a model without its weights, to see what it can hide."""
    from bids_brainfm.models.weights import build

    return cast(Reconstructing, build(spec.card.config))


def mask_ratio(settings: Settings, spec: ModelSpec) -> float:
    """Proportion of tokens to hide, once it is seen that the model can hide so many."""
    import torch

    from bids_brainfm.models.masking import leave_out

    ratio = settings.options.get('mask_ratio') or spec.capabilities.mask_ratio or 0.75
    leave_out(network_of(spec).tokens, ratio, torch.Generator())
    return ratio


def parameters(settings: Settings, spec: ModelSpec, atlas: Atlas) -> Parameters:
    """Settle the masks and the covariance."""
    given = settings.options
    return Parameters(
        mask_ratio(settings, spec), settings.random_seed, given.get('aggregate') or 'first',
        bool(given.get('write_bold')), choose(given.get('covariance') or (), atlas.name),
    )  # fmt: skip


def companions(run: BoldRun, place: Place, task: ModelTask | None = None) -> list[Path]:
    """The series, and BOLD where it is asked for."""
    files = [place.path(run, 'timeseries')]
    asked = task.parameters.get(NAME) if task else None
    if task is None or (asked and asked.bold):
        extension = '.dtseries.nii' if run.is_cifti else '.nii.gz'
        files.append(derivative_path(place.output, run, 'bold', extension, desc=place.label))
    return files


def settings(task: ModelTask) -> dict[str, Any]:
    """Masks, their aggregation, and the covariance."""
    given = asdict(task.parameters[NAME])
    file = given['covariance']
    found = {name: given[name] for name in ('mask_ratio', 'aggregate', 'seed')}
    return found | {'covariance': file and f'sha256 {sha256_of(file)}'}


def methods(task: ModelTask) -> str:
    """Sentences on masks, scores and baselines."""
    asked = task.parameters[NAME]
    source = _source_of_covariance(asked.covariance)
    return (
        f'Runs were reconstructed by {task.spec.card.name}: in each pass {asked.mask_ratio:.0%} '
        f'of the tokens of a window were hidden at random, until each had been hidden '
        f'({"its first prediction" if asked.aggregate == "first" else "the mean prediction"} was '
        'kept). Flagged volumes in visible tokens were filled from visible volumes only. R2 and '
        'Pearson correlation of hidden points, in the units of the model and without a floor, are '
        'given with those of three baselines: the mean of what was visible of the parcel, linear '
        'interpolation in time between visible points, and the Gaussian conditional mean given '
        f'the parcels visible at the same instant. For the last, {source}.'
    )


def _source_of_covariance(file: Path | None) -> str:
    """Where the covariance between parcels is from, as a clause."""
    if file is None:
        return (
            'the covariance between parcels was estimated in each pass from the visible, '
            'unflagged points of the run, by regularised expectation maximisation (Schneider '
            '2001) with Ledoit-Wolf shrinkage'
        )
    return (
        f'the covariance between parcels was that of other participants ({file.stem}), with '
        'Ledoit-Wolf shrinkage'
    )


@dataclass(frozen=True)
class Result:
    """A reconstruction with its scores by method, for each parcel and pooled, and the gain."""

    found: 'Reconstruction'
    by_parcel: dict[str, Score]
    pooled: dict[str, Score]
    gain: 'GainCheck'
    cohort: CohortCorrelation | None  # whose covariance the baseline takes, None for the run's


def compute(context: Context) -> Result:
    """Reconstruct and score the run."""
    from bids_brainfm.analyses.reconstruct import gain_check, reconstruct, target_level

    task, data, encoder = context.task, context.data, context.model.encoder
    asked, cohort = task.parameters[NAME], None
    if asked.covariance is not None:
        person = context.run.entities['sub']
        cohort = load(asked.covariance, person, context.atlas.n_parcels)
    found = reconstruct(
        encoder, data.data, asked.mask_ratio, asked.aggregate, asked.seed, task.batch_size,
        data.flagged, data.donors, None if cohort is None else cohort.values,
    )  # fmt: skip
    gain = gain_check(encoder, data.data, asked.mask_ratio, asked.seed, data.flagged, data.donors)
    target = np.where(context.scored, found.target, np.nan)
    level = target_level(target)
    return Result(
        found, {name: score(values, target, axis=0) for name, values in found.predictions.items()},
        {name: score(v - level, target - level) for name, v in found.predictions.items()}, gain,
        cohort,
    )  # fmt: skip


def write(context: Context, result: Result) -> None:
    """Write series, scores, images, figures and sidecars."""
    from bids_brainfm.analyses.reconstruct import BASELINES
    from bids_brainfm.reports.figures import reconstruction as figures

    run, task, data, atlas = context.run, context.task, context.data, context.atlas
    found, by_parcel, gain = result.found, result.by_parcel, result.gain
    series = data.in_bold_units(found.model)
    series_table = task.place.path(run, 'timeseries')
    write_matrix(series_table, series, list(atlas.names))
    content = {
        'Description': f'Reconstruction by {task.spec.card.name} of each parcel, each sample '
        'from windows in which it was hidden; BOLD units, a row a row of the parcel series. n/a '
        'where nothing was reconstructed.',
    }
    asked = task.parameters[NAME]
    masking = {'MaskRatio': asked.mask_ratio, 'Aggregate': asked.aggregate, 'Seed': asked.seed}
    context.write_sidecar(series_table, content | context.series_metadata | masking)
    if asked.bold:
        _write_bold(context, series)

    scores_table = context.table(NAME)
    columns = {'r2': by_parcel['model'].r2, 'r': by_parcel['model'].r}
    for name in BASELINES:
        columns |= {f'r2_{name}': by_parcel[name].r2, f'r_{name}': by_parcel[name].r}
    context.write_map(scores_table, columns, by_parcel['model'].r2)

    order, label = display_order(atlas.xyz)
    shown, drawn = (np.where(data.own, x, np.nan) for x in (found.target, found.model))
    figure = figures.reconstruction(
        shown, found.hidden, drawn, data.tr, by_parcel['model'].r2, list(atlas.names), order,
        order_label=label, start=data.series.start,
    )  # fmt: skip
    context.save_figure(figure, 'reconstruction')
    titles = {'model': 'model', 'interpolation': 'linear interpolation'}
    r2 = {titles.get(name, name): by_parcel[name].r2 for name in ('model', *BASELINES)}
    context.save_figure(figures.r2_map(atlas.xyz, r2), 'r2')
    context.save_figure(figures.gain(gain.gains, gain.r2, gain.warned), 'gain')
    context.write_sidecar(scores_table, _describe_scores(context, result) | masking)


def _write_bold(context: Context, series: np.ndarray) -> None:
    from bids_brainfm.signals.paint import paint_series

    run, tr = context.run, context.data.series.tr
    _, path = companions(run, context.task.place)
    paint_series(path, run.bold, context.image, series, tr)
    content = {
        'Description': f'Reconstruction by {context.task.spec.card.name}: every voxel holds '
        'the series of its parcel.',
        'RepetitionTime': tr,
        'TaskName': run.entities.get('task'),
        'StartTime': context.source['StartTime'],
        'SkullStripped': True,
        # an image in that space which is at hand: the atlas, last among the sources
        'SpatialReference': context.common['Sources'][-1],
        'Resolution': run.entities.get('res') and 'as the input',
        'GapRule': 'Volumes without reconstruction hold the mean over the others',
        'VolumesWithoutReconstruction': np.flatnonzero(np.isnan(series).all(axis=1)),
    }
    write_sidecar(path, content | context.common)


def _describe_scores(context: Context, result: Result) -> dict[str, Any]:
    from bids_brainfm.analyses.reconstruct import GAIN_MARGIN

    gain, label, warnings = result.gain, context.task.spec.label, []
    if gain.warned:
        warnings.append(
            f'{label} reconstructs these data better when they are {gain.best:g} times as large '
            f'(R2 {np.nanmax(gain.r2):.2f} instead of {gain.r2[gain.gains == 1][0]:.2f}): they '
            f'do not lie in the range of its training data, see the gain check.'
        )
    return {
        'Description': f'How well {context.task.spec.card.name} reconstructs each parcel where it '
        'was hidden: proportion of variance explained (R2, not floored; 0 is what the mean of the '
        'parcel over the run explains) and Pearson r, in the units of the model. Flagged volumes '
        'are not scored; where visible they were filled from visible volumes only.',
        'ProportionFlagged': context.data.flagged.mean(), 'NumberOfPasses': result.found.n_passes,
        'Pooled': score_metadata(result.pooled),
        'Covariance': _describe_covariance(context, result),
        'GainCheck': {
            'Description': 'R2 of the hidden points of the first window when the input is '
            f'multiplied by each gain. It is warned about where another gain gives an R2 above 0 '
            f'that is higher by more than {GAIN_MARGIN}',
            'Gain': gain.gains, 'R2': gain.r2, 'Best': gain.best,
        },
        'Warnings': warnings,
    } | described({
        'Node': f'Parcel of {context.atlas.name}', 'r2': 'Of the model', 'r': 'Of the model',
        '*_mean': "Of the mean of the parcel's visible points in the window",
        '*_interpolation': 'Of linear interpolation between visible points',
        '*_covariance': 'Of the conditional mean given the parcels visible at the same instant',
    })  # fmt: skip


def _describe_covariance(context: Context, result: Result) -> dict[str, Any]:
    """Where the covariance of the baseline is from."""
    file, cohort = context.task.parameters[NAME].covariance, result.cohort
    if cohort is None:
        return {'Source': 'visible, unflagged points of the run in each pass'}
    return {
        'Source': file.name, 'SHA256': sha256_of(file),
        'NumberOfParticipants': cohort.participants,
        'NumberOfParticipantsLeftOut': cohort.left_out,
    }  # fmt: skip


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Scores, and what the gain check found."""
    check = sidecar['GainCheck']
    best = max(value for value in check['R2'] if value == value)
    return {
        'Reconstruction': f'R2 {pooled_scores(sidecar)}; {sidecar["MaskRatio"]:.0%} of the tokens '
        f'hidden in each of {sidecar["NumberOfPasses"]} passes',
        'Gain check': f'best R2 {best:.2f}, when the input is multiplied by {check["Best"]:g}'
        if best > 0
        else 'at no gain is the model nearer than the mean',
    }
