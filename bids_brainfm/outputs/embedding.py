"""What encoding writes for a run: embeddings, latent prediction, their sidecars and pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import atomic, read_relmat, write_matrix, write_table
from bids_brainfm.bids.freshness import (
    input_fingerprints,
    is_current,
    is_whole,
    read_sidecar,
    write_sidecar,
)
from bids_brainfm.bids.naming import derivative_path, own_uri
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.context import AnalysisSettings, source_sidecar
from bids_brainfm.outputs.prediction import (
    prediction_current,
    remove_prediction,
    write_prediction,
)
from bids_brainfm.outputs.series import (
    FILL_RULE,
    WINDOW_COLUMNS,
    dimension_names,
    display_order,
    report_name,
    series_paths,
    window_rows,
)
from bids_brainfm.resources import sha256_of
from bids_brainfm.signals.contract import Contract
from bids_brainfm.signals.resample import same_rate
from bids_brainfm.signals.scale import load_scale_stats, static_share, unusable

BLOCKS = {
    'cross-time': 'the last time patches of all parcels, from the patches before',
    'cross-roi': 'every second parcel, from the others at the same times',
    'double-cross': 'every second parcel at the last time patches, from the others before',
}


@dataclass(frozen=True)
class EncodeTask:
    """How one model encodes, for all runs.

    Attributes
    ----------
    spec : ModelSpec
    atlas : str
        Name of its atlas.
    contract : Contract
    home : Path
        Where fetched atlases are kept.
    device, precision : str
        As resolved: ``cpu`` or ``cuda``, ``float32`` or ``bfloat16``.
    batch_size, threads : int
        Windows at once; CPU threads.
    tokens : bool
        Whether to write token embeddings.
    block : str or None
        Block of the window that is predicted from the rest; None for no latent prediction.
    analyses : AnalysisSettings
        What is computed beside the embeddings.
    output : Path
        The output dataset.
    version : str
        Version of this program, for the sidecars.
    """

    spec: ModelSpec
    atlas: str
    contract: Contract
    home: Path
    device: str
    precision: str
    batch_size: int
    threads: int
    tokens: bool
    block: str | None
    analyses: AnalysisSettings
    output: Path
    version: str

    @property
    def arrays(self) -> list[str]:
        """What is written as HDF5 beside the table."""
        return ['parcels'] * self.spec.per_parcel + ['tokens'] * self.tokens


def latent_name(label: str) -> str:
    """Entities of the maps of latent prediction."""
    return f'stat-latenterror_desc-{label}'


def embedding_path(run: BoldRun, task: EncodeTask) -> Path:
    """Path of the table of embeddings of a run; arrays stand beside it as HDF5."""
    return derivative_path(
        task.output, run, 'embedding', '.tsv', atlas=task.atlas, desc=task.spec.label
    )


def latent_path(run: BoldRun, task: EncodeTask) -> Path:
    """Path of the table of latent prediction of a run."""
    return derivative_path(
        task.output, run, 'boldmap', '.tsv',
        atlas=task.atlas, stat='latenterror', desc=task.spec.label,
    )  # fmt: skip


def embedding_current(run: BoldRun, task: EncodeTask) -> bool:
    """Whether all that a task writes for a run stands and fits the inputs."""
    return (
        _table_current(run, task)
        and (not task.block or _latent_current(run, task))
        and (not task.spec.predicted or prediction_current(run, task))
    )


def _table_current(run: BoldRun, task: EncodeTask) -> bool:
    path = embedding_path(run, task)
    if not is_current(path, input_fingerprints(run)):
        return False
    written = read_sidecar(path.with_suffix('.json'))['Arrays']
    whole = not written or is_whole(path.with_suffix('.h5'))
    return whole and set(task.arrays) <= set(written)


def _latent_current(run: BoldRun, task: EncodeTask) -> bool:
    return is_current(latent_path(run, task), input_fingerprints(run))


def write_outputs(run: BoldRun, task: EncodeTask, atlas, windows, donors, encoding) -> None:
    """Write what an encoder says of a run, but for what stands already.

    Parameters
    ----------
    run : BoldRun
    task : EncodeTask
    atlas : Atlas
    windows : Windows
    donors : (P,) int
        See :func:`bids_brainfm.signals.contract.prepare`.
    encoding : Encoding
    """
    source, common = source_sidecar(run, task), common_metadata(run, task)
    name, rows = report_name(run, atlas.name), _rows(windows, source)
    if not prediction_current(run, task):
        remove_prediction(run, task)  # what stands is of an earlier input
        if task.spec.predicted:
            write_prediction(run, task, encoding.prediction, rows, common)
    if not _latent_current(run, task):
        if task.block:
            write_latent(run, task, atlas, encoding, common, name)
        else:  # a map of an earlier input would not belong to these embeddings
            _remove_latent(run, task, name)
    if not _table_current(run, task):
        filled = {atlas.names[i]: atlas.names[d] for i, d in enumerate(donors) if d >= 0}
        write_embedding(run, task, atlas, windows, rows, filled, encoding, source, common, name)


def _rows(windows, source: dict) -> list[str]:
    """First columns of tables with a row a window; flagged is n/a where it was not assessed."""
    assessed = 'NumberOfVolumesFlagged' in source
    flagged = windows.flagged if assessed else np.full(len(windows.data), np.nan)
    return window_rows(windows.onset, windows.duration, windows.real, flagged)


def common_metadata(run: BoldRun, task: EncodeTask) -> dict:
    """What all sidecars of a run and model say."""
    series = series_paths(task.output, run, task.atlas)['series']
    source = source_sidecar(run, task)
    return {
        'InputFiles': source['InputFiles'],
        'SoftwareVersion': task.version,
        'Sources': [own_uri(task.output, series), *source['Sources']],
    }


def write_embedding(
    run, task: EncodeTask, atlas, windows, rows, filled, encoding, source, common, name
) -> None:
    """Write one run's embeddings: table, arrays, figures, sidecar.

    Parameters
    ----------
    rows : list of str
        First columns of the table.
    filled : dict of str to str
        Parcels that were filled, and from which.
    source : dict
        Sidecar of the parcel series.
    common : dict
        What all sidecars of the run say.
    name : str
        What the report calls the run.
    """
    from bids_brainfm.reports import figures
    from bids_brainfm.reports.report import figure_path

    spec, path = task.spec, embedding_path(run, task)
    shares = (windows.onset, windows.duration, windows.real, windows.flagged)
    header = [*WINDOW_COLUMNS, *dimension_names(encoding.summary.shape[1])]
    write_matrix(path, encoding.summary, header, rows)
    if task.arrays:
        write_arrays(path.with_suffix('.h5'), encoding, windows, atlas)
    else:  # those of an earlier input would not belong to this table
        path.with_suffix('.h5').unlink(missing_ok=True)
    recorded = (windows.onset + windows.duration).max() + windows.left_over
    pictures = {
        'windows': figures.windows(*shares, recorded),
        'embedding': figures.embedding(encoding.summary, windows.onset),
    }
    order = {}
    if spec.gradients is not None:
        order, pictures['order'] = check_order(run, task, atlas)
    for what, figure in pictures.items():
        figures.save(figure, figure_path(task.output, name, what, spec.label))
    content = _describe(task, atlas, source, windows, encoding.summary.shape[1], filled, order)
    write_sidecar(path, content | common)


def check_order(run: BoldRun, task: EncodeTask, atlas) -> tuple[dict, object]:
    """Hold the order of the parcels against the run's connectivity: sidecar entry and figure."""
    from bids_brainfm.analyses.order import EXPECTED, EXPECTED_OF, order_check, order_warning
    from bids_brainfm.models.gradient_table import read_gradients
    from bids_brainfm.reports import figures

    gradients = read_gradients(task.spec.gradients.path)
    relmat = read_relmat(series_paths(task.output, run, atlas.name)['relmat'])
    found = order_check(gradients, relmat, atlas.misorders)
    expected = EXPECTED if task.spec.gradients.sha256 == EXPECTED_OF else None
    facts = {'Correlation': found, 'Expected': expected, 'Warning': order_warning(found)}
    return facts, figures.order_check(found, gradients, relmat, expected)


