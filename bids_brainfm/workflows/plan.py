"""What a run of the command has to do, settled before anything starts.

Everything that can be missing or contradictory is found here: weights, atlases, inputs, settings
that do not fit the outputs already there.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

from bids_brainfm.bids.description import generators, read_description
from bids_brainfm.bids.naming import parse_name
from bids_brainfm.bids.reading import find_runs, index, read_filters
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.bids.settings import claim_settings
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.embedding import EncodeTask, latent_name
from bids_brainfm.outputs.encoding import encode_step
from bids_brainfm.outputs.model_outputs import analyses_of, analysis_name, run_current
from bids_brainfm.outputs.networks import (
    NetworkTask,
    networks_step,
    remove_stale,
    whole_participant,
)
from bids_brainfm.outputs.outcome import Outcome, read_failures
from bids_brainfm.outputs.series import SeriesTask, series_current, series_step
from bids_brainfm.signals.scale import STATISTICS, check_stats, kind_of, load_scale_stats
from bids_brainfm.workflows.asked import (
    analyses_asked,
    check_outputs,
    claim_networks,
    networks_asked,
    networks_to_find,
)

# The card's own space first; fMRIPrep's default comes last, where the atlas is a warped one
SPACES = ('MNI152NLin6Asym', 'fsLR', 'MNI152NLin2009cAsym')


@dataclass(frozen=True)
class ModelPlan:
    """One model: how it encodes, and the runs that it has yet to encode."""

    task: EncodeTask
    todo: list[BoldRun]


@dataclass(frozen=True)
class AtlasPlan:
    """One atlas: its runs, those whose series are yet to be made, and its models.

    ``networks`` is None where no networks are asked for, ``network_runs`` the runs of each
    participant whose networks are yet to be found.
    """

    name: str
    citation: tuple[str, ...]
    task: SeriesTask
    runs: list[BoldRun]
    todo: list[BoldRun]
    models: list[ModelPlan]
    networks: NetworkTask | None = None
    network_runs: dict[str, list[BoldRun]] = field(default_factory=dict)

    @property
    def steps(self) -> list[Outcome]:
        """Everything that is wanted of this atlas, by run and step, as if it were done."""
        labels = [encode_step(self.name, model.task.spec.label) for model in self.models]
        wanted = [(run, s) for run in self.runs for s in (series_step(self.name), *labels)]
        if self.networks is not None:
            whole = {(run.subject, run.space): whole_participant(run) for run in self.runs}
            wanted += [
                (of, networks_step(of, source, self.networks))
                for of in (*self.runs, *whole.values())
                for source in self.networks.sources
            ]
        return [Outcome(run.name, step) for run, step in wanted]


@dataclass(frozen=True)
class Plan:
    """Everything that a run of the command does.

    ``failures`` are recordings that cannot be read, ``absent`` participants without one.
    """

    settings: Settings
    version: str
    datasets: dict[str, Path]
    work: Path
    atlases: list[AtlasPlan]
    failures: list[Outcome] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def subjects(self) -> list[str]:
        """Participants to report on."""
        runs = {run.subject for atlas in self.atlases for run in atlas.runs}
        return sorted(runs | {_subject(failure.run) for failure in self.failures})

    @property
    def steps(self) -> list[Outcome]:
        """Everything that this plan wants done, by run and step, as if it were."""
        return [step for atlas in self.atlases for step in atlas.steps]

    def remove_stale(self) -> None:
        """Remove networks of runs whose parcel series will be other ones."""
        for atlas in self.atlases:
            for run in atlas.todo:
                remove_stale(self.settings.output_dir, run, atlas.name)

    def record_failures(self) -> None:
        """Forget failures of earlier runs in what is to be done now, and write down the known."""
        for outcome in self.steps + self.failures:
            outcome.record(self.settings.output_dir)

    def read_failures(self) -> list[str]:
        """Sentences of what failed in this plan."""
        wanted = {(outcome.run, outcome.step) for outcome in self.steps + self.failures}
        recorded = [
            outcome.error
            for subject in self.subjects
            for outcome in read_failures(self.settings.output_dir, subject)
            if (outcome.run, outcome.step) in wanted
        ]
        absent = [f'sub-{label}: no BOLD run matches what was asked for.' for label in self.absent]
        return recorded + absent


def _subject(name: str) -> str:
    """Participant of a run.

    >>> _subject('sub-01_task-rest')
    '01'
    """
    return parse_name(f'{name}_')[0]['sub']


def find_resources(settings: Settings, home: Path) -> list:
    """Cards of the models that were asked for, once all that they need is on this machine.

    Raises
    ------
    BrainfmError
        Atlases are missing or, where something is to be encoded, weights: all of them are named.
    """
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.models.cards import load_card
    from bids_brainfm.models.spec import find_checkpoint, find_gradients, split_name

    cards, missing = [], []
    for text in settings.model:
        card = load_card(split_name(text)[0])
        cards.append(card)
        needs = [partial(load_atlas, card.atlas, home)]
        if settings.stop_after is None:
            needs = [
                partial(find_checkpoint, text, home, settings.random_weights),
                partial(find_gradients, text, home),
                *needs,
            ]
        for find in needs:
            try:
                find()
            except BrainfmError as error:
                missing.append(str(error))
    if missing:
        raise BrainfmError(' '.join(dict.fromkeys(missing)))
    return cards


def resolve_models(settings: Settings, home: Path, version: str) -> list[EncodeTask]:
    """How each model that was asked for encodes.

    Raises
    ------
    BrainfmError
        A model cannot do what is asked of it.
    """
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.models.encoder import resolve_device, resolve_precision
    from bids_brainfm.models.masking import BLOCKS
    from bids_brainfm.models.spec import resolve_model

    device = resolve_device(settings.device)
    tasks = []
    for text in settings.model:
        spec = resolve_model(text, home, settings.random_weights)
        atlas = load_atlas(spec.card.atlas, home)
        block = (settings.latent_prediction or BLOCKS[0]) if spec.predicts_latents else 'none'
        tasks.append(
            EncodeTask(
                spec=spec,
                atlas=atlas.name,
                contract=_contract(settings, spec.card, atlas.name),
                home=home,
                device=str(device),
                precision=str(resolve_precision(settings.precision, device)),
                batch_size=settings.batch_size,
                threads=settings.omp_nthreads,
                tokens=settings.tokens,
                block=None if block == 'none' else block,
                analyses=analyses_asked(settings, spec, atlas),
                output=settings.output_dir,
                version=version,
            )
        )
    labels = [task.spec.label for task in tasks]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise BrainfmError(
            f'--model names {", ".join(sorted(twice))} twice, and both would write the same '
            f'files: name it once.'
        )
    if settings.temporal == 'official' and not any(t.spec.card.official_volumes for t in tasks):
        raise BrainfmError(
            f'--temporal official picks frames as Brain-JEPA does, and '
            f'{", ".join(settings.model)} has no such recipe: leave it out.'
        )
    check_outputs(settings, tasks)
    asked = settings.latent_prediction not in (None, 'none')
    if asked and not any(task.spec.predicts_latents for task in tasks):
        raise BrainfmError(
            f'--latent-prediction {settings.latent_prediction}: {", ".join(settings.model)} '
            f'predicts no latents, as Brain-JEPA does: leave it out.'
        )
    return tasks


def _contract(settings: Settings, card, atlas: str):
    from bids_brainfm.signals.contract import Contract

    scaling = {'card': card.scaling, 'cohort': card.cohort_scaling}.get(
        settings.scale, settings.scale
    )
    official = settings.temporal == 'official' and card.official_volumes
    return Contract(
        tr=card.tr,
        window=card.window,
        scaling=scaling,
        divide_by=card.divide_by,
        stride=settings.stride,
        short_runs=settings.short_runs,
        min_coverage=settings.min_coverage,
        stats=_stats_of(settings.scale_stats or (), atlas, scaling),
        temporal='official' if official else 'resample',
        official_volumes=card.official_volumes,
        min_real=card.min_real,
    )


def _stats_of(files: tuple[Path, ...], atlas: str, scaling: str) -> Path | None:
    """The file of statistics that a model takes; a single one is checked where it is read."""
    if len(files) < 2:
        return files[0] if files else None
    found = {}
    for path in files:
        if (kind := kind_of(path)) in found:
            raise BrainfmError(
                f'--scale-stats names {found[kind]} and {path}, both of the {kind[1]} of the '
                f'atlas {kind[0]}: give one of them.'
            )
        found[kind] = path
    wanted = (atlas, STATISTICS[scaling])
    if wanted not in found:
        raise BrainfmError(
            f'None of the files of --scale-stats is of the {wanted[1]} of the atlas {atlas}: they '
            f'are of {", ".join(f"{kind} of {name}" for name, kind in found)}.'
        )
    return found[wanted]


def make_plan(settings: Settings, datasets: dict[str, Path], work: Path, version: str) -> Plan:
    """Find the runs, the models and the atlases, and what is left to do.

    Parameters
    ----------
    settings : Settings
    datasets : dict of str to Path
        fMRIPrep datasets to read.
    work : Path
        Work folder of this process.
    version : str
        Version of this program.

    Raises
    ------
    BrainfmError
        Nothing can be run; the sentence says why.
    """
    from bids_brainfm.resources import home

    place = home()
    cards = find_resources(settings, place)
    tasks = [] if settings.stop_after else resolve_models(settings, place, version)
    database = settings.bids_database_dir or work / 'bids_db'
    layouts = {
        name: index(root, settings.participant_label, database / name)
        for name, root in datasets.items()
    }
    prepare_output(settings.output_dir)
    failures: list[Outcome] = []
    plans = []
    for atlas in dict.fromkeys(card.atlas for card in cards):
        denoise = _denoising(settings, atlas, cards)
        of_atlas = [task for task in tasks if task.spec.card.atlas == atlas]
        plans.append(
            _plan_atlas(settings, version, place, atlas, denoise, of_atlas, layouts, failures)
        )
    if not any(plan.runs for plan in plans):
        raise BrainfmError(_nothing(settings, datasets, failures))
    plan = Plan(settings, version, datasets, work, plans, failures)
    absent = sorted(set(settings.participant_label) - set(plan.subjects))
    return dataclasses.replace(plan, absent=absent)


def prepare_output(folder: Path) -> None:
    """Make the output folder, or say why that cannot be.

    Raises
    ------
    BrainfmError
        It cannot be written, or holds another dataset.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BrainfmError(
            f'The output folder {folder} cannot be written ({error.strerror}): check its '
            f'permissions, or choose another one.'
        ) from None
    if (folder / 'dataset_description.json').exists():
        programs = generators(read_description(folder))
        author = next((p['Name'] for p in programs if 'Name' in p), 'unknown software')
        if author != 'bids_brainfm':
            raise BrainfmError(
                f'{folder} already holds another dataset (by {author}): choose an output folder '
                f'of its own.'
            )


