"""What every training starts with: checked settings, prepared data, a network, one engine."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.files import write_json, write_table
from bids_brainfm.config import split_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import encoder
from bids_brainfm.models.model import Model, contract_of
from bids_brainfm.models.precision import resolve_precision, set_products
from bids_brainfm.models.protocol import Network
from bids_brainfm.models.spec import ModelSpec, resolve_model
from bids_brainfm.models.weights import build, initialise, load_checkpoint
from bids_brainfm.signals.series import read_series
from bids_brainfm.training import cohort as cohorts
from bids_brainfm.training.cohort import CohortRun, Targets, count_parts
from bids_brainfm.training.recipe import Recipe, load_recipe
from bids_brainfm.training.store import INDEX, Store, StoredRun, collect, windows_in, write_store

# Other processes wait while the first prepares the data of a large cohort.
PATIENCE = timedelta(days=2)
SETTINGS = 'settings.json'
# Number of runs from which on it is worth starting processes to read them
MANY_RUNS = 100


@dataclass(frozen=True)
class TrainingSettings:
    """The options of the command; None: the default of the recipe, the model or the family."""

    model: str
    output: Path
    data: tuple[Path, ...]
    home: Path
    recipe: str | None = None
    epochs: float | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    lr: float | None = None
    patience: int | None = None
    seed: int = 0
    name: str | None = None
    scale: str | None = None
    scale_stats: Path | None = None
    min_coverage: float = 0.5
    mix_trs: bool = False
    strides: tuple[int, ...] = (1,)
    validation_share: float = 0.1
    test_share: float = 0.2
    checkpoint_steps: int = 200
    evaluate_epochs: float = 1.0
    resume: Path | None = None
    device: str = 'cpu'
    precision: str = 'float32'
    workers: int = 0
    nthreads: int = 1
    # pretraining
    mask_ratio: float | None = None
    masking: str = 'random'
    loss: str | None = None
    warm_start: bool = False
    # fine-tuning
    target: str | None = None
    problem: str | None = None
    drop_missing: bool = False
    mode: str = 'full'
    pooling: str | None = None
    dropout: float = 0.0
    random_weights: bool = False

    # What may change between the start of a training and its continuation.
    FREE: ClassVar[tuple[str, ...]] = (
        'home', 'resume', 'device', 'workers', 'nthreads', 'checkpoint_steps', 'micro_batch_size',
        'output',
    )  # fmt: skip

    def recorded(self) -> dict[str, Any]:
        """What must stay the same when a training is continued."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.FREE}
        return json.loads(json.dumps(values, default=str))


def claim_output(settings: TrainingSettings) -> None:
    """Refuse a folder that holds something other than this very training."""
    output, path = settings.output, settings.output / SETTINGS
    if not output.exists() or not any(output.iterdir()):
        return
    if not path.is_file():
        raise BrainfmError(f'{output} is not empty and holds no training: name another folder.')
    before, now = json.loads(path.read_text())['settings'], settings.recorded()
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise BrainfmError(
            f'{output} holds a training with {changed[0]} {before.get(changed[0])!r}, now it is '
            f'{now[changed[0]]!r}: continue with the same settings, or name another folder.'
        )


def choose_recipe(settings: TrainingSettings, default: str) -> Recipe:
    """Load the recipe with the changes that were asked for."""
    fields = ('epochs', 'batch_size', 'micro_batch_size', 'patience')
    changes = {field: getattr(settings, field) for field in fields}
    recipe = load_recipe(settings.recipe or default, **changes)
    if settings.lr is not None:  # asked for in so many words: not scaled by the batch
        first, peak, last = recipe.lr
        ratio = settings.lr / peak
        lr = (first * ratio, settings.lr, last * ratio)
        recipe = dataclasses.replace(recipe, lr=lr, lr_batch=None)
    return recipe


@dataclass(frozen=True)
class Preparation:
    """Reads a run as the model takes it, (S, P) float32, S at least one window, or refuses it."""

    model: Model

    def __call__(self, run: CohortRun) -> np.ndarray:
        atlas, contract = self.model.atlas, self.model.contract
        series = read_series(run.path)
        if series.data.shape[1] != atlas.n_parcels:
            raise BrainfmError(
                f'{run.path} has {series.data.shape[1]} parcels, but {atlas.name} has '
                f'{atlas.n_parcels}: run "bids_brainfm" on it again.'
            )
        data = self.model.prepare_input(series).data
        missing = contract.window - len(data)
        if missing > (1 - contract.min_real) * contract.window + 1e-9:
            raise BrainfmError(
                f'it has {len(data)} samples of {contract.tr:g} s, and a window takes '
                f'{contract.window}.'
            )
        if missing > 0:  # completed as for encoding
            data = np.concatenate([data, np.tile(data.mean(0), (missing, 1))])
        return np.asarray(data, np.float32)


