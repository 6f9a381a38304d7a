"""Kill -9, SIGTERM, lack of memory, full disks, damaged caches, jobs side by side.

After each of them the same command gives the files of a run that nothing disturbed, and what was
wrong is said in one sentence.
"""

import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.files import TEMPORARY, _machine, atomic, remove_leftovers
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.spec import resolve_model
from bids_brainfm.resources import Resource, fetch, is_present

REPOSITORY = Path(__file__).parents[1]
SPACE = 'space-MNI152NLin2009cAsym'
ONE, TWO = (f'sub-{label}_task-rest_{SPACE}_atlas-Demo424' for label in ('01', '02'))
COPY = 'tpl-MNI152NLin2009cAsym/tpl-MNI152NLin2009cAsym_atlas-Demo424_res-02_dseg.nii.gz'
LABELS = [f'{number:02d}' for number in range(1, 11)]

# What strikes once, in the process where it happens: an event that Python audits, of a file.
SITE = """
import os, signal, sys, time
EVENT, FILE, FATE, MARK = os.environ['FAULT'].split()

def watch(event, args):
    if event == EVENT and any(str(arg).endswith(FILE) for arg in args):
        try:
            with open(MARK, 'x') as mark:
                mark.write(str(os.getpid()))
        except FileExistsError:
            return
        name, _, whom = FATE.partition('-')
        number = getattr(signal, name)
        if whom == 'parent':
            import multiprocessing
            os.kill(multiprocessing.parent_process().pid, number)
            time.sleep(600)
        elif whom == 'group':
            os.killpg(0, number)
            time.sleep(600)
        os.kill(os.getpid(), number)

sys.addaudithook(watch)
"""
PARCELLATION = f'open sub-02_task-rest_{SPACE}_desc-preproc_bold.nii.gz'
ENCODING = f'open {TWO}_stat-coverage_bold.tsv'  # read when the encoder gathers its windows
# the file is whole then, but has a temporary name
WRITING_SERIES = f'os.rename {TWO}_stat-pearsoncorrelation_relmat.tsv'
WRITING_EMBEDDING = f'os.rename {ONE}_desc-brainlmdemo_embedding.json'
WRITING_REPORT = 'os.rename sub-02.html'


def start(folder, data, out, *options, fault=None, **others):
    """Start the command, which `fault` ('EVENT FILE FATE') then strikes."""
    environment = dict(os.environ) | {'PYTHONPATH': str(REPOSITORY), 'PYTHONFAULTHANDLER': '1'}
    if fault:
        site = folder / 'site'
        site.mkdir(exist_ok=True)
        (site / 'sitecustomize.py').write_text(SITE)
        environment['PYTHONPATH'] = f'{site}{os.pathsep}{REPOSITORY}'
        environment['FAULT'] = f'{fault} {folder / "struck"}'
    command = [sys.executable, '-m', 'bids_brainfm.cli.run', data, out, 'participant']
    command += ['--model', 'brainlm-demo', '-w', folder / 'work', *options]
    # a shell's background job ignores SIGINT, and so would the command
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=heard, **others,
    )  # fmt: skip


def end(process, seconds=300):
    """Exit code and output; a process that does not end fails the test, and shows where it is."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # all threads of all processes are printed
        said, _ = process.communicate(timeout=60)
        pytest.fail(f'no end after {seconds} s:\n{said}')
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def tree(folder):
    """Content of every file but those in the folders of single runs of the command."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file() and not re.match(r'logs/\d', str(path.relative_to(folder)))
    }


def assert_same(out, reference):
    """The same files with the same content, and nothing else."""
    found, wanted = tree(out), tree(reference)
    assert sorted(found) == sorted(wanted)
    assert [name for name, content in wanted.items() if found[name] != content] == []


def assert_whole(out, reference):
    """What has its final name has its final content, but for what tells of the fault."""
    wanted = tree(reference)
    told = ('.html', '.txt', '.toml', '.log')
    for name, content in tree(out).items():
        if not name.endswith(told) and '.brainfm-' not in name:
            assert content == wanted[name], name


def temporaries(out):
    return [path.name for path in out.rglob('.brainfm-*')]


@pytest.fixture(scope='module')
def reference(simulated, tmp_path_factory):
    """What a run writes that nothing disturbs."""
    folder = tmp_path_factory.mktemp('reference')
    code, said = end(start(folder, simulated, folder / 'out', '--nprocs', '1'))
    assert code == 0, said
    return folder / 'out'


