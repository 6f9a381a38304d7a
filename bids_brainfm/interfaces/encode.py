"""From parcel series to embeddings: one model, many runs, one load of the weights."""

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    SimpleInterface,
    TraitedSpec,
    traits,
)

from bids_brainfm.bids import writing
from bids_brainfm.bids.reading import BoldRun
from bids_brainfm.errors import BrainfmError
from bids_brainfm.interfaces.outcome import Outcome, attempt
from bids_brainfm.interfaces.series import (
    FILL_RULE,
    embedding_columns,
    read_series,
    report_name,
    series_paths,
)
from bids_brainfm.models.spec import SEED, ModelSpec
from bids_brainfm.signals.contract import Contract, prepare
from bids_brainfm.signals.resample import same_rate

LOGGER = logging.getLogger('bids_brainfm')


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
    output: Path
    version: str


def encode_step(atlas: str, label: str) -> str:
    """What encoding with a model is called in the log folder."""
    return f'atlas-{atlas}_desc-{label}'


def embedding_path(output: Path, run: BoldRun, atlas: str, label: str) -> Path:
    """Path of the table of embeddings of a run."""
    return writing.derivative_path(output, run, 'embedding', '.tsv', atlas=atlas, desc=label)


def embedding_current(
    output: Path, run: BoldRun, atlas: str, label: str, inputs: dict, tokens: bool
) -> bool:
    """Whether a run's embeddings stand and fit the inputs."""
    path = embedding_path(output, run, atlas, label)
    if tokens and not path.with_suffix('.h5').is_file():
        return False
    return writing.is_current(path.with_suffix('.json'), path, inputs)


def load_encoder(task: EncodeTask, xyz: np.ndarray):
    """Build the network of a task and give it its weights."""
    import torch

    from bids_brainfm.models.encoder import Encoder, ascending_y
    from bids_brainfm.models.weights import build, initialise, load_checkpoint

    torch.set_num_threads(task.threads)
    spec = task.spec
    network = build(spec.card.config)
    if spec.checkpoint is None:
        initialise(network, SEED)
    else:
        load_checkpoint(network, spec.checkpoint)
    order = ascending_y(xyz) if spec.card.parcel_order == 'ascending-y' else None
    return Encoder(
        network,
        name=spec.card.name,
        order=order,
        xyz=xyz,
        device=task.device,
        precision=task.precision,
    )


def encode_all(runs: list[BoldRun], task: EncodeTask, stop: bool = False) -> list[Outcome]:
    """Encode runs whose parcel series are written, and write their embeddings.

    Parameters
    ----------
    runs : list of BoldRun
    task : EncodeTask
    stop : bool
        Whether the first failure is raised.

    Returns
    -------
    list of Outcome
        One a run.
    """
    from tqdm import tqdm

    step, name = encode_step(task.atlas, task.spec.label), task.spec.card.name
    outcomes: list[Outcome] = []
    started = time.monotonic()
    with tqdm(total=len(runs), desc=f'Encoding with {name}', unit='run', disable=None) as bar:

        def settle(run, work):
            outcome = attempt(task.output, run, step, work, stop)
            outcomes.append(outcome)
            bar.update()
            head = f'[{len(outcomes)}/{len(runs)}]'
            if outcome.error:
                LOGGER.error('%s %s', head, outcome.error)
            else:
                seconds = time.monotonic() - started
                LOGGER.info('%s %s: encoded with %s (%.1f s)', head, run.name, name, seconds)

        try:
            for run, work in _encode(runs, task, lambda n: bar.set_postfix(windows=n)):
                settle(run, work)
        except Exception as error:  # the encoder itself failed: all that is left fails with it
            if stop:
                raise
            failing = partial(_fail, _explain(error, task))
            settled = {outcome.run for outcome in outcomes}
            for run in runs:
                if run.name not in settled:
                    settle(run, failing)
    return outcomes