@dataclass(frozen=True)
class Cohort:
    """Runs, the part of each participant, and what is to be predicted of them."""

    runs: list[CohortRun]
    parts: dict[str, str]
    targets: Targets | None = None

    def part(self, name: str) -> list[str]:
        """Participants of a part."""
        return [label for label, part in self.parts.items() if part == name]


def prepare(settings: TrainingSettings, model: Model, cohort: Cohort) -> None:
    """Write settings, split and series of a training, unless they are there.

    Settings come first, so that the same command goes on where this was killed; the series' index
    comes last. Nothing is left where data are refused.
    """
    output, series = settings.output, settings.output / 'series'
    new = not (output / SETTINGS).is_file()
    if not (series / INDEX).is_file():
        record = {'settings': settings.recorded(), 'software': version('bids_brainfm')}
        write_json(output / SETTINGS, record)
        people = [f'sub-{label}' for label in cohort.parts]
        parts = list(cohort.parts.values())
        write_table(output / 'participants.tsv', {'participant_id': people, 'part': parts})
        runs = [run for run in cohort.runs if run.participant in cohort.parts]
        processes = settings.nthreads if len(runs) >= MANY_RUNS else 1
        found = collect(runs, Preparation(model), cohort.parts, processes)
        bar = tqdm(found, total=len(runs), desc='Preparing', unit='run', disable=None)
        try:
            write_store(series, model.atlas.n_parcels, bar)
        except BrainfmError:
            # an earlier training, whose series were deleted, keeps what it made
            shutil.rmtree(output if new else series)
            raise
    store = Store(series)
    if left_out := store.left_out:
        path = output / 'left_out.tsv'
        write_table(path, {'run': list(left_out), 'reason': list(left_out.values())})
        print(f'{len(left_out)} of {len(store.runs) + len(left_out)} runs are left out: {path}')


def gather_cohort(settings: TrainingSettings, atlas: str) -> Cohort:
    """Find runs, targets and the split, and report everything that is wrong with them."""
    runs = cohorts.find_cohort(settings.data, atlas, settings.mix_trs)
    people = [run.participant for run in runs]
    validation, test = settings.validation_share, settings.test_share
    if settings.target is None:
        proportions = {'train': 1 - validation, 'validation': validation}
        return Cohort(runs, cohorts.split(people, proportions, settings.seed))
    targets = cohorts.read_targets(runs, settings.target, settings.problem, settings.drop_missing)
    proportions = {'train': 1 - validation - test, 'validation': validation, 'test': test}
    groups = targets.values if targets.problem == 'classification' else None
    known = [person for person in people if person in targets.values]
    return Cohort(runs, cohorts.split(known, proportions, settings.seed, groups), targets)


@dataclass
class Session:
    """All that a training works with, once its data are prepared."""

    settings: TrainingSettings
    recipe: Recipe
    spec: ModelSpec
    accelerator: Accelerator
    store: Store
    network: Network
    order: np.ndarray | None
    micro_batch: int
    precision: str

    def windows(self, part: str, most: int | None = None) -> list[tuple[StoredRun, int]]:
        """Windows of a part of the split, the first one of each run before the second."""
        runs, length = self.store.part(part), self.spec.card.window
        found = [(run, first) for run in runs for first in windows_in(run, length)]
        return sorted(found, key=lambda item: item[1])[:most]  # stable: runs keep their order

    def batches(self, windows: list[tuple[StoredRun, int]]) -> Iterator[tuple[Tensor, list[int]]]:
        """This process's part of windows as batches (B, P, T), and their numbers."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(windows), processes)
        rows = slice(None) if self.order is None else self.order
        for i in range(0, len(mine), self.micro_batch):
            numbers = list(mine[i : i + self.micro_batch])
            data = [
                self.store.window(run, first, self.spec.card.window)[rows]
                for run, first in map(windows.__getitem__, numbers)
            ]
            yield torch.from_numpy(np.stack(data)).to(self.accelerator.device), numbers

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
    precision = settings.precision or ('float32' if device.type == 'cpu' else 'bfloat16')
    precision = resolve_precision(precision, device)
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
        settings, recipe, spec, accelerator, store, network, order, micro_batch, precision
    )
    return session, cohort


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
