"""Files of other people run nothing, write nowhere else, and nothing uses the network."""

import html
import json
import os
import pickle
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from bids_brainfm.cli.run import main
from bids_brainfm.errors import BrainfmError

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY / 'bids_brainfm' / 'data'
HOSTILE = [
    '../../escaped',
    '/tmp/escaped',
    '..',
    'a/b',
    'a b',
    'a;touch escaped',
    '$(touch escaped)',
]


def everything(folder):
    """All files below a folder, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.write_text, (self.place, 'executed')


@pytest.mark.parametrize('protocol', ['torch', 2, 5])
def test_pickle_that_would_run_code_is_refused(simulated, tmp_path, app, capfd, protocol):
    """Before anything is written, in one sentence; and the trap is one."""
    import torch

    folder, place = tmp_path / 'weights', tmp_path / 'executed'
    folder.mkdir()
    card = (DATA / 'models' / 'brainlm-demo.yml').read_text()
    card = card[: card.index('\nweights:')] + '\nweights: [{name: pytorch_model.bin}]\n'
    (folder / 'mine.yml').write_text(card)
    held = {'vit.layernorm.bias': Trap(place)}
    path = folder / 'pytorch_model.bin'
    if protocol == 'torch':
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held, protocol))
    assert app(simulated, tmp_path / 'out', '--model', folder / 'mine.yml') == 2
    said = capfd.readouterr().err
    assert f'{path} is refused' in said or f'{path} ({path.stat().st_size} bytes) is not' in said
    assert not place.exists()
    assert not list((tmp_path / 'out').glob('*'))
    if protocol == 'torch':
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert place.exists()


@pytest.mark.parametrize(
    'setting', ['participant_label', 'session_label', 'task_id', 'run_id', 'space']
)
def test_labels_that_are_asked_for_lead_nowhere(simulated, tmp_path, app, setting):
    """They choose among what there is; a settings file is no way past the command line."""
    (tmp_path / 'new').mkdir()
    config = tmp_path / 'my.toml'
    for label in HOSTILE:
        before = everything(tmp_path)
        config.write_text(f'{setting} = {json.dumps(label)}\n')
        try:
            typed = app(
                simulated, tmp_path / 'new' / 'out', f'--{setting.replace("_", "-")}', label
            )
        except SystemExit as error:  # of argparse
            typed = error.code
        assert typed == 2
        assert app(simulated, tmp_path / 'new' / 'out', '--config-file', config) == 2
        new = {path.relative_to(tmp_path).parts[0] for path in everything(tmp_path)}
        assert new <= {path.relative_to(tmp_path).parts[0] for path in before} | {'new', 'my.toml'}
    assert not Path('/tmp/escaped').exists()


def test_names_of_derivatives_are_plain(simulated, tmp_path, app, capfd):
    """The name of a dataset becomes part of URIs."""
    for name in HOSTILE:
        assert app(simulated, tmp_path / 'out', '-d', f'{name}={simulated}') == 2
        assert 'use letters, digits' in capfd.readouterr().err


@pytest.mark.slow
def test_names_of_files_that_are_none_of_bids(dataset, tmp_path, app, capfd):
    """They reach no shell and no page; the others are written."""
    hostile = 'task-a;touch escaped $(touch escaped)`touch escaped`<img src=x>"'
    func = dataset / 'sub-01' / 'func'
    for path in list(func.iterdir()):
        shutil.copy(path, func / path.name.replace('task-rest', hostile))
    folder = dataset / 'sub-<img src=x>$(touch escaped)' / 'func'
    folder.mkdir(parents=True)
    for path in (dataset / 'sub-02' / 'func').iterdir():
        shutil.copy(path, folder / path.name.replace('sub-02', folder.parent.name))
    out = tmp_path / 'out'
    assert app(dataset, out) == 1
    said = capfd.readouterr().err
    assert f'Failed: sub-01_{hostile}: its name has a label that is empty' in said
    assert f'Failed: {folder.parent.name}_task-rest: its name has a label that is empty' in said
    assert len(list(out.rglob('*brainlmdemo_embedding.tsv'))) == 2
    assert not list(tmp_path.rglob('*escaped'))
    pages = list(out.glob('*.html'))
    assert len(pages) == 3
    assert not any('<img src=x>' in page.read_text() for page in pages)
    assert '&lt;img src=x&gt;' in (out / 'sub-01.html').read_text()


@pytest.mark.parametrize('field', ['label', 'name', 'weights', 'gradients'])
@pytest.mark.parametrize('name', ['../../escaped', '..', '../x/../../escaped'])
def test_model_card_names_nothing_outside_its_folder(tmp_path, monkeypatch, capsys, field, name):
    """Neither outputs nor what is fetched."""
    from bids_brainfm.cli.models import main

    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'a' / 'home'))
    source = tmp_path / 'source'
    source.mkdir()
    for file in ('escaped', 'model.safetensors'):
        shutil.copy(DATA / 'models' / 'brain-jepa-demo.safetensors', source / file)
    shutil.copy(DATA / 'models' / 'brain-jepa-demo_gradients.csv', source / 'g.csv')
    card = (DATA / 'models' / 'brain-jepa-demo.yml').read_text()
    for old, new in {
        'label': ('label: brainjepademo', f'label: {name}'),
        'name': ('\nname: brain-jepa-demo\n', f'\nname: {name}\n'),
        'weights': ('name: brain-jepa-demo.safetensors', f'name: {name}'),
        'gradients': ('name: brain-jepa-demo_gradients.csv', f'name: {name}'),
    }.items():
        place = {'weights': 'name: model.safetensors', 'gradients': 'name: g.csv'}
        assert new[0] in card
        card = card.replace(*new) if old == field else card.replace(new[0], place.get(old, new[0]))
    card = '\n'.join(line for line in card.splitlines() if 'sha256' not in line)
    folder = tmp_path / 'cards'
    folder.mkdir()
    (folder / 'mine.yml').write_text(card)
    before = everything(tmp_path)
    assert main(['fetch', str(folder / 'mine.yml'), '--from', str(source)]) == 2
    said = capsys.readouterr().err
    assert 'leads out of' in said or 'goes into file names' in said
    home = tmp_path / 'a' / 'home' / 'models'
    assert all(home in path.parents for path in everything(tmp_path) if path not in before)


@pytest.mark.parametrize('field', ['name: Demo424\n', 'space: MNI'])
@pytest.mark.parametrize('name', ['../../escaped', '..', '$(touch escaped)'])
def test_atlas_card_names_nothing_outside_its_folder(simulated, tmp_path, app, capfd, field, name):
    """The name of the atlas is in that of every output."""
    folder = tmp_path / 'a' / 'cards'
    folder.mkdir(parents=True)
    for file in ('Demo424_dseg.tsv', 'Demo424_dseg.nii.gz'):
        shutil.copy(DATA / 'atlases' / file, folder)
    text = (DATA / 'atlases' / 'Demo424.yml').read_text()
    assert field in text
    key = field.partition(':')[0]
    end = '\n' if field.endswith('\n') else ''
    (folder / 'mine.yml').write_text(text.replace(field, f'{key}: {name}{end}', 1))
    model = (DATA / 'models' / 'brainlm-demo.yml').read_text()
    model = model.replace('atlas: Demo424', 'atlas: mine.yml')
    shutil.copy(DATA / 'models' / 'brainlm-demo.safetensors', folder)
    (folder / 'model.yml').write_text(model)
    before = everything(tmp_path)
    assert app(simulated, tmp_path / 'out', '--model', folder / 'model.yml') == 2
    assert 'goes into file names' in capfd.readouterr().err
    assert set(everything(tmp_path)) == set(before)


@pytest.mark.parametrize('name', ['../../escaped', '..', '../x/../../escaped'])
def test_files_of_an_atlas_are_fetched_beside_its_card_only(tmp_path, capsys, name):
    from bids_brainfm.cli.models import main

    folder, source = tmp_path / 'a' / 'cards', tmp_path / 'source'
    for place in (folder, source):
        place.mkdir(parents=True)
    shutil.copy(DATA / 'atlases' / 'Demo424_dseg.tsv', source / 'escaped')
    shutil.copy(DATA / 'atlases' / 'Demo424_dseg.nii.gz', source)
    text = (DATA / 'atlases' / 'Demo424.yml').read_text().replace('embedded: true', '')
    text = text.replace('name: Demo424_dseg.tsv', f'name: {name}\n    url: http://192.0.2.1/x')
    (folder / 'mine.yml').write_text(text)
    before = everything(tmp_path)
    assert main(['fetch', str(folder / 'mine.yml'), '--from', str(source)]) == 2
    assert 'leads out of' in capsys.readouterr().err
    assert set(everything(tmp_path)) == set(before)


def test_a_card_may_name_a_folder_below_its_own(tmp_path):
    """What is refused is leaving, not a path."""
    from bids_brainfm.resources import inside

    assert inside(tmp_path, 'a/b.nii') == tmp_path / 'a' / 'b.nii'
    assert inside(Path('x/../y'), 'z') == Path('x/../y/z')
    for name in ('.', '..', '/etc/passwd', 'a/../../b', ''):
        with pytest.raises(BrainfmError, match='leads out of'):
            inside(tmp_path, name)


# Every process of the command, workers too, notes whom it would ask
WATCH = """
import os, sys