def _encode(runs: list[BoldRun], task: EncodeTask, progress):
    """Yield each run with the work that writes its embeddings, or that raises what was wrong."""
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.models.encoder import encode_runs

    atlas = load_atlas(task.spec.card.atlas, task.home)
    encoder = load_encoder(task, atlas.xyz)
    failed, prepared = [], {}

    def windows_of_runs():
        for run in runs:
            try:
                series = read_series(series_paths(task.output, run, atlas.name)['series'])
                prepared[run] = prepare(series, task.contract, atlas.xyz, atlas.name)
            except Exception as error:
                failed.append((run, partial(_fail, _named(error, run, task))))
            else:
                yield run, prepared[run][0].data

    encodings = encode_runs(encoder, windows_of_runs(), task.batch_size, task.tokens, progress)
    for run, encoding in encodings:
        windows, donors = prepared.pop(run)
        yield run, partial(write_embedding, run, task, atlas, windows, donors, encoding)
        while failed:
            yield failed.pop(0)
    yield from failed


def _fail(error: Exception):
    raise error


def _named(error: Exception, run: BoldRun, task: EncodeTask) -> Exception:
    """Say which model it was that refused the run."""
    if isinstance(error, BrainfmError):
        return BrainfmError(f'{run.name}: {task.spec.card.name} cannot take it: {error}')
    return error


def _explain(error: Exception, task: EncodeTask) -> Exception:
    """Say what to do where the GPU's memory is too small."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return BrainfmError(
            f'{task.spec.card.name} with {task.batch_size} windows at once does not fit into the '
            f"GPU's memory: lower --batch-size, or use --precision bfloat16 or --device cpu."
        )
    return error


def write_embedding(run, task: EncodeTask, atlas, windows, donors, encoding) -> None:
    """Write one run's embeddings: table, tokens on request, figures, sidecar."""
    from bids_brainfm.reports import figures
    from bids_brainfm.reports.report import figure_path

    spec = task.spec
    path = embedding_path(task.output, run, atlas.name, spec.label)
    series = series_paths(task.output, run, atlas.name)['series']
    source = writing.read_sidecar(series.with_suffix('.json'))
    shares = (windows.onset, windows.duration, windows.real, windows.flagged)
    assessed = 'NumberOfVolumesFlagged' in source
    flagged = windows.flagged if assessed else np.full(len(windows.data), np.nan)
    header, index = embedding_columns(*shares[:3], flagged, encoding.summary.shape[1])
    writing.write_matrix(path, encoding.summary, header, index)
    if task.tokens:
        write_tokens(path.with_suffix('.h5'), encoding, windows, atlas)
    else:  # tokens of an earlier input would not belong to this table
        path.with_suffix('.h5').unlink(missing_ok=True)
    recorded = (windows.onset + windows.duration).max() + windows.left_over
    pictures = {
        'windows': figures.windows(*shares, recorded),
        'embedding': figures.embedding(encoding.summary, windows.onset),
    }
    name = report_name(run, atlas.name)
    for what, figure in pictures.items():
        figures.save(figure, figure_path(task.output, name, what, spec.label))
    filled = {atlas.names[i]: atlas.names[donor] for i, donor in enumerate(donors) if donor >= 0}
    content = _describe(task, source, windows, encoding.summary.shape[1], filled)
    own = {'Sources': [writing.own_uri(task.output, series), *source['Sources']]}
    writing.write_json(path.with_suffix('.json'), content | own)


def _warnings(task: EncodeTask, windows, filled: dict) -> list[str]:
    """What is out of the ordinary with the windows of a run, one sentence each."""
    spec, warnings = task.spec, []
    if not spec.trained:
        warnings.append(
            f'{spec.label} is untrained (random weights): its embeddings are a control, '
            f'not a result.'
        )
    if filled:
        warnings.append(f'{len(filled)} parcels were filled before encoding with {FILL_RULE}.')
    if windows.left_over > 0:
        warnings.append(
            f'The last {windows.left_over:.1f} s of the run are in no window of {spec.label} '
            f'(--short-runs pad would add one).'
        )
    if (windows.real < 1).any():
        warnings.append(
            f'{(windows.real < 1).sum()} window(s) of {spec.label} are not all recorded signal '
            f'(--short-runs {task.contract.short_runs}).'
        )
    return warnings