def write_latent(run, task: EncodeTask, atlas, encoding, common: dict, name: str) -> None:
    """Write how well each parcel's latents are predicted: table, figure, sidecar."""
    from bids_brainfm.reports import figures
    from bids_brainfm.reports.report import figure_path

    error, baseline = encoding.latent_error, encoding.latent_baseline
    n_windows, n_parcels, n_patches = error.shape
    columns = {
        'window': np.repeat(np.arange(n_windows), n_parcels),
        'Node': list(atlas.names) * n_windows,
    }
    columns |= {f'patch{k:02d}': error[:, :, k].ravel() for k in range(n_patches)}
    for what, values in (('error', error), ('baseline', baseline)):
        columns[what] = _mean(values, axis=2).ravel()
    path, label = latent_path(run, task), task.spec.label
    write_table(path, columns)
    order, order_label = display_order(atlas.xyz)
    figure = figures.latent_error(error, baseline, order, order_label=order_label)
    figures.save(figure, figure_path(task.output, name, 'latent', label))
    write_sidecar(
        path,
        {
            'Description': f'How well {task.spec.card.name} predicts the latents of a block of '
            f'each window: {BLOCKS[task.block]}. Smooth L1 error (beta 1), mean over '
            f'dimensions, of the predicted against the layer-normalised target latents.',
            'Model': {'Name': task.spec.card.name, 'Weights': task.spec.weights},
            'Block': task.block,
            'MeanError': float(np.nanmean(error)),
            'MeanBaseline': float(np.nanmean(baseline)),
            'window': {'Description': 'Number of the window, from 0'},
            'Node': {'Description': f'Parcel of {atlas.name}'},
            'patch*': {'Description': 'Error at each time patch, n/a where it was the context'},
            'error': {'Description': "Mean over the parcel's patches"},
            'baseline': {
                'Description': 'The same for a guess without a model: the mean target latent of '
                "the window's context"
            },
        }
        | common,
    )