def watch(event, args):
    if event in ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr'):
        asked = args[0]
    elif event in ('socket.connect', 'socket.sendto') and isinstance(args[1], tuple):
        asked = args[1]  # the address of a socket between processes is a path
    else:
        return
    with open(os.environ['ASKED'], 'a') as file:
        file.write(f'{os.getpid()} {event} {asked}\\\\n')

sys.addaudithook(watch)
""".replace('\\\\', '\\')


@pytest.fixture
def isolated(tmp_path):
    """Run a Python command line without a network: (exit code, what was said, who was asked)."""
    cut = ['unshare', '-rn']
    if shutil.which('unshare') is None:
        pytest.skip('there is no unshare to cut the network with')
    if subprocess.run([*cut, 'true'], capture_output=True, check=False).returncode:
        pytest.skip('user namespaces, which cut the network, are not allowed here')
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site' / 'sitecustomize.py').write_text(WATCH)
    asked = tmp_path / 'asked'
    environment = dict(os.environ) | {
        'PYTHONPATH': f'{tmp_path / "site"}{os.pathsep}{REPOSITORY}',
        'ASKED': str(asked),
        'HOME': str(tmp_path),
    }

    def run(*arguments):
        asked.write_text('')
        ended = subprocess.run(
            [*cut, sys.executable, *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return ended.returncode, ended.stderr, asked.read_text()

    return run


def test_the_network_is_cut_and_watched(isolated):
    """What the next test relies on: asking fails, and is noted, in a worker, too."""
    ask = 'import socket; socket.create_connection(("192.0.2.1", 80), 2)'
    code, said, asked = isolated('-c', ask)
    assert code == 1
    assert 'unreachable' in said
    assert '192.0.2.1' in asked
    work = (
        'import multiprocessing as mp, socket\n'
        'pool = mp.get_context("forkserver").Pool(1)\n'
        'print(pool.apply(socket.gethostbyname, ("example.org",)))'
    )
    code, said, asked = isolated('-c', work)
    assert code == 1
    assert 'socket.gethostbyname example.org' in asked


@pytest.mark.slow
def test_no_network_call_offline(simulated, tmp_path, isolated):
    """The whole command with both models, in a home without anything cached: nobody is asked."""
    command = ['-m', 'bids_brainfm.cli.run', simulated, tmp_path / 'out', 'participant']
    command += ['--model', 'brainlm-demo', 'brain-jepa-demo', '--offline', '--nprocs', '2']
    command += ['--short-runs', 'pad']
    code, said, asked = isolated(*command)
    assert code == 0, said
    assert asked == ''
    for label in ('brainlmdemo', 'brainjepademo'):
        assert len(list(tmp_path.glob(f'out/sub-*/func/*_desc-{label}_embedding.tsv'))) == 2
    assert len(list(tmp_path.glob('out/*.html'))) == 2


@pytest.mark.slow
def test_no_network_call_is_made_by_any_library(simulated, tmp_path):
    """The kernel's word for it: libraries in C do not pass by Python's hooks."""
    if shutil.which('strace') is None:
        pytest.skip('there is no strace here')
    trace = tmp_path / 'trace'
    calls = ['strace', '-f', '-qq', '-e', 'trace=connect,sendto', '-o', trace]
    environment = dict(os.environ) | {'PYTHONPATH': str(REPOSITORY)}
    command = [*calls, sys.executable, '-m', 'bids_brainfm.cli.run', simulated, 'out']
    command += ['participant', '--model', 'brainlm-demo', '--offline', '--nprocs', '2']
    ended = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    if not trace.is_file():
        pytest.skip(f'processes cannot be traced here: {ended.stderr.strip()}')
    assert ended.returncode == 0, ended.stderr
    made = trace.read_text()
    assert 'AF_UNIX' in made  # between the command and its workers
    assert 'AF_INET' not in made


class Elements(HTMLParser):
    """Elements of a page, their attributes, and where these lead."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.links = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.links |= {value for name, value in attributes if name in ('href', 'src')}


