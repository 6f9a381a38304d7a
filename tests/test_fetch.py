"""Fetching against a real server on this machine, and from folders."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bids_brainfm.cli.models import main
from bids_brainfm.errors import BrainfmError
from bids_brainfm.resources import Resource, fetch, forget, is_present, recorded_sha256, sha256_of

CONTENT = bytes(range(256)) * 20000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content`` with Range and If-Range; can break off after some bytes."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if self.path == '/absent':
            self.send_error(404)
            return
        body, start = server.content, 0
        wanted = self.headers.get('Range')
        if wanted and self.headers.get('If-Range', server.etag) == server.etag:
            start = int(wanted.removeprefix('bytes=').removesuffix('-'))
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Length', str(len(body) - start))
        self.send_header('ETag', server.etag)
        self.end_headers()
        stop = start + server.break_after if server.break_after else None
        self.wfile.write(body[start:stop])

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def server():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.content, server.etag, server.break_after, server.requests = CONTENT, '"1"', None, []
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def resource(server, tmp_path):
    return Resource('w.bin', tmp_path / 'home' / 'w.bin', f'{server.url}/w.bin', SHA256)


def test_download_then_left_alone(server, resource):
    fetch([resource])
    assert resource.target.read_bytes() == CONTENT
    fetch([resource])
    assert len(server.requests) == 1
    assert sorted(p.name for p in resource.target.parent.iterdir()) == ['w.bin', 'w.bin.sha256']


def test_resumes_where_it_broke_off(server, resource):
    server.break_after = 3_000_000
    with pytest.raises(BrainfmError, match='the next attempt goes on from there'):
        fetch([resource])
    assert not resource.target.exists()
    server.break_after = None
    fetch([resource])
    assert server.requests[-1]['Range'] == 'bytes=3000000-'
    assert resource.target.read_bytes() == CONTENT


def test_changed_file_is_not_glued_to_the_old_part(server, tmp_path):
    resource = Resource('w.bin', tmp_path / 'w.bin', f'{server.url}/w.bin')
    server.break_after = 1000
    with pytest.raises(BrainfmError):
        fetch([resource])
    server.break_after, server.etag, server.content = None, '"2"', CONTENT[::-1]
    fetch([resource])
    assert resource.target.read_bytes() == CONTENT[::-1]


def test_part_longer_than_the_file_starts_anew(server, resource):
    resource.target.parent.mkdir()
    resource.target.with_name('w.bin.part').write_bytes(CONTENT + b'x')
    resource.target.with_name('w.bin.part.version').write_text('"1"')
    fetch([resource])
    assert resource.target.read_bytes() == CONTENT


def test_wrong_content_never_gets_the_name(server, resource):
    server.content = b'something else'
    found = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(BrainfmError, match=f'{found} where {SHA256}'):
        fetch([resource])
    assert list(resource.target.parent.iterdir()) == []


def test_damaged_file_is_fetched_again(server, resource):
    fetch([resource])
    resource.target.write_bytes(b'damaged')
    assert not is_present(resource)
    fetch([resource])
    assert resource.target.read_bytes() == CONTENT


def test_unknown_sha256_is_recorded_and_holds(server, tmp_path):
    resource = Resource('w.bin', tmp_path / 'w.bin', f'{server.url}/w.bin')
    fetch([resource])
    assert recorded_sha256(resource.target) == SHA256
    resource.target.write_bytes(b'damaged')
    assert not is_present(resource)


def test_what_is_forgotten_leaves_no_trace(server, resource):
    fetch([resource])
    forget(resource)
    assert list(resource.target.parent.iterdir()) == []
    forget(resource)


@pytest.mark.parametrize('where', ['nobody_listens', 'absent'])
def test_unreachable_names_url_and_command(server, tmp_path, where):
    url = f'{server.url}/absent' if where == 'absent' else 'http://127.0.0.1:9/w.bin'
    with pytest.raises(BrainfmError) as caught:
        fetch([Resource('w.bin', tmp_path / 'w.bin', url)], command='bids_brainfm_models fetch X')
    assert url in str(caught.value)
    assert '`bids_brainfm_models fetch X --from DIR`' in str(caught.value)


def test_from_folder_by_sha256_whatever_the_name(resource, tmp_path):
    source = tmp_path / 'usb' / 'deep'
    source.mkdir(parents=True)
    (source / 'renamed.dat').write_bytes(CONTENT)
    fetch([resource], source_dir=tmp_path / 'usb')
    assert sha256_of(resource.target) == SHA256


def test_from_folder_refuses_same_name_with_other_content(resource, tmp_path):
    (tmp_path / 'usb').mkdir()
    (tmp_path / 'usb' / 'w.bin').write_bytes(b'other')
    with pytest.raises(BrainfmError, match=f'where {SHA256} was expected'):
        fetch([resource], source_dir=tmp_path / 'usb')
    assert not resource.target.exists()


def test_from_folder_by_name_is_never_a_guess(tmp_path):
    resource = Resource('config.json', tmp_path / 'home' / 'config.json')
    for size in ('13M', '111M'):
        (tmp_path / 'usb' / size).mkdir(parents=True)
        (tmp_path / 'usb' / size / 'config.json').write_text(size)
    with pytest.raises(BrainfmError, match='2 files called config'):
        fetch([resource], source_dir=tmp_path / 'usb')
    fetch([resource], source_dir=tmp_path / 'usb' / '111M')
    assert resource.target.read_text() == '111M'


def test_from_folder_names_all_that_lacks(tmp_path):
    (tmp_path / 'usb').mkdir()
    resources = [Resource(name, tmp_path / 'home' / name) for name in ('a.bin', 'b.bin')]
    resources.append(Resource('c.bin', tmp_path / 'home' / 'c.bin', optional=True))
    with pytest.raises(BrainfmError, match=r'does not hold a\.bin, b\.bin: add'):
        fetch(resources, source_dir=tmp_path / 'usb')


def test_unwritable_place_is_one_sentence(server, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(BrainfmError, match='BIDS_BRAINFM_HOME'):
        fetch([Resource('w', tmp_path / 'file' / 'w', f'{server.url}/w')])


@pytest.fixture
def checkpoint(tmp_path):
    """Folder with the two files of a checkpoint that has the sizes of brainlm-111m."""
    source = tmp_path / 'usb'
    source.mkdir()
    sizes = {'model_type': 'vit_mae', 'hidden_size': 768, 'num_hidden_layers': 12}
    (source / 'config.json').write_text(json.dumps(sizes))
    (source / 'model.safetensors').write_bytes(b'weights')
    return source


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.fixture
def own_card(tmp_path):
    """A user's card that asks for a pickle, and a folder with the weights as safetensors."""
    import yaml
    from safetensors.torch import save_file

    from bids_brainfm.models.weights import build, initialise

    cards = Path(__file__).parents[1] / 'bids_brainfm' / 'data' / 'models'
    text = yaml.safe_load((cards / 'brain-jepa-demo.yml').read_text())
    names = ('config.json', 'pytorch_model.bin')
    text |= {'name': 'mine', 'atlas': 'A424', 'weights': [{'name': name} for name in names]}
    card, source = tmp_path / 'mine.yml', tmp_path / 'usb'
    card.write_text(yaml.safe_dump(text))
    source.mkdir()
    (source / 'config.json').write_text(json.dumps(text['config']))
    save_file(initialise(build(text['config']), 1).state_dict(), source / 'model.safetensors')
    shutil.copy(cards / 'brain-jepa-demo_gradients.csv', source)
    return card, source


