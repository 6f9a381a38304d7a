"""``--outputs reconstruction``: the run rebuilt by the model, its scores, and the gain check."""

import numpy as np

from bids_brainfm.analyses.reconstruct import (
    GAIN_MARGIN,
    gain_check,
    reconstruct,
    target_level,
)
from bids_brainfm.analyses.scores import score
from bids_brainfm.bids.files import write_matrix
from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.bids.naming import derivative_path
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.outputs.context import (
    Context,
    image_path,
    score_metadata,
    series_metadata,
    source_sidecar,
    table_path,
)
from bids_brainfm.outputs.series import display_order
from bids_brainfm.signals.windows import cover

NAME = 'reconstruction'
PICTURES = ('reconstruction', 'r2', 'gain')
SETTINGS = ('mask_ratio', 'aggregate', 'seed')


def paths(run: BoldRun, task) -> list:
    """Files of a run; the first one's sidecar is written last."""
    scores = table_path(run, task, 'boldmap', 'r2')
    files = [scores, image_path(run, scores), table_path(run, task, 'timeseries')]
    return files + ([bold_path(run, task)] if task.analyses.bold else [])


def bold_path(run: BoldRun, task):
    """Path of the reconstruction as BOLD."""
    extension = '.dtseries.nii' if run.is_cifti else '.nii.gz'
    return derivative_path(task.output, run, 'bold', extension, desc=task.spec.label)


def pattern(task) -> str:
    """Glob of the first file of every run."""
    return f'*_stat-r2_desc-{task.spec.label}_boldmap.tsv'


def text(task) -> str:
    """Sentences for the methods."""
    asked = task.analyses
    return (
        f'Runs were reconstructed by {task.spec.card.name}: in each pass {asked.mask_ratio:.0%} '
        f'of the tokens of a window were hidden at random, until each had been hidden '
        f'({"its first prediction" if asked.aggregate == "first" else "the mean prediction"} was '
        'kept). R2 and Pearson correlation of hidden points, in the units of the model and '
        'without a floor, are given beside those of the mean and of linear interpolation in time '
        'of what was visible.'
    )


def write(context: Context) -> None:
    """Write series, scores, images, figures and sidecars."""
    from bids_brainfm.reports import analysis_figures as figures

    run, task, data, asked = context.run, context.task, context.data, context.asked
    made = reconstruct(
        context.encoder, data.data, asked.mask_ratio, asked.aggregate, asked.seed, task.batch_size
    )
    windows, samples = cover(data.data, task.spec.card.window)
    first = (samples[0] >= 0)[:, None] & context.scored[samples[0]]
    gain = gain_check(context.encoder, windows[0], asked.mask_ratio, asked.seed, first.T)

    target = np.where(context.scored, made.target, np.nan)
    level = target_level(target)
    by_parcel = {name: score(values, target, axis=0) for name, values in made.ways.items()}
    pooled = {name: score(v - level, target - level) for name, v in made.ways.items()}

    series = data.in_bold_units(made.model)
    series_table = table_path(run, task, 'timeseries')
    write_matrix(series_table, series, list(context.atlas.names))
    context.write_sidecar(series_table, _describe_series(context))
    if asked.bold:
        _write_bold(context, series)

    scores_table = table_path(run, task, 'boldmap', 'r2')
    columns = {'r2': by_parcel['model'].r2, 'r': by_parcel['model'].r}
    for name in ('mean', 'interpolation'):
        columns |= {f'r2_{name}': by_parcel[name].r2, f'r_{name}': by_parcel[name].r}
    context.write_map(scores_table, columns, by_parcel['model'].r2)

    order, label = display_order(context.atlas.xyz)
    r2 = {name: found.r2 for name, found in by_parcel.items()}
    shown, drawn = (np.where(data.own, x, np.nan) for x in (made.target, made.model))
    names = list(context.atlas.names)
    context.save_figure(
        figures.reconstruction(
            shown, made.hidden, drawn, data.tr, r2['model'], names, order,
            order_label=label, start=data.series.start,
        ),
        'reconstruction',
    )  # fmt: skip
    titled = {
        'model': r2['model'],
        'mean': r2['mean'],
        'linear interpolation': r2['interpolation'],
    }
    context.save_figure(figures.r2_map(context.atlas.xyz, titled), 'r2')
    context.save_figure(figures.gain(gain.gains, gain.r2, gain.warned), 'gain')
    context.write_sidecar(scores_table, _describe_scores(context, made, pooled, gain))


def _masking(context: Context) -> dict:
    asked = context.asked
    return {'MaskRatio': asked.mask_ratio, 'Aggregate': asked.aggregate, 'Seed': asked.seed}


def _describe_series(context: Context) -> dict:
    return {
        'Description': f'Reconstruction by {context.task.spec.card.name} of each parcel, each '
        'sample from windows in which it was hidden; BOLD units, a row a row of the parcel '
        'series. n/a where nothing was reconstructed.',
        **series_metadata(context.run, context.task),
    } | _masking(context)


def _write_bold(context: Context, series: np.ndarray) -> None:
    from bids_brainfm.signals.paint import paint_series

    run, tr = context.run, context.data.series.tr
    path, source = bold_path(run, context.task), source_sidecar(run, context.task)
    paint_series(path, run.bold, context.image, series, tr)
    write_sidecar(
        path,
        {
            'Description': f'Reconstruction by {context.task.spec.card.name}: every voxel holds '
            'the series of its parcel.',
            'RepetitionTime': tr,
            'TaskName': run.entities.get('task'),
            'StartTime': source['StartTime'],
            'SkullStripped': True,
            # an image in that space which is at hand: the atlas, last among the sources
            'SpatialReference': context.common['Sources'][-1],
            'Resolution': run.entities.get('res') and 'as the input',
            'GapRule': 'Volumes without reconstruction hold the mean over the others',
            'VolumesWithoutReconstruction': np.flatnonzero(np.isnan(series).all(axis=1)),
        }
        | context.common,
    )


def _describe_scores(context: Context, made, pooled: dict, gain) -> dict:
    warnings = []
    label = context.task.spec.label
    if gain.warned:
        warnings.append(
            f'{label} reconstructs these data better when they are {gain.best:g} times as large '
            f'(R2 {np.nanmax(gain.r2):.2f} instead of {gain.r2[gain.gains == 1][0]:.2f}): they '
            f'do not lie in the range of its training data, see the gain check.'
        )
    return {
        'Description': f'How well {context.task.spec.card.name} reconstructs each parcel where it '
        'was hidden: share of variance explained (R2, not floored; 0 is what the mean of the '
        'parcel over the run explains) and Pearson r, in the units of the model. Flagged volumes, '
        'which were interpolated, are not scored.',
        'ShareFlagged': context.data.flagged.mean(),
        'NumberOfPasses': made.n_passes,
        'Pooled': score_metadata(pooled),
        'GainCheck': {
            'Description': 'R2 of the hidden points of the first window when the input is '
            f'multiplied by each gain. It is warned about where another gain gives an R2 above 0 '
            f'that is higher by more than {GAIN_MARGIN}',
            'Gain': gain.gains,
            'R2': gain.r2,
            'Best': gain.best,
        },
        'Warnings': warnings,
        'Node': {'Description': f'Parcel of {context.atlas.name}'},
        'r2': {'Description': 'Of the model'},
        'r': {'Description': 'Of the model'},
        '*_mean': {'Description': "Of the mean of the parcel's visible points in the window"},
        '*_interpolation': {'Description': 'Of linear interpolation between visible points'},
    } | _masking(context)