@pytest.mark.parametrize('hostile', ['"><img src=x onerror=alert(1)>', "' onload='alert(1)"])
def test_reports_show_hostile_outputs_as_text(series, tmp_path, monkeypatch, hostile):
    """Names of files and folders, and every text in a sidecar, may come from anyone."""
    plain = Elements((series / 'sub-01.html').read_text())
    out, slashless = tmp_path / 'out', hostile.replace('/', '')
    shutil.copytree(series, out)
    for path in out.glob('sub-*/func/*.json'):
        path.write_text(json.dumps(spoiled(json.loads(path.read_text()), hostile)))
    (figure,) = out.glob('sub-01/figures/*desc-carpet_bold.svg')
    renamed = {
        'task-rest': f'task-{slashless}', 'Demo424_': f'Demo424_model-{slashless}_',
        '_desc': f'_{slashless}_desc', 'rest': '[rest]?%20&amp;',
    }  # fmt: skip
    for old, new in renamed.items():
        shutil.copy(figure, figure.with_name(figure.name.replace(old, new)))
    for name, words in ((f'sub-01_task-{slashless}', hostile), ('sub-01_task-rest', hostile)):
        log = out / 'sub-01' / 'log' / f'failed-{name}_atlas-Demo424.txt'
        log.parent.mkdir(exist_ok=True)
        log.write_text(f'{words}\nTraceback')
    (series_json,) = out.glob('sub-01/func/*timeseries.json')
    other = series_json.name.replace('task-rest', f'task-{slashless}')
    shutil.copy(series_json, series_json.with_name(other))
    (out / 'logs' / 'CITATION.md').write_text(f'# {hostile}\n\n{hostile}\n\n- {hostile}\n')
    shutil.copytree(out / 'sub-01', out / f'sub-{slashless}')
    monkeypatch.chdir(tmp_path)
    assert main([str(out), str(out), 'participant', '--reports-only']) == 0
    pages = [Elements(path.read_text()) for path in out.glob('*.html')]
    assert len(pages) == 2
    for page in pages:
        assert page.tags <= plain.tags | {'ul'}
        assert page.attributes <= plain.attributes
        assert all(link.startswith(('./sub-', '#')) for link in page.links)
    assert (out / 'sub-01.html').read_text().count(html.escape(hostile)) > 9
    shown = [unquote(link) for link in pages[0].links | pages[1].links if link.startswith('./')]
    assert all((out / link).is_file() for link in shown)


