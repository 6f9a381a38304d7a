"""``--outputs forecast``: the end of each window from what comes before it."""

import numpy as np

from bids_brainfm.analyses.forecast import AR_ORDER, forecast
from bids_brainfm.analyses.scores import score
from bids_brainfm.bids.files import write_matrix, write_table
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.outputs.context import Context, score_metadata, series_metadata, table_path
from bids_brainfm.signals.resample import same_rate

NAME = 'forecast'
PICTURES = ('forecast',)
MEASURES = ('mse', 'r2', 'r')
SETTINGS = ('points', 'mode', 'seed')


def paths(run: BoldRun, task) -> list:
    """Files of a run; the first one's sidecar is written last."""
    return [table_path(run, task, 'forecast'), table_path(run, task, 'timeseries', 'forecast')]


def pattern(task) -> str:
    """Glob of the first file of every run."""
    return f'*_desc-{task.spec.label}_forecast.tsv'


def text(task) -> str:
    """Sentences for the methods."""
    asked = task.analyses
    return (
        f'The last {asked.points} points of windows that roll over the run were forecast by '
        f'{task.spec.card.name} ({asked.mode}), beside persistence, the mean of what came before '
        f'and an autoregressive model of order {AR_ORDER} fitted on it.'
    )


def write(context: Context) -> None:
    """Write scores by step, the forecasts along the run, figure and sidecars."""
    from bids_brainfm.reports import analysis_figures as figures

    run, task, data, asked = context.run, context.task, context.data, context.asked
    made = forecast(
        context.encoder, data.data, asked.points, asked.mode, asked.seed, task.batch_size
    )
    scores = made.scores(context.scored)
    horizon = made.target.shape[2]
    steps = np.arange(1, horizon + 1)
    table = table_path(run, task, 'forecast')
    columns = {'step': steps, 'time': steps * data.tr}
    for name, found in scores.items():
        columns |= {f'{name}_{measure}': getattr(found, measure) for measure in MEASURES}
    write_table(table, columns)

    along = table_path(run, task, 'timeseries', 'forecast')
    series = data.in_bold_units(made.along(made.model, len(data.data)))
    write_matrix(along, series, list(context.atlas.names))
    context.write_sidecar(
        along,
        {
            'Description': f'Forecasts by {task.spec.card.name} laid end on end, in BOLD units, a '
            'row a row of the parcel series; n/a where nothing was forecast.',
        }
        | series_metadata(run, task),
    )
    by_step = {n: {m: getattr(s, m) for m in MEASURES} for n, s in scores.items()}
    examples = _examples(context, made)
    context.save_figure(figures.forecast(steps * data.tr, by_step, examples), 'forecast')
    warnings = []
    if data.series.tr > data.tr and not same_rate(data.series.tr, data.tr):
        warnings.append(
            f'The run was brought from {data.series.tr:g} s to {data.tr:g} s, so that a sample '
            f'also holds a part of volumes after it: the first steps of forecasts by '
            f'{task.spec.label}, and of all baselines, are easier than they would be.'
        )
    context.write_sidecar(
        table,
        {
            'Description': f'Forecasts by {task.spec.card.name} of the last {horizon} points of '
            'windows that roll over the run, scored at each step over windows and parcels, in '
            "the units of the model, each parcel's mean over the run taken out. Flagged volumes, "
            'which were interpolated, are not scored.',
            'Mode': asked.mode,
            'PointsAsked': asked.points,
            'PointsHidden': horizon,
            'NumberOfWindows': len(made.target),
            'Seed': asked.seed,
            'Pooled': score_metadata(made.scores(context.scored, axis=None)),
            'ShareFlagged': data.flagged.mean(),
            'Warnings': warnings,
            'step': {'Description': 'Points after the last one that was seen'},
            'time': {'Description': 'The same in seconds', 'Units': 's'},
            'model_*': {'Description': 'MSE, R2 and Pearson r of the model'},
            'persistence_*': {'Description': 'Of the last value that was seen'},
            'mean_*': {'Description': 'Of the mean of what was seen'},
            'ar_*': {
                'Description': f'Of an autoregressive model of order {AR_ORDER}, fitted for each '
                'window and parcel on what was seen'
            },
        },
    )


def _examples(context: Context, made) -> list[dict]:
    """Best, middle and worst parcel, as the figure takes them."""
    data = context.data
    fit = score(made.model, made.target, axis=(0, 2)).r2
    ranked = np.argsort(np.where(data.own, fit, -np.inf))[::-1]
    ranked = ranked[: np.count_nonzero(data.own & np.isfinite(fit))]
    if not ranked.size:
        return []
    error = np.sqrt(np.mean((made.model - made.target) ** 2, axis=0))
    when = data.series.start + data.tr * np.arange(len(data.data))
    return [
        {
            'name': context.atlas.names[p],
            'time': when,
            'observed': data.data[:, p],
            'origins': [
                (data.series.start + data.tr * rows, values[p], error[p])
                for rows, values in zip(made.samples, made.model, strict=True)
            ],
        }
        for p in dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1]))
    ]
