"""JSON, YAML and TSV files are read within bounds; numbers and sizes in them are, too."""

import json
import time

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_brainfm import documents
from bids_brainfm.atlases import cards as atlases
from bids_brainfm.bids.description import read_description
from bids_brainfm.bids.run import BoldRun, repetition_time, start_time
from bids_brainfm.documents import read_json, read_toml, read_tsv, read_yaml
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import load_card
from bids_brainfm.models.weights import build
from bids_brainfm.signals.confounds import Tables, read_confounds
from bids_brainfm.signals.scale import load_scale_stats
from bids_brainfm.signals.strategy import load_strategy, override
from bids_brainfm.training.recipe import load_recipe
from bids_brainfm.validation import DATA

READERS = {'.json': read_json, '.toml': read_toml, '.tsv': read_tsv, '.yml': read_yaml}
LAUGHS = '\n'.join(
    [f'a0: &a0 [{", ".join(["lol"] * 9)}]']
    + [f'a{n}: &a{n} [{", ".join([f"*a{n - 1}"] * 9)}]' for n in range(1, 30)]
)
MERGES = '\n'.join(
    ['a0: &a0 {x: 1, y: 2}']
    + [f'a{n}: &a{n}\n  <<: [{", ".join([f"*a{n - 1}"] * 9)}]' for n in range(1, 12)]
)


def put(path, text):
    path.write_text(text, encoding='utf-8')
    return path


def test_a_byte_order_mark_is_no_part_of_the_content(tmp_path):
    mark = '\ufeff'
    assert read_json(put(tmp_path / 'a.json', f'{mark}{{"a": 1}}')) == {'a': 1}
    assert read_yaml(put(tmp_path / 'a.yml', f'{mark}a: 1')) == {'a': 1}
    table = read_tsv(put(tmp_path / 'a.tsv', f'{mark}a\tb\n1\t2\n'))
    assert list(table.columns) == ['a', 'b']
    put(tmp_path / 'dataset_description.json', f'{mark}{{"Name": "x"}}')
    assert read_description(tmp_path) == {'Name': 'x'}


@pytest.mark.parametrize(
    ('name', 'text', 'reason'),
    [
        ('deep.json', '[' * 100_000, 'nests'),
        ('deep.json', '{"a":' * 60 + '1' + '}' * 60, 'nests'),
        ('list.json', '[1]', 'no JSON object but a list'),
        ('deep.yml', '[' * 1500, 'nests'),
        ('deep.yml', 'a: ' + '[' * 60 + ']' * 60, 'nests'),
        ('laughs.yml', LAUGHS, 'more than 100,000 values'),
        ('merges.yml', MERGES, 'more than 100,000 values'),
        ('self.yml', '&a [*a]', 'nests'),
        ('tag.yml', 'a: !!int ""', 'does not fit its tag'),
        ('tag.yml', 'a: !!timestamp x', 'does not fit its tag'),
        ('code.yml', 'a: !!python/object/apply:os.system [ls]', 'could not determine'),
        ('null.yml', 'a: \0', 'special characters'),
        ('large.yml', '#' * 300_000, '0.25 MB is the most'),
        ('deep.toml', 'a = ' + '[' * 20_000, 'nests'),
        ('large.toml', '#' * 300_000, '0.25 MB is the most'),
        ('wide.tsv', '\t' * 5_000_000, 'more than 4,194,304 bytes'),
        ('wide.tsv', 'a\n' + '\t' * 5_000_000, 'more than 4,194,304 bytes'),
    ],
)
def test_documents_that_explode_or_nest_are_refused_at_once(tmp_path, name, text, reason):
    path, start = put(tmp_path / name, text), time.monotonic()
    with pytest.raises(ValueError, match=reason):
        READERS[path.suffix](path)
    assert time.monotonic() - start < 60


def test_large_tables_are_refused_and_columns_never_shift(tmp_path, monkeypatch):
    """Rows that are longer than the header would move each column by one."""
    with pytest.raises(ValueError, match='more values than its header'):
        read_tsv(put(tmp_path / 'a.tsv', 'a\tb\n1\t2\t3\n'))
    monkeypatch.setitem(documents.MAX_BYTES, 'TSV', 3)
    with pytest.raises(ValueError, match='of a TSV file'):
        read_tsv(put(tmp_path / 'a.tsv', 'a\tb\n1\t2\n'))


def test_aliases_and_merges_are_read(tmp_path):
    text = 'a: &a {x: 1}\nb: {<<: *a, y: [*a]}'
    assert read_yaml(put(tmp_path / 'a.yml', text))['b'] == {'x': 1, 'y': [{'x': 1}]}


