"""Figures of the reconstruction: series, where it holds, and the gain of the input."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from scipy.ndimage import find_objects, label

from bids_brainfm.reports import style
from bids_brainfm.reports.figures.brain import missing_words, signed_map
from bids_brainfm.reports.fragments import percent
from bids_brainfm.reports.style import BLUE, GREY, INK, MISSING_IN_GREY, ORANGE, VERMILION

# A point hidden from the model: a colour that is no grey and not that of missing parcels
HIDDEN = '#F6DDA0'


@style.look()
def reconstruction(original: np.ndarray, hidden: np.ndarray, reconstructed: np.ndarray, tr: float,
                   r2: np.ndarray, names: list[str], order: np.ndarray, order_label: str,
                   start: float = 0.0) -> Figure:  # fmt: skip
    """Parcel series as measured, as the model saw them in its first pass, and as it rebuilt them.

    Above, the series of the parcels with the best, the median and the worst R2; below, all of
    them as carpets with one scale.

    Parameters
    ----------
    original : (T, P) float, in the model's scaled units; a missing parcel is NaN throughout
    hidden : (T, P) bool, points hidden in the first masking pass
    reconstructed : (T, P) float, NaN in missing parcels and where a sample lies in no window
    r2 : (P,) float, of each parcel; NaN where it could not be scored
    """
    original, reconstructed = np.asarray(original, float), np.asarray(reconstructed, float)
    samples, parcels = original.shape
    end = start + samples * tr
    time = start + tr * (np.arange(samples) + 0.5)  # the middle of a sample's column below

    ranked = np.argsort(-r2, kind='stable')[: np.isfinite(r2).sum()]
    # Of one or two parcels the later words hold
    places = {(len(ranked) - 1) // 2: 'median', len(ranked) - 1: 'worst', 0: 'best'}
    chosen = {ranked[place]: places[place] for place in sorted(places)} if ranked.size else {}

    figure = style.new_figure(4.6 + 0.85 * len(chosen))
    rows = figure.subplots(
        len(chosen) + 3, 1, sharex=True,
        gridspec_kw={'height_ratios': [0.8] * len(chosen) + [1.5] * 3},
    )  # fmt: skip
    for axes, (parcel, word) in zip(rows, chosen.items(), strict=False):
        stretches = [span for (span,) in find_objects(label(hidden[:, parcel])[0])]
        axes.broken_barh(
            [(start + tr * span.start, tr * (span.stop - span.start)) for span in stretches],
            (0, 1), transform=axes.get_xaxis_transform(), color=HIDDEN, linewidth=0, alpha=0.6,
            label='hidden in the first pass',
        )  # fmt: skip
        axes.plot(time, original[:, parcel], color=GREY, linewidth=1.1, label='original')
        axes.plot(time, reconstructed[:, parcel], color=BLUE, linewidth=1.1, label='rebuilt')
        axes.set(title=f'{word} parcel: {names[parcel]}, R² = {r2[parcel]:z.2f}', ylabel='scaled')
    if chosen:
        style.legend_above(rows[0], 'lower right', 0.1, ncols=3, columnspacing=1.2)

    known = original[np.isfinite(original)]
    low, high = np.quantile(known, [0.02, 0.98]) if known.size else (-1.0, 1.0)
    if low == high:
        low, high = low - 1, high + 1
    empty = ' (pale blue: none)' if np.isnan(reconstructed).any() else ''
    blank = np.isfinite(original) & hidden
    seen = np.where(blank, np.nan, original)
    panels = {
        'Original': original,
        'What the model saw in the first pass (hidden points blank)': seen,
        f'Rebuilt, each point while it was hidden{empty}': reconstructed,
    }
    carpets = rows[len(chosen) :]
    extent = (start, end, parcels, 0)
    for axes, (title, series) in zip(carpets, panels.items(), strict=True):
        values = style.shrink(series[:, order].T, 450, 600)
        picture = axes.imshow(values, cmap=style.colour_map('gray', 16, MISSING_IN_GREY), vmin=low,
                              vmax=high, aspect='auto', extent=extent)  # fmt: skip
        if axes is carpets[1]:
            covered = style.shrink(blank[:, order].T.astype(float), 450, 600)
            covered = np.where(np.isnan(values) & (covered > 0), 0.0, np.nan)
            axes.imshow(covered, cmap=ListedColormap([HIDDEN]), aspect='auto', extent=extent)
        axes.set_title(title)
    carpets[1].set_ylabel(f'parcel ({order_label})')
    carpets[-1].set(xlabel='time (s)', xlim=(start, end))
    figure.colorbar(picture, ax=list(carpets), extend='both', shrink=0.6, aspect=30, pad=0.01,
                    label='scaled signal')  # fmt: skip

    finding = f'None of {parcels} parcels could be scored'
    if ranked.size:
        finding = f'Median R² {np.nanmedian(r2):z.2f} over {len(ranked)} of {parcels} parcels'
    proportion = percent(blank.sum() / max(known.size, 1))
    style.headline(figure, f'{finding}; {proportion} of the points hidden in the first pass')
    return figure


@style.look()
def r2_map(xyz: np.ndarray, scores: dict[str, np.ndarray]) -> Figure:
    """R2 of the model in each parcel, and its distribution next to those of the baselines.

    Parameters
    ----------
    scores : dict of (P,) float, R2 of the model, first, and of up to three baselines, by name
        NaN where it could not be scored.
    """
    scores = {name: np.asarray(values, float) for name, values in scores.items()}
    (model, ours), *baselines = scores.items()
    both = np.all([np.isfinite(values) for values in scores.values()], axis=0)
    figure, axes = signed_map(xyz, ours, f'R² of the {model}', most=1.0)
    pooled = np.concatenate([values[np.isfinite(values)] for values in scores.values()])
    if pooled.size:
        axes.set_xlim(max(pooled.min(), style.FLOOR) - 0.03, min(pooled.max(), 1.0) + 0.03)
    else:
        style.say_none(axes)
    looks = [(BLUE, '-'), (ORANGE, '--'), (VERMILION, '-.'), (GREY, ':')]
    for (name, values), (colour, dashes) in zip(scores.items(), looks, strict=False):
        values = np.sort(values[np.isfinite(values)])
        if values.size:
            below = values < style.FLOOR
            note = f' ({percent(below.mean())} below {style.FLOOR:.0f})'
            axes.step(
                np.concatenate(([-1e9], values, [1e9])),  # the curve runs on beyond both ends
                100 * np.concatenate(([0], np.arange(1, len(values) + 1) / len(values), [1])),
                where='post', color=colour, linestyle=dashes, linewidth=1 + (name == model),
                label=name + (note if below.any() else ''),
            )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.6, zorder=0)
    axes.set(ylim=(0, 101), xlabel='R²', ylabel='parcels at or below (%)')
    if pooled.size:
        style.legend_above(axes, 'lower left', 0.2)

    if not np.isfinite(ours).any():
        finding = f'No parcel has an R² of the {model}'
    else:
        counts = [f'above {name} in {(ours > values)[both].sum()}' for name, values in baselines]
        listed = ' and '.join(filter(None, (', '.join(counts[:-1]), counts[-1])))
        finding = f'R² of the {model} {listed} of {both.sum()} parcels'
    style.headline(figure, finding + missing_words(ours))
    return figure


@style.look()
def gain(gains: np.ndarray, r2: np.ndarray, warned: bool) -> Figure:
    """How well hidden points are predicted when the input is made larger or smaller.

    Parameters
    ----------
    gains : (G,) float, factors on the model's input, above 0
    r2 : (G,) float, R2 of the hidden points at each gain
    warned : bool, whether the user is warned that another gain would do better
    """
    order = np.argsort(gains)
    gains, r2 = gains[order], r2[order]
    below = r2 < style.FLOOR
    figure = style.new_figure(2.7)
    axes = figure.subplots()
    axes.axvline(1, color=INK, linewidth=0.9, linestyle='--', zorder=0)
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    axes.plot(gains, r2, 'o-', color=BLUE, markersize=5, linewidth=1.3)
    axes.set_xscale('log', base=2)
    axes.set_xticks(gains, [f'{each:g}' if each >= 1 else f'{each:.3g}' for each in gains])
    axes.minorticks_off()
    axes.set(xlabel='gain on the input (1: as it is)', ylabel='R² of hidden points')
    if below.any():
        axes.set_ylim(style.FLOOR, max(np.nanmax(r2), 0) + 0.1)
        floor = np.full(below.sum(), style.FLOOR)
        axes.plot(gains[below], floor, 'v', color=BLUE, markersize=7, clip_on=False)
    else:
        axes.margins(y=0.15)
    if not np.isfinite(r2).any():
        style.say_none(axes)
        style.headline(figure, f'R² could not be computed at any of {len(gains)} gains')
        return figure
    best, plain = np.nanargmax(r2), np.abs(np.log(gains)).argmin()
    at_best = f'R² is {r2[best]:z.2f} at gain {gains[best]:g}'
    at_one = f'{r2[plain]:z.2f} at gain 1'
    both = f'{at_best}, against {at_one}'
    if r2[best] <= 0:
        finding = f'At no gain is the model nearer than the mean: {at_best}, {at_one}'
    elif warned:
        finding = f'{both}: the input is not on the scale that the model knows'
    elif best == plain:
        finding = f'R² is highest at gain 1, {r2[plain]:z.2f}'
    else:
        finding = f'{both}: the input is on the scale that the model knows'
    if below.any():
        finding += f'; {below.sum()} of {len(r2)} points lie below {style.FLOOR:.0f} (triangles)'
    style.headline(figure, finding, warned)
    return figure
