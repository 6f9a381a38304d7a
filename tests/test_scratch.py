"""As little as a container may give: no temporary folder, no home, no shared memory."""

import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bids_brainfm.cli import scratch
from bids_brainfm.cli.run import run_group
from bids_brainfm.config import Settings
from bids_brainfm.outputs import contrast
from bids_brainfm.workflows.plugins import choose_plugin

ROOT = Path(__file__).parents[1]
# A command line, in a process that finds no temporary folder but the one that is named
BARE = """
import os, sys, tempfile
tempfile._candidate_tempdir_list = lambda: list(filter(None, [os.environ.get('TMPDIR')]))
from bids_brainfm.cli.run import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*arguments):
    """Run a command without temporary folder and home."""
    absent = ('TMPDIR', 'MPLCONFIGDIR', 'TEMP', 'TMP')
    env = {k: v for k, v in os.environ.items() if k not in absent}
    env |= {'HOME': '/proc/none', 'PYTHONPATH': str(ROOT)}  # there not even root can write
    command = [sys.executable, '-c', BARE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.slow
def test_run_and_reports_without_temporary_folder_and_home(simulated, tmp_path):
    out, work = tmp_path / 'out', tmp_path / 'work'
    participant = [simulated, out, 'participant', '--participant-label', '01']
    run = bare(*participant, '--model', 'brainlm-demo', '-w', work)
    assert run.returncode == 0, run.stderr
    assert 'matplotlib' not in run.stderr.lower()  # it warns where it has to look for a place
    report = out / 'sub-01.html'
    page = report.read_text()
    report.unlink()

    again = bare(*participant, '--reports-only')
    assert again.returncode == 0, again.stderr
    assert report.read_text() == page
    assert {path.name for path in out.glob('logs/*/*')} >= {'bids_brainfm.log'}
    assert not list(out.glob('logs/*/tmp*'))


@pytest.fixture
def nowhere(monkeypatch):
    """No temporary folder and no home, in this process."""
    found = lambda: list(filter(None, [os.environ.get('TMPDIR')]))
    monkeypatch.setattr(tempfile, 'tempdir', None)
    monkeypatch.setattr(tempfile, '_candidate_tempdir_list', found)
    monkeypatch.setenv('HOME', '/proc/none')
    for name in ('TMPDIR', 'MPLCONFIGDIR'):
        monkeypatch.setenv(name, '')  # so that it is put back afterwards
        monkeypatch.delenv(name)


def test_places_are_given_where_there_are_none(nowhere, tmp_path):
    scratch.keep_in(tmp_path)
    assert tempfile.gettempdir() == str(tmp_path)
    assert os.environ['MPLCONFIGDIR'] == str(tmp_path)


def test_passing_place_is_gone_afterwards(nowhere, tmp_path):
    with scratch.passing(tmp_path):
        place = Path(tempfile.gettempdir())
        assert place.parent == tmp_path
    assert not place.exists()


def test_group_level_has_a_passing_place(nowhere, tmp_path, monkeypatch):
    places = []

    def write(*_):
        places.append(Path(tempfile.gettempdir()))
        return places

    monkeypatch.setattr(contrast, 'find', lambda *_: None)
    monkeypatch.setattr(contrast, 'write', write)
    settings = Settings(
        bids_dir=tmp_path, output_dir=tmp_path, analysis_level='group',
        options={'contrast': ('task', 'nback', 'rest')},
    )  # fmt: skip
    assert run_group(settings, 'now') == 0
    assert places[0].parent == tmp_path / 'logs' / 'now'
    assert not places[0].exists()


def test_places_that_are_there_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in ('TMPDIR', 'MPLCONFIGDIR'):
        monkeypatch.delenv(name, raising=False)
    scratch.keep_in(tmp_path / 'other')
    assert 'TMPDIR' not in os.environ
    assert 'MPLCONFIGDIR' not in os.environ


def test_without_shared_memory_there_are_no_workers(monkeypatch, tmp_path, caplog):
    settings = Settings(bids_dir=tmp_path, output_dir=tmp_path / 'out', nprocs=2)
    assert type(choose_plugin(settings, None, 3)).__name__ == 'MultiProc'

    def refuse():
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(multiprocessing, 'Lock', refuse)
    monkeypatch.setattr(logging.getLogger('bids_brainfm'), 'propagate', True)
    assert type(choose_plugin(settings, None, 3)).__name__ == 'LinearPlugin'
    assert '/dev/shm' in caplog.text
