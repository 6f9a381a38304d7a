"""What happens to the graph when a worker dies, and how plugins are chosen."""

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from nipype.interfaces.utility import Function
from nipype.pipeline import engine as pe

from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.workflows.execution import run
from bids_brainfm.workflows.plugins import MultiProc, Slurm, end_workers, from_file


def die():
    """As the kernel does when memory runs out."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def lose_folder():
    """As another job does that empties a shared work folder."""
    import shutil
    from pathlib import Path

    shutil.rmtree(Path.cwd().parent)


def live():
    """As most jobs do."""
    return 1


def workflow_of(tmp_path, function):
    """Graph of one node, whose losses are not waited for."""
    workflow = pe.Workflow('small', base_dir=str(tmp_path))
    workflow.config['execution'] = {
        'poll_sleep_duration': '0.1',
        'crashdump_dir': str(tmp_path),
        'job_finished_timeout': '0.1',
    }
    workflow.add_nodes([pe.Node(Function(function=function, output_names=['out']), 'node')])
    return workflow


@pytest.mark.parametrize(('fate', 'word'), [(die, 'memory'), (lose_folder, 'work folder')])
def test_lost_worker_is_said_and_not_waited_for(tmp_path, fate, word):
    workflow = workflow_of(tmp_path, fate)
    plugin = MultiProc({'n_procs': 2, 'mp_context': 'forkserver'})
    with pytest.raises(BrainfmError, match=word):
        run(workflow, plugin)


def test_a_signal_to_all_processes_does_not_hide_a_worker():
    """One that is still writing is waited for, and only then is looked at what it has left."""
    plugin = MultiProc({'n_procs': 1, 'mp_context': 'forkserver'})
    server = plugin.pool.submit(os.getppid).result()
    (worker,) = multiprocessing.active_children()
    os.kill(server, signal.SIGTERM)
    worker.join(1)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)  # which a worker does not outlive
    worker.join(20)
    # 255 where the pool, which joins it at the same time, was the first to read its exit code
    assert worker.exitcode in (-signal.SIGTERM, 255)
    end_workers()


def settings_with(tmp_path, text):
    """Settings with a plugin file of this text."""
    path = tmp_path / 'plugin.yml'
    path.write_text(text)
    return Settings(bids_dir=tmp_path, output_dir=tmp_path / 'out', use_plugin=path)


@pytest.mark.parametrize(
    ('text', 'word'),
    [
        ('plugin: Teleport', 'Teleport'),
        ('plugin: SLURMGraph', 'waits'),
        ('- not a mapping', 'plugin_args'),
        ('{', 'plugin_args'),
        ('plugin: SLURM\nplugin_args: [1]', 'plugin_args'),
    ],
)
def test_plugin_file_that_cannot_be_used(tmp_path, text, word):
    settings = settings_with(tmp_path, text)
    with pytest.raises(BrainfmError, match=word):
        from_file(settings, settings.use_plugin, None)


def test_plugin_file_of_one_process(tmp_path):
    settings = settings_with(tmp_path, 'plugin: Linear\n')
    plugin = from_file(settings, settings.use_plugin, None)
    assert type(plugin).__name__ == 'LinearPlugin'


def test_plugin_file_of_workers_keeps_to_the_options(tmp_path):
    """What the file does not say is as without it: CPUs, memory, processes that start clean."""
    settings = settings_with(tmp_path, 'plugin: MultiProc\nplugin_args: {memory_gb: 3}\n')
    settings = dataclasses.replace(settings, nprocs=1, mem=1.0)
    plugin = from_file(settings, settings.use_plugin, None)
    assert (plugin.processors, plugin.memory_gb) == (1, 3)
    assert plugin.plugin_args['mp_context'] == 'forkserver'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of Slurm that run a job at once, and a file that tells what they were given."""
    commands = tmp_path / 'bin'
    commands.mkdir()
    for name, text in {
        'sbatch': 'bash "${@: -1}" >/dev/null 2>&1\necho 7',
        'squeue': '',
        'scancel': '',
    }.items():
        path = commands / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/said\n{text}\n')
        path.chmod(0o755)
    monkeypatch.setenv('PATH', f'{commands}:{os.environ["PATH"]}')
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[1]))
    return commands


def plugin_of(tmp_path):
    """The plugin that the example of the documentation makes."""
    text = 'plugin: SLURM\nplugin_args:\n  sbatch_args: --time=60 --mem=8G\n'
    settings = settings_with(tmp_path, text)
    return from_file(settings, settings.use_plugin, None)


def test_jobs_of_a_cluster(tmp_path, slurm, monkeypatch):
    """A node is submitted with what the file says, also where nobody has told the user's name."""
    monkeypatch.delenv('LOGNAME', raising=False)
    run(workflow_of(tmp_path, live), plugin_of(tmp_path))
    said = (tmp_path / 'said').read_text()
    assert '--time=60 --mem=8G' in said
    assert 'scancel' not in said


def test_scheduler_that_does_not_answer_is_asked_again(tmp_path, slurm):
    """Only what squeue says of a job counts, and that it does not know it any more."""
    replies = [
        'exit 1',
        'echo 7',
        'echo slurm_load_jobs error: Invalid job id specified >&2; exit 1',
    ]
    plugin = plugin_of(tmp_path)
    pending = []
    for reply in replies:
        (slurm / 'squeue').write_text(f'#!/bin/bash\n{reply}\n')
        pending.append(plugin._is_pending(7))
    assert pending == [True, True, False]


def test_lost_job_is_said(tmp_path, slurm):
    """A job that is killed leaves no result."""
    with pytest.raises(BrainfmError, match=r'Slurm job 7 .*memory or time.*plugin\.yml'):
        run(workflow_of(tmp_path, die), plugin_of(tmp_path))


def test_refused_job_is_said(tmp_path, slurm):
    """What sbatch says of its arguments is in the sentence."""
    (slurm / 'sbatch').write_text(
        '#!/bin/bash\necho sbatch: error: invalid partition specified: none >&2\nexit 1\n'
    )
    with pytest.raises(BrainfmError, match=r'invalid partition specified: none\).*plugin\.yml'):
        run(workflow_of(tmp_path, live), plugin_of(tmp_path))


def test_jobs_are_not_left_behind(tmp_path, slurm, monkeypatch):
    """Jobs in the queue are taken back when the command is stopped."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Slurm, '_is_pending', stop)
    with pytest.raises(KeyboardInterrupt):
        run(workflow_of(tmp_path, live), plugin_of(tmp_path))
    assert 'scancel 7' in (tmp_path / 'said').read_text()


def test_cluster_that_is_not_here(tmp_path, monkeypatch):
    """As in a container, where there is no sbatch."""
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(BrainfmError, match='no sbatch'):
        plugin_of(tmp_path)


def test_job_takes_no_more_threads_than_it_has_cpus(tmp_path, monkeypatch):
    """The command counted the CPUs of another machine."""
    import torch

    from bids_brainfm.outputs.encoding import load
    from bids_brainfm.workflows.resolve import resolve_models

    settings = Settings(
        bids_dir=tmp_path, output_dir=tmp_path, model='brainlm-demo', omp_nthreads=64
    )
    (task,) = resolve_models(settings, tmp_path, '1')
    monkeypatch.setenv('SLURM_CPUS_PER_TASK', '1')
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    load(task)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