def _denoising(settings: Settings, atlas: str, cards: list) -> str:
    """Name or file of the denoising preset of an atlas."""
    asked = {card.denoising for card in cards if card.atlas == atlas}
    if settings.denoise != 'card':
        return settings.denoise
    if len(asked) > 1:
        raise BrainfmError(
            f'The models of atlas {atlas} ask for different denoising '
            f'({", ".join(sorted(asked))}): choose one with --denoise.'
        )
    return asked.pop()


def _plan_atlas(
    settings, version, home, atlas_name, denoise, tasks, layouts, failures
) -> AtlasPlan:
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.signals.denoise import load_preset

    atlas = load_atlas(atlas_name, home)
    present = {image.space for image in atlas.images}
    spaces = tuple(space for space in SPACES if space in present)
    spaces += tuple(sorted(present - set(SPACES)))
    if settings.space is not None:
        if settings.space not in present:
            raise BrainfmError(
                f'--space {settings.space}: the atlas {atlas.name} is at hand for '
                f'{", ".join(spaces)} only; choose one of these.'
            )
        spaces = (settings.space,)
    preset = load_preset(denoise)
    output = settings.output_dir
    series = SeriesTask(
        atlas.name, atlas_name, home, denoise, settings.min_coverage, output, version
    )

    filters = read_filters(settings.bids_filter_file)
    for entity, labels in (
        ('session', settings.session_label),
        ('task', settings.task_id),
        ('run', settings.run_id),
    ):
        if labels:
            filters[entity] = labels
    runs = []
    for name, layout in layouts.items():
        found, without = find_runs(layout, name, spaces, filters)
        runs += found
        failures += [
            Outcome(stem, series_step(atlas.name), sentence) for stem, sentence in without.items()
        ]
    if preset.touches_nothing:  # then the confounds are no input
        runs = [dataclasses.replace(run, confounds=None, confounds_json=None) for run in runs]
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise BrainfmError(
            f'{", ".join(twice[:3])} is in more than one of the --derivatives datasets, and both '
            f'would write the same files: name one dataset.'
        )
    for task in tasks:
        _check_fit(task, atlas)
    _claim(settings, atlas.name, preset, tasks)
    todo = [run for run in runs if not series_current(output, run, atlas.name)]
    models = [ModelPlan(task, _to_encode(runs, todo, task)) for task in tasks]
    networks = networks_asked(settings, version, home, atlas_name, tasks) if tasks else None
    if networks is not None:
        claim_networks(networks)
    return AtlasPlan(
        atlas.name, atlas.citation, series, runs, todo, models, networks,
        networks_to_find(runs, todo, models, networks),
    )  # fmt: skip


