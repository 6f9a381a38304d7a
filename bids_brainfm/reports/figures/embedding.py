"""Figures of the embedding: the windows in the run, and how their embeddings differ."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.fragments import count, percent
from bids_brainfm.reports.style import BLUE, GREY, INK, ORANGE, PALE

PADDED = {'facecolor': 'white', 'edgecolor': GREY, 'hatch': '////', 'linewidth': 0.6}


@style.look()
def windows(onset: np.ndarray, duration: np.ndarray, recorded: np.ndarray, flagged: np.ndarray,
            excluded: np.ndarray, end: float, start: float = 0.0) -> Figure:  # fmt: skip
    """Where the windows lie in the run, and how much of each was recorded and flagged.

    Parameters
    ----------
    onset, duration : (W,) float, in seconds since the run's start, and of recorded signal
    recorded, flagged : (W,) float, proportion of samples recorded, not padded or repeated
        And the proportion of these that come from flagged volumes.
    excluded : (W,) bool, windows that summaries and group results leave out (grey)
    end, start : float, of the last and the first volume, in seconds since the run's start
    """
    onset, duration, recorded, flagged = np.array([onset, duration, recorded, flagged], float)
    excluded = np.asarray(excluded, bool)
    length = duration / np.where(recorded > 0, recorded, 1.0)
    seen = float((onset + duration).max())
    # Resampling leaves a fraction of a sample at the end, which is nothing to report.
    left_over = end - seen if end - seen > 0.005 * (end - start) else 0.0
    row = np.arange(len(onset))
    figure = style.new_figure(1.0 + float(np.clip(0.26 * len(row), 0.7, 3.6)))
    lanes, right = figure.subplots(1, 2, sharey=True, gridspec_kw={'width_ratios': [3.4, 1]})
    for each in row:
        colour, alpha = GREY if excluded[each] else BLUE, 0.75 if each % 2 else 1.0
        lanes.barh(each, duration[each], 0.78, onset[each], color=colour, alpha=alpha)
    padded = recorded < 1
    begin = (onset + duration)[padded]
    lanes.barh(row[padded], (length - duration)[padded], 0.78, begin, **PADDED)
    if left_over:
        lanes.axvspan(seen, end, color=PALE, linewidth=0, zorder=0)
    lanes.axvline(end, color=INK, linewidth=0.8, linestyle='--', zorder=0)
    last = max(end, float((onset + length).max()))
    lanes.set_xlim(start, last + 0.01 * (last - start))
    lanes.set_ylim(len(row) - 0.4, -0.6)
    style.whole_numbers(lanes.yaxis)
    lanes.set(xlabel='time (s)', ylabel='window')
    rest = f'{left_over:.0f} s in no window (pale)' if left_over else 'nothing left over'
    rest += f', {excluded.sum()} excluded (grey)' if excluded.any() else ''
    lanes.set_title(f'{count(len(row), "window")} in {end - start:.0f} s, {rest}')

    right.barh(row - 0.2, 100 * flagged, 0.38, color=ORANGE, label='flagged')
    right.barh(row + 0.2, 100 * (1 - recorded), 0.38, label='padded', **PADDED)
    if len(row) <= 12:
        for each in row:
            for shift, proportion in ((-0.2, flagged[each]), (0.2, 1 - recorded[each])):
                if proportion > 0:
                    place = (100 * proportion + 2, each + shift)
                    right.text(*place, percent(proportion), va='center', fontsize=7)
    if not flagged.any() and not padded.any():
        style.say_none(right)
    right.set(xlim=(0, 115), xticks=[0, 50, 100], xlabel='proportion of samples (%)')
    right.tick_params(labelleft=False)
    style.legend_above(right, 'lower right', 0, ncols=2, columnspacing=1)
    return figure


def principal_components(summary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (W, min(W, D)) and proportions of variance (min(W, D),) of the components of (W, D).

    The largest weight of each is positive. Where all windows are alike, the proportions are 0.
    """
    centred = summary - summary.mean(0)
    left, size, weights = np.linalg.svd(centred, full_matrices=False)
    largest = np.abs(weights).argmax(1)
    sign = np.sign(weights[np.arange(len(size)), largest])
    total = (size**2).sum()
    alike = total <= 1e-12 * (summary**2).sum()
    return left * size * sign, np.zeros_like(size) if alike else size**2 / total


