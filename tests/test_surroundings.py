"""Streams, locale, paths and folders as they are in the field: no run stops for them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bids_brainfm import resources, stopping, surroundings
from bids_brainfm.bids.files import write_text
from bids_brainfm.cli import demo, models
from bids_brainfm.cli.run import main
from bids_brainfm.errors import BrainfmError

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY / 'bids_brainfm' / 'data'
ODD = 'a [b] ? * é中 "c" \'d\' $e;\nf'  # a file system takes all of these
PREPARED = 'import os, sys, bids_brainfm.surroundings as s; s.prepare(); '


def python(code, redirected='', cwd=None, **environment):
    """Run Python code as a command, with standard streams redirected by a shell."""
    command = f'"$0" -c "$1" {redirected}'
    return subprocess.run(
        ['bash', '-c', f'set -o pipefail; {command}', sys.executable, PREPARED + code], text=True,
        capture_output=True, cwd=cwd, check=False,
        env=os.environ | {'PYTHONPATH': str(REPOSITORY)} | environment,
    )  # fmt: skip


@pytest.mark.parametrize('redirected', ['2>&-', '>&-', '<&-', '>&- 2>&- <&-', '2>&1 | head -1'])
def test_closed_streams(tmp_path, redirected):
    """What is written to them is lost, and the next file does not take their numbers."""
    code = (
        'number = os.open(os.devnull, os.O_RDONLY)\n'
        'for i in range(3000): print("é", "x" * 99, flush=True); print("x", file=sys.stderr)\n'
        'sys.stdin.read() if sys.stdin else None\n'
        'os.system("true"); open("ended", "w").write(str(number > 2))'
    )
    ended = python(code, redirected, cwd=tmp_path, LC_ALL='C.UTF-8')
    assert ended.returncode == 0, ended.stderr
    assert 'Traceback' not in ended.stderr + ended.stdout
    assert (tmp_path / 'ended').read_text() == 'True'


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full here')
def test_full_standard_output_is_reported_once():
    ended = python('[print("x", flush=True) for _ in range(9)]', '>/dev/full')
    assert ended.returncode == 0
    assert ended.stderr == 'Standard output cannot be written (No space left on device).\n'


@pytest.mark.parametrize('mode', ['0', ''])
@pytest.mark.parametrize('locale', ['C', 'POSIX'])
def test_text_is_utf8_in_any_locale(tmp_path, locale, mode):
    """Names of files, their content, and what is printed, here and in worker processes."""
    code = (
        'import pathlib, subprocess; print(pathlib.Path(sys.argv[1]).read_text())\n'
        'one = [sys.executable, "-c", "import sys; print(sys.flags.utf8_mode)"]\n'
        'print(subprocess.run(one, capture_output=True, text=True).stdout) if sys.argv[2:] else 0'
    )
    (tmp_path / 'José 中.tsv').write_text('José 中', encoding='utf-8')
    redirected = '"José 中.tsv"' + ' workers' * (mode == '0')
    ended = python(code, redirected, tmp_path, LC_ALL=locale, PYTHONUTF8=mode)
    assert ended.stdout.split('\n')[0] == 'José 中', ended.stderr
    assert mode != '0' or ended.stdout.split('\n')[1] == '1'


def test_name_in_another_encoding_is_refused(tmp_path):
    ended = subprocess.run(
        [sys.executable, '-m', 'bids_brainfm.cli.run', b'in\xe9', 'out', 'participant'],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {'PYTHONPATH': str(REPOSITORY)},
    )  # fmt: skip
    assert ended.returncode == 2
    words = 'is not encoded in UTF-8, as paths must be: rename the file or folder.'
    assert ended.stderr == f'bids_brainfm: error: in\\xe9 {words}\n'
    path = write_text(tmp_path / 'text', 'in\udce9')  # of a file in the input, in a report
    assert path.read_bytes() == b'in\\udce9'


@pytest.mark.parametrize('run', [main, models.main, demo.main])
@pytest.mark.parametrize(
    ('name', 'said'), [('gone', 'does not exist any more'), ('a\nb', 'has a line break')]
)
def test_current_folder_that_cannot_be_used(tmp_path, monkeypatch, capsys, run, name, said):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    if name == 'gone':
        (tmp_path / 'gone').rmdir()
    monkeypatch.setattr(surroundings, '_use_utf8', lambda: None)
    monkeypatch.setattr(surroundings, 'forgive_streams', lambda: None)
    monkeypatch.setattr(sys, 'argv', ['command'])
    assert run() == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('place', ['data', 'out', 'work', 'card', 'home', 'settings'])
def test_name_that_is_too_long_is_reported(simulated, tmp_path, capsys, monkeypatch, place):
    """By the file system, in one sentence."""
    long = tmp_path / ('x' * 300)
    paths = {'data': simulated, 'out': tmp_path / 'out', 'work': tmp_path / 'work'}
    options = ['--model', str(long if place == 'card' else 'brainlm-demo')]
    options += ['--config-file', str(long)] * (place == 'settings')
    if place == 'home':
        monkeypatch.setenv('BIDS_BRAINFM_HOME', str(long))
        options = ['--model', 'brainlm-111m']
    data, out, work = (str(long if place == key else path) for key, path in paths.items())
    assert main([data, out, 'participant', '-w', work, *options]) == 2
    said = capsys.readouterr().err
    assert said.count('bids_brainfm: error: ') == 1
    assert 'Traceback' not in said
    assert str(long) in said


@pytest.mark.parametrize(
    ('folder', 'found'), [('short', True), ('x' * 200, True), ('x' * 200, False)]
)
def test_sockets_of_workers_have_short_paths(tmp_path, monkeypatch, folder, found):
    """A cluster's TMPDIR may be longer than the path of a socket can be."""
    from multiprocessing import process, util

    from bids_brainfm.workflows import plugins

    place = tmp_path / folder
    place.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(place))
    monkeypatch.setattr(process.current_process(), '_config', {})
    monkeypatch.setattr(surroundings, 'LONGEST_FOLDER', len(str(tmp_path)) + 9)
    if not found:
        monkeypatch.setattr(surroundings, 'FOLDERS', ())
    assert plugins._workers_can_be() is found
    assert tempfile.gettempdir() == str(place)
    if found:
        assert (Path(util.get_temp_dir()).parent == place) is (folder == 'short')


