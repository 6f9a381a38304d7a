"""Embedding of each window of a run: table, arrays, and the check of the parcels' order."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.bids.files import atomic, read_relmat, write_matrix
from bids_brainfm.bids.freshness import check_contents, write_sidecar
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.config import Settings
from bids_brainfm.models.gradient_table import read_gradients
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.products import Context
from bids_brainfm.outputs.tasks import ModelTask, Place
from bids_brainfm.outputs.words import WINDOW_COLUMNS, dimension_names, rows_of
from bids_brainfm.reports.report import Figure
from bids_brainfm.resources import sha256_of
from bids_brainfm.signals import order
from bids_brainfm.signals.contract import Contract
from bids_brainfm.signals.resample import same_rate
from bids_brainfm.signals.scale import (
    load_scale_stats,
    static_proportion,
    static_warning,
    unusable,
)  # fmt: skip

FILL_RULE = (
    'the series of the nearest parcel (by centroid, and of the same structure where the atlas '
    'tells cortex from subcortex) with enough coverage'
)
FIGURES = {
    'windows': Figure('Windows',
        'Each bar is one window that the model saw; grey bars are excluded windows, hatching is '
        'padding, and the pale area is recorded time that lies in no window. At the right, the '
        "proportions of each window's samples that come from flagged volumes and that were "
        'padded.'),
    'embedding': Figure('Embedding',
        'From three windows on: each dot is a window, joined in time, on the two directions in '
        "which the run's embeddings differ most; at the right, the correlation of each pair of "
        'windows. Its colours span only the range found, which may be narrow.'),
    'order': Figure('Order of the parcels',
        'Parcels that lie near to each other in the gradient space that the model was given '
        'should be functionally connected. Should a wrong order of the rows fit better than the '
        "one as read, the atlas or the table is not in the model's order, and the embeddings "
        'mean nothing. Swapped hemispheres can hardly be found this way, since both sides are '
        'connected alike. Where they are drawn, expected values are those of a group (HCP); one '
        'run is noisier.'),
}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """How tokens are ordered, as in :class:`bids_brainfm.models.encoder.Encoder`."""

    token_shuffles: int  # 0: the order of the atlas
    seed: int


def parameters(settings: Settings, spec: ModelSpec, atlas: Atlas) -> Parameters:
    """Settle the orders of tokens; a model to which they do not matter has one."""
    asked = settings.options.get('token_shuffles') or 0
    return Parameters(asked * spec.capabilities.ordered_tokens, settings.random_seed)


def companions(run: BoldRun, place: Place, task: ModelTask | None = None) -> list[Path]:
    """Arrays of parcels and tokens as HDF5."""
    arrays = place.path(run, 'embedding', extension='.h5')
    return [arrays] if task is None or task.arrays else []


def settings(task: ModelTask) -> dict[str, Any]:
    """Contract, weights and precision."""
    spec, contract = task.spec, dataclasses.asdict(task.contract)
    if contract['stats'] is not None:
        contract['stats'] = f'sha256 {sha256_of(contract["stats"])}'
    config = json.dumps(spec.card.config, sort_keys=True)
    return contract | {
        'weights': spec.weights, 'gradients': spec.gradients and f'sha256 {spec.gradients.sha256}',
        'architecture_sha256': hashlib.sha256(config.encode()).hexdigest(),
        'parcel_order': spec.card.parcel_order, 'atlas': task.place.atlas,
        'precision': task.precision,
    } | _shuffles(task)  # fmt: skip


def _shuffles(task: ModelTask) -> dict[str, int]:
    """Number and seed of the token orders, where they are averaged over."""
    asked = task.parameters['embedding']
    return dataclasses.asdict(asked) if asked.token_shuffles else {}


def methods(task: ModelTask) -> str:
    """Sentences on the model, its input and its embedding."""
    spec, card = task.spec, task.spec.card
    weights = '' if spec.trained else ' with random, untrained weights'
    placed = predicting = reduced = ''
    if task.precision != 'float32':
        reduced = f' Matrix products were computed in {task.precision}, and the embeddings of the '
        reduced += 'first windows were compared with float32.'
    shuffled = task.parameters['embedding'].token_shuffles
    averaged = '.' if not shuffled else f', a mean over {shuffled} random orders of the tokens.'
    if table := spec.gradients:
        placed = f' Parcels were placed by the brain gradients {table.path.name} '
        placed += f'(sha256 {table.sha256[:12]}).'
    if spec.predicted:
        predicting = f' Its head predicted {card.config["head"]["target"]} from each window.'
    return (
        f'For {card.name} ({card.description}), parcels without signal were filled with '
        f'{FILL_RULE}. Series {_windows_text(task.contract)} Every window was encoded '
        f'without masking by {card.name}{weights}; its embedding is the '
        f'{spec.capabilities.pooling} after the last normalisation{averaged}'
        f'{reduced}{predicting}{placed}\n\n'
    )


def _scaling_text(contract: Contract) -> str:
    """How series were scaled, from "Series" on."""
    text = {
        'none': 'were not scaled',
        'run-robust': 'were scaled for each run (each parcel demeaned, divided by its own '
        'interquartile range, and clipped)',
        'global-z': 'were standardised with one mean and standard deviation for the whole run',
        'parcel-z': 'were standardised for each parcel',
        'cohort': 'were scaled for each run (whole-brain mean to 10000, each parcel demeaned) and '
        'by the interquartile range and bounds of a cohort',
        'cohort-means': 'were scaled for each run (whole-brain mean to 10000) and then for each '
        'parcel by the median and interquartile range of its temporal mean over a cohort',
    }[contract.scaling]
    divided = contract.scaling != 'none' and contract.divide_by != 1
    return f'{text} and divided by {contract.divide_by:g}' if divided else text


def _windows_text(contract: Contract) -> str:
    """How series became windows, from "Series" on."""
    scaling, filling = _scaling_text(contract), 'the mean of each parcel'
    if contract.temporal == 'official':
        filling = 'its last volume'
        text = (
            f'{scaling}, and windows of {contract.window} samples were taken from them as in the '
            f'official code, spread evenly over {contract.official_volumes} volumes'
        )
    else:
        text = (
            f'were resampled to {contract.tr:g} s with an anti-aliasing filter where their '
            f'repetition time differs, {scaling}, and cut into windows of {contract.window} '
            f'samples ({contract.window * contract.tr:.1f} s)'
        )
    text += f', one every {contract.stride or contract.window} samples.'
    ended, missing = 'Where a run ended before its last window', f'{1 - contract.min_real:.0%}'
    if contract.short_runs == 'tile':
        return f'{text} {ended}, it was repeated from its start.'
    if contract.short_runs == 'pad':
        return f'{text} {ended}, {filling} was continued.'
    if contract.min_real < 1:
        text += f' {ended}, but no more than {missing} of it was missing, {filling} was continued.'
    return text


# Sidecar entry on the order of the parcels, gradients, and connectivity
OrderCheck = tuple[dict[str, Any], np.ndarray, np.ndarray]


def compute(context: Context) -> OrderCheck | None:
    """Check the order of the parcels, where the model is given gradients."""
    table, place = context.task.spec.gradients, context.task.place
    if table is None:
        return None
    gradients = read_gradients(table.path)
    connectome = place.of_series.table(context.run, 'connectome')
    check_contents(connectome)
    relmat = read_relmat(connectome)
    found = order.order_check(gradients, relmat, dict(context.atlas.misorders))
    expected = order.EXPECTED if table.sha256 == order.EXPECTED_OF else None
    warning = order.order_warning(found)
    entry = {'Correlation': found, 'Expected': expected, 'Warning': warning}
    return entry, gradients, relmat


def write(context: Context, result: OrderCheck | None) -> None:
    """Write table, arrays, figures and sidecar."""
    from bids_brainfm.reports.figures import embedding as figures
    from bids_brainfm.reports.figures.order import order_check

    task, windows, encoding = context.task, context.windows, context.encoding
    table = context.table('embedding')
    header = [*WINDOW_COLUMNS, *dimension_names(encoding.summary.shape[1])]
    write_matrix(table, encoding.summary, header, rows_of(windows, context.source))
    for arrays in companions(context.run, task.place, task):
        write_arrays(arrays, context)
    recorded = (windows.onset + windows.duration).max() + windows.left_over
    seen = windows.onset, windows.duration, windows.real, windows.flagged, windows.excluded
    start = context.data.series.start
    context.save_figure(figures.windows(*seen, recorded, start), 'windows')
    context.save_figure(figures.embedding(encoding.summary, windows.onset), 'embedding')
    entry: dict[str, Any] = {}
    if result is not None:
        entry, gradients, relmat = result
        drawn = order_check(entry['Correlation'], gradients, relmat, entry['Expected'])
        context.save_figure(drawn, 'order')
    write_sidecar(table, _describe(context, entry) | context.common)


def write_arrays(path: Path, context: Context) -> None:
    """Write parcel embeddings and tokens as HDF5.

    Datasets: ``parcels`` (windows, parcels, dimensions), where the model has a token or more per
    parcel; ``tokens`` (windows, tokens, dimensions) in canonical order without the class token
    and ``attention`` (windows, parcels) as a multiple of uniform attention, where tokens were
    asked for; ``onset`` (windows,) in seconds and ``parcel_names``.
    """
    import h5py

    with atomic(path) as temporary, h5py.File(temporary, 'w') as file:
        file['onset'], file['parcel_names'] = context.windows.onset, list(context.atlas.names)
        file['excluded'] = context.windows.excluded
        for name in ('parcels', 'tokens', 'attention'):
            if (values := getattr(context.encoding, name)) is not None:
                file.create_dataset(name, data=values, compression='gzip', compression_opts=1)


def _warnings(
    context: Context, filled: dict[str, str], checked: dict[str, Any], static: float
) -> list[str]:
    """What is out of the ordinary with the windows of a run, one sentence each."""
    spec, contract, windows = context.task.spec, context.task.contract, context.windows
    atlas, warnings = context.atlas, []
    if not spec.trained:
        warnings.append(
            f'{spec.label} is untrained (random weights): its embeddings are a control, '
            f'not a result.'
        )
    if spec.gradients is not None and not spec.gradients.named:
        warnings.append(
            f'{spec.label} was given the table of gradients {spec.gradients.path.name} that lies '
            f'next to its weights, not the one that the card of {spec.card.name} names.'
        )
    if checked.get('Warning'):
        warnings.append(f'{spec.label}: {checked["Warning"]}')
    if not same_rate(windows.tr, spec.card.tr):
        warnings.append(
            f'The official frame sampling gave {spec.label} one sample in {windows.tr:.4g} s '
            f'where it was trained with {spec.card.tr:g} s: leave out --temporal official.'
        )
    if mostly := static_warning(static, contract.scaling):
        warnings.append(f'{spec.label}: {mostly}')
    if inexact := (context.precision_check or {}).get('Warning'):
        warnings.append(f'{spec.label}: {inexact}')
    if filled:
        warnings.append(f'{len(filled)} parcels were filled before encoding with {FILL_RULE}.')
    if contract.stats is not None:
        stats = load_scale_stats(contract.stats, atlas.name, atlas.n_parcels)
        if (lost := unusable(stats)).size:
            names = ', '.join(atlas.names[i] for i in lost[:5]) + ' and others' * (lost.size > 5)
            warnings.append(
                f'{lost.size} parcels have no usable statistics in {contract.stats.name} and are '
                f'zero: {names}.'
            )
    n_excluded = np.count_nonzero(windows.excluded)
    if n_excluded and not context.source.get('Excluded'):  # else the whole run is, and says so
        warnings.append(
            f'{n_excluded} of {len(windows.data)} windows of {spec.label} are excluded from '
            f'summaries, since more of their volumes are flagged than --max-flagged '
            f'{contract.max_flagged:g} allows.'
        )
    if (left := windows.left_over) > 0:
        warnings.append(f'The last {left:.1f} s of the run are in no window of {spec.label}.')
    if number := int((windows.real < 1).sum()):
        verb = 'is' if number == 1 else 'are'
        how = 'pad' if contract.short_runs == 'refuse' else contract.short_runs
        warnings.append(
            f'{number} of {len(windows.data)} windows of {spec.label} {verb} recorded in part '
            f'only, down to {windows.real.min():.0%}, and completed as by --short-runs {how}.'
        )
    return warnings


def _describe(context: Context, checked: dict[str, Any]) -> dict[str, Any]:
    """Sidecar of the table, without what all sidecars of the run say."""
    task, source, windows = context.task, context.source, context.windows
    spec, card, contract = task.spec, task.spec.card, task.contract
    names = context.atlas.names
    filled = {names[i]: names[d] for i, d in enumerate(context.data.donors) if d >= 0}
    official = contract.temporal == 'official'
    resampled = not official and not same_rate(source['RepetitionTime'], card.tr)
    method = 'polyphase with anti-aliasing filter' if resampled else None
    static = static_proportion(np.concatenate(windows.data, axis=1).T)
    table = spec.gradients
    # Official windows follow one another by whole volumes, a sample each volume that is picked
    sample = windows.tr
    if contract.official_volumes is not None and official:
        sample = contract.official_volumes / card.window * source['RepetitionTime']
    return {
        'Description': f'Embedding of each window of the run by {card.name}: the '
        f'{spec.capabilities.pooling} after the last normalisation.',
        'Model': {
            'Name': card.name, 'Description': card.description, 'Trained': spec.trained,
            'Weights': spec.weights, 'WeightsSHA256': spec.sha256,
            'GradientTable': table and {'Name': table.path.name, 'SHA256': table.sha256},
            'License': card.licence, 'Source': card.source, 'Citation': card.citation,
            'Training': card.training, 'Architecture': card.config,
        },
        'Pooling': spec.capabilities.pooling, 'Arrays': task.arrays,
        'ParcelOrder': card.parcel_order, 'OrderCheck': checked or None,
        'EmbeddingSize': context.encoding.summary.shape[1], 'NumberOfWindows': len(windows.data),
        'WindowLength': card.window * sample, 'WindowSamples': card.window,
        'WindowStride': (contract.stride or card.window) * sample, 'WindowOnsets': windows.onset,
        'SamplingFrequency': 1 / windows.tr, 'RepetitionTime': source['RepetitionTime'],
        'Resampled': resampled or official,
        'ResamplingMethod': 'frames picked as by the official code' if official else method,
        'Scaling': contract.scaling,
        'DividedBy': contract.divide_by if contract.scaling != 'none' else None,
        'ScaleStatistics': contract.stats
        and {'Name': contract.stats.name, 'SHA256': sha256_of(contract.stats)},
        'StaticVariance': static,
        'ShortRuns': contract.short_runs, 'LeftOver': windows.left_over,
        'Denoising': source['Denoising'],
        'ProportionFlagged': windows.flagged if 'NumberOfVolumesFlagged' in source else None,
        'MaxFlagged': contract.max_flagged, 'WindowsExcluded': np.flatnonzero(windows.excluded),
        'ProportionReal': windows.real, 'FilledParcels': filled, 'FillRule': FILL_RULE,
        'TokenShuffles': task.parameters['embedding'].token_shuffles,
        'Precision': task.precision, 'PrecisionCheck': context.precision_check,
        'Device': task.device, 'Space': source['Space'], 'Atlas': source['Atlas'],
        'Warnings': _warnings(context, filled, checked, static),
    } | WINDOW_COLUMNS  # fmt: skip


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Weights, input, embedding, and what placed the parcels."""
    resampled, divided = '', sidecar.get('DividedBy', 1)
    orders = sidecar.get('TokenShuffles')
    shuffled = f', mean over {orders} orders of the tokens' if orders else ''
    if sidecar['Resampled']:
        resampled = f', one in {1 / sidecar["SamplingFrequency"]:.5g} s'
        resampled += f' ({sidecar["ResamplingMethod"]})'
    lines = {
        'Weights': sidecar['Model']['Weights'],
        'Input': f'{sidecar["WindowSamples"]} samples ({sidecar["WindowLength"]:g} s) a window'
        + resampled,
        'Scaling': sidecar['Scaling'] + (f', divided by {divided:g}' if divided != 1 else ''),
        'Static variance': f'{sidecar["StaticVariance"]:.1%} of the variance that the model is '
        f'given is constant over time',
        'Embedding': f'{sidecar["EmbeddingSize"]} dimensions ({sidecar["Pooling"]}{shuffled})',
        'Filled parcels': len(sidecar['FilledParcels']),
        'Ran on': f'{sidecar["Device"]}, {sidecar["Precision"]}',
    }
    if check := sidecar.get('PrecisionCheck'):
        error, compared = check['RelativeError'], check['WindowsCompared']
        lines['Error by precision'] = (
            'could not be assessed: no two windows to take a standard deviation over'
            if error is None
            else f'{error:.2%} of the standard deviation between windows ({compared} compared '
            f'with float32, standard deviation over {check["WindowsEncoded"]})'
        )
    if table := sidecar['Model'].get('GradientTable'):
        found, *others = sidecar['OrderCheck']['Correlation'].items()
        wrong = ', '.join(f'{r:.2f} ({name})' for name, r in others)
        lines['Gradient table'] = f'{table["Name"]}, sha256 {table["SHA256"]}'
        lines['Order of parcels'] = (
            f'correlation of connectivity with nearness in gradient space {found[1]:.2f}, in '
            f'wrong orders {wrong}'
        )
    return lines
