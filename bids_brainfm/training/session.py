"""What every training starts with: checked settings, prepared data, a network, one engine."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bids_brainfm.atlases.atlas import Atlas, load_atlas
from bids_brainfm.bids.files import write_json, write_table
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import ModelCard
from bids_brainfm.models.spec import ModelSpec, resolve_model
from bids_brainfm.signals.contract import Contract, prepare_input
from bids_brainfm.signals.series import read_series
from bids_brainfm.training.cohort import (
    CohortRun,
    Targets,
    count_parts,
    find_cohort,
    read_targets,
    split,
)
from bids_brainfm.training.recipe import OF_FAMILY, Recipe, load_recipe
from bids_brainfm.training.store import INDEX, Store, StoredRun, collect, windows_in, write_store

SETTINGS = 'settings.json'
# From which on starting processes is worth while to read them
MANY_RUNS = 100


@dataclass(frozen=True)
class TrainingSettings:
    """What a training was asked to do.

    What has the name of an option of the command is that option. None stands for what the recipe,
    the model or the family has as its default.
    """

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
    FREE = (
        'home', 'resume', 'device', 'workers', 'nthreads', 'checkpoint_steps', 'micro_batch_size',
        'output',
    )  # fmt: skip

    def recorded(self) -> dict:
        """What must stay the same when a training is continued."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.FREE}
        return json.loads(json.dumps(values, default=str))


def claim_output(settings: TrainingSettings) -> None:
    """See that a folder is free, or holds this very training.

    Raises
    ------
    BrainfmError
        It holds something else.
    """
    output = settings.output
    if not output.exists() or not any(output.iterdir()):
        return
    path = output / SETTINGS
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
    name = settings.recipe or default
    recipe = load_recipe(
        name,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        patience=settings.patience,
    )
    if settings.lr is not None:  # asked for in so many words: not scaled by the batch
        first, peak, last = recipe.lr
        ratio = settings.lr / peak
        lr = (first * ratio, settings.lr, last * ratio)
        recipe = dataclasses.replace(recipe, lr=lr, lr_batch=None)
    return recipe


def contract_of(card: ModelCard, settings: TrainingSettings) -> Contract:
    """What the model expects of a run."""
    return Contract(
        tr=card.tr,
        window=card.window,
        scaling=card.scaling,
        divide_by=card.divide_by,
        min_coverage=settings.min_coverage,
        stats=settings.scale_stats,
        min_real=card.min_real,
    )


@dataclass(frozen=True)
class Preparation:
    """Reads a run as the model takes it, (S, P) float32, S at least one window.

    Raises
    ------
    BrainfmError
        The run is too short, covers too little, or cannot be scaled.
    """

    contract: Contract
    xyz: np.ndarray
    atlas: str
    structures: tuple[str, ...] | None

    def __call__(self, run: CohortRun) -> np.ndarray:
        contract = self.contract
        series = read_series(run.path)
        if series.data.shape[1] != len(self.xyz):
            raise BrainfmError(
                f'{run.path} has {series.data.shape[1]} parcels, but {self.atlas} has '
                f'{len(self.xyz)}: run "bids_brainfm" on it again.'
            )
        data = prepare_input(series, contract, self.xyz, self.atlas, self.structures).data
        lacking = contract.window - len(data)
        if lacking > (1 - contract.min_real) * contract.window + 1e-9:
            raise BrainfmError(
                f'it has {len(data)} samples of {contract.tr:g} s, and a window takes '
                f'{contract.window}.'
            )
        if lacking > 0:  # completed as for encoding
            data = np.concatenate([data, np.tile(data.mean(0), (lacking, 1))])
        return np.asarray(data, np.float32)