@pytest.mark.parametrize('kept', [(), ('Atlas', 'Warnings', 'Excluded'), ('all',)])
def test_report_names_a_malformed_sidecar(series, tmp_path, kept):
    """Entries are missing, or of other types; the report is written all the same."""
    from bids_brainfm.outputs.reporting import report

    out = tmp_path / 'out'
    shutil.copytree(series, out)
    (path,) = out.glob('sub-01/func/*_stat-mean_timeseries.json')
    content = json.loads(path.read_text())
    malformed = {'ResultsVersion': content['ResultsVersion']} | {
        key: [value] if kept == ('all',) else value
        for key, value in content.items()
        if key in kept or (kept == ('all',) and key != 'ResultsVersion')
    }
    path.write_text(json.dumps(malformed))
    page = report(out, '01', {}).read_text()
    assert f'the sidecar {path.name} is damaged: run the participant level again' in page


@pytest.fixture(scope='module')
def series(simulated, tmp_path_factory):
    """Parcel series of one participant, with their report."""
    folder = tmp_path_factory.mktemp('series')
    options = ('-w', folder / 'work', '--model', 'brainlm-demo', '--stop-after', 'timeseries')
    options += ('--participant-label', '01', '--nprocs', '1')
    assert main([*map(str, (simulated, folder / 'out', 'participant', *options))]) == 0
    return folder / 'out'


def spoiled(value, hostile):
    """Put a text into every text of a sidecar."""
    if isinstance(value, dict):
        return {key: spoiled(item, hostile) for key, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item, hostile) for item in value]
    return f'{value} {hostile}' if isinstance(value, str) else value