def _check_fit(task: EncodeTask, atlas) -> None:
    """See that a model and its statistics are of this atlas, before anything is computed."""
    card, stats = task.spec.card, task.contract.stats
    if task.spec.n_parcels != atlas.n_parcels:
        raise BrainfmError(
            f'{card.name} takes {task.spec.n_parcels} parcels, but its atlas {atlas.name} has '
            f'{atlas.n_parcels}: name the atlas that it was trained with in its card.'
        )
    if stats is not None:
        found = load_scale_stats(stats, atlas.name, atlas.n_parcels)
        check_stats(found, task.contract.scaling)


def _to_encode(runs, todo, task: EncodeTask) -> list[BoldRun]:
    remade = {run.name for run in todo}
    return [run for run in runs if run.name in remade or not run_current(run, task)]


def _claim(settings: Settings, atlas: str, preset, tasks: list[EncodeTask]) -> None:
    """Hold the outputs to one set of settings."""
    from bids_brainfm.resources import sha256_of

    claim_settings(
        settings.output_dir,
        f'atlas-{atlas}',
        {
            'denoise': preset.name,
            'denoise_sha256': _digest(dataclasses.asdict(preset)),
            'min_coverage': settings.min_coverage,
        },
        f'*_atlas-{atlas}_*.tsv',
    )
    for task in tasks:
        contract = dataclasses.asdict(task.contract)
        if contract['stats'] is not None:
            contract['stats'] = f'sha256 {sha256_of(contract["stats"])}'
        claim_settings(
            settings.output_dir,
            f'desc-{task.spec.label}',
            contract
            | {
                'weights': task.spec.weights,
                'gradients': task.spec.gradients and f'sha256 {task.spec.gradients.sha256}',
                'architecture_sha256': _digest(task.spec.card.config),
                'parcel_order': task.spec.card.parcel_order,
                'atlas': atlas,
                'precision': task.precision,
            },
            f'*_desc-{task.spec.label}_*.tsv',
        )
        if task.block:
            name = latent_name(task.spec.label)
            claim_settings(
                settings.output_dir, name, {'latent_prediction': task.block}, f'*_{name}_*.tsv'
            )
        for analysis in analyses_of(task):
            claim_settings(
                settings.output_dir,
                analysis_name(analysis, task.spec.label),
                {key: getattr(task.analyses, key) for key in analysis.SETTINGS},
                analysis.pattern(task),
            )


def _digest(content: dict) -> str:
    """Checksum of what a dictionary says, in whatever order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _nothing(settings: Settings, datasets: dict, failures: list[Outcome]) -> str:
    """Why there is no run at all."""
    if failures:
        more = f' ({len(failures) - 1} more runs likewise)' if len(failures) > 1 else ''
        return f'{failures[0].error}{more}'
    asked = {
        '--participant-label': settings.participant_label,
        '--session-label': settings.session_label,
        '--task-id': settings.task_id,
        '--run-id': settings.run_id,
        '--bids-filter-file': [settings.bids_filter_file] if settings.bids_filter_file else (),
    }
    filters = [f'{flag} {" ".join(map(str, v))}' for flag, v in asked.items() if v]
    where = ', '.join(str(root) for root in datasets.values())
    if filters:
        return f'No BOLD run in {where} matches {" and ".join(filters)}: check these options.'
    return f'There is no BOLD run in {where}: give the folder that fMRIPrep wrote.'