@pytest.fixture(scope='module')
def tokens(simulated, tmp_path_factory):
    """Outputs of one participant, with tokens."""
    folder = tmp_path_factory.mktemp('tokens')
    options = ('--participant-label', '01', '--tokens')
    code, said = end(start(folder, simulated, folder / 'out', *options))
    assert code == 0, said
    return folder / 'out'


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize(
    'moment',
    [
        PARCELLATION,
        ENCODING,
        WRITING_EMBEDDING,
        WRITING_SERIES,
        WRITING_REPORT,
    ],
)
def test_killed_and_started_again(simulated, reference, tmp_path, moment):
    """Kill -9 at any moment leaves whole files only, and the same command completes them."""
    out = tmp_path / 'out'
    killed = start(tmp_path, simulated, out, '--nprocs', '1', fault=f'{moment} SIGKILL')
    assert end(killed)[0] == -signal.SIGKILL
    assert_whole(out, reference)
    if moment.startswith('os.rename'):
        assert len(temporaries(out)) == 1
    before = {path: path.stat().st_mtime_ns for path in out.rglob(f'{ONE}_*.tsv')}
    code, said = end(start(tmp_path, simulated, out, '--nprocs', '1'))
    assert code == 0, said
    assert_same(out, reference)
    if moment != PARCELLATION:  # what was complete was not made again
        kept = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
        assert any('timeseries' in path.name for path in kept)


@slow
def test_leftovers_do_not_pile_up(simulated, tmp_path):
    """A command that is killed each time has removed what it found."""
    out = tmp_path / 'out'
    for moment in (WRITING_SERIES, PARCELLATION):
        (tmp_path / 'struck').unlink(missing_ok=True)
        killed = start(tmp_path, simulated, out, '--nprocs', '1', fault=f'{moment} SIGKILL')
        assert end(killed)[0] == -signal.SIGKILL
        assert len(temporaries(out)) == (moment == WRITING_SERIES)


@pytest.mark.slow
def test_killed_worker_is_said(simulated, reference, tmp_path):
    """As by the kernel for want of memory: a sentence at once, no hang, and others' files stay."""
    out = tmp_path / 'out'
    options = ('--nprocs', '2')
    killed = start(tmp_path, simulated, out, *options, fault=f'{WRITING_SERIES} SIGKILL')
    code, said = end(killed)
    assert code == 1
    assert said.count('a worker process was killed, most often because memory ran out') == 1
    assert 'lower --nprocs' in said
    assert 'Traceback' not in said
    assert temporaries(out) == []
    assert_whole(out, reference)
    code, said = end(start(tmp_path, simulated, out, *options))
    assert code == 0, said
    for path in out.glob('logs/crash-*'):
        path.unlink()
    assert_same(out, reference)


@slow
def test_workers_leave_ctrl_c_to_the_command(simulated, tmp_path):
    """A terminal sends it to all; here it is sent to a worker alone, which goes on."""
    fault = f'{WRITING_SERIES} SIGINT'
    code, said = end(start(tmp_path, simulated, tmp_path / 'out', '--nprocs', '2', fault=fault))
    assert code == 0, said
    assert (tmp_path / 'struck').is_file()


@slow
def test_workers_do_not_outlive_the_command(simulated, tmp_path):
    """Kill -9 of the process that gives the work ends those that do it."""
    moment = f'{WRITING_SERIES} SIGKILL-parent'
    killed = start(tmp_path, simulated, tmp_path / 'out', '--nprocs', '2', fault=moment)
    # its standard error is closed only when the last of them has ended
    assert end(killed)[0] == -signal.SIGKILL
    worker = int((tmp_path / 'struck').read_text())
    for _ in range(200):
        if not Path(f'/proc/{worker}').exists():
            break
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@slow
@pytest.mark.parametrize(
    ('moment', 'nprocs', 'fate', 'code'),
    [
        (PARCELLATION, 1, 'SIGTERM', 143),
        (WRITING_EMBEDDING, 1, 'SIGTERM', 143),
        (WRITING_EMBEDDING, 1, 'SIGINT', 130),
        (WRITING_SERIES, 2, 'SIGTERM-group', 143),
        (WRITING_SERIES, 2, 'SIGTERM-parent', 143),
        (WRITING_SERIES, 2, 'SIGINT-group', 130),
    ],
)
def test_stopped_and_started_again(simulated, reference, tmp_path, moment, nprocs, fate, code):
    """SIGTERM or Ctrl-C, to one process or to all: a sentence, no debris, and on from there."""
    out, options = tmp_path / 'out', ('--nprocs', nprocs)
    stopped = start(tmp_path, simulated, out, *options, fault=f'{moment} {fate}')
    found, said = end(stopped)
    assert found == code, said
    assert 'was stopped; the same command goes on from here' in said.splitlines()[-1]
    assert 'Traceback' not in said
    assert temporaries(out) == []
    assert list((tmp_path / 'work').iterdir()) == []
    assert_whole(out, reference)
    assert len(tree(out)) < len(tree(reference))
    assert not list(out.glob('logs/crash-*'))
    found, said = end(start(tmp_path, simulated, out, *options))
    assert found == 0, said
    assert_same(out, reference)