def _describe(task: EncodeTask, source: dict, windows, size: int, filled: dict) -> dict:
    """Sidecar of a run's embeddings, but for its sources.

    Parameters
    ----------
    task : EncodeTask
    source : dict
        Sidecar of the parcel series.
    windows : Windows
    size : int
        Dimensions of the embedding.
    filled : dict of str to str
        Parcels that were filled, and from which.
    """
    spec, card, contract = task.spec, task.spec.card, task.contract
    assessed = 'NumberOfVolumesFlagged' in source
    resampled = not same_rate(source['RepetitionTime'], card.tr)
    return {
        'Description': f'Embedding of each window of the run by {card.name}: the state of the '
        f'class token after the last normalisation.',
        'InputFiles': source['InputFiles'],
        'SoftwareVersion': task.version,
        'Model': {
            'Name': card.name,
            'Description': card.description,
            'Trained': spec.trained,
            'Weights': spec.weights,
            'WeightsSHA256': spec.sha256,
            'License': card.licence,
            'Source': card.source,
            'Citation': card.citation,
            'Architecture': card.config,
        },
        'Pooling': 'class token',
        'ParcelOrder': card.parcel_order,
        'EmbeddingSize': size,
        'NumberOfWindows': len(windows.data),
        'WindowLength': card.window * card.tr,
        'WindowSamples': card.window,
        'WindowStride': (contract.stride or card.window) * card.tr,
        'WindowOnsets': windows.onset,
        'SamplingFrequency': 1 / card.tr,
        'RepetitionTime': source['RepetitionTime'],
        'Resampled': resampled,
        'ResamplingMethod': 'polyphase with anti-aliasing filter' if resampled else None,
        'Scaling': contract.scaling,
        'DividedBy': contract.divide_by if contract.scaling != 'none' else None,
        'ScaleStatistics': contract.stats,
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
        'Warnings': _warnings(task, windows, filled),
        'window': {'Description': 'Number of the window, from 0'},
        'onset': {'Description': "Start of the window since the run's start", 'Units': 's'},
        'duration': {'Description': 'Recorded signal in the window', 'Units': 's'},
        'real': {'Description': 'Share of samples that were recorded'},
        'flagged': {'Description': 'Share of recorded samples from flagged volumes'},
    }


def write_tokens(path: Path, encoding, windows, atlas) -> None:
    """Write token and parcel embeddings as HDF5.

    Datasets: ``tokens`` (windows, tokens, dimensions) in canonical order without the class token,
    ``parcels`` (windows, parcels, dimensions) where the model has one token or more a parcel,
    ``onset`` (windows,) in seconds and ``parcel_names``.
    """
    import h5py

    with writing.atomic(path) as temporary, h5py.File(temporary, 'w') as file:
        file['onset'] = windows.onset
        file['parcel_names'] = list(atlas.names)
        for name in ('tokens', 'parcels'):
            values = getattr(encoding, name)
            if values is not None:
                file.create_dataset(name, data=values, compression='gzip', compression_opts=1)


class _EncodeInputSpec(BaseInterfaceInputSpec):
    runs = traits.List(traits.Any(), mandatory=True, desc='BoldRun of each run')
    series = traits.List(traits.Any(), desc='Outcome of the parcel series that were made now')
    task = traits.Any(mandatory=True, desc='EncodeTask')
    stop = traits.Bool(False, usedefault=True, desc='raise where a run fails')


class _EncodeOutputSpec(TraitedSpec):
    outcomes = traits.Any(desc='list of Outcome')


class EncodeRuns(SimpleInterface):
    """Write the embeddings of many runs by one model."""

    input_spec = _EncodeInputSpec
    output_spec = _EncodeOutputSpec
    # What is done is known from the outputs, which may have been deleted, not from the work folder
    _always_run = True

    def _run_interface(self, runtime):
        failed = {outcome.run for outcome in self.inputs.series or [] if outcome.error}
        runs = [run for run in self.inputs.runs if run.name not in failed]
        self._results['outcomes'] = (
            encode_all(runs, self.inputs.task, self.inputs.stop) if runs else []
        )
        return runtime