def test_command_fetches_a_model_in_either_format(own_card, tmp_path, monkeypatch, capsys):
    card, source = own_card
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    code, out, _ = run(capsys, 'fetch', card, '--from', source)
    assert code == 0
    assert 'Apache-2.0' in out.splitlines()[0]
    assert 'fetch A424' in out  # the atlas is still to be had
    fetched = tmp_path / 'home' / 'models' / 'mine'
    for name in ('model.safetensors', 'brain-jepa-demo_gradients.csv'):
        assert (fetched / name).read_bytes() == (source / name).read_bytes()


def test_command_replaces_what_a_broken_fetch_left(own_card, tmp_path, monkeypatch, capsys):
    """Wrong weights that came before something else was found to be lacking do not stay."""
    card, source = own_card
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    wrong = tmp_path / 'wrong'
    wrong.mkdir()
    shutil.copy(source / 'config.json', wrong)
    (wrong / 'model.safetensors').write_bytes(b'<html>')
    code, _, err = run(capsys, 'fetch', card, '--from', wrong)
    assert code == 2
    assert 'does not hold brain-jepa-demo_gradients.csv' in err
    assert run(capsys, 'fetch', card, '--from', source)[0] == 0
    fetched = tmp_path / 'home' / 'models' / 'mine' / 'model.safetensors'
    assert fetched.read_bytes() == (source / 'model.safetensors').read_bytes()