def prepare(settings: TrainingSettings, spec: ModelSpec, atlas: Atlas, cohort: 'Cohort') -> None:
    """Write settings, split and series of a training, unless they stand.

    Settings come first, so that the same command goes on where this was killed; the series' index
    comes last. Nothing is left where data are refused.
    """
    from tqdm import tqdm

    output, series = settings.output, settings.output / 'series'
    new = not (output / SETTINGS).is_file()
    if not (series / INDEX).is_file():
        write_json(
            output / SETTINGS,
            {'settings': settings.recorded(), 'software': version('bids_brainfm')},
        )
        columns = {
            'participant_id': [f'sub-{label}' for label in cohort.parts],
            'part': list(cohort.parts.values()),
        }
        write_table(output / 'participants.tsv', columns)
        structures = atlas.structures and tuple(atlas.structures)
        contract = contract_of(spec.card, settings)
        preparation = Preparation(contract, atlas.xyz, atlas.name, structures)
        runs = [run for run in cohort.runs if run.participant in cohort.parts]
        processes = settings.nthreads if len(runs) >= MANY_RUNS else 1
        found = collect(runs, preparation, cohort.parts, processes)
        bar = tqdm(found, total=len(runs), desc='Preparing', unit='run', disable=None)
        try:
            write_store(series, atlas.n_parcels, bar)
        except BrainfmError:
            # an earlier training, whose series were deleted, keeps what it made
            shutil.rmtree(output if new else series)
            raise
    store = Store(series)
    if store.left_out:
        path = output / 'left_out.tsv'
        columns = {'run': list(store.left_out), 'reason': list(store.left_out.values())}
        write_table(path, columns)
        total = len(store.runs) + len(store.left_out)
        print(f'{len(store.left_out)} of {total} runs are left out: {path}')


@dataclass(frozen=True)
class Cohort:
    """Runs, the part of each participant, and what is to be predicted of them."""

    runs: list[CohortRun]
    parts: dict[str, str]
    targets: Targets | None = None


def gather_cohort(settings: TrainingSettings, atlas: str) -> Cohort:
    """Find runs, targets and the split; all that can be wrong with them is said here."""
    runs = find_cohort(settings.data, atlas, settings.mix_trs)
    people = [run.participant for run in runs]
    shares = {'train': 1 - settings.validation_share, 'validation': settings.validation_share}
    if settings.target is None:
        return Cohort(runs, split(people, shares, settings.seed))
    targets = read_targets(runs, settings.target, settings.problem, settings.drop_missing)
    shares['train'] -= settings.test_share
    shares['test'] = settings.test_share
    groups = targets.values if targets.problem == 'classification' else None
    parts = split([p for p in people if p in targets.values], shares, settings.seed, groups)
    return Cohort(runs, parts, targets)


@dataclass
class Session:
    """All that a training works with, once its data are prepared."""

    settings: TrainingSettings
    recipe: Recipe
    spec: ModelSpec
    atlas: Atlas
    accelerator: object
    store: Store
    network: object
    order: np.ndarray | None
    xyz: object
    micro_batch: int

    def windows(self, part: str, most: int | None = None) -> list[tuple[StoredRun, int]]:
        """Windows of a part of the split, the first one of each run before the second."""
        length = self.spec.card.window
        found = [
            (place, number, run, first)
            for number, run in enumerate(self.store.part(part))
            for place, first in enumerate(windows_in(run, length))
        ]
        found.sort(key=lambda item: item[:2])
        return [item[2:] for item in found[:most]]

    def batches(self, windows: list) -> Iterator[tuple[object, list[int]]]:
        """This process's share of windows as batches (B, P, T), and their numbers."""
        import torch

        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(windows), processes)
        for i in range(0, len(mine), self.micro_batch):
            numbers = list(mine[i : i + self.micro_batch])
            data = [self.store.window(*windows[n], self.spec.card.window) for n in numbers]
            data = np.stack(data if self.order is None else [x[self.order] for x in data])
            yield torch.from_numpy(data).to(self.accelerator.device), numbers

    def reduce(self, tensor):
        """Sum over processes."""
        return self.accelerator.reduce(tensor.to(self.accelerator.device), 'sum').cpu()