def test_what_nobody_foresaw_is_said_in_a_line(simulated, tmp_path, app, capfd, monkeypatch):
    """Nipype's last words, and where the others are."""
    from bids_brainfm.workflows import execution

    def fail(*_):
        raise RuntimeError('Traceback:\n\tKeyError: x\n')

    monkeypatch.setattr(execution, 'execute', fail)
    assert app(simulated, tmp_path / 'out') == 1
    said = capfd.readouterr().err
    assert f'Stopped: unexpected RuntimeError: KeyError: x (crash files are in {tmp_path}' in said
    assert 'Traceback' not in said


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full here')
def test_a_log_that_cannot_be_written_says_nothing(capfd):
    """Its lines go to the terminal anyway; a traceback beside each would hide them."""
    from bids_brainfm.cli.run import _LogFile

    log = _LogFile('/dev/full')
    log.handle(logging.makeLogRecord({'msg': 'disk full'}))
    with contextlib.suppress(OSError):
        log.close()
    assert capfd.readouterr() == ('', '')


def test_leftovers_are_removed_when_their_process_has_ended(tmp_path):
    """Those of a process that runs stay, and of another machine, which cannot be asked, a day."""
    ended = subprocess.Popen(['true'])
    ended.wait()
    machine, mine, others = _machine(), os.getpid(), 'ffffffff'
    func = tmp_path / 'sub-01' / 'func'
    func.mkdir(parents=True)
    (tmp_path / 'group' / 'scale').mkdir(parents=True)
    names = {
        'dead': f'{TEMPORARY}-{machine}-{ended.pid}-abc.tsv',
        'alive': f'{TEMPORARY}-{machine}-{mine}-abc.tsv',
        'young': f'{TEMPORARY}-{others}-{ended.pid}-abc.tsv',
        'old': f'{TEMPORARY}-{others}-{mine}-abc.nii.gz',
        'strange': '.nfs0123',
    }
    for folder in (tmp_path, func, tmp_path / 'group' / 'scale'):
        for what, name in names.items():
            (folder / name).touch()
            when = time.time() - {'young': 80_000, 'old': 90_000}.get(what, 200_000)
            os.utime(folder / name, (when, when))
    remove_leftovers(tmp_path, ['01', '02'])
    stay = sorted(names[what] for what in ('alive', 'young', 'strange'))
    assert sorted(path.name for path in func.iterdir()) == stay
    assert sorted(path.name for path in (tmp_path / 'group' / 'scale').iterdir()) == stay
    assert sorted(path.name for path in tmp_path.glob('.*')) == stay


def test_leftover_that_cannot_be_removed_stops_nobody(tmp_path, monkeypatch):
    """As another user's in a shared folder."""
    left = tmp_path / f'{TEMPORARY}-{_machine()}-{2**30}-abc.tsv'
    left.touch()

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, 'unlink', refuse)
    remove_leftovers(tmp_path, [])
    assert left.exists()


def test_names_of_temporaries_tell_their_process(tmp_path):
    """What a test of leftovers takes for granted."""
    with atomic(tmp_path / 'a.nii.gz') as temporary:
        start = f'{TEMPORARY}-{_machine()}-{os.getpid()}-'
        assert temporary.name.startswith(start)
        assert temporary.name.endswith('.nii.gz')


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many kilobytes; the function that it gives makes it larger."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = []

    def make(kilobytes):
        options = f'{"remount," if mounted else ""}size={kilobytes}k'
        command = ['mount', '-t', 'tmpfs', '-o', options, 'none', folder]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f'no small disk can be mounted here: {made.stderr.strip()}')
        mounted.append(folder)
        return folder

    if os.geteuid() != 0 or shutil.which('mount') is None:
        pytest.skip('only root can mount a small disk')
    yield make
    if mounted:
        subprocess.run(['umount', '-l', folder], check=True)


