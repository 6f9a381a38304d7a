"""What is written to and read from a shared output folder is what one command would write.

Settings of commands side by side, inputs replaced while they are read, and damaged outputs.
"""

import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bids_brainfm.bids import claims, freshness
from bids_brainfm.bids.dataset import Record
from bids_brainfm.bids.files import has_ended, owner, write_matrix, write_table
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.bids.settings import SETTINGS, claim_settings, recorded_digest
from bids_brainfm.cli.run import main
from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.series import coverage_path, read_series
from bids_brainfm.training.store import INDEX, Store, is_complete, write_store


@pytest.fixture(scope='module')
def series(simulated, tmp_path_factory):
    """Parcel series of the demonstration; tests must not change them."""
    folder = tmp_path_factory.mktemp('integrity')
    assert participant(simulated, folder / 'out', folder, '--stop-after', 'timeseries') == 0
    return folder / 'out'


def participant(data, out, folder, *options):
    """Run the participant level in this process; returns the exit code."""
    given = ('--model', 'brainlm-demo', '--nprocs', '1', '-w', folder / 'work', *options)
    return main(list(map(str, (data, out, 'participant', *given))))


def turn_bit(path, keep_date=False):
    """Turn a bit in the middle of a file, which keeps its length and, if asked, its date."""
    content, state = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if keep_date:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


# Settings of commands side by side


def claim(folder, value, outputs=()):
    found = [Record(folder / name, {}, 'x', '.tsv') for name in outputs]
    claim_settings(folder, 'desc-x', {'a': value}, iter(found))


def recorded(folder):
    return json.loads((folder / 'logs' / 'settings' / 'desc-x.json').read_text())['a']


def claimed_by(folder, process, value):
    """Leave the claim of another process, and the record that it wrote."""
    code = (
        'import sys; from pathlib import Path; from bids_brainfm.bids.settings import *;'
        f'claim_settings(Path(sys.argv[1]), "desc-x", {{"a": {value}}}, iter(()))'
    )
    subprocess.run([sys.executable, '-c', code, folder], check=True)
    (left,) = (folder / 'logs').glob('claim-desc-x_*.txt')
    machine, _, _ = owner().partition('-')
    digest = left.stem.rpartition('-')[2]
    return left.rename(left.with_name(f'claim-desc-x_{machine}-{process}-{digest}.txt'))


def test_settings_of_a_running_command_are_not_replaced(tmp_path):
    """Nor those of one that was killed a moment ago; those of earlier ones without outputs are."""
    running = subprocess.Popen(['sleep', '60'])
    try:
        left = claimed_by(tmp_path, running.pid, 1)
        with pytest.raises(BrainfmError, match=r'another command .*a was 1 and is now 2; process'):
            claim(tmp_path, 2)
        claim(tmp_path, 1)
    finally:
        running.kill()
        running.wait()
    claims.withdraw(tmp_path)
    with pytest.raises(BrainfmError, match='If it was killed, try again in a minute'):
        claim(tmp_path, 2)
    os.utime(left, (0, 0))
    claim(tmp_path, 2)
    assert recorded(tmp_path) == 2
    claims.withdraw(tmp_path)
    assert list((tmp_path / 'logs').glob('claim-*')) == []


def test_same_settings_go_on_after_a_kill(tmp_path):
    """At once, and the claim of the killed command is removed."""
    ended = subprocess.Popen(['true'])
    ended.wait()
    left = claimed_by(tmp_path, ended.pid, 1)
    claim(tmp_path, 1)
    assert not left.exists()
    assert len(list((tmp_path / 'logs').glob('claim-*'))) == 1


def test_claims_of_other_machines_count_for_a_day(tmp_path):
    left = claimed_by(tmp_path, 1, 1)
    machine, _, _ = owner().partition('-')
    left = left.rename(left.with_name(left.name.replace(machine, 'ffffffff')))
    assert has_ended('ffffffff-1') is None
    with pytest.raises(BrainfmError, match='another command'):
        claim(tmp_path, 2)
    yesterday = time.time() - 90_000
    os.utime(left, (yesterday, yesterday))
    claim(tmp_path, 2)