def test_home_of_a_user_without_one(monkeypatch):
    """As in a container that runs under a number without a name."""
    for name in ('BIDS_BRAINFM_HOME', 'XDG_CACHE_HOME', 'HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr('pwd.getpwuid', lambda _: {}['nobody'])
    assert resources.home() == Path('/.cache/bids_brainfm')
    monkeypatch.setenv('BIDS_BRAINFM_HOME', 'here')  # nodes run in folders of their own
    assert resources.home() == Path.cwd() / 'here'


@pytest.mark.parametrize(
    'what',
    [
        'out',
        pytest.param('sub-01', marks=pytest.mark.slow),
        pytest.param('dataset_description.json', marks=pytest.mark.slow),
    ],
)
def test_outputs_removed_while_running(simulated, tmp_path, app, capfd, monkeypatch, what):
    """It is one failure of the command, which would report success otherwise."""
    from bids_brainfm.workflows import execution

    def execute(*given, run=execution.execute):
        run(*given)
        path = out / what if what != 'out' else out
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    out = tmp_path / 'out'
    monkeypatch.setattr(execution, 'execute', execute)
    options = ('--stop-after', 'timeseries', '--participant-label', '01')
    assert app(simulated, out, *options) == 1
    said = capfd.readouterr().err
    assert said.count('removed while the command ran: start it again.') == 1
    assert 'Stopped: unexpected' not in said


@pytest.mark.slow
def test_work_folder_removed_while_running(simulated, tmp_path, app, capfd, monkeypatch):
    from bids_brainfm.outputs import series

    def make(*given, make=series.make_series):
        shutil.rmtree(tmp_path / 'work', ignore_errors=True)
        return make(*given)

    monkeypatch.setattr(series, 'make_series', make)
    assert app(simulated, tmp_path / 'out', '--stop-after', 'timeseries') == 1
    said = capfd.readouterr().err
    assert said.count('was removed or emptied while the command ran: start again') == 1
    assert 'Stopped: unexpected' not in said


def test_signal_that_a_library_swallows_is_not_lost(simulated, tmp_path, app, capfd, monkeypatch):
    """The run that is being settled is the last one, also where it is the last of all."""
    from bids_brainfm.outputs import encoding

    def write(*given, write=encoding.write_products):
        write(*given)
        written.append(given[1].name)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    written: list[str] = []
    monkeypatch.setattr(encoding, 'write_products', write)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    assert app(simulated, tmp_path / 'out') == 130
    assert written == ['sub-01_task-rest']
    said = capfd.readouterr().err
    assert 'was stopped; the same command goes on from here' in said.splitlines()[-1]


def test_signal_that_is_swallowed_at_the_end_is_not_lost(tmp_path, monkeypatch):
    """Of any level, and where only reports are written."""
    from bids_brainfm.cli import run

    def swallowing(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            return 0

    monkeypatch.setattr(run, 'run', swallowing)
    assert main([str(tmp_path), str(tmp_path), 'participant', '--reports-only']) == 143
    assert stopping.exit_code() == 143


@pytest.mark.parametrize(('module', 'name'), [(models, 'list_all'), (demo, 'prepare_dataset')])
def test_ctrl_c_is_one_sentence(module, name, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupted)
    assert module.main(['list']) == 130
    assert capsys.readouterr().err.endswith('was stopped.\n')


def test_what_the_system_refuses_is_one_sentence():
    words = 'check the path, its permissions and the free space.'
    for error, match in (
        (
            FileNotFoundError(2, os.strerror(2), '/x'),
            f'^/x cannot be used .No such file.*{words}$',
        ),
        (OSError(5, os.strerror(5)), f'^The system refused .*{words}$'),
        (RuntimeError('Symlink loop from /x'), '^Symlink loop from /x: a link leads to itself.$'),
    ):
        with pytest.raises(BrainfmError, match=match), surroundings.explained():
            raise error
    with pytest.raises(RuntimeError, match='other'), surroundings.explained():
        raise RuntimeError('other')


def tree(out):
    """Names and content of what is written below the participants."""
    return {p.relative_to(out): p.read_bytes() for p in out.glob('sub-*/**/*') if p.is_file()}


@pytest.mark.slow
def test_everything_odd_at_once(simulated, tmp_path):
    """Odd paths, an ASCII locale, a long TMPDIR, closed streams, a private umask: same outputs."""
    odd = tmp_path / ODD.replace('\n', '')
    long = tmp_path / ('t' * 200) / ('t' * 200)
    for folder in (odd, long, tmp_path / 'plain'):
        folder.mkdir(parents=True)
    shutil.copytree(simulated, odd / f'data {ODD}')
    people = 'participant_id\tname\nsub-01\tJosé 中\nsub-02\tx\n'
    (odd / f'data {ODD}' / 'participants.tsv').write_text(people, encoding='utf-8')
    for file in DATA.glob('models/brainlm-demo*'):
        shutil.copy(file, odd / file.name.replace('brainlm-demo.yml', f'{ODD}.yml'))
    plain = os.environ | {'PYTHONPATH': str(REPOSITORY), 'OMP_NUM_THREADS': '1'}
    strange = plain | {
        'LC_ALL': 'C', 'PYTHONUTF8': '0', 'TMPDIR': str(long), 'HOME': str(tmp_path / 'nobody'),
        'BIDS_BRAINFM_HOME': str(odd / 'home'),
    }  # fmt: skip
    cases = [
        (tmp_path / 'plain', plain, simulated, 'brainlm-demo', ''),
        (odd, strange, f'data {ODD}', f'{ODD}.yml', '>&- 2>&- <&-'),
    ]
    for folder, environment, data, model, redirected in cases:
        options = [data, f'out {ODD}', 'participant', '-w', f'work {ODD}', '--nprocs', '2']
        options += ['--model', model]
        shell = f'umask 077; exec "$0" -m bids_brainfm.cli.run "$@" {redirected}'
        ended = subprocess.run(
            ['bash', '-c', shell, sys.executable, *map(str, options)], cwd=folder,
            env=environment, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert not [path for path in (folder / f'work {ODD}').iterdir() if path.is_dir()]
    outs = [folder / f'out {ODD}' for folder, *_ in cases]
    one, two = map(tree, outs)
    assert one.keys() == two.keys()
    assert len(one) > 20
    for name, content in one.items():
        if name.suffix in ('.tsv', '.svg', '.h5'):
            assert two[name] == content, name
    assert all((out / 'sub-01.html').is_file() for out in outs)
    described = json.loads((outs[1] / 'dataset_description.json').read_text())
    assert 'file:///' in described['SourceDatasets'][0]['URL']