def changed(folder, kind, name, old, new):
    text = (DATA / kind / name).read_text(encoding='utf-8')
    assert old in text
    return put(folder / name, text.replace(old, new))


@pytest.mark.parametrize('value', ['.inf', '-.inf', '.nan', '1.0e+300', '1.0e-300', '0', '-1'])
@pytest.mark.parametrize('field', ['divide_by', 'tr'])
def test_numbers_of_model_cards(tmp_path, field, value):
    old = {'divide_by': 'divide_by: 1.0', 'tr': 'tr: 0.735'}[field]
    path = changed(tmp_path, 'models', 'brainlm-13m.yml', old, f'{field}: {value}')
    with pytest.raises(BrainfmError, match=f': {field} .*is not'):
        load_card(path)


@pytest.mark.parametrize(
    'value', ['1_0', 'a b', 'bräin', 'µ', 'x²', '٣', 'a-b', 'a_b', 'a.b', '', 'a\\n']
)
def test_labels_are_those_of_bids(tmp_path, value):
    """Letters of ASCII and digits; Python takes others for letters and digits, too."""
    text = f'"{value}"'
    path = changed(tmp_path, 'models', 'brainlm-13m.yml', 'label: brainlm13m', f'label: {text}')
    with pytest.raises(BrainfmError, match=r'label .*letters A to Z'):
        load_card(path)
    path = changed(tmp_path, 'atlases', 'A424.yml', 'name: A424\n', f'name: {text}\n')
    with pytest.raises(BrainfmError, match=r'name .*letters A to Z'):
        atlases.load_card(path)


@pytest.mark.parametrize(
    ('name', 'old', 'new'),
    [
        ('window', 'window: 200', 'window: 1000000000'),
        ('official_volumes', 'window: 200', 'window: 200\nofficial_volumes: 9999999999'),
        ('min_real', 'window: 200', 'window: 200\nmin_real: 1.0e-300'),
    ],
)
def test_counts_of_model_cards(tmp_path, name, old, new):
    with pytest.raises(BrainfmError, match=f': {name} '):
        load_card(changed(tmp_path, 'models', 'brainlm-13m.yml', old, new))


@pytest.mark.parametrize(
    ('old', 'new', 'what'),
    [
        ('parcels: 424', 'parcels: 1000000000', 'parcels 1000000000'),
        ('parcels: 424', 'parcels: 424\norder: {"*": 1000000000}', 'order 1000000000'),
        ('parcels: 424', 'parcels: 424\norder: {"*": 999999}', 'order of 999999 names'),
    ],
)
def test_counts_of_atlas_cards(tmp_path, old, new, what):
    with pytest.raises(BrainfmError, match=what):
        atlases.load_card(changed(tmp_path, 'atlases', 'Demo424.yml', old, new))


@pytest.mark.parametrize(
    'line',
    ['outliers: {std_dvars: 1.0e+300}', 'bandpass: [0.01, .inf]',
     'head_radius: 1.0e-300', 'min_minutes: 1.0e+300', 'dummy_scans: 10000000000000000000'],
)  # fmt: skip
def test_numbers_of_denoising_presets(tmp_path, line):
    with pytest.raises(BrainfmError, match=f'{line.partition(":")[0]} .*is not'):
        load_strategy(put(tmp_path / 'own.yml', line))


def test_numbers_of_options_and_recipes(tmp_path):
    with pytest.raises(BrainfmError, match='order 1000000 is not above 0 and at most 20'):
        override(load_strategy('none'), motion_filter_type='lp', band_stop_min=6.0,
                 motion_filter_order=10**6)  # fmt: skip
    with pytest.raises(BrainfmError, match='outliers'):
        override(load_strategy('none'), fd_threshold=1e300)
    with pytest.raises(BrainfmError, match='epochs'):
        load_recipe(changed(tmp_path, 'training', 'fixed.yml', 'epochs: ', 'epochs: 1.0e+30 #'))


@pytest.mark.parametrize('name', ['brainlm-13m', 'brainlm-111m', 'brain-jepa-vitb'])
def test_sizes_of_configurations(name):
    """Of cards and of config.json, which are built by the same function."""
    config, start = load_card(name).config, time.monotonic()
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            for wrong in (10**9, 10**400, 1e300, float('inf'), float('nan')):
                with pytest.raises(BrainfmError, match=f'{key} .*is the most'):
                    build(config | {key: wrong})
        for wrong in (0, -1, 1e5, float('nan'), 'x') * key.endswith('eps'):
            with pytest.raises(BrainfmError, match=f'{key} .*must be above 0'):
                build(config | {key: wrong})
    assert time.monotonic() - start < 60


