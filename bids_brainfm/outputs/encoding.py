"""Run one model over many runs: one load of the weights, batches that cross runs."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bids_brainfm import stopping
from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.freshness import input_fingerprints
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.config import available_cpus
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.outcome import Outcome, attempt
from bids_brainfm.outputs.products import Context, product_current, write_products
from bids_brainfm.outputs.registry import BY_NAME, OF_MODELS
from bids_brainfm.outputs.tasks import ModelTask
from bids_brainfm.progress import Progress
from bids_brainfm.signals.series import read_series

if TYPE_CHECKING:
    from bids_brainfm.models.model import Model

LOGGER = logging.getLogger('bids_brainfm')


def run_current(run: BoldRun, task: ModelTask, contents: bool = False) -> bool:
    """Whether all products of a model that are asked for exist and fit the inputs.

    With `contents`, files are compared with their checksums.
    """
    inputs = input_fingerprints(run)
    return all(
        product_current(BY_NAME[name], run, task, inputs, contents) for name in task.parameters
    )


def load(task: ModelTask) -> 'Model':
    """Build the network of a task and give it its weights."""
    import torch

    from bids_brainfm.models.model import Model

    # a cluster's plugin may run this with fewer CPUs than the process that settled the threads
    torch.set_num_threads(min(task.threads, available_cpus()))
    atlas = load_atlas(task.spec.card.atlas, task.home)
    asked, embedding = task.parameters.get('prediction_error'), task.parameters['embedding']
    return Model(
        task.spec, atlas, task.contract, device=task.device, precision=task.precision,
        block=asked and asked.latent_prediction,
        shuffles=embedding.token_shuffles, seed=embedding.seed,
    )  # fmt: skip


def encode_all(runs: Sequence[BoldRun], task: ModelTask, stop: bool = False) -> list[Outcome]:
    """Encode runs whose parcel series are written, and write what is made from that.

    Runs whose parcel series are on record as failed are left out; `stop` raises the first failure.
    There is one outcome per run.
    """
    step, output = task.place.of_series.step, task.place.output
    runs = [run for run in runs if not Outcome(run.name, step).path(output).is_file()]
    if not runs:
        return []
    name, place, started = task.spec.card.name, task.place, time.monotonic()
    outcomes: list[Outcome] = []
    with Progress(len(runs), f'Encoding with {name}') as progress:

        def settle(run: BoldRun, found: Context | Exception) -> None:
            work = partial(_write, found, task)
            outcomes.append(outcome := attempt(place.output, run, place.step, work, stop))
            stopping.check()
            head = f'[{len(outcomes)}/{len(runs)}]'
            if outcome.error:
                LOGGER.error('%s %s', head, outcome.error)
            else:
                seconds = time.monotonic() - started
                LOGGER.info('%s %s: encoded with %s (%.1f s)', head, run.name, name, seconds)
            progress.update()

        try:
            for run, found in _encode(runs, task, lambda n: progress.bar.set_postfix(windows=n)):
                settle(run, found)
        except Exception as error:  # the encoder itself failed: all that is left fails with it
            if stop:
                raise
            settled = {outcome.run for outcome in outcomes}
            for run in runs:
                if run.name not in settled:
                    settle(run, error)
    return outcomes


def _encode(
    runs: Sequence[BoldRun], task: ModelTask, progress: Callable[[int], None]
) -> Iterator[tuple[BoldRun, Context | Exception]]:
    """Yield each run with what its products are made from, or with what was wrong."""
    from bids_brainfm.models.encoder import encode_runs
    from bids_brainfm.models.precision import PrecisionCheck

    model = load(task)
    check = None
    if task.precision != 'float32':
        check = PrecisionCheck(task.precision, lambda: model.exact)
    failed: list[tuple[BoldRun, Exception]] = []
    prepared = {}

    def windows_of_runs() -> Iterator[tuple[BoldRun, np.ndarray]]:
        for run in runs:
            try:
                data = model.prepare_input(read_series(task.place.of_series.table(run, 'series')))
                prepared[run] = data, model.windows(data)
            except BrainfmError as error:
                words = f'{run.name}: {task.spec.card.name} cannot take it: {error}'
                failed.append((run, BrainfmError(words)))
            except Exception as error:
                failed.append((run, error))
            else:
                yield run, prepared[run][1].data

    attention = 'attention' in task.parameters
    encodings = encode_runs(
        model.encoder, windows_of_runs(), task.batch_size, task.tokens, attention, progress, check
    )
    for run, encoding in encodings:
        data, windows = prepared.pop(run)
        found = None if check is None else check.found()
        yield run, Context(run, task, model, data, windows, encoding, found)
        while failed:
            yield failed.pop(0)
    yield from failed


def _write(found: Context | Exception, task: ModelTask) -> None:
    """Write the products of a run, or raise what was wrong with it."""
    import torch

    try:
        if isinstance(found, Exception):
            raise found
        write_products(OF_MODELS, found.run, task, task.parameters, found)
    except torch.OutOfMemoryError:
        raise BrainfmError(
            f'{task.spec.card.name} with {task.batch_size} windows at once does not fit into the '
            f"GPU's memory: lower --batch-size, or use --precision bfloat16 or --device cpu."
        ) from None
