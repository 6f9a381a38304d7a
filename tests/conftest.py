"""Data that many tests share: a simulated dataset, and the real one where it is at hand."""

import os
import shutil
from pathlib import Path

import pytest

# OpenMP threads that wait would otherwise spin, and take the time of the other test worker
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

SHARED = Path(__file__).parents[1].parent / 'shared'


@pytest.fixture(scope='session', autouse=True)
def empty_home(tmp_path_factory):
    """Whatever the user has fetched must not decide how tests end."""
    os.environ['BIDS_BRAINFM_HOME'] = str(tmp_path_factory.mktemp('home'))


@pytest.fixture(scope='session')
def simulated(tmp_path_factory):
    """fMRIPrep-like dataset of two participants, 210 volumes; tests must not change it."""
    from bids_brainfm.cli.demo import write_dataset

    folder = tmp_path_factory.mktemp('simulated') / 'data'
    write_dataset(folder, participants=2, volumes=210)
    return folder


@pytest.fixture
def dataset(simulated, tmp_path):
    """A copy of the simulated dataset that a test may damage."""
    return Path(shutil.copytree(simulated, tmp_path / 'data'))


@pytest.fixture(scope='session')
def shared():
    """Folder of shared test material."""
    if not SHARED.is_dir():
        pytest.skip('the shared test material is not beside the repository')
    return SHARED


@pytest.fixture
def app(tmp_path, monkeypatch):
    """Run the command in a folder of its own: ``app(data, out, ...)`` returns the exit code.

    In one process, where a test does not ask for more: the others are busy with other tests.
    """
    from bids_brainfm.cli.run import main

    monkeypatch.chdir(tmp_path)

    def run(data, out, *options):
        arguments = [str(data), str(out), 'participant', '-w', str(tmp_path / 'work')]
        defaults = {'--model': 'brainlm-demo', '--nprocs': '1'}
        for name, value in defaults.items():
            if name not in options:
                arguments += [name, value]
        return main([*arguments, *map(str, options)])

    return run