@style.look()
def embedding(summary: np.ndarray, onset: np.ndarray) -> Figure:
    """Embedding of each window: PCA over windows and the likeness of each pair of windows.

    With one or two windows, which no PCA can spread out, the values themselves are drawn.

    Parameters
    ----------
    summary : (W, D) float, one embedding per window
    onset : (W,) float, in seconds since the run's start
    """
    summary = np.asarray(summary, float)
    if len(summary) < 3:
        return _values(summary, onset)
    figure = style.new_figure(3.7)
    axes, right = figure.subplots(1, 2, gridspec_kw={'width_ratios': [1.5, 1]})
    _components(figure, axes, summary, onset)

    centred = summary - summary.mean(1, keepdims=True)
    size = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(size > 0, size, 1)
    likeness = np.clip(unit @ unit.T, -1, 1)
    off = likeness[~np.eye(len(likeness), dtype=bool)]
    picture = right.imshow(
        style.shrink(likeness, 450, 450), cmap=style.colour_map('cividis', 64),
        vmin=off.min(), vmax=max(off.max(), off.min() + 1e-6),
        extent=(-0.5, len(summary) - 0.5, len(summary) - 0.5, -0.5),
    )  # fmt: skip
    style.whole_numbers(right.xaxis)
    style.whole_numbers(right.yaxis)
    right.set(xlabel='window', ylabel='window', title='Likeness of windows')
    bar = figure.colorbar(picture, ax=right, shrink=0.8, aspect=25, pad=0.02)
    bar.set_label('correlation of embeddings')
    bar.ax.ticklabel_format(useOffset=False)
    return figure


def _components(figure: Figure, axes: Axes, summary: np.ndarray, onset: np.ndarray) -> None:
    """Each window as a dot on the first two principal components, joined in time."""
    scores, explained = principal_components(summary)
    first, second = scores[:, 0], scores[:, 1] if scores.shape[1] > 1 else np.zeros(len(scores))
    axes.plot(first, second, color=GREY, linewidth=0.6, zorder=1)
    dots = axes.scatter(first, second, c=onset, cmap=style.colour_map('viridis', 64), s=42,
                        edgecolors='white', linewidths=0.6, zorder=2)  # fmt: skip
    if len(summary) <= 20:
        for window, place in enumerate(zip(first, second, strict=True)):
            axes.annotate(str(window), place, (5, 4), textcoords='offset points', fontsize=7)
    axes.margins(0.1)
    axes.set_xlabel(f'component 1 ({explained[0]:.0%} of variance)')
    axes.set_ylabel(f'component 2 ({explained[1]:.0%})' if len(explained) > 1 else '')
    title = f'PCA over {len(summary)} windows of {summary.shape[1]} dimensions'
    axes.set_title(title if explained.any() else 'All windows have the same embedding')
    figure.colorbar(dots, ax=axes, label='window onset (s)', aspect=30, pad=0.01)


def _values(summary: np.ndarray, onset: np.ndarray) -> Figure:
    """The values of one or two embeddings."""
    figure = style.new_figure(2.2)
    axes = figure.subplots()
    for window, (values, begin) in enumerate(zip(summary, onset, strict=True)):
        label = f'window {window} (from {begin:.0f} s)'
        axes.plot(values, color=(BLUE, ORANGE)[window], linewidth=0.7, label=label)
    axes.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    axes.set(xlim=(0, max(summary.shape[1] - 1, 1)), xlabel='embedding dimension', ylabel='value')
    alike = ''
    if len(summary) == 2 and summary.std(1).all():
        alike = f'; their correlation is {np.corrcoef(summary)[0, 1]:.3f}'
    number = 'One window' if len(summary) == 1 else 'Two windows'
    axes.set_title(f'{number}: too few for a PCA, so these are the values{alike}')
    axes.legend(loc='upper right', ncols=2, frameon=True, framealpha=0.9, edgecolor='none',
                borderaxespad=0.3)  # fmt: skip
    return figure
