"""Pretraining and fine-tuning from derivatives to a checkpoint that ``--model`` takes."""

import dataclasses
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bids_brainfm.atlases.atlas import Atlas, load_atlas
from bids_brainfm.atlases.fetch import sha256_of
from bids_brainfm.bids import writing
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import ModelCard
from bids_brainfm.models.spec import ModelSpec, resolve_model
from bids_brainfm.signals.contract import Contract, bring
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

# Windows of the validation split that are evaluated at most, one of each run first
EVALUATED = 256
# Participants up to whom the connectome baseline is fitted: it holds all connectomes in memory
MOST_CONNECTOMES = 5000
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
        data = bring(series, contract, self.xyz, self.atlas, self.structures).data
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
        writing.write_json(
            output / SETTINGS,
            {'settings': settings.recorded(), 'software': version('bids_brainfm')},
        )
        columns = {
            'participant_id': [f'sub-{label}' for label in cohort.parts],
            'part': list(cohort.parts.values()),
        }
        writing.write_table(output / 'participants.tsv', columns)
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
        writing.write_table(path, columns)
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


def pretrain(settings: TrainingSettings) -> Path | None:
    """Pretrain a network on the parcel series of a cohort.

    Returns
    -------
    Path or None
        The card of the trained model; None in processes other than the first.

    Raises
    ------
    BrainfmError
        Something is wrong with the settings or the data.
    """
    from bids_brainfm.training.store import sample_seed

    check = lambda recipe, network: objective_for(settings, recipe, network).draw([0])
    session, _ = start(settings, None, check=check)
    objective = objective_for(settings, session.recipe, session.network, session.xyz)
    asked = {'mask_ratio': settings.mask_ratio, 'loss_fn': settings.loss}
    session.network.config |= {key: value for key, value in asked.items() if value is not None}
    held = session.windows('validation', EVALUATED)

    def evaluate():
        batches = (
            (signal, [sample_seed(settings.seed, 4, n) for n in numbers])
            for signal, numbers in session.batches(held)
        )
        with session.accelerator.autocast():
            return objective.evaluate(batches, session.reduce)

    rows = train(session, objective, evaluate)
    if not session.accelerator.is_main_process:
        return None
    first, last = ({k: v for k, v in row.items() if k != 'step'} for row in (rows[0], rows[-1]))
    facts = {
        'held_out_windows': len(held),
        'held_out_untrained': _plain(first),
        'held_out': _plain(last),
    }
    return publish(session, facts, 'Pretrained')


def objective_for(settings: TrainingSettings, recipe: Recipe, network, xyz=None):
    """The objective that a network of a family is pretrained with.

    Raises
    ------
    BrainfmError
        Masks cannot be had for this network, or the recipe is for another family.
    """
    from bids_brainfm.training.pretraining import LatentPrediction, MaskedAutoencoding

    config, latent = network.config, hasattr(network, 'latent_error')
    if latent != (recipe.masks is not None and recipe.momentum is not None):
        raise BrainfmError(
            f'--recipe {settings.recipe}: a model of the family {config["model_type"]} takes a '
            f'recipe {"with" if latent else "without"} masks and momentum, such as '
            f'{OF_FAMILY[config["model_type"]]}.'
        )
    if latent:
        return LatentPrediction(network, recipe.masks)
    return MaskedAutoencoding(
        network,
        config['mask_ratio'] if settings.mask_ratio is None else settings.mask_ratio,
        settings.masking,
        settings.loss or config.get('loss_fn', 'mse'),
        config.get('norm_pix_loss', False),
        xyz,
    )


def finetune(settings: TrainingSettings) -> Path | None:
    """Fit a head on a network, with or without the network, and test it on held-out people.

    Returns
    -------
    Path or None
        The card of the trained model; None in processes other than the first.

    Raises
    ------
    BrainfmError
        Something is wrong with the settings or the data.
    """
    import torch
    from accelerate.utils import gather_object

    from bids_brainfm.training import finetuning

    probe = settings.mode == 'probe'
    session, cohort = start(
        settings, 'probe' if probe else 'finetune', partial(head_settings, settings)
    )
    targets, head = cohort.targets, session.network.head
    objective = finetuning.Supervised(session.network, probe, session.xyz)
    centre, spread = head.settings.get('mean', 0.0), head.settings.get('sd', 1.0)
    wanted = lambda label: (targets.values[label] - centre) / spread
    in_training = torch.tensor([wanted(r.participant) for r in session.store.part('train')])

    def outputs(part):
        windows = session.windows(part)
        batches = (
            (signal, [windows[n][0].participant for n in numbers])
            for signal, numbers in session.batches(windows)
        )
        objective.eval()
        with session.accelerator.autocast():
            return finetuning.outputs_by_participant(objective, batches, gather_object)

    def scored(part):
        found = outputs(part)
        made = torch.stack(list(found.values()))
        loss = finetuning.loss_of(
            made, torch.tensor([wanted(p) for p in found]).float(), targets.problem
        )
        prediction = head.predict(made).numpy()
        real = np.array([targets.values[p] for p in found])
        scores = finetuning.scores_of(prediction, real, targets)
        return list(found), prediction, {'loss': float(loss)} | scores

    train(session, objective, lambda: scored('validation')[2], in_training.float())
    tested = {part: scored(part) for part in ('train', 'validation', 'test')}
    if not session.accelerator.is_main_process:
        return None
    people, _, scores = tested['test']
    facts = {
        'target': targets.column,
        'participants': count_parts(cohort.parts),
        'validation': tested['validation'][2],
        'test': scores,
        'test_baselines': baselines(cohort, session, people),
    }
    _write_predictions(settings.output / 'predictions.tsv', tested, targets, head.columns)
    writing.write_json(settings.output / 'scores.json', _plain(facts))
    return publish(session, _plain(facts), 'Probed' if probe else 'Fine-tuned')