NO_SPACE = os.strerror(28)


@slow
@pytest.mark.parametrize(
    ('kilobytes', 'nprocs', 'code'),
    [
        (8, 1, 2),  # not even the log's folder
        (12, 1, 2),  # not even the dataset's own files
        (80, 2, 1),  # no series, no report
        (7000, 1, 1),  # one participant
        (3000, 2, 1),  # no series
        (3000, 1, 1),
    ],
)
def test_output_disk_full(simulated, reference, tmp_path, small_disk, kilobytes, nprocs, code):
    """A sentence names the folder, only whole files stand, and with space the run completes."""
    out = small_disk(kilobytes) / 'out'
    options = ('--nprocs', nprocs)
    found, said = end(start(tmp_path, simulated, out, *options))
    assert found == code, said
    assert re.search(rf'{out}/\S+ cannot be written \({NO_SPACE}\).*free space', said)
    assert 'Traceback' not in said
    assert 'unexpected' not in said
    assert 'work folder' not in said
    assert '\\n' not in said
    if kilobytes == 80:
        assert re.search(rf'Stopped: {out}/sub-\d+.html cannot be written', said)
    assert temporaries(out) == []
    assert_whole(out, reference)
    small_disk(50_000)
    found, said = end(start(tmp_path, simulated, out, *options))
    assert found == 0, said
    for path in out.glob('logs/crash-*'):
        path.unlink()
    assert_same(out, reference)


@slow
@pytest.mark.parametrize('nprocs', [1, 2])
def test_work_disk_full(simulated, reference, tmp_path, small_disk, nprocs):
    """The graph wants space in the work folder; the sentence names it."""
    out, work = tmp_path / 'out', small_disk(8) / 'work'
    options = ('--nprocs', nprocs, '-w', work)
    code, said = end(start(tmp_path, simulated, out, *options))
    assert code == 1
    assert re.search(rf'disk of the work folder {work}/\S+,.* is full \({NO_SPACE}\)', said)
    assert 'Traceback' not in said
    assert_whole(out, reference)
    small_disk(50_000)
    code, said = end(start(tmp_path, simulated, out, *options))
    assert code == 0, said
    for path in out.glob('logs/crash-*'):
        path.unlink()
    assert_same(out, reference)


@pytest.fixture(scope='module')
def ten(simulated, tmp_path_factory):
    """Ten participants, and what one command writes of them."""
    folder = tmp_path_factory.mktemp('ten')
    data = folder / 'data'
    shutil.copytree(simulated, data)
    for label in LABELS[2:]:
        for path in (simulated / 'sub-01').rglob('*'):
            if path.is_file():
                new = str(path.relative_to(simulated)).replace('sub-01', f'sub-{label}')
                (data / new).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, data / new)
    code, said = end(start(folder, data, folder / 'alone', '--nprocs', '1'), 400)
    assert code == 0, said
    return data, folder / 'alone'


@slow
def test_forty_jobs_of_which_many_are_killed(ten, tmp_path):
    """Eight at a time, some killed at random: the outputs of one command; others are refused."""
    (data, alone), out, rng = ten, tmp_path / 'out', random.Random(0)
    others = (11, 29)  # commands with other settings

    def job(number):
        people = rng.sample(LABELS, 2)
        options = ('--denoise', '36P') if number in others else ('--participant-label', *people)
        process = start(tmp_path, data, out, '--nprocs', '1', '--omp-nthreads', '1', *options)
        if number not in others and rng.random() < 0.5:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(2, 40))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return end(process, 400)

    with ThreadPoolExecutor(8) as pool:
        ended = list(pool.map(job, range(40)))
    for number, (code, said) in enumerate(ended):
        if number in others:
            assert code == 2, said
            assert "denoise was 'simple' and is now '36P'" in said
        else:
            assert code in (0, -signal.SIGKILL), said
    assert any(code == -signal.SIGKILL for code, _ in ended)
    code, said = end(start(tmp_path, data, out, '--nprocs', '1'), 400)
    assert code == 0, said
    assert_same(out, alone)