def test_a_network_of_too_many_weights_is_refused():
    config = load_card('brainlm-111m').config
    with pytest.raises(BrainfmError, match='at most 5,000,000,000 are supported'):
        build(config | {'hidden_size': 96_000, 'intermediate_size': 900_000})


@pytest.mark.parametrize('value', ['1e300', '-1e300', '1e16', 'inf', '-inf', '1e400'])
@pytest.mark.parametrize('kind', ['confounds', 'custom'])
def test_values_of_confounds(tmp_path, value, kind):
    frame = pd.DataFrame({'trans_x': np.arange(9.0), 'csf': np.arange(9.0)}).astype(str)
    whole = tmp_path / 'whole.tsv'
    frame.to_csv(whole, sep='\t', index=False)
    frame.loc[4, 'csf'] = value
    path = tmp_path / 'confounds.tsv'
    frame.to_csv(path, sep='\t', index=False)
    strategy = load_strategy(put(tmp_path / 'own.yml', 'columns: [trans_x, csf]'))
    tables = Tables(path) if kind == 'confounds' else Tables(whole, custom=path)
    with pytest.raises(BrainfmError, match=r'csf of .*confounds\.tsv has the value .* in row 5'):
        read_confounds(tables, strategy, 9, 0.8)


@pytest.mark.parametrize('value', ['1e300', '-1', '1e-300', 'Infinity', 'NaN', '1' + '0' * 400])
def test_times_of_sidecars(tmp_path, value):
    """Whatever JSON takes for a number."""
    path = put(tmp_path / 'a.json', f'{{"RepetitionTime": {value}, "StartTime": 1e300}}')
    run = BoldRun('r', {'sub': '01'}, 'd', tmp_path, path, sidecars=(path,))
    with pytest.raises(BrainfmError, match='write the repetition time in seconds'):
        repetition_time(run)
    with pytest.raises(BrainfmError, match='StartTime'):
        start_time(run)


def test_coordinates_of_atlases(tmp_path):
    from bids_brainfm.atlases.atlas import load_atlas

    for name in ('Demo424.yml', 'Demo424_dseg.tsv', 'Demo424_dseg.nii.gz'):
        (tmp_path / name).write_bytes((DATA / 'atlases' / name).read_bytes())
    table = tmp_path / 'Demo424_dseg.tsv'
    frame = pd.read_csv(table, sep='\t', dtype=str, keep_default_na=False)
    if 'x' not in frame:
        pytest.skip('the table has no coordinates')
    frame.loc[3, 'x'] = '1e30'
    frame.to_csv(table, sep='\t', index=False)
    with pytest.raises(BrainfmError, match='coordinate'):
        load_atlas(tmp_path / 'Demo424.yml', tmp_path)


def test_grayordinates_that_the_data_do_not_have(tmp_path):
    """The matrix and its description in XML must agree."""
    from bids_brainfm.signals.stream import open_bold

    axis = nib.cifti2.BrainModelAxis.from_surface(np.arange(20), 30, 'cortex_left')
    image = nib.Cifti2Image(np.ones((5, 20), 'f4'), (nib.cifti2.SeriesAxis(0, 1, 5), axis))
    path = tmp_path / 'a.dtseries.nii'
    nib.save(image, path)
    path.write_bytes(path.read_bytes().replace(b'NumberOfSeriesPoints="5"',
                                               b'NumberOfSeriesPoints="6"'))  # fmt: skip
    with pytest.raises(BrainfmError, match='describes 6 volumes of 20 grayordinates'):
        open_bold(path)


@pytest.mark.parametrize('value', [1e300, 10**400, True, '1', [1], float('inf')])
def test_numbers_of_scale_statistics(tmp_path, value):
    columns = {'Median': 1.0, 'IQR': 1.0, 'Lower': -3.6, 'Upper': 3.7}
    content = {'Atlas': 'a', 'Statistic': 'series', 'FormatVersion': 1}
    content |= {key: [None, column] for key, column in columns.items()}
    load_scale_stats(put(tmp_path / 'a.json', json.dumps(content)), 'a', 2)
    content['Median'] = [1.0, value]
    with pytest.raises(BrainfmError, match=r'its Median holds .* no number up to 1e\+15'):
        load_scale_stats(put(tmp_path / 'a.json', json.dumps(content)), 'a', 2)
