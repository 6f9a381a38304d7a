"""From parcel series to embeddings: one model, many runs, one load of the weights."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from bids_brainfm.bids.run import BoldRun
from bids_brainfm.config import available_cpus
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.spec import SEED
from bids_brainfm.outputs.embedding import EncodeTask
from bids_brainfm.outputs.model_outputs import write_run
from bids_brainfm.outputs.outcome import Outcome, attempt
from bids_brainfm.outputs.series import series_paths
from bids_brainfm.signals.contract import prepare_input, windows_of
from bids_brainfm.signals.series import read_series

LOGGER = logging.getLogger('bids_brainfm')


def encode_step(atlas: str, label: str) -> str:
    """What encoding with a model is called in the log folder."""
    return f'atlas-{atlas}_desc-{label}'


def load_encoder(task: EncodeTask, xyz: np.ndarray):
    """Build the network of a task and give it its weights."""
    import torch

    from bids_brainfm.models.encoder import Encoder, ascending_y
    from bids_brainfm.models.gradient_table import read_gradients
    from bids_brainfm.models.weights import build, initialise, load_checkpoint

    # a cluster's plugin may run this with fewer CPUs than the process that settled the threads
    torch.set_num_threads(min(task.threads, available_cpus()))
    spec = task.spec
    network = build(spec.card.config)
    if spec.checkpoint is None:
        initialise(network, SEED)
    else:
        load_checkpoint(network, spec.checkpoint)
    if spec.gradients is not None:
        network.set_gradients(read_gradients(spec.gradients.path))
    order = ascending_y(xyz) if spec.card.parcel_order == 'ascending-y' else None
    return Encoder(
        network,
        name=spec.card.name,
        order=order,
        xyz=xyz,
        device=task.device,
        precision=task.precision,
        block=task.block,
    )


def encode_all(
    runs: list[BoldRun], task: EncodeTask, stop: bool = False, made: Sequence[Outcome] = ()
) -> list[Outcome]:
    """Encode runs whose parcel series are written, and write their embeddings.

    Parameters
    ----------
    runs : list of BoldRun
    task : EncodeTask
    stop : bool
        Whether the first failure is raised.
    made : sequence of Outcome
        Of the parcel series that were made now; runs that failed are left out.

    Returns
    -------
    list of Outcome
        One a run.
    """
    from tqdm import tqdm

    failed = {outcome.run for outcome in made if outcome.error}
    runs = [run for run in runs if run.name not in failed]
    if not runs:
        return []
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
    exact = encoder = load_encoder(task, atlas.xyz)
    if 'perturbation' in task.analyses.outputs and task.precision != 'float32':
        exact = load_encoder(dataclasses.replace(task, precision='float32'), atlas.xyz)
    failed, prepared = [], {}

    def windows_of_runs():
        for run in runs:
            try:
                series = read_series(series_paths(task.output, run, atlas.name)['series'])
                data = prepare_input(
                    series, task.contract, atlas.xyz, atlas.name, atlas.structures
                )
                prepared[run] = data, windows_of(data, task.contract)
            except Exception as error:
                failed.append((run, partial(_fail, _named(error, run, task))))
            else:
                yield run, prepared[run][1].data

    attention = 'networks' in task.analyses.outputs
    encodings = encode_runs(
        encoder, windows_of_runs(), task.batch_size, task.tokens, attention, progress
    )
    for run, encoding in encodings:
        data, windows = prepared.pop(run)
        yield run, partial(_write, run, task, atlas, data, windows, encoding, encoder, exact)
        while failed:
            yield failed.pop(0)
    yield from failed


def _write(run: BoldRun, task: EncodeTask, *what) -> None:
    import torch

    try:
        write_run(run, task, *what)
    except torch.OutOfMemoryError as error:
        raise _explain(error, task) from None


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