def _remove_latent(run, task: EncodeTask, name: str) -> None:
    from bids_brainfm.reports.report import figure_path

    path = latent_path(run, task)
    for old in (
        path,
        path.with_suffix('.json'),
        figure_path(task.output, name, 'latent', task.spec.label),
    ):
        old.unlink(missing_ok=True)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN, NaN where there is nothing."""
    count = np.isfinite(values).sum(axis=axis)
    return np.divide(
        np.nansum(values, axis=axis), count, out=np.full(count.shape, np.nan), where=count > 0
    )


def _warnings(task: EncodeTask, atlas, windows, filled: dict, order: dict) -> list[str]:
    """What is out of the ordinary with the windows of a run, one sentence each."""
    spec, contract, warnings = task.spec, task.contract, []
    if not spec.trained:
        warnings.append(
            f'{spec.label} is untrained (random weights): its embeddings are a control, '
            f'not a result.'
        )
    if spec.gradients is not None and not spec.gradients.named:
        warnings.append(
            f'{spec.label} was given the table of gradients {spec.gradients.path.name} that lies '
            f'beside its weights, not the one that the card of {spec.card.name} names.'
        )
    if order.get('Warning'):
        warnings.append(f'{spec.label}: {order["Warning"]}')
    if not same_rate(windows.tr, spec.card.tr):
        warnings.append(
            f'The official frame sampling gave {spec.label} one sample in {windows.tr:.4g} s '
            f'where it was trained with {spec.card.tr:g} s: leave out --temporal official.'
        )
    if filled:
        warnings.append(f'{len(filled)} parcels were filled before encoding with {FILL_RULE}.')
    if contract.stats is not None:
        stats = load_scale_stats(contract.stats, atlas.name, atlas.n_parcels)
        if (lost := unusable(stats)).size:
            warnings.append(
                f'{lost.size} parcels have no usable statistics in {contract.stats.name} and are '
                f'zero: {", ".join(atlas.names[i] for i in lost[:5])}'
                + (' and others.' if lost.size > 5 else '.')
            )
    if windows.left_over > 0:
        warnings.append(
            f'The last {windows.left_over:.1f} s of the run are in no window of {spec.label}.'
        )
    if (windows.real < 1).any():
        how = 'pad' if contract.short_runs == 'refuse' else contract.short_runs
        warnings.append(
            f'{(windows.real < 1).sum()} window(s) of {spec.label} are not all recorded signal '
            f'(completed as by --short-runs {how}; at least {windows.real.min():.0%} recorded).'
        )
    return warnings


def _describe(
    task: EncodeTask, atlas, source: dict, windows, size: int, filled: dict, order: dict
) -> dict:
    """Sidecar of a run's embeddings, but for what all its sidecars say.

    Parameters
    ----------
    task : EncodeTask
    atlas : Atlas
    source : dict
        Sidecar of the parcel series.
    windows : Windows
    size : int
        Dimensions of the embedding.
    filled : dict of str to str
        Parcels that were filled, and from which.
    order : dict
        What the check of the parcels' order found, empty where there is none.
    """
    spec, card, contract = task.spec, task.spec.card, task.contract
    assessed = 'NumberOfVolumesFlagged' in source
    official = contract.temporal == 'official'
    resampled = not official and not same_rate(source['RepetitionTime'], card.tr)
    method = 'polyphase with anti-aliasing filter' if resampled else None
    table = spec.gradients
    # Official windows follow one another by whole volumes, a sample each volume that is picked
    sample = windows.tr
    if official:
        sample = contract.official_volumes / card.window * source['RepetitionTime']
    return {
        'Description': f'Embedding of each window of the run by {card.name}: the {spec.pooling} '
        f'after the last normalisation.',
        'Model': {
            'Name': card.name,
            'Description': card.description,
            'Trained': spec.trained,
            'Weights': spec.weights,
            'WeightsSHA256': spec.sha256,
            'GradientTable': table and {'Name': table.path.name, 'SHA256': table.sha256},
            'License': card.licence,
            'Source': card.source,
            'Citation': card.citation,
            'Training': card.training,
            'Architecture': card.config,
        },
        'Pooling': spec.pooling,
        'Arrays': task.arrays,
        'ParcelOrder': card.parcel_order,
        'OrderCheck': order or None,
        'EmbeddingSize': size,
        'NumberOfWindows': len(windows.data),
        'WindowLength': card.window * sample,
        'WindowSamples': card.window,
        'WindowStride': (contract.stride or card.window) * sample,
        'WindowOnsets': windows.onset,
        'SamplingFrequency': 1 / windows.tr,
        'RepetitionTime': source['RepetitionTime'],
        'Resampled': resampled or official,
        'ResamplingMethod': 'frames picked as by the official code' if official else method,
        'Scaling': contract.scaling,
        'DividedBy': contract.divide_by if contract.scaling != 'none' else None,
        'ScaleStatistics': contract.stats
        and {'Name': contract.stats.name, 'SHA256': sha256_of(contract.stats)},
        'StaticVariance': static_share(np.concatenate(windows.data, axis=1).T),
        'ShortRuns': contract.short_runs,
        'LeftOver': windows.left_over,
        'Denoising': source['Denoising'],
        'ShareFlagged': windows.flagged if assessed else None,
        'ShareReal': windows.real,
        'FilledParcels': filled,
        'FillRule': FILL_RULE,
        'Precision': task.precision,
        'Device': task.device,
        'Space': source['Space'],
        'Atlas': source['Atlas'],
        'Warnings': _warnings(task, atlas, windows, filled, order),
    } | WINDOW_COLUMNS


def write_arrays(path: Path, encoding, windows, atlas) -> None:
    """Write parcel embeddings and tokens as HDF5.

    Datasets: ``parcels`` (windows, parcels, dimensions), where the model has a token or more a
    parcel; ``tokens`` (windows, tokens, dimensions) in canonical order without the class token
    and ``attention`` (windows, parcels), where tokens were asked for; ``onset`` (windows,) in
    seconds and ``parcel_names``.
    """
    import h5py

    with atomic(path) as temporary, h5py.File(temporary, 'w') as file:
        file['onset'] = windows.onset
        file['parcel_names'] = list(atlas.names)
        for name in ('parcels', 'tokens', 'attention'):
            values = getattr(encoding, name)
            if values is not None:
                file.create_dataset(name, data=values, compression='gzip', compression_opts=1)
