"""What every training starts with: checked settings, prepared data, a network, one engine."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.config import split_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import encoder
from bids_brainfm.models.model import Model, contract_of
from bids_brainfm.models.precision import resolve_precision, set_products
from bids_brainfm.models.protocol import Network
from bids_brainfm.models.spec import ModelSpec, resolve_model
from bids_brainfm.models.weights import build, initialise, load_checkpoint
from bids_brainfm.training.preparation import Cohort, gather_cohort, prepare
from bids_brainfm.training.recipe import Recipe
from bids_brainfm.training.settings import TrainingSettings, choose_recipe, claim_output
from bids_brainfm.training.split import count_parts
from bids_brainfm.training.store import Store, StoredRun, windows_in

# Other processes wait while the first prepares the data of a large cohort.
PATIENCE = timedelta(days=2)

# windows (B, P, T), their flags (B, T) bool, and a number for each
MicroBatch = tuple[Tensor, Tensor, list[int]]


@dataclass
class Session:
    """All that a training works with, once its data are prepared."""

    settings: TrainingSettings
    recipe: Recipe
    model: Model  # its input, and the network from which training starts
    accelerator: Accelerator
    store: Store
    network: Network
    order: np.ndarray | None
    micro_batch: int
    precision: str

    @property
    def spec(self) -> ModelSpec:
        """The model from which training starts."""
        return self.model.spec

    def untrained(self) -> Network:
        """The network with random weights, as a control."""
        network = initialise(build(self.network.config), self.settings.seed)
        encoder.set_positions(network, self.model.atlas.xyz, self.order, self.model.gradients)
        return network

    def windows(self, part: str, most: int | None = None) -> list[tuple[StoredRun, int]]:
        """Windows of a part of the split, the first one of each run before the second."""
        runs, length = self.store.part(part), self.spec.card.window
        found = [(run, first) for run in runs for first in windows_in(run, length)]
        return sorted(found, key=lambda item: item[1])[:most]  # stable: runs keep their order

    def batches(self, windows: list[tuple[StoredRun, int]]) -> Iterator[MicroBatch]:
        """This process's part of windows as batches: windows, flags, and their numbers."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(windows), processes)
        rows = slice(None) if self.order is None else self.order
        for i in range(0, len(mine), self.micro_batch):
            numbers = list(mine[i : i + self.micro_batch])
            of_batch = [
                self.store.window(run, first, self.spec.card.window)
                for run, first in map(windows.__getitem__, numbers)
            ]
            arrays = np.stack([x[rows] for x, _ in of_batch]), np.stack([f for _, f in of_batch])
            signal, flagged = (
                torch.from_numpy(array).to(self.accelerator.device) for array in arrays
            )
            yield signal, flagged, numbers

    def series(self, part: str, most: int) -> Iterator[np.ndarray]:
        """Unflagged samples (P, S) of this process's part of the first runs, in network order."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = slice(None) if self.order is None else self.order
        for run in self.store.part(part)[:most][rank::processes]:
            data, flagged = self.store.window(run, 0, run.samples)
            yield data[rows][:, ~flagged]

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(tensor.to(self.accelerator.device), 'sum').cpu()


def start(
    settings: TrainingSettings,
    default_recipe: str | None,
    head: Callable[[Network, Cohort], dict[str, Any]] | None = None,
    check: Callable[[Recipe, Network], object] | None = None,
) -> tuple[Session, Cohort]:
    """Check everything, prepare the data, and build the network.

    The default recipe is that of the model's family. `head` gives the settings of a head for a
    network and a cohort; `check` refuses a recipe that does not fit a network without weights.
    """
    untrained = settings.random_weights if head else not settings.warm_start
    name, path = split_name(settings.model)
    spec = resolve_model(name, settings.home, path, random_weights=untrained)
    if settings.scale:
        scaling = spec.card.cohort_scaling if settings.scale == 'cohort' else settings.scale
        spec = dataclasses.replace(spec, card=dataclasses.replace(spec.card, scaling=scaling))
    card = spec.card
    recipe = choose_recipe(settings, default_recipe or spec.capabilities.recipe)
    claim_output(settings)
    if settings.resume is not None and not settings.resume.is_dir():
        raise BrainfmError(f'--resume {settings.resume}: there is no such checkpoint folder.')
    atlas = load_atlas(card.atlas, settings.home)
    contract = contract_of(
        card, scale_stats=settings.scale_stats, min_coverage=settings.min_coverage
    )
    model = Model(spec, atlas, contract)
    device = encoder.resolve_device(settings.device)
    precision = training_precision(settings, device)
    set_products(precision)
    accelerator = Accelerator(
        cpu=device.type == 'cpu', mixed_precision='bf16' if precision == 'bfloat16' else 'no',
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )  # fmt: skip
    micro_batch = micro_batch_of(recipe, accelerator.num_processes)
    source = build(card.config)
    if check is not None:
        check(recipe, source)
    bare = {key: value for key, value in card.config.items() if key != 'head'}
    # The first process prepares; what it finds wrong, all say.
    found: list[Cohort | BrainfmError | None] = [None]
    if accelerator.is_main_process:
        try:
            cohort = gather_cohort(settings, atlas.name)
            if head is not None:  # unpredictable targets are reported before anything is written
                build(bare | {'head': head(source, cohort)})
            prepare(settings, model, cohort)
            found = [cohort]
        except BrainfmError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], BrainfmError):
        raise found[0]
    assert found[0] is not None
    cohort = found[0]
    network = build(bare if head is None else bare | {'head': head(source, cohort)})
    initialise(network, settings.seed)
    if spec.checkpoint is not None:
        # all but a head, which is made anew
        load_checkpoint(source, spec.checkpoint)
        loaded = {k: v for k, v in source.state_dict().items() if not k.startswith('head.')}
        network.load_state_dict(network.state_dict() | loaded)
    order = encoder.row_order(card.parcel_order, atlas.xyz)
    encoder.set_positions(network, atlas.xyz, order, model.gradients)
    store = Store(settings.output / 'series')
    if accelerator.is_main_process:
        parts = count_parts(cohort.parts)
        print(f'{card.name}: {parts} participants, {len(store.runs)} runs', flush=True)
    session = Session(
        settings, recipe, model, accelerator, store, network, order, micro_batch, precision
    )
    return session, cohort


def training_precision(settings: TrainingSettings, device: torch.device) -> str:
    """Precision of matrix products, by default bfloat16 where a GPU trains the network.

    Embeddings of a frozen network differ by little between people, so they are computed as
    precisely as those that the participant level writes.
    """
    asked = settings.precision
    if asked is None and device.type != 'cpu' and settings.mode == 'full':
        asked = 'bfloat16'
    return resolve_precision(asked, device)


def micro_batch_of(recipe: Recipe, processes: int) -> int:
    """Windows that a process takes at once; refused where the batch does not divide."""
    each, rest = divmod(recipe.batch_size, processes)
    micro = recipe.micro_batch_size or each
    if rest or not each or each % micro:
        raise BrainfmError(
            f'A batch of {recipe.batch_size} windows does not divide into {processes} '
            f'process(es) with {micro or "any"} windows at once: change --batch-size or '
            f'--micro-batch-size.'
        )
    return micro


def is_first_process() -> bool:
    """Whether this is the first process; known before the processes have joined."""
    return os.environ.get('RANK', '0') == '0'
