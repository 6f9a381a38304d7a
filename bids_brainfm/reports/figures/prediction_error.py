"""Figure of the prediction error of latents."""

import numpy as np
from matplotlib.figure import Figure

from bids_brainfm.reports import style
from bids_brainfm.reports.style import BLUE, GREY, INK, VERMILION


@style.look()
def latent_error(
    error: np.ndarray, baseline: np.ndarray, windows: np.ndarray, order: np.ndarray,
    order_label: str,
) -> Figure:  # fmt: skip
    """Prediction error of the latents of parcels and time patches.

    Parcels that were context throughout come last.

    Parameters
    ----------
    error, baseline : (W, P, K) float, of the prediction and of the mean latent of the context
        Per window, parcel and time patch; NaN where that was context, the same in every window.
    windows : (W,) int, numbers of the windows
    """
    error, baseline = np.asarray(error, float), np.asarray(baseline, float)
    count, parcels, patches = error.shape
    mean = error.mean(0)
    targets = np.isfinite(mean).any(1)
    order = order[np.argsort(~targets[order], kind='stable')]  # parcels of context last
    figure = style.new_figure(4.2 + 0.6 * (count > 1))
    grid = figure.add_gridspec(1 + (count > 1), 2, width_ratios=[1.35, 1])

    axes = figure.add_subplot(grid[:, 0])
    low, high = np.quantile(mean[np.isfinite(mean)], [0.02, 0.98])
    picture = axes.imshow(style.shrink(mean[order], rows=450, columns=patches),
                          cmap=style.colour_map('viridis', 64), vmin=low, vmax=high, aspect='auto',
                          extent=(-0.5, patches - 0.5, parcels, 0))  # fmt: skip
    style.whole_numbers(axes.xaxis)
    axes.set(xlabel='time patch', ylabel=f'parcel ({order_label})')
    averaged = f', mean of {count} windows' if count > 1 else ''
    axes.set_title(f'Prediction error{averaged} (grey: context)')
    label = 'smooth L1 error'
    figure.colorbar(picture, ax=axes, extend='both', shrink=0.8, aspect=30, pad=0.01, label=label)

    right = figure.add_subplot(grid[0, 1])
    guessed, predicted = (np.nanmean(each.mean(0)[targets], axis=1) for each in (baseline, error))
    both = np.concatenate((guessed, predicted))
    ends = [both.min(), both.max()]
    right.plot(ends, ends, color=INK, linewidth=0.8, linestyle='--', zorder=0)
    better = predicted < guessed
    right.scatter(guessed, predicted, s=9, color=np.where(better, BLUE, VERMILION), alpha=0.7,
                  linewidths=0, rasterized=len(predicted) > 500)  # fmt: skip
    right.set_title(f'{better.sum()} of {len(predicted)} parcels below the baseline')
    right.set_xlabel('error of the mean context latent (baseline)')
    right.set_ylabel('prediction error')

    if count > 1:
        lower = figure.add_subplot(grid[1, 1])
        for values, colour, label in ((baseline, GREY, 'baseline'), (error, BLUE, 'prediction')):
            mean_error = np.nanmean(values, axis=(1, 2))
            lower.plot(windows, mean_error, 'o-', color=colour, markersize=3.5, linewidth=1,
                       label=label)  # fmt: skip
        style.whole_numbers(lower.xaxis)
        lower.set(ylim=(0, 1.1 * lower.dataLim.ymax), xlabel='window', ylabel='mean error')
        lower.legend(loc='lower left', ncols=2)
    return figure
