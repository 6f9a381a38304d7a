"""``--outputs forecast``: the end of each window from what comes before it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bids_brainfm.analyses.scores import score
from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.bids.files import write_matrix, write_table
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.products import Context, known_mean
from bids_brainfm.outputs.reconstruction import network_of
from bids_brainfm.outputs.tasks import ModelTask, Place
from bids_brainfm.outputs.words import described, pooled_scores, score_metadata
from bids_brainfm.reports.report import Figure
from bids_brainfm.signals.resample import same_rate

if TYPE_CHECKING:
    from bids_brainfm.analyses.forecast import Forecast
    from bids_brainfm.reports.figures.forecast import Example

NAME = 'forecast'
MEASURES = ('mse', 'r2', 'r')
FIGURES = {'forecast': Figure('Forecast',
    'The end of each window forecast from what comes before it, rolling over the run. '
    'Shading is one and two times the error that forecasts of the parcel have at that step. '
    'Below, scores at each step over windows and parcels, compared with the last value seen, '
    'the mean of what was seen, and an autoregressive model fitted to it.')}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """How runs are forecast, as in :func:`bids_brainfm.analyses.forecast.forecast`."""

    points: int  # to forecast
    mode: str
    seed: int


def parameters(settings: Settings, spec: ModelSpec, atlas: Atlas) -> Parameters | None:
    """Settle the horizon, once it is seen that the model can hide it.

    None where the windows of the model are too short, unless forecasts are asked for by name.
    """
    from bids_brainfm.analyses.forecast import hidden_points

    points = settings.options.get('forecast_points') or spec.capabilities.forecast_points
    mode = settings.options.get('forecast_mode') or 'predict_last_pixel'
    if points is None:
        if NAME not in settings.outputs:
            return None
        raise BrainfmError(
            f'--outputs {NAME}: the windows of {spec.card.name} are too short to hide a part of '
            f'them and forecast it: leave it out.'
        )
    hidden_points(network_of(spec), points, mode, spec.card.name)
    return Parameters(points, mode, settings.random_seed)


def companions(run: BoldRun, place: Place, task: ModelTask | None = None) -> list[Path]:
    """Forecasts along the run."""
    return [place.path(run, 'timeseries', 'forecast')]


def methods(task: ModelTask) -> str:
    """Sentence on horizon and baselines."""
    from bids_brainfm.analyses.forecast import AR_ORDER

    asked = task.parameters[NAME]
    return (
        f'The last {asked.points} points of windows that roll over the run were forecast by '
        f'{task.spec.card.name} ({asked.mode}), and by persistence, the mean of what came before '
        f'and an autoregressive model of order {AR_ORDER} fitted on it. Flagged volumes before a '
        'forecast took the last unflagged value, so that nothing after them was used.'
    )


def compute(context: Context) -> 'Forecast':
    """Forecast the end of every window."""
    from bids_brainfm.analyses.forecast import forecast

    task, asked = context.task, context.task.parameters[NAME]
    how = asked.points, asked.mode, asked.seed, task.batch_size, context.data.flagged
    return forecast(context.model.encoder, context.data.data, *how)


def write(context: Context, result: 'Forecast') -> None:
    """Write scores by step, the forecasts along the run, figure and sidecars."""
    from bids_brainfm.reports.figures import forecast as figures

    task, data, scores = context.task, context.data, result.scores(context.scored)
    steps = np.arange(1, result.target.shape[2] + 1)
    table, (along,) = context.table(NAME), companions(context.run, task.place)
    columns = {'step': steps, 'time': steps * data.tr}
    for name, found in scores.items():
        columns |= {f'{name}_{measure}': getattr(found, measure) for measure in MEASURES}
    write_table(table, columns)

    series = data.in_bold_units(result.along(result.model, len(data.data)))
    write_matrix(along, series, list(context.atlas.names))
    content = {
        'Description': f'Forecasts by {task.spec.card.name} laid end on end, in BOLD units, a '
        'row a row of the parcel series; n/a where nothing was forecast.',
    }
    context.write_sidecar(along, content | context.series_metadata)
    by_step = {n: {m: getattr(s, m) for m in MEASURES} for n, s in scores.items()}
    figure = figures.forecast(steps * data.tr, by_step, _examples(context, result))
    context.save_figure(figure, 'forecast')
    context.write_sidecar(table, _describe(context, result))


def _describe(context: Context, result: 'Forecast') -> dict[str, Any]:
    """Sidecar of the scores."""
    from bids_brainfm.analyses.forecast import AR_ORDER

    spec, data, asked = context.task.spec, context.data, context.task.parameters[NAME]
    horizon, warnings = result.target.shape[2], []
    if data.series.tr > data.tr and not same_rate(data.series.tr, data.tr):
        warnings.append(
            f'The run was brought from {data.series.tr:g} s to {data.tr:g} s, so that a sample '
            f'also holds a part of volumes after it: the first steps of forecasts by '
            f'{spec.label}, and of all baselines, are easier than they would be.'
        )
    return {
        'Description': f'Forecasts by {spec.card.name} of the last {horizon} points of '
        'windows that roll over the run, scored at each step over windows and parcels, in '
        "the units of the model, each parcel's mean over the run taken out. Flagged volumes are "
        'not scored; before a forecast they have the last unflagged value, for all methods.',
        'Mode': asked.mode, 'PointsAsked': asked.points, 'PointsHidden': horizon,
        'NumberOfWindows': len(result.target), 'Seed': asked.seed,
        'Pooled': score_metadata(result.scores(context.scored, axis=None)),
        'ProportionFlagged': data.flagged.mean(), 'Warnings': warnings,
        'step': {'Description': 'Points after the last one that was seen'},
        'time': {'Description': 'The same in seconds', 'Units': 's'},
    } | described({
        'model_*': 'MSE, R2 and Pearson r of the model',
        'persistence_*': 'Of the last value that was seen',
        'mean_*': 'Of the mean of what was seen',
        'ar_*': f'Of an autoregressive model of order {AR_ORDER}, fitted for each window and '
        'parcel on what was seen',
    })  # fmt: skip


def _examples(context: Context, result: 'Forecast') -> 'list[Example]':
    """Best, middle and worst parcel, as the figure takes them."""
    data = context.data
    target = np.where(context.scored[result.samples].transpose(0, 2, 1), result.target, np.nan)
    fit = score(result.model, target, axis=(0, 2)).r2
    ranked = np.argsort(np.where(data.own, fit, -np.inf))[::-1]
    ranked = ranked[: np.count_nonzero(data.own & np.isfinite(fit))]
    if not ranked.size:
        return []
    error = np.sqrt(known_mean((result.model - target) ** 2, axis=0))
    when = data.series.start + data.tr * np.arange(len(data.data))
    return [
        {
            'name': context.atlas.names[p], 'time': when, 'observed': data.data[:, p],
            'origins': [
                (data.series.start + data.tr * rows, values[p], error[p])
                for rows, values in zip(result.samples, result.model, strict=True)
            ],
        }
        for p in dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1]))
    ]  # fmt: skip


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Horizon and scores."""
    return {
        'Forecast': f'{sidecar["PointsHidden"]} points ({sidecar["Mode"]}), '
        f'{sidecar["NumberOfWindows"]} windows: R2 {pooled_scores(sidecar)}'
    }