def start(
    settings: TrainingSettings,
    default_recipe: str | None,
    head: Callable | None = None,
    check: Callable | None = None,
) -> tuple[Session, Cohort]:
    """Check everything, prepare the data, and build the network.

    Parameters
    ----------
    settings : TrainingSettings
    default_recipe : str or None
        None: that of the model's family.
    head : callable, optional
        Gives the settings of a head for a network and a cohort.
    check : callable
        Is given the recipe and a network without weights, and raises what does not fit.
    """
    import torch
    from accelerate.utils import broadcast_object_list

    from bids_brainfm.models.encoder import ascending_y, resolve_device, resolve_precision
    from bids_brainfm.models.gradient_table import read_gradients
    from bids_brainfm.models.weights import build, initialise, load_checkpoint
    from bids_brainfm.training.engine import make_accelerator, micro_batch_of

    untrained = settings.random_weights if head else not settings.warm_start
    spec = resolve_model(settings.model, settings.home, random_weights=untrained)
    if settings.scale:
        scaling = spec.card.cohort_scaling if settings.scale == 'cohort' else settings.scale
        spec = dataclasses.replace(spec, card=dataclasses.replace(spec.card, scaling=scaling))
    recipe = choose_recipe(settings, default_recipe or OF_FAMILY[spec.card.config['model_type']])
    claim_output(settings)
    if settings.resume is not None and not settings.resume.is_dir():
        raise BrainfmError(f'--resume {settings.resume}: there is no such checkpoint folder.')
    atlas = load_atlas(spec.card.atlas, settings.home)
    device = resolve_device(settings.device)
    accelerator = make_accelerator(device.type, resolve_precision(settings.precision, device))
    micro_batch = micro_batch_of(recipe, accelerator.num_processes)
    if check is not None:
        check(recipe, build(spec.card.config))
    source = build(spec.card.config)
    bare = {key: value for key, value in spec.card.config.items() if key != 'head'}
    # The first process prepares; what it finds wrong, all say.
    found: list = [None]
    if accelerator.is_main_process:
        try:
            cohort = gather_cohort(settings, atlas.name)
            if head is not None:  # what no head can predict is said before anything is written
                build(bare | {'head': head(source, cohort)})
            prepare(settings, spec, atlas, cohort)
            found = [cohort]
        except BrainfmError as error:
            found = [error]
    broadcast_object_list(found)
    (cohort,) = found
    if isinstance(cohort, BrainfmError):
        raise cohort
    config = bare if head is None else bare | {'head': head(source, cohort)}
    network = initialise(build(config), settings.seed)
    if spec.checkpoint is not None:
        # all but a head, which is made anew
        load_checkpoint(source, spec.checkpoint)
        loaded = {k: v for k, v in source.state_dict().items() if not k.startswith('head.')}
        network.load_state_dict(network.state_dict() | loaded)
    if spec.gradients is not None:
        network.set_gradients(read_gradients(spec.gradients.path))
    order = ascending_y(atlas.xyz) if spec.card.parcel_order == 'ascending-y' else None
    xyz = None
    if network.needs_xyz:
        rows = atlas.xyz if order is None else atlas.xyz[order]
        xyz = torch.from_numpy(np.asarray(rows, np.float32))[None]
    store = Store(settings.output / 'series')
    if accelerator.is_main_process:
        print(
            f'{spec.card.name}: {count_parts(cohort.parts)} participants, {len(store.runs)} runs',
            flush=True,
        )
    session = Session(
        settings, recipe, spec, atlas, accelerator, store, network, order, xyz, micro_batch
    )
    return session, cohort


def train(session: Session, objective, evaluate, targets=None) -> list[dict]:
    """Run the engine on the training part."""
    from bids_brainfm.training.engine import Plan, Trainer
    from bids_brainfm.training.store import WindowStream

    settings, recipe = session.settings, session.recipe
    runs = session.store.part('train')
    stream = WindowStream(
        session.store, runs, session.spec.card.window, settings.seed, settings.strides,
        session.order,
    )  # fmt: skip
    steps = recipe.steps(len(runs))
    epoch = len(runs) / recipe.batch_size
    plan = Plan(
        recipe=recipe,
        seed=settings.seed,
        steps=steps,
        checkpoint_steps=settings.checkpoint_steps,
        evaluate_steps=max(1, round(settings.evaluate_epochs * epoch)),
        micro_batch=session.micro_batch,
        output=settings.output,
        workers=settings.workers,
    )
    trainer = Trainer(session.accelerator, objective, stream, evaluate, plan, targets)
    return trainer.run(settings.resume)


def is_first_process() -> bool:
    """Whether this is the process that speaks; known before the processes have joined."""
    return os.environ.get('RANK', '0') == '0'
