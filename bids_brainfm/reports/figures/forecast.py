"""Figure of the forecasts: a few parcels along the run, and the scores of each step."""

from typing import TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.style import BLUE, GREY, INK, ORANGE, VERMILION

LOOKS = {  # of the ways to forecast: label, colour, line and width
    'model': ('model', BLUE, '-', 2.4),
    'persistence': ('persistence', ORANGE, '--', 1.3),
    'mean': ('mean', GREY, '-', 1.3),
    'ar': ('AR', VERMILION, '-.', 1.3),
}
MEASURES = {'mse': 'MSE', 'r2': 'R²', 'r': 'r'}


class Example(TypedDict):
    """A parcel along the run and its forecasts, in the model's scaled units."""

    name: str
    time: np.ndarray  # (T,) s
    observed: np.ndarray  # (T,)
    # Time (n,) in s, forecast (n,) and its RMS error at that step (n,), of each origin
    origins: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@style.look()
def forecast(
    steps_s: np.ndarray, scores: dict[str, dict[str, np.ndarray]], examples: list[Example]
) -> Figure:
    """Rolling forecasts of a few parcels with their fan, and the scores of each step.

    Parameters
    ----------
    steps_s : (n,) float, time of each step since the last sample that the model saw, in seconds
    scores : dict of dict of (n,) float, each of `MEASURES` at each step, for each of `LOOKS`
    examples : list of Example, parcels to draw
    """
    figure = style.new_figure(2.7 + 1.25 * len(examples))
    heights = [1.0] * len(examples) + [1.7]
    grid = figure.add_gridspec(len(heights), len(MEASURES), height_ratios=heights)
    first = None
    for row, example in enumerate(examples):
        axes = figure.add_subplot(grid[row, :], sharex=first)
        first = first or axes
        _draw_example(axes, example)
        if row == 0:
            style.legend_above(axes, 'lower right', 0.1, ncols=3)
        if row == len(examples) - 1:
            axes.set_xlabel('time (s)')
        else:
            axes.tick_params(labelbottom=False)

    for column, (measure, title) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(grid[-1, column])
        for way, values in scores.items():
            label, colour, dashes, width = LOOKS[way]
            axes.plot(steps_s, values[measure], color=colour, linestyle=dashes, linewidth=width,
                      marker='o' if len(steps_s) <= 3 else '', markersize=4, label=label,
                      zorder=2 + (way == 'model'))  # fmt: skip
        axes.set_xlabel('time ahead (s)')
        drawn = np.array([values[measure] for values in scores.values()])
        lowest = np.nanmin(drawn) if np.isfinite(drawn).any() else 0
        if measure == 'r2' and lowest < style.FLOOR:
            axes.set_ylim(style.FLOOR, max(np.nanmax(drawn), 0) + 0.1)
            title += f' (cut off at {style.FLOOR:.0f})'
        elif measure == 'mse':
            axes.set_ylim(bottom=0)
        if lowest < 0:
            axes.axhline(0, color=INK, linewidth=0.6, zorder=0)
        axes.set_title(title)
    lines = axes.lines[: len(scores)]
    figure.legend(handles=lines, loc='outside lower center', ncols=len(lines), handlelength=3)
    style.headline(figure, _lowest_error({way: values['mse'] for way, values in scores.items()}))
    return figure


def _draw_example(axes: Axes, example: Example) -> None:
    """What was observed, and the forecast from each origin with its fan."""
    axes.plot(example['time'], example['observed'], color=INK, linewidth=0.8, label='observed')
    for number, (time, *fan) in enumerate(example['origins']):
        prediction, spread = (np.asarray(values, float) for values in fan)
        for width in (2, 1):
            axes.fill_between(time, prediction - width * spread, prediction + width * spread,
                              color=BLUE, alpha=0.16, linewidth=0,
                              label='± 1 and 2 RMS errors' * (number + width == 1))  # fmt: skip
        axes.plot(time, prediction, color=BLUE, linewidth=1.5, label='forecast' * (number == 0))
        if time.size:
            axes.axvline(time[0], color=GREY, linewidth=0.5, linestyle=':', zorder=0)
    axes.margins(x=0)
    axes.set(ylabel='scaled', title=example['name'])


def _lowest_error(errors: dict[str, np.ndarray]) -> str:
    """At how many steps the model has the lowest error, in words."""
    ours = np.asarray(errors['model'], float)
    others = [error for way, error in errors.items() if way != 'model']
    lowest = np.min(others, axis=0, initial=np.inf)
    known = np.isfinite(ours) & ~np.isnan(lowest)
    if not known.any():
        return 'No step of the forecast could be scored'
    best = known & (ours < lowest)
    return f'The model has the lowest error at {best.sum()} of {known.sum()} steps'