def head_settings(settings: TrainingSettings, network, cohort: Cohort) -> dict:
    """Settings of a head for a network and targets; statistics are those of the training part."""
    targets = cohort.targets
    classes = network.has_class_token
    kind = 'probe' if settings.mode == 'probe' else 'mlp' if classes else 'linear'
    found = {
        'kind': kind,
        'pooling': settings.pooling or ('class-token' if classes else 'mean'),
        'dropout': settings.dropout,
        'target': targets.column,
        'task': targets.problem,
    }
    if targets.problem == 'classification':
        return found | {'classes': list(targets.classes)}
    values = [targets.values[p] for p, part in cohort.parts.items() if part == 'train']
    if np.std(values) == 0:
        raise BrainfmError(
            f'--target {targets.column}: all participants of the training part have the same '
            f'value: add participants, or choose another --seed.'
        )
    return found | {'mean': float(np.mean(values)), 'sd': float(np.std(values, ddof=1))}


def baselines(cohort: Cohort, session: Session, people: list[str]) -> dict[str, dict]:
    """Scores on the test part of what needs no model: a constant, and the connectome."""
    from bids_brainfm.training import finetuning

    targets = cohort.targets
    train = [p for p, part in cohort.parts.items() if part == 'train']
    known, real = (np.array([targets.values[p] for p in group]) for group in (train, people))
    found = {'constant': finetuning.dummy(known, len(people), targets)}
    if len(train) + len(people) <= MOST_CONNECTOMES:
        of = {group: _connectomes(cohort, group) for group in (tuple(train), tuple(people))}
        found['connectome ridge'] = finetuning.connectome_ridge(
            of[tuple(train)], known, of[tuple(people)], targets
        )
    return {n: finetuning.scores_of(made, real, targets) for n, made in found.items()}


def _connectomes(cohort: Cohort, people: tuple[str, ...]) -> np.ndarray:
    """Connectome (N, F) of each participant, mean over runs; 0 where a parcel is n/a."""
    from bids_brainfm.models.connectome import connectome, connectome_vector

    of: dict[str, list] = {person: [] for person in people}
    for run in cohort.runs:
        if run.participant in of:
            vector = connectome_vector(connectome(read_series(run.path).data))
            of[run.participant].append(np.nan_to_num(vector))
    return np.stack([np.mean(rows, axis=0) for rows in of.values()])


def _write_predictions(path: Path, tested: dict, targets: Targets, columns) -> None:
    rows = [
        (person, part, targets.values[person], row)
        for part, (people, prediction, _) in tested.items()
        for person, row in zip(people, prediction, strict=True)
    ]
    real = [targets.classes[int(v)] if targets.classes else v for _, _, v, _ in rows]
    table = {
        'participant_id': [f'sub-{person}' for person, *_ in rows],
        'part': [part for _, part, *_ in rows],
        'real': real,
    }
    table |= {f'predicted_{c}': [row[i] for *_, row in rows] for i, c in enumerate(columns)}
    writing.write_table(path, table)


def publish(session: Session, facts: dict, how: str) -> Path:
    """Write the network and its card, which goes to ``--model``."""
    import torch
    import yaml

    from bids_brainfm.training.engine import save_network

    settings, card, output = session.settings, session.spec.card, session.settings.output
    save_network(session.network, output)
    name = settings.name or re.sub(r'[^A-Za-z0-9-]', '-', output.absolute().name).lower()
    gradients = None
    if session.spec.gradients is not None:
        shutil.copyfile(session.spec.gradients.path, output / 'gradients.csv')
        gradients = {'name': 'gradients.csv', 'sha256': session.spec.gradients.sha256}
    started = session.spec.trained
    training = {
        'how': f'{how} with bids_brainfm {version("bids_brainfm")}',
        'from': f'{card.name}, {session.spec.weights}' if started else 'random weights',
        'runs': len(session.store.part('train')),
        'seed': settings.seed,
        'recipe': _plain(dataclasses.asdict(session.recipe)),
        'steps': session.recipe.steps(len(session.store.part('train'))),
        'precision': {'bf16': 'bfloat16'}.get(session.accelerator.mixed_precision, 'float32'),
        'processes': session.accelerator.num_processes,
        'torch': f'{torch.__version__}, Python {platform.python_version()}',
    } | facts
    content = {
        field.name: getattr(card, field.name)
        for field in dataclasses.fields(card)
        if getattr(card, field.name) is not None
    } | {
        'name': name,
        'label': re.sub(r'[^A-Za-z0-9]', '', name),
        'description': f'{how} from {card.name} with bids_brainfm',
        'config': session.network.config,
        'licence': card.licence if started else 'not stated',
        'weights': [
            {'name': 'model.safetensors', 'sha256': sha256_of(output / 'model.safetensors')}
        ],
        'training': training,
    }
    if gradients:
        content['gradients'] = gradients
    with writing.atomic(output / 'card.yml') as temporary:
        temporary.write_text(yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True))
    return output / 'card.yml'


def _plain(content):
    """As YAML and JSON can say it, numbers of six digits."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if isinstance(content, (float, np.floating)):
        return float(f'{content:.6g}')
    return content.item() if isinstance(content, np.generic) else content


def is_first_process() -> bool:
    """Whether this is the process that speaks; known before the processes have joined."""
    return os.environ.get('RANK', '0') == '0'
