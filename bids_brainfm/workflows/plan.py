"""What a run of the command has to do, settled before anything starts.

All that can be missing or contradictory is found here: weights, atlases, inputs, settings.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.description import generators, read_description
from bids_brainfm.bids.freshness import sidecar_path
from bids_brainfm.bids.inputs import FindRuns, open_datasets
from bids_brainfm.bids.inputs.filters import read_filters
from bids_brainfm.bids.naming import parse_name
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.bids.tables import custom_table, ica_tables
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError, abridge
from bids_brainfm.models.cards import ModelCard
from bids_brainfm.models.model import check_fit
from bids_brainfm.outputs import networks
from bids_brainfm.outputs.encoding import run_current
from bids_brainfm.outputs.outcome import Outcome, read_failures
from bids_brainfm.outputs.products import claim, damaged_files
from bids_brainfm.outputs.registry import BY_NAME, DENOISING, OF_SERIES
from bids_brainfm.outputs.series import series_current
from bids_brainfm.outputs.tasks import ModelTask, NetworksTask, Place, SeriesTask
from bids_brainfm.progress import track
from bids_brainfm.resources import home
from bids_brainfm.signals.strategy import Strategy, load_strategy, override
from bids_brainfm.workflows import resolve

LOGGER = logging.getLogger('bids_brainfm')
# The card's own space first; fMRIPrep's default comes last, where the atlas is a warped one
SPACES = ('MNI152NLin6Asym', 'fsLR', 'MNI152NLin2009cAsym')


@dataclass(frozen=True)
class ModelPlan:
    """One model: how it encodes, and the runs that it has yet to encode."""

    task: ModelTask
    todo: list[BoldRun]


@dataclass(frozen=True)
class AtlasPlan:
    """One atlas: its runs, those whose series are yet to be made, and its models.

    ``networks`` is empty where no networks are asked for, ``network_runs`` the runs of each
    participant whose networks are yet to be found.
    """

    task: SeriesTask
    citation: tuple[str, ...]
    runs: list[BoldRun]
    todo: list[BoldRun]
    models: list[ModelPlan]
    networks: list[NetworksTask] = field(default_factory=list)
    network_runs: dict[str, list[BoldRun]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the atlas."""
        return self.task.place.atlas

    @property
    def steps(self) -> list[Outcome]:
        """Everything that is wanted of this atlas, by run and step, as if it were done."""
        steps = [self.task.place.step, *(model.task.place.step for model in self.models)]
        wanted = [(run, step) for run in self.runs for step in steps]
        whole = {(run.subject, run.space): networks.whole_participant(run) for run in self.runs}
        wanted += [
            (of, task.step(of)) for of in (*self.runs, *whole.values()) for task in self.networks
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
    def busy(self) -> set[str]:
        """Participants for whom something is left to do."""
        subjects = set[str]()
        for atlas in self.atlases:
            parts = (atlas.todo, *(model.todo for model in atlas.models))
            subjects |= {run.subject for runs in parts for run in runs} | set(atlas.network_runs)
        return subjects

    @property
    def steps(self) -> list[Outcome]:
        """Everything that this plan wants done, by run and step, as if it were."""
        return [step for atlas in self.atlases for step in atlas.steps]

    def remove_stale(self) -> None:
        """Remove networks of runs whose parcel series will be other ones."""
        for atlas in self.atlases:
            for run in atlas.todo:
                networks.remove_stale(run, atlas.task.place)

    def record_failures(self) -> None:
        """Forget failures of earlier runs in what is to be done now, and write down the known."""
        for outcome in self.steps + self.failures:
            outcome.record(self.settings.output_dir)

    def failed(self) -> list[Outcome]:
        """What failed in this plan, by run and step."""
        wanted = {(outcome.run, outcome.step) for outcome in self.steps + self.failures}
        known = (read_failures(self.settings.output_dir, each) for each in self.subjects)
        return [o for o in chain(*known) if (o.run, o.step) in wanted]

    def read_failures(self) -> list[str]:
        """Sentences of what failed in this plan."""
        recorded = [outcome.error or '' for outcome in self.failed()]
        absent = [f'sub-{label}: no BOLD run matches what was asked for.' for label in self.absent]
        return recorded + absent

    def removed(self) -> list[Path]:
        """Sidecars that are gone although nothing failed: removed while the command ran."""
        failed = {(outcome.run, outcome.step) for outcome in self.failed()}
        wanted = [self.settings.output_dir / 'dataset_description.json']
        for atlas in self.atlases:
            series = atlas.task.place
            made = [(series, 'series')] + [(m.task.place, 'embedding') for m in atlas.models]
            for run in atlas.runs:
                for place, product in made:
                    if failed.isdisjoint({(run.name, series.step), (run.name, place.step)}):
                        wanted.append(sidecar_path(place.table(run, product)))
        return [path for path in wanted if not path.is_file()]


def _subject(name: str) -> str:
    """Participant of a run, by the run's name."""
    return parse_name(f'{name}_')[0]['sub']


def make_plan(settings: Settings, datasets: dict[str, Path], work: Path, version: str) -> Plan:
    """Find the runs of the preprocessed `datasets`, models, atlases, and what is left to do.

    `work` is the work folder of this process, `version` that of this program. Raises BrainfmError
    where nothing can be run, with the reason.
    """
    place = home()
    cards = resolve.find_resources(settings, place)
    tasks = [] if settings.stop_after else resolve.resolve_models(settings, place, version)
    inputs = open_datasets(datasets, settings.participant_label)
    prepare_output(settings.output_dir)
    failures: list[Outcome] = []
    plans = []
    for atlas in dict.fromkeys(card.atlas for card in cards):
        strategy = _denoising(settings, atlas, cards)
        own = [task for task in tasks if task.spec.card.atlas == atlas]
        found = _plan_atlas(settings, version, place, atlas, strategy, own, inputs, failures)
        plans.append(found)
    if not any(plan.runs for plan in plans):
        raise BrainfmError(_nothing(settings, datasets, failures))
    plan = Plan(settings, version, datasets, work, plans, failures)
    absent = sorted(set(settings.participant_label) - set(plan.subjects))
    return dataclasses.replace(plan, absent=absent)


def prepare_output(folder: Path) -> None:
    """Make the output folder; raises BrainfmError where that cannot be, or it holds other data."""
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


def _denoising(settings: Settings, atlas: str, cards: Sequence[ModelCard]) -> Strategy:
    """How the series of an atlas are denoised."""
    asked = {card.denoising for card in cards if card.atlas == atlas}
    if settings.denoise != 'card':
        return resolve.denoising(settings, settings.denoise)
    if len(asked) > 1:
        raise BrainfmError(
            f'The models of atlas {atlas} ask for different denoising '
            f'({", ".join(sorted(asked))}): choose one with --denoise.'
        )
    return resolve.denoising(settings, asked.pop())


def _plan_atlas(
    settings: Settings, version: str, home: Path, card: str, strategy: Strategy,
    tasks: list[ModelTask], inputs: Sequence[FindRuns], failures: list[Outcome],
) -> AtlasPlan:  # fmt: skip
    atlas = load_atlas(card, home)
    place = Place(settings.output_dir, atlas.name)
    spaces = _spaces(settings, {image.space for image in atlas.images}, atlas.name)
    runs: list[BoldRun] = []
    for find_runs in inputs:
        found, without = find_runs(spaces, _filters(settings))
        runs += found
        failures += [Outcome(name, place.step, text) for name, text in without.items()]
    if any(run.denoised for run in runs):  # nothing is regressed out twice
        if not all(run.denoised for run in runs):
            raise BrainfmError(
                'Some of the runs were denoised by their pipeline and others were not, and they '
                'would not be comparable: process them into two output folders.'
            )
        given = {f'--denoise {settings.denoise}': settings.denoise not in ('card', 'none')}
        given |= {option.flag: option.name in settings.options for option in DENOISING}
        if refused := [flag for flag, is_given in given.items() if is_given]:
            raise BrainfmError(
                f'{refused[0]}: the runs were denoised by their pipeline ({runs[0].pipeline}), '
                'and nothing is regressed out twice: leave the option out.'
            )
        strategy = override(load_strategy('none'), keep_nonsteady=True)
    series = SeriesTask(
        place, card, home, strategy, settings.min_coverage, settings.max_flagged, version,
        denoised=any(run.denoised for run in runs), parcel_voxels=settings.parcel_voxels,
        custom_confounds=settings.options.get('custom_confounds'),
        parameters=resolve.parameters(OF_SERIES, settings, None, atlas),
    )  # fmt: skip
    runs = [_with_tables(run, series) for run in runs]
    _check_unique(runs)
    if noted := [note for run in runs for note in run.notes]:
        LOGGER.warning(
            'Some runs have several candidates for one file (see their reports): %s',
            abridge(noted, 3),
        )
    for task in tasks:
        check_fit(task.spec, atlas, task.contract)
    every: list[SeriesTask | ModelTask] = [series, *tasks]
    for asked in every:
        for name in asked.parameters:
            claim(BY_NAME[name], asked, settings.recompute)
    sources = resolve.networks_tasks(settings, version, home, card, tasks)
    if sources:
        claim(BY_NAME['networks'], sources[0], settings.recompute)
    seen = track(runs, f'Looking through outputs in atlas {atlas.name}')
    done = {run.name: _done(run, series, tasks) for run in seen}
    by_subject: dict[str, list[BoldRun]] = {}
    for run in runs if sources else ():
        by_subject.setdefault(run.subject, []).append(run)
    network_runs = {
        subject: own
        for subject, own in track(by_subject.items(), 'Looking through networks', 'participant')
        if not all(all(done[run.name]) for run in own)
        or not networks.participant_current(own, sources)
    }
    for run in chain(*network_runs.values()):
        if all(done[run.name]):  # what is done will be read
            done[run.name] = _done(run, series, tasks, contents=True)
    todo = [run for run in runs if not done[run.name][0]]
    models = [
        ModelPlan(task, [run for run in runs if not (done[run.name][0] and done[run.name][i])])
        for i, task in enumerate(tasks, 1)
    ]
    return AtlasPlan(series, atlas.citation, runs, todo, models, sources, network_runs)


def _done(
    run: BoldRun, series: SeriesTask, tasks: Sequence[ModelTask], contents: bool = False
) -> list[bool]:
    """Whether the parcel series of a run and what each model makes of it are done.

    Where anything is left to do, or with `contents`, files are compared with their checksums,
    since they will be read; a warning names those that are damaged.
    """
    found = [series_current(run, series, contents)]
    found += [run_current(run, task, contents) for task in tasks]
    if all(found):
        return found
    if not contents:
        return _done(run, series, tasks, contents=True)
    every: list[SeriesTask | ModelTask] = [series, *tasks]
    for task in every:
        for name in task.parameters:
            for path, fault in damaged_files(BY_NAME[name], run, task.place).items():
                LOGGER.warning('%s %s: it is made again.', path, fault)
    return found


def _check_unique(runs: Sequence[BoldRun]) -> None:
    """Raise BrainfmError where two files would be written to the same outputs."""
    first: dict[str, BoldRun] = {}
    for run in runs:
        if (other := first.setdefault(run.name, run)) is not run:
            raise BrainfmError(
                f'{run.name} is in more than one of the --derivatives datasets, and both would '
                f'write the same files ({other.bold} and {run.bold}): name one dataset.'
            )


def _with_tables(run: BoldRun, task: SeriesTask) -> BoldRun:
    """Return a run with the tables that its denoising reads, and no others."""
    strategy, folder = task.strategy, task.custom_confounds
    custom = mixing = metrics = None
    if run.confounds is not None:
        custom = custom_table(run.confounds, folder) if folder else None
        if strategy.ica:
            mixing, metrics = ica_tables(run.confounds, strategy.ica, folder)
    run = dataclasses.replace(run, custom=custom, mixing=mixing, metrics=metrics)
    if strategy.needs_table or strategy.finds_dummies:
        return run
    return dataclasses.replace(run, confounds=None, confounds_json=None)


def _spaces(settings: Settings, present: set[str], atlas: str) -> tuple[str, ...]:
    """Spaces that will do, the best first."""
    spaces = tuple(s for s in (*SPACES, *sorted(present - set(SPACES))) if s in present)
    if settings.space is None:
        return spaces
    if settings.space not in present:
        raise BrainfmError(
            f'--space {settings.space}: the atlas {atlas} is at hand for '
            f'{", ".join(spaces)} only; choose one of these.'
        )
    return (settings.space,)


def _filters(settings: Settings) -> dict[str, Any]:
    """Labels that entities of runs must have."""
    labels = {'session': settings.session_label, 'task': settings.task_id, 'run': settings.run_id}
    given = {entity: values for entity, values in labels.items() if values}
    return read_filters(settings.bids_filter_file) | given


def _nothing(settings: Settings, datasets: dict[str, Path], failures: list[Outcome]) -> str:
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
    where = ', '.join(map(str, datasets.values()))
    if filters:
        return f'No BOLD run in {where} matches {" and ".join(filters)}: check these options.'
    return f'There is no BOLD run in {where}: give the folder that fMRIPrep wrote.'
