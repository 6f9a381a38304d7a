"""Cohorts of many runs: graph, progress, and what is not done again."""

import json
import logging
import pickle
import shutil
import time
from pathlib import Path

import pytest

from bids_brainfm import progress, stopping
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.config import Settings
from bids_brainfm.outputs import encoding, series
from bids_brainfm.outputs.outcome import Outcome
from bids_brainfm.workflows.execution import execute
from bids_brainfm.workflows.journal import Follower, Journal
from bids_brainfm.workflows.participant import add_reports, init_participant_wf, portions
from bids_brainfm.workflows.plan import AtlasPlan, ModelPlan, Plan
from bids_brainfm.workflows.plugins import MultiProc
from bids_brainfm.workflows.resolve import denoising, resolve_models

LOGGER = logging.getLogger('bids_brainfm')


@pytest.fixture
def log(monkeypatch):
    """Lines that the command logs."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(LOGGER, 'handlers', [handler])
    monkeypatch.setattr(LOGGER, 'propagate', False)
    LOGGER.setLevel(logging.INFO)
    return lines


def a_run(number):
    entities = {'sub': f'{number:05d}', 'task': 'rest', 'space': 'MNI152NLin6Asym'}
    name = f'sub-{number:05d}_task-rest'
    bold = Path(f'/data/{name}_bold.nii.gz')
    return BoldRun(name, entities, 'p', Path('/data'), bold, pipeline='fmriprep')


def plan_of(tmp_path, number):
    """A plan of runs that are all to be done."""
    from bids_brainfm.outputs.tasks import Place, SeriesTask

    settings = Settings(
        bids_dir=tmp_path, output_dir=tmp_path / 'out', model='brainlm-demo', nprocs=1
    )
    (task,) = resolve_models(settings, tmp_path, '1')
    runs = [a_run(i) for i in range(number)]
    place = Place(settings.output_dir, 'Demo424')
    made = SeriesTask(
        place, task.spec.card.atlas, tmp_path, denoising(settings, 'simple'), 0.5, 1.0, '1'
    )
    atlas = AtlasPlan(made, (), runs, runs, [ModelPlan(task, runs)])
    work = tmp_path / 'work'
    work.mkdir()
    return Plan(settings, '1', {}, work, [atlas])


@pytest.mark.parametrize(('people', 'nodes', 'here'), [(3, 1, True), (120, 4, False)])
def test_many_reports_are_written_by_workers(tmp_path, people, nodes, here):
    """A few take less time in the process of the command than a worker takes to start."""
    plan = plan_of(tmp_path, 1)
    workflow = init_participant_wf(plan)
    add_reports(workflow, plan, [f'{number:05d}' for number in range(people)], {})
    names = [name for name in workflow.list_node_names() if name.startswith('reports')]
    made = [workflow.get_node(name) for name in names]
    assert len(made) == nodes
    assert [node.run_without_submitting for node in made] == [here] * nodes
    subjects = [subject for node in made for _, subject in node.inputs.items]
    assert subjects == [f'{number:05d}' for number in range(people)]


@pytest.mark.parametrize(
    ('items', 'nprocs', 'cluster', 'nodes', 'largest'),
    [
        (0, 1, False, 0, 0),
        (3, 2, False, 3, 1),  # none waits while another does two
        (100, 2, False, 8, 13),
        (2000, 2, False, 40, 50),
        (100, 1, True, 50, 2),
        (40_000, 16, True, 800, 50),
    ],
)
def test_work_is_split_into_few_nodes(tmp_path, items, nprocs, cluster, nodes, largest):
    plugin = tmp_path / 'plugin.yml' if cluster else None
    settings = Settings(tmp_path, tmp_path, nprocs=nprocs, use_plugin=plugin)
    split = portions(range(items), settings)
    assert [each for portion in split for each in portion] == list(range(items))
    assert (len(split), max(map(len, split), default=0)) == (nodes, largest)


def test_graph_holds_each_run_a_fixed_number_of_times(tmp_path):
    sizes = []
    for number in (100, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        workflow = init_participant_wf(plan_of(folder, number))
        nodes = [workflow.get_node(name) for name in workflow.list_node_names()]
        sizes.append(sum(len(pickle.dumps(node.inputs.get())) for node in nodes))
    assert sizes[1] < 2.1 * sizes[0]


def test_scheduling_is_linear_and_tells_of_each_run(tmp_path, log, monkeypatch):
    """A run that fails, or that raises, does not keep the others of its node from being done."""
    encoded = []

    def make(run, task, stop):
        if run.subject == '00001':
            raise OSError('unreadable')
        error = f'{run.name}: no mask.' if run.subject == '00002' else None
        return Outcome(run.name, 'step', error)

    monkeypatch.setattr(series, 'make_series', make)
    monkeypatch.setattr(encoding, 'encode_all', lambda runs, task, stop: encoded.extend(runs))
    plan = plan_of(tmp_path, 60)
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match='unreadable'):
        execute(init_participant_wf(plan), plan)
    assert time.perf_counter() - started < 20
    reported = sorted(line.partition('] ')[2] for line in log if line.startswith('['))
    assert len(reported) == 60
    assert reported[1:3] == ['sub-00001_task-rest: unreadable', 'sub-00002_task-rest: no mask.']
    assert all(': parcel series written (' in line for line in (reported[0], *reported[3:]))
    assert not encoded


def test_runs_that_failed_are_not_encoded(tmp_path):
    """Their failures are on record in the output folder; the encoder learns of them there."""
    (atlas,) = plan_of(tmp_path, 2).atlases
    (model,) = atlas.models
    for run in atlas.runs:
        Outcome(run.name, atlas.task.place.step, 'no mask').record(tmp_path / 'out')
    assert encoding.encode_all(atlas.runs, model.task) == []


def test_node_in_another_process_writes_what_it_logs(tmp_path, monkeypatch):
    """There the log has no handler."""
    monkeypatch.setattr(LOGGER, 'handlers', [])
    with Journal(tmp_path, 'networks', 'participant') as journal:
        LOGGER.warning('few %s', 'volumes')
        journal.write('sub-01', None, 1.5)
    assert LOGGER.handlers == []
    (file,) = tmp_path.iterdir()
    begin, first, second = map(json.loads, file.read_text().splitlines())
    assert begin == {'what': 'networks', 'unit': 'participant'}
    assert first == {'level': logging.WARNING, 'message': 'few volumes'}
    assert (second['name'], second['error'], second['seconds']) == ('sub-01', None, 1.5)


def test_journals_are_reported_line_by_line(tmp_path, log):
    """Half a line waits for its end, and a folder that goes away is no reason to stop."""
    entry = {'what': 'networks', 'unit': 'participant', 'name': 'sub-01', 'error': None}
    one = json.dumps(entry | {'seconds': 1.5}) + '\n'
    two = json.dumps(entry | {'seconds': 1, 'name': 'sub-02', 'error': 'none found'}) + '\n'
    with Follower(tmp_path / 'journal', {'networks': 2}):
        (tmp_path / 'journal').mkdir()
        with (tmp_path / 'journal' / 'a.jsonl').open('w') as file:
            for part in (
                json.dumps({'level': 30, 'message': 'few'}) + '\n' + one + two[:40],
                two[40:],
            ):
                file.write(part)
                file.flush()
                time.sleep(0.5)
        shutil.rmtree(tmp_path / 'journal')
        time.sleep(0.3)
    reported = [line for line in log if ' left' not in line]
    assert reported == [
        'few',
        '[1/2] sub-01: networks written (1.5 s)',
        '[2/2] sub-02: none found',
    ]


def test_progress_tells_after_a_second_and_then_every_minute(log, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    for _ in progress.track(range(400), 'Runs'):
        now[0] += 0.5
    assert log == [
        'Runs: 2 of 400 runs, about 3 min left',
        'Runs: 122 of 400 runs, about 2 min left',
        'Runs: 242 of 400 runs, about 79 s left',
        'Runs: 362 of 400 runs, about 19 s left',
    ]


def test_progress_is_shown_while_the_first_run_is_not_finished(log, tmp_path, monkeypatch):
    """In this process, and where a node elsewhere has begun."""
    monkeypatch.setattr(progress, 'FIRST', 0.1)
    monkeypatch.setattr(progress, 'TICK', 0.05)
    with progress.Progress(40, 'Encoding'):
        time.sleep(0.4)
    with Follower(tmp_path, {'parcel series': 40}), Journal(tmp_path, 'parcel series', 'run'):
        time.sleep(0.7)
    assert log == ['Encoding: 0 of 40 runs', 'Parcel series: 0 of 40 runs']


def test_signal_that_python_dropped_is_seen_while_workers_are_waited_for(monkeypatch):
    monkeypatch.setattr(stopping, '_received', [2])
    plugin = MultiProc({'n_procs': 1, 'mp_context': 'forkserver'})
    with pytest.raises(KeyboardInterrupt):
        plugin._get_result(1)


def test_reports_are_written_only_where_something_changed(simulated, tmp_path, app, capfd):
    out = tmp_path / 'out'

    def written():
        assert app(simulated, out) == 0
        return capfd.readouterr().err.count('report written')

    assert written() == 2
    assert written() == 0
    pages = [out / f'sub-{label}.html' for label in ('01', '02')]
    contents = [page.read_bytes() for page in pages]
    pages[0].write_bytes(contents[0][:1000])  # cut off
    assert written() == 1
    assert pages[0].read_bytes() == contents[0]
    figure = next((out / 'sub-02' / 'figures').glob('*carpet*'))
    figure.unlink()
    assert written() == 1
    assert figure.name.encode() in contents[1]
    assert figure.name.encode() not in pages[1].read_bytes()
