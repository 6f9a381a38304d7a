"""What happens to the graph when a worker dies, and how plugins are chosen."""

import pytest
from nipype.interfaces.utility import Function
from nipype.pipeline import engine as pe

from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.workflows.execution import _from_file, _MultiProc, run


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


@pytest.mark.parametrize(('fate', 'word'), [(die, 'memory'), (lose_folder, 'work folder')])
def test_lost_worker_is_said_and_not_waited_for(tmp_path, fate, word):
    workflow = pe.Workflow('lost', base_dir=str(tmp_path))
    workflow.config['execution'] = {'poll_sleep_duration': '0.1', 'crashdump_dir': str(tmp_path)}
    workflow.add_nodes([pe.Node(Function(function=fate), 'node')])
    plugin = _MultiProc({'n_procs': 2, 'mp_context': 'forkserver'})
    with pytest.raises(BrainfmError, match=word):
        run(workflow, plugin)


@pytest.mark.parametrize(
    ('text', 'word'),
    [('plugin: Teleport', 'Teleport'), ('- not a mapping', 'plugin_args'), ('{', 'plugin_args')],
)
def test_plugin_file_that_cannot_be_used(tmp_path, text, word):
    path = tmp_path / 'plugin.yml'
    path.write_text(text)
    settings = Settings(bids_dir=tmp_path, output_dir=tmp_path / 'out', use_plugin=path)
    with pytest.raises(BrainfmError, match=word):
        _from_file(settings, None)


def test_plugin_file_of_one_process(tmp_path):
    path = tmp_path / 'plugin.yml'
    path.write_text('plugin: Linear\n')
    settings = Settings(bids_dir=tmp_path, output_dir=tmp_path / 'out', use_plugin=path)
    assert type(_from_file(settings, None)).__name__ == 'LinearPlugin'


def test_plugin_file_of_a_cluster(tmp_path):
    """The example of the documentation makes the plugin, though no Slurm is here to run it."""
    path = tmp_path / 'plugin.yml'
    path.write_text('plugin: SLURM\nplugin_args:\n  sbatch_args: --time=60 --mem=8G\n')
    settings = Settings(bids_dir=tmp_path, output_dir=tmp_path / 'out', use_plugin=path)
    plugin = _from_file(settings, None)
    assert type(plugin).__name__ == 'SLURMPlugin'
    assert plugin._sbatch_args == '--time=60 --mem=8G'