def test_table_beside_a_card_is_left_alone(own_card, tmp_path, monkeypatch, capsys):
    card, source = own_card
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    table = card.with_name('brain-jepa-demo_gradients.csv')
    (source / table.name).rename(table)
    assert run(capsys, 'fetch', card, '--from', source)[0] == 0
    assert sorted(p.name for p in card.parent.glob('*gradients*')) == [table.name]


def test_command_lists_what_is_present(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    shutil.copytree(checkpoint, tmp_path / 'home' / 'models' / 'brainlm-111m')
    _, out, _ = run(capsys, 'list')
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert ' yes ' in rows['brainlm-111m']
    assert ' no ' in rows['brainlm-13m']
    assert 'yes (embedded)' in rows['Demo424']
    assert ' MB ' in rows['brain-jepa-demo']  # what lies beside a card counts too
    assert rows['Schaefer2018Tian2020'].split()[2] == 'no'


def test_command_keeps_no_weights_that_do_not_load(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    code, _, err = run(capsys, 'fetch', 'brainlm-111m', '--from', checkpoint)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert list((tmp_path / 'home' / 'models' / 'brainlm-111m').iterdir()) == []


def test_command_refuses_another_model_under_the_name(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    code, _, err = run(capsys, 'fetch', 'brainlm-650m', '--from', checkpoint)
    assert code == 2
    assert 'hidden_size 768, but brainlm-650m has 1280' in err
    assert list((tmp_path / 'home' / 'models' / 'brainlm-650m').iterdir()) == []


@pytest.mark.parametrize('name', ['nope', 'nope.yml'])
def test_command_unknown_name(name, capsys):
    code, _, err = run(capsys, 'fetch', name)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert 'brainlm-111m' in err


def test_command_fetches_the_atlas_from_renamed_files(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    source = tmp_path / 'usb'
    source.mkdir()
    for number, path in enumerate(sorted((shared / 'atlases').glob('*A424*'))):
        shutil.copy(path, source / f'file{number}')
    code, out, err = run(capsys, 'fetch', 'A424', '--from', source)
    assert (code, err) == (0, '')
    assert 'GPL-3.0' in out
    _, out, _ = run(capsys, 'list')
    assert next(line for line in out.splitlines() if line.startswith('A424')).split()[2] == 'yes'


def test_command_fetches_the_atlas_of_brain_jepa(shared, tmp_path, monkeypatch, capsys):
    """From a folder with everything; then a folder that lacks the cortex says what is lacking."""
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    name = 'Schaefer2018Tian2020'
    source = tmp_path / 'usb'
    source.mkdir()
    for path in (shared / 'atlases').glob('*Tian_Subcortex_S3*.nii*'):
        shutil.copy(path, source)
    code, _, err = run(capsys, 'fetch', name, '--from', source)
    assert code == 2
    assert 'is ready except for space MNI152NLin6Asym and MNI152NLin2009cAsym' in err
    for space in ('MNI152NLin6Asym', 'MNI152NLin2009cAsym'):
        part = f'tpl-{space}_res-02_atlas-Schaefer2018_desc-400Parcels17Networks_dseg.nii.gz'
        assert f'{source} does not hold {part}: add' in err
    _, out, _ = run(capsys, 'list')
    row = next(line for line in out.splitlines() if line.startswith(name))
    assert 'only for fsLR' in row
    code, out, err = run(capsys, 'fetch', name, '--from', shared / 'atlases')
    assert (code, err) == (0, '')
    assert 'MIT' in out.splitlines()[0]
    assert 'Melbourne Subcortex Atlas' in out.splitlines()[0]
    _, out, _ = run(capsys, 'list')
    row = next(line for line in out.splitlines() if line.startswith(name))
    assert row.split()[2] == 'yes'