@pytest.mark.parametrize('code', [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_settings_are_claimed_without_hard_links(tmp_path, monkeypatch, code):
    """As on exFAT, and many network and user file systems."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, 'link', refuse)
    claim(tmp_path, 1)
    claim(tmp_path, 1, ['an output'])
    with pytest.raises(BrainfmError, match='a was 1 and is now 2'):
        claim(tmp_path, 2, ['an output'])
    assert recorded(tmp_path) == 1


def test_record_is_not_written_anew_for_outputs_of_other_settings(tmp_path):
    """Where a person has removed it; sidecars know the settings."""
    claim(tmp_path, 1)
    record = tmp_path / 'logs' / 'settings' / 'desc-x.json'
    (tmp_path / 'a_x.tsv').touch()
    settings = {SETTINGS: {'desc-x': recorded_digest(tmp_path, 'desc-x')}}
    freshness.write_sidecar(tmp_path / 'a_x.tsv', settings)
    record.unlink()
    with pytest.raises(BrainfmError, match=r'a_x\.tsv was made with other .* missing'):
        claim(tmp_path, 2, ['a_x.tsv'])
    assert not record.exists()
    claim(tmp_path, 1, ['a_x.tsv'])
    assert recorded(tmp_path) == 1


def _claim_often(folder, value, start):
    """Claim for each of 50 kinds of outputs, and twice; returns what was granted."""
    time.sleep(max(0, start - time.time()))
    granted = []
    for name in [f'desc-{number}' for number in range(25)] * 2:
        try:
            claim_settings(folder, name, {'a': value, 'b': 'long' * 1000}, iter(()))
        except BrainfmError:
            continue
        granted.append(name)
    return value, granted


@pytest.mark.slow
def test_a_thousand_claims_leave_one_valid_record(tmp_path):
    """Of 20 processes with 4 settings: those of the record are granted, all others refused."""
    with multiprocessing.get_context('spawn').Pool(20) as pool:
        start = time.time() + 10
        asked = [(tmp_path, number % 4, start) for number in range(20)]
        found = pool.starmap(_claim_often, asked, chunksize=1)
    paths = sorted((tmp_path / 'logs' / 'settings').iterdir())
    assert sorted(path.name for path in paths) == sorted(f'desc-{n}.json' for n in range(25))
    agreed = {path.stem: json.loads(path.read_text())['a'] for path in paths}
    for value, granted in found:
        assert sorted(granted) == sorted([n for n, known in agreed.items() if known == value] * 2)


def test_outputs_of_other_settings_are_refused(simulated, series, tmp_path, capfd, monkeypatch):
    """Also where the record does not tell: files of another folder, at all levels."""
    monkeypatch.chdir(tmp_path)
    other, out = tmp_path / 'other', Path(shutil.copytree(series, tmp_path / 'out'))
    options = ('--stop-after', 'timeseries')
    label = ('--participant-label', '02', '--denoise', '36P')
    assert participant(simulated, other, tmp_path, *options, *label) == 0
    shutil.rmtree(out / 'sub-02')
    shutil.copytree(other / 'sub-02', out / 'sub-02')
    before = {path: path.read_bytes() for path in out.rglob('sub-*/func/*')}
    capfd.readouterr()
    assert participant(simulated, out, tmp_path, *options) == 2
    assert re.search(
        r'sub-02\S+ was made with other settings of atlas-Demo424', capfd.readouterr().err
    )
    assert main([str(out), str(out), 'group', '--scale-stats']) == 2
    assert 'made with different settings of atlas-Demo424' in capfd.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob('sub-*/func/*')}


def test_settings_that_were_replaced_meanwhile_stop_a_run(simulated, tmp_path, monkeypatch, capfd):
    """As by a person; nothing is written with settings that the record does not have."""
    from bids_brainfm.outputs import series as module

    compute, out = module.compute_series, tmp_path / 'out'

    def compute_and_replace(run, task):
        record = out / 'logs' / 'settings' / 'atlas-Demo424.json'
        record.write_text(json.dumps(json.loads(record.read_text()) | {'denoise': '36P'}))
        return compute(run, task)

    monkeypatch.setattr(module, 'compute_series', compute_and_replace)
    options = ('--stop-after', 'timeseries', '--participant-label', '01')
    assert participant(simulated, out, tmp_path, *options) == 1
    assert 'no longer has the settings that this command started with' in capfd.readouterr().err
    assert list(out.rglob('*_timeseries.*')) == []


# Inputs


def test_input_that_changed_is_found(tmp_path):
    """Whichever it is, and where it is gone."""
    paths = {role: tmp_path / role for role in ('bold', 'mask', 'confounds', 'sidecar')}
    bold, mask, confounds, sidecar = paths.values()
    run = BoldRun(
        'sub-01_task-x', {}, 'data', tmp_path, bold, mask=mask, confounds=confounds,
        sidecars=(sidecar,),
    )  # fmt: skip
    for path in paths.values():
        path.write_text('1')
    before = freshness.input_fingerprints(run)
    freshness.check_unchanged(run, before)
    for path in paths.values():
        state = path.stat()
        path.write_text('2')
        for _ in range(2):
            with pytest.raises(BrainfmError, match=f'task-x: bids:data:{path.name} changed'):
                freshness.check_unchanged(run, before)
            path.unlink(missing_ok=True)
        path.write_text('1')
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.slow
def test_input_replaced_while_a_command_runs(dataset, tmp_path, monkeypatch, capfd):
    """While it is read, so that the run fails; and later, so that it is read again next time."""
    from bids_brainfm.outputs import series as module
    from bids_brainfm.signals import bold

    parcellate, write, out = bold.parcellate, module.write, tmp_path / 'out'
    (path,) = (dataset / 'sub-01' / 'func').glob('*desc-brain_mask.nii.gz')
    options = ('--stop-after', 'timeseries', '--participant-label', '01')

    def replace_after_reading(*args):
        found = parcellate(*args)
        shutil.copyfile(path, path.with_name('new')).replace(path)
        return found

    def replace_and_write(*args):
        os.utime(path)
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(bold, 'parcellate', replace_after_reading)
        assert participant(dataset, out, tmp_path, *options) == 1
    assert f'{path.name} changed while it was read: run the same' in capfd.readouterr().err
    assert list(out.rglob('*stat-mean_timeseries.*')) == []
    with monkeypatch.context() as patch:
        patch.setattr(module, 'write', replace_and_write)
        assert participant(dataset, out, tmp_path, *options) == 0
    (sidecar,) = out.rglob('*stat-mean_timeseries.json')
    inputs = lambda: json.loads(sidecar.read_text())['InputFiles']
    date = lambda: next(s['Modified'] for uri, s in inputs().items() if uri.endswith(path.name))
    assert date() != freshness.fingerprint(path)['Modified']
    assert participant(dataset, out, tmp_path, *options) == 0
    assert date() == freshness.fingerprint(path)['Modified']


# Damaged outputs


@pytest.fixture
def output(tmp_path):
    """A table and an image that share a sidecar."""
    table, image = tmp_path / 'sub-01_map.tsv', tmp_path / 'sub-01_map.nii.gz'
    table.write_text('a\tb\n1\t2\n')
    image.write_bytes(b'image')
    freshness.write_sidecar(table, {'Level': 1.5, 'Nothing': None, 'List': (1, np.nan)})
    return table, image


def test_damage_is_found(output):
    for path in output:
        assert freshness.damage(path, contents=True) is None
        content, date = path.read_bytes(), path.stat().st_mtime_ns
        for damaged, words in (
            (content[:-1], f'has {len(content) - 1} bytes in place of {len(content)}'),
            (content + b'\n', f'has {len(content) + 1} bytes'),
            (b'', 'has 0 bytes'),
        ):
            path.write_bytes(damaged)
            os.utime(path, ns=(date, date))
            assert words in freshness.damage(path)
        path.write_bytes(content)
        turn_bit(path)
        assert 'has other contents' in freshness.damage(path)  # it is newer than its sidecar
        os.utime(path, ns=(date, date))
        assert freshness.is_whole(path)  # not read
        assert 'has other contents' in freshness.damage(path, contents=True)
        with pytest.raises(
            BrainfmError, match=f'{path.name} has other contents .* remove it, and'
        ):
            freshness.check_contents(path)
        path.unlink()
        assert freshness.damage(path) == 'is missing'


def test_changed_sidecar_is_no_sidecar(output):
    """Whatever is changed in it; its layout does not matter, and earlier ones are accepted."""
    sidecar = output[0].with_suffix('.json')
    content = json.loads(sidecar.read_text())
    assert content['List'] == [1, None]
    sidecar.write_text(json.dumps(content, sort_keys=True))
    assert freshness.read_sidecar(sidecar) == content
    for change in ({'Level': 0}, {'New': 1}, {'FileSizes': {}}, {'FileChecksums': {'.json': ''}}):
        sidecar.write_text(json.dumps(content | change))
        assert freshness.read_sidecar(sidecar) is None, change
    assert 'has no valid sidecar' in freshness.damage(output[0])
    for entry in ('FileChecksums', 'FileSizes'):
        del content[entry]
        sidecar.write_text(json.dumps(content))
        assert all(freshness.is_whole(path, contents=True) for path in output)


def test_copies_are_read_once(output, monkeypatch):
    """Data with later dates than their sidecar, as after cp without -p."""
    later = time.time() + 1
    os.utime(output[0], (later, later))
    read, checksum = [], freshness.checksum
    monkeypatch.setattr(freshness, 'checksum', lambda path: read.append(path) or checksum(path))
    for _ in range(3):
        assert freshness.is_whole(output[0])
        os.utime(output[0], (later - 10, later - 10))
    assert read == [output[0]]


@pytest.mark.parametrize(
    ('entry', 'value'),
    [
        ('BrainMean', 0), ('BrainMean', None), ('BrainMean', '700'), ('BrainMean', True),
        ('StartTime', None), ('StartTime', 'x'), ('FlaggedVolumes', [12]),
        ('FlaggedVolumes', [-1]), ('FlaggedVolumes', [1.0]), ('FlaggedVolumes', None),
        ('RepetitionTime', 0), ('RepetitionTime', 2000), ('RepetitionTime', None),
    ],
)  # fmt: skip
def test_impossible_values_of_series_are_refused(tmp_path, entry, value):
    """Also in a sidecar that has no checksum."""
    path = tmp_path / 'sub-01_task-rest_atlas-X_stat-mean_timeseries.tsv'
    write_matrix(path, np.ones((12, 2), np.float32), ['a', 'b'])
    write_table(coverage_path(path), {'Node': ['a', 'b'], 'coverage': [1.0, 0.5]})
    freshness.write_sidecar(coverage_path(path), {})
    content = {
        'RepetitionTime': 2.0, 'BrainMean': 700.0, 'StartTime': 0.0, 'FlaggedVolumes': [0, 11],
    }  # fmt: skip
    freshness.write_sidecar(path, content)
    assert read_series(path).flagged.nonzero()[0].tolist() == [0, 11]
    content[entry] = value
    path.with_suffix('.json').write_text(json.dumps(content))
    with pytest.raises(BrainfmError, match=r'impossible|is not a repetition time'):
        read_series(path)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['stat-mean_timeseries.tsv', 'stat-coverage_bold.tsv'])
def test_series_are_compared_before_they_are_encoded(simulated, series, tmp_path, capfd, name):
    """A turned bit that no date shows is found when the file is read, and the run made again."""
    out = Path(shutil.copytree(series, tmp_path / 'out'))
    (path,) = out.rglob(f'sub-01_*_{name}')
    whole = path.read_bytes()
    turn_bit(path, keep_date=True)
    options = ('--stop-after', 'timeseries')
    assert participant(simulated, out, tmp_path, *options) == 0
    assert path.read_bytes() != whole  # nothing was left to do, so it was not read
    with pytest.raises(BrainfmError, match=f'{path.name} has other contents'):
        read_series(next(out.rglob('sub-01_*_stat-mean_timeseries.tsv')))
    capfd.readouterr()
    assert participant(simulated, out, tmp_path, '--participant-label', '01') == 0
    assert f'{path} has other contents than were written' in capfd.readouterr().err
    assert path.read_bytes() == whole


def test_group_level_compares_what_it_reads(series, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path(shutil.copytree(series, tmp_path / 'out'))
    group = lambda option: main([str(out), str(out), 'group', option])
    assert group('--scale-stats') == group('--covariance') == 0
    (path,) = out.rglob('sub-01_*_stat-mean_timeseries.tsv')
    turn_bit(path, keep_date=True)
    capfd.readouterr()
    for option in ('--scale-stats', '--covariance'):
        assert group(option) == 2
        assert f'{path} has other contents' in capfd.readouterr().err


def test_group_products_are_compared_when_read(series, tmp_path, monkeypatch):
    from bids_brainfm.outputs import covariance
    from bids_brainfm.signals.scale import load_scale_stats

    monkeypatch.chdir(tmp_path)
    out = Path(shutil.copytree(series, tmp_path / 'out'))
    for option in ('--scale-stats', '--covariance'):
        assert main([str(out), str(out), 'group', option]) == 0
    stats = next((out / 'group' / 'scale').glob('*stat-series*.json'))
    load_scale_stats(stats, 'Demo424', 424)
    content = json.loads(stats.read_text())
    content['Median'][7] = 1
    stats.write_text(json.dumps(content))
    with pytest.raises(BrainfmError, match='not those that were written'):
        load_scale_stats(stats, 'Demo424', 424)
    (sums,) = (out / 'group' / 'covariance').glob('*.h5')
    covariance.load(sums, '01', 424)
    turn_bit(sums, keep_date=True)
    for read in (lambda: covariance.load(sums, '01', 424), lambda: covariance.atlas_of(sums)):
        with pytest.raises(BrainfmError, match=r'has other contents .* fit it again'):
            read()


def test_files_that_are_not_of_a_covariance_are_refused(tmp_path):
    """Without a sidecar to compare it with, and whatever shape it claims."""
    import h5py

    from bids_brainfm.outputs import covariance

    path = tmp_path / 'x.h5'
    content = {'sums': np.zeros((2, 3, 3, 3)), 'folds': [0, 1], 'participants': ['01', '02']}
    wrong = [None, np.zeros(3), np.zeros((2, 3, 1, 3)), np.full((2, 3, 3, 3), np.nan)]
    changes = [{'sums': values} for values in wrong] + [{'folds': [0]}, {'participants': [1, 2]}]
    for change in changes:
        with h5py.File(path, 'w') as file:
            file.attrs['atlas'] = 'x'
            for name, values in (content | change).items():
                if values is not None:
                    file[name] = values
        with pytest.raises(BrainfmError, match='is not a file that bids_brainfm OUT OUT group'):
            covariance.load(path, '01', 3)
    with h5py.File(path, 'w') as file:  # takes no space on disk
        file.create_dataset('sums', (10**6, 3, 3, 3), 'f4', chunks=(1, 3, 3, 3))
        file['folds'], file['participants'] = [0], ['01']
    with pytest.raises(BrainfmError, match='is not a file that'):
        covariance.load(path, '01', 3)


def test_damaged_texts_of_a_dataset(tmp_path, caplog, monkeypatch):
    """Failures and the methods text, which are read again later."""
    from bids_brainfm.bids.dataset import find_failure
    from bids_brainfm.outputs.outcome import read_failures
    from bids_brainfm.reports import methods

    monkeypatch.setattr('bids_brainfm.reports.methods.LOGGER.propagate', True)
    log = tmp_path / 'sub-01' / 'log'
    log.mkdir(parents=True)
    (log / 'failed-sub-01_task-x_atlas-A.txt').write_bytes(b'sub-01_task-x: \xff\n')
    assert find_failure(tmp_path, 'sub-01_task-x', 'A', None) == r'\xff'
    assert read_failures(tmp_path, '01')[0].error == r'sub-01_task-x: \xff'
    for name in 'ab':
        methods.write_methods(tmp_path, {name: (f'Text {name}.', [])})
    part = tmp_path / 'logs' / 'methods' / 'a.json'
    part.write_text(part.read_text().replace('Text a', 'Test a'))
    methods.write_methods(tmp_path, {'c': ('Text c.', [])})
    text = methods.read_methods(tmp_path)
    assert 'Text b.' in text
    assert 'Test a.' not in text
    assert 'a.json is damaged' in caplog.text
    methods.methods_path(tmp_path).write_bytes(b'\xff')
    assert methods.read_methods(tmp_path) == r'\xff'


@pytest.fixture
def store(tmp_path):
    """Series of three runs, of 12 samples each, prepared for a training."""
    samples = lambda n: (np.full((12, 3), n, np.float32), np.zeros(12, bool))
    write_store(tmp_path, 3, [(f'run{n}', f'{n}', 'train', samples(n)) for n in range(3)])
    return tmp_path


@pytest.mark.parametrize(('kind', 'place'), [('f32', 12 * 3 * 4 + 5), ('flags', 13)])
def test_damaged_series_of_a_training(store, kind, place):
    """The run is named, and its store is prepared anew by the same command."""
    path = store / f'shard-0000.{kind}'
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert is_complete(store)
    opened = Store(store)
    assert opened.window(opened.runs[0], 0, 12)[0].shape == (3, 12)
    with pytest.raises(BrainfmError, match=r'series of run1 .* run the same command again'):
        opened.window(opened.runs[1], 3, 2)
    assert not is_complete(store)


def test_incomplete_series_of_a_training(store):
    assert is_complete(store)
    path = store / 'shard-0000.f32'
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert not is_complete(store)
    path.write_bytes(whole)
    index = store / INDEX
    index.write_text(index.read_text().replace('"samples": 12', '"samples": 11'))
    assert not is_complete(store)
    with pytest.raises(BrainfmError, match=r'index\.json is missing or damaged'):
        Store(store)


def test_checksums_of_a_folder(tmp_path):
    """As of a checkpoint: each file, and the list itself; a folder without is taken as it is."""
    (tmp_path / 'sub').mkdir()
    paths = [tmp_path / 'a', tmp_path / 'sub' / 'b']
    for path in paths:
        path.write_text('content')
    freshness.check_checksums(tmp_path, '')
    freshness.write_checksums(tmp_path)
    for path in (*paths, tmp_path / freshness.CHECKSUMS_FILE):
        freshness.check_checksums(tmp_path, 'remove it')
        whole = path.read_bytes()
        turn_bit(path)
        with pytest.raises(BrainfmError, match=f'{path.name} is not as it was written: remove it'):
            freshness.check_checksums(tmp_path, 'remove it')
        path.write_bytes(whole)
    paths[1].unlink()
    with pytest.raises(BrainfmError, match='b is not as it was written'):
        freshness.check_checksums(tmp_path, 'remove it')