@slow
def test_different_settings_started_together(simulated, tmp_path):
    """In an empty folder: the first one has it, and the outputs are its own."""
    out, options = tmp_path / 'out', ('--stop-after', 'timeseries', '--nprocs', '1')
    names = ('simple', '36P', 'none', 'simple')
    jobs = [start(tmp_path, simulated, out, *options, '--denoise', name) for name in names]
    ended = [end(job, 200) for job in jobs]
    record = json.loads((out / 'logs' / 'settings' / 'atlas-Demo424.json').read_text())
    for name, (code, said) in zip(names, ended, strict=True):
        assert code == (0 if name == record['denoise'] else 2), said
        assert 'Traceback' not in said
    made = [json.loads(path.read_text()) for path in out.rglob('*stat-mean_timeseries.json')]
    assert [sidecar['Denoising']['Name'] for sidecar in made] == [record['denoise']] * 2


def damage(path, how, share=667):
    """Cut a file to a share of it, to nothing, or between rows; empty pages; turn a bit."""
    content = path.read_bytes()
    if how == 'pages':
        a, b = 20 * 4096, 26 * 4096
        content = content[:a] + bytes(b - a) + content[b:]
    elif how == 'rows':
        content = content[: content.rindex(b'\n', 0, len(content) // 2) + 1]
    elif how == 'bit':
        place = len(content) * share // 1000
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    else:
        content = content[: int(len(content) * how)]
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'how'),
    [
        (f'func/{ONE}_stat-mean_timeseries.tsv', 0.6),
        (f'func/{ONE}_stat-mean_timeseries.tsv', 'rows'),
        (f'func/{ONE}_stat-mean_timeseries.tsv', 'bit'),
        (f'func/{ONE}_stat-mean_timeseries.json', 'BrainMean'),
        (f'func/{ONE}_stat-coverage_bold.tsv', 'rows'),
        (f'func/{ONE}_stat-mean_timeseries.json', 0.6),
        (f'func/{ONE}_desc-brainlmdemo_embedding.tsv', 0),
        (f'func/{ONE}_desc-brainlmdemo_embedding.h5', 0.6),
        (f'func/{ONE}_desc-brainlmdemo_embedding.h5', 'bit'),
        (f'../sourcedata/atlases/{COPY}', 'bit'),
    ],
)
def test_damaged_output_is_made_again(simulated, tokens, tmp_path, app, capfd, name, how):
    """What the outputs say is done is looked at, not believed, and what is damaged is named."""
    out = Path(shutil.copytree(tokens, tmp_path / 'out'))
    options = ('--participant-label', '01', '--tokens')
    path = out / 'sub-01' / name
    if how == 'BrainMean':
        sidecar = json.loads(path.read_text()) | {'BrainMean': 0}
        path.write_text(json.dumps(sidecar, indent=2) + '\n')
    else:
        damage(path, how)
    if 'sourcedata' in name:  # it is looked at when a run of its space is made
        (out / 'sub-01' / 'func' / f'{ONE}_stat-mean_timeseries.tsv').unlink()
    assert app(simulated, out, *options) == 0
    assert_same(out, tokens)
    if 'sourcedata' not in name:
        assert re.search(
            rf'WARNING \S+{path.stem}\S+ has .*: it is made again', capfd.readouterr().err
        )


@pytest.mark.slow
def test_damaged_record_of_settings_is_said(tokens, simulated, tmp_path, app, capfd):
    """It is not guessed what the outputs were made with; without outputs it is written anew."""
    out = Path(shutil.copytree(tokens, tmp_path / 'out'))
    record = out / 'logs' / 'settings' / 'desc-brainlmdemo.json'
    damage(record, 0.5)
    options = ('--participant-label', '01', '--tokens')
    assert app(simulated, out, *options) == 2
    said = capfd.readouterr().err
    assert f'{record} is damaged' in said
    assert 'remove this file' in said
    record.unlink()
    assert app(simulated, out, *options) == 0
    assert_same(out, tokens)
    damage(record, 0.5)
    shutil.rmtree(out / 'sub-01')
    assert app(simulated, out, *options) == 0
    assert_same(out, tokens)


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A home with a model and an atlas that were fetched there, and the folder they came from."""
    source, home = tmp_path / 'source', tmp_path / 'home'
    source.mkdir()
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(home))
    data = REPOSITORY / 'bids_brainfm' / 'data'
    text = (data / 'models' / 'brainlm-demo.yml').read_text()
    text = text[: text.index('\nweights:')] + '\nweights: [{name: model.safetensors}]\n'
    card = tmp_path / 'mine.yml'
    card.write_text(text.replace('name: brainlm-demo', 'name: mine'))
    shutil.copy(data / 'models' / 'brainlm-demo.safetensors', source / 'model.safetensors')
    return card, source, home


def bring(card, source):
    from bids_brainfm.cli.models import main

    return main(['fetch', str(card), '--from', str(source)])


@pytest.mark.parametrize('how', [0, 0.5, 0.97, 'bit'])
def test_damaged_weights_are_refused_and_fetched_again(fetched, how):
    """Even a single bit, with which they would load and give other numbers."""
    card, source, home = fetched
    assert bring(card, source) == 0
    whole = resolve_model(str(card), home)
    weights = home / 'models' / 'mine' / 'model.safetensors'
    damage(weights, how)
    with pytest.raises(BrainfmError, match=r'damaged.*fetch'):
        resolve_model(str(card), home)
    assert bring(card, source) == 0
    assert resolve_model(str(card), home) == whole


@pytest.mark.parametrize('record', ['', 'deadbeef  a\n'])
def test_damaged_record_of_a_checksum_is_written_again(tmp_path, record):
    """It breaks no later command."""
    (tmp_path / 'source').mkdir()
    (tmp_path / 'source' / 'a').write_text('content')
    resource = Resource('a', tmp_path / 'home' / 'a')
    fetch([resource], tmp_path / 'source')
    note = tmp_path / 'home' / 'a.sha256'
    whole = note.read_text()
    note.write_text(record)
    is_present(resource)
    fetch([resource], tmp_path / 'source')
    assert note.read_text() == whole


@pytest.mark.parametrize(
    ('how', 'share'),
    [(0, 0), (0.5, 0), (0.97, 0), *(('bit', share) for share in range(1, 999, 83))],
)
def test_damaged_image_of_an_atlas_is_refused(tmp_path, how, share):
    """In one sentence, whatever the reader of the image makes of it."""
    data = REPOSITORY / 'bids_brainfm' / 'data' / 'atlases'
    for name in ('Demo424.yml', 'Demo424_dseg.tsv', 'Demo424_dseg.nii.gz'):
        shutil.copy(data / name, tmp_path / name)
    image = tmp_path / 'Demo424_dseg.nii.gz'
    damage(image, how, share)
    with pytest.raises(BrainfmError, match=str(image)):
        load_atlas(tmp_path / 'Demo424.yml', tmp_path).image_for(SPACE.removeprefix('space-'))


def test_damaged_image_that_was_made_is_made_again(tmp_path):
    """By fetching, which else takes a file that stands for one that is right."""
    data, home = REPOSITORY / 'bids_brainfm' / 'data' / 'atlases', tmp_path / 'home'
    for name in ('Demo424_dseg.tsv', 'Demo424_dseg.nii.gz'):
        shutil.copy(data / name, tmp_path / name)
    shutil.copy(data / 'Demo424_dseg.nii.gz', tmp_path / 'other.nii.gz')
    card = tmp_path / 'mine.yml'
    card.write_text(
        'name: Mine\nparcels: 424\nlicence: none\nfiles:\n'
        '- {name: Demo424_dseg.tsv, role: table}\n'
        '- {name: Demo424_dseg.nii.gz, role: part, parcels: [1, 424]}\n'
        '- {name: none.nii.gz, role: image, space: MNI, resolution: 2, made: '
        '{by: overlay, of: [Demo424_dseg.nii.gz], provenance: a test}}\n'
        '- {name: other.nii.gz, role: image, space: Other, resolution: 2}\n'
    )
    assert bring(card, tmp_path) == 0
    image = load_atlas(card, home).image_for('MNI').path
    whole, when = image.read_bytes(), image.stat().st_mtime_ns
    assert bring(card, tmp_path) == 0
    assert image.stat().st_mtime_ns == when
    for how in (0, 0.6, 'bit'):
        damage(image, how)
        with pytest.raises(BrainfmError, match=str(image)):
            load_atlas(card, home).image_for('MNI')
        assert bring(card, tmp_path) == 0
        assert image.read_bytes() == whole
