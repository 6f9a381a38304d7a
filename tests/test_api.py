"""The package in a notebook: the numbers of the command, in three lines."""

import dataclasses
import inspect
import json
import operator
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import bids_brainfm
from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.config import absolute, split_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.encoder import ascending_y
from bids_brainfm.signals.order import misordered
from bids_brainfm.signals.scale import ScaleStats, stats_content
from bids_brainfm.signals.series import read_series

TR = 0.735
MODELS = ('brainlm-demo', 'brain-jepa-demo')
SPACE = 'space-MNI152NLin2009cAsym'


@pytest.fixture(scope='module')
def done(simulated, tmp_path_factory):
    """Output of the command for one participant and both models."""
    place = tmp_path_factory.mktemp('api')
    command = [sys.executable, '-m', 'bids_brainfm.cli.run', simulated, place / 'out']
    command += [
        'participant',
        '--model',
        *MODELS,
        '--participant-label',
        '01',
        '--short-runs',
        'pad',
        '--nprocs',
        '1',
    ]
    ended = subprocess.run(
        [*command, '-w', place / 'work'], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return place / 'out' / 'sub-01' / 'func'


@pytest.fixture(scope='module', params=MODELS)
def model(request):
    return bids_brainfm.load_model(request.param, device='cpu', short_runs='pad')


@pytest.fixture(scope='module')
def bold(simulated):
    return simulated / 'sub-01' / 'func' / f'sub-01_task-rest_{SPACE}_desc-preproc_bold.nii.gz'


@pytest.fixture(scope='module')
def series(done):
    """Path of the parcel series that the command wrote."""
    return done / f'sub-01_task-rest_{SPACE}_atlas-Demo424_stat-mean_timeseries.tsv'


def written(done, model):
    """What the command wrote: windows, embedding and, where there are some, those of parcels."""
    stem = f'sub-01_task-rest_{SPACE}_atlas-Demo424_desc-{model.spec.label}_embedding'
    table = pd.read_csv(done / f'{stem}.tsv', sep='\t')
    parcels = None
    if (path := done / f'{stem}.h5').is_file():
        with h5py.File(path) as file:
            parcels = file['parcels'][:]
    return table, table.filter(like='dim').to_numpy(), parcels


def compare(embedding, done, model):
    table, summary, parcels = written(done, model)
    assert embedding.summary == pytest.approx(summary, abs=1e-6)
    assert embedding.duration == pytest.approx(table['duration'], rel=1e-6)
    if parcels is None:
        assert embedding.parcels is None
    else:
        assert embedding.parcels == pytest.approx(parcels, abs=1e-6)
    return table


def test_numbers_of_the_command(model, done, series):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        embedding = model.embed(read_series(series))
    table = compare(embedding, done, model)
    for column in ('onset', 'real', 'flagged'):
        assert getattr(embedding, column) == pytest.approx(table[column], rel=1e-6)
    assert embedding.tokens is None


def test_an_array_will_do(model, done, series):
    tr = json.loads(series.with_suffix('.json').read_text())['RepetitionTime']
    array = pd.read_csv(series, sep='\t')
    assert list(array.columns) == list(model.atlas.names)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        embedding = model.embed(array, tr=tr, tokens=True)
    # which volumes were interpolated is not known of an array, so that all count in the scale
    found = read_series(series)
    whole = model.embed(dataclasses.replace(found, flagged=np.zeros_like(found.flagged)))
    assert embedding.summary == pytest.approx(whole.summary, abs=1e-6)
    assert found.flagged.any()
    assert embedding.tokens.shape[0] == len(embedding.summary)


def test_a_bold_file_will_do(model, done, bold):
    """Mask, confounds, repetition time and space are found, the denoising is the card's."""
    embedding = model.embed_bold(bold)
    table = compare(embedding, done, model)
    assert embedding.flagged == pytest.approx(table['flagged'], rel=1e-6)
    func, stem = bold.parent, 'sub-01_task-rest'
    named = model.embed_bold(
        bold,
        mask=func / f'{stem}_{SPACE}_desc-brain_mask.nii.gz',
        confounds=func / f'{stem}_desc-confounds_timeseries.tsv',
        denoising='simple',
        space='MNI152NLin2009cAsym',
    )
    assert np.array_equal(named.summary, embedding.summary)


def test_step_by_step(done, bold, series):
    """Parcellate, denoise: the series that the command writes."""
    raw = bids_brainfm.parcellate(bold, 'Demo424')
    table = bold.parent / 'sub-01_task-rest_desc-confounds_timeseries.tsv'
    clean, command = bids_brainfm.denoise(raw, table), read_series(series)
    covered = clean.coverage >= 0.5
    assert clean.data[:, covered] == pytest.approx(command.data[:, covered], rel=1e-5)
    assert clean.tr == command.tr
    assert clean.start == command.start
    assert np.array_equal(clean.flagged, command.flagged)
    assert isinstance(clean, bids_brainfm.ParcelSeries)
    assert clean.names
    none = bids_brainfm.denoise(raw, table, 'none', scrub=5)
    assert np.array_equal(none.data, raw.data)
    assert none.denoised.freedom.residual == len(raw.data) - 1
    with pytest.raises(BrainfmError, match=r'"simple" needs the confounds of the run: give its'):
        bids_brainfm.denoise(raw)


def test_a_file_of_which_nothing_is_known(bold, tmp_path):
    copy = tmp_path / 'run.nii.gz'
    copy.write_bytes(bold.read_bytes())
    with pytest.raises(BrainfmError, match=r'run\.nii\.gz has no space- entity, .* space='):
        bids_brainfm.parcellate(copy, 'Demo424')
    space = SPACE.removeprefix('space-')
    mask = bold.parent / f'sub-01_task-rest_{SPACE}_desc-brain_mask.nii.gz'
    found = bids_brainfm.parcellate(copy, 'Demo424', mask, space)  # as the header says
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        beside = bids_brainfm.parcellate(bold, 'Demo424')  # as fMRIPrep says
    assert found.tr == pytest.approx(beside.tr)
    assert found.brain_mean == beside.brain_mean
    assert bids_brainfm.parcellate(copy, 'Demo424', mask, space, tr=1.5).tr == 1.5


def test_volumes_without_a_brain_mask_give_a_warning(bold, tmp_path):
    copy = tmp_path / bold.name
    copy.write_bytes(bold.read_bytes())
    model = bids_brainfm.load_model('brainlm-demo', device='cpu', short_runs='pad')
    said = r'bold\.nii\.gz comes without a brain mask, .* whole atlas: give .* as mask='
    with pytest.warns(UserWarning, match=said):
        bids_brainfm.parcellate(copy, 'Demo424', tr=TR)
    with pytest.warns(UserWarning, match=said):
        model.embed_bold(copy, denoising='none', tr=TR)


def test_data_without_a_mean_give_a_warning(dataset):
    """Denoised data under the name of preprocessed ones."""
    (bold,) = (dataset / 'sub-01' / 'func').glob('*_bold.nii.gz')
    image = nib.load(bold)
    data = image.get_fdata(dtype=np.float32)
    data -= data.mean(axis=-1, keepdims=True)
    nib.save(nib.Nifti1Image(data, image.affine), bold)
    with pytest.warns(UserWarning, match=r'bold\.nii\.gz: The parcels have means of about zero'):
        series = bids_brainfm.parcellate(bold, 'Demo424')
    assert abs(series.brain_mean) < 1e-2


def test_a_series_has_level_tsnr_and_the_time_of_its_first_volume(dataset):
    """What fMRIPrep writes next to the file is looked up: mask, StartTime and dummy volumes."""
    folder = dataset / 'sub-01' / 'func'
    (bold,), (sidecar,) = folder.glob('*_bold.nii.gz'), folder.glob('*_bold.json')
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {'StartTime': 0.3675}))
    table = folder / 'sub-01_task-rest_desc-confounds_timeseries.tsv'
    confounds = pd.read_csv(table, sep='\t')
    confounds['non_steady_state_outlier00'] = (confounds.index == 0).astype(int)
    confounds.to_csv(table, sep='\t', index=False, na_rep='n/a')
    series = bids_brainfm.parcellate(bold, 'Demo424', voxels='all')
    assert (series.found.voxels, series.start) == ('all', 0.3675)
    np.testing.assert_allclose(series.level, series.data[1:].mean(axis=0), rtol=1e-5)
    assert series.tsnr.shape == series.coverage.shape
    assert (series.tsnr > 0).all()
    clean = bids_brainfm.denoise(series, table)
    assert clean.start == pytest.approx(0.3675 + TR)
    assert np.array_equal(clean.tsnr, series.tsnr)


def test_denoising_keeps_the_flags_of_a_series(bold):
    raw = bids_brainfm.parcellate(bold, 'Demo424')
    marked = dataclasses.replace(raw, flagged=np.arange(len(raw.data)) % 20 == 19)
    table = bold.parent / 'sub-01_task-rest_desc-confounds_timeseries.tsv'
    none = bids_brainfm.denoise(marked, table, 'none')
    assert np.array_equal(none.flagged, marked.flagged)
    clean, other = bids_brainfm.denoise(marked, table), bids_brainfm.denoise(raw, table)
    assert other.flagged.any()
    assert np.array_equal(clean.flagged, other.flagged | marked.flagged[clean.dummy :])
    rows = np.flatnonzero(clean.flagged & ~other.flagged)[:-1]  # interpolated, as the others are
    row = next(r for r in rows if not clean.flagged[[r - 1, r + 1]].any())
    middle = (clean.data[row - 1] + clean.data[row + 1]) / 2
    np.testing.assert_allclose(clean.data[row], middle, rtol=1e-6)


@pytest.mark.parametrize(
    ('shape', 'said'),
    [
        ((300, 400), r'424 parcels of the atlas Demo424 .* is 300×400: parcellate the run by'),
        ((424, 300), r'is 424×300: give its transpose'),
        ((424,), r'is 424: parcellate'),
        ((0, 424), r'is 0×424: parcellate'),
    ],
)
def test_an_array_of_other_parcels_is_refused(model, shape, said):
    with pytest.raises(BrainfmError, match=said):
        model.embed(np.ones(shape), tr=2.0)


@pytest.mark.parametrize('values', [None, 3, 'text', [[1, 2], [3]], [['a'] * 424]])
def test_what_is_no_array_is_refused(model, values):
    with pytest.raises(BrainfmError, match=r'424 parcels .* but this is no array: parcellate'):
        model.embed(values, tr=2.0)
    text = np.full((300, 424), 'x')
    run = bids_brainfm.ParcelSeries(text, 2.0, np.ones(424), np.zeros(300, bool), 1.0)
    with pytest.raises(BrainfmError, match='this is no array'):
        model.embed(run)


@pytest.mark.parametrize(
    'change',
    [
        {'coverage': np.ones(400)},
        {'flagged': np.zeros(9, bool)},
        {'flagged': [False] * 300},
        {'data': np.ones((0, 424)), 'flagged': np.zeros(0, bool)},
        {'data': np.ones(424)},
    ],
)
def test_parts_of_a_series_fit_each_other(change):
    parts = {'data': np.ones((300, 424)), 'coverage': np.ones(424), 'flagged': np.zeros(300, bool)}
    bids_brainfm.ParcelSeries(**parts, tr=2.0, brain_mean=1.0)
    with pytest.raises(BrainfmError, match=r'takes arrays data \(volumes, parcels\), coverage'):
        bids_brainfm.ParcelSeries(**parts | change, tr=2.0, brain_mean=1.0)


def test_an_array_does_not_tell_its_repetition_time(model):
    with pytest.raises(BrainfmError, match=r'An array does not tell .* tr=0\.735'):
        model.embed(np.ones((300, 424)))


@pytest.mark.parametrize('tr', [735, 0, -1, np.nan, np.inf, '0.8', True, [2.0]])
def test_one_check_of_the_repetition_time(model, series, bold, tr):
    said = rf'tr={re.escape(repr(tr))} is not a repetition time in seconds: give tr= .* to 30'
    run = read_series(series)
    for call in (
        lambda: model.embed(run.data, tr=tr),
        lambda: model.embed(run, tr=tr),
        lambda: dataclasses.replace(run, tr=tr),
        lambda: bids_brainfm.parcellate(bold, 'Demo424', tr=tr),
        lambda: model.embed_bold(bold, tr=tr),
    ):
        with pytest.raises(BrainfmError, match=said):
            call()


@pytest.mark.parametrize('tr', [0, 2000])
def test_the_header_gives_no_repetition_time_in_seconds(bold, tmp_path, tr):
    image = nib.load(bold)
    image.header['pixdim'][4] = tr
    image.header.set_xyzt_units('mm', None)
    nib.save(image, tmp_path / bold.name)
    with (
        pytest.warns(UserWarning, match='brain mask'),
        pytest.raises(BrainfmError, match=rf'tr={tr}\.0 in the header of sub-01.* is not a rep'),
    ):
        bids_brainfm.parcellate(tmp_path / bold.name, 'Demo424')


def test_a_series_has_its_own_repetition_time(model, series):
    run = read_series(series)
    with pytest.raises(BrainfmError, match=r'tr=1\.7 is not the repetition time of this series'):
        model.embed(run, tr=1.7)
    same = model.embed(run, tr=np.float32(run.tr))
    assert np.array_equal(same.summary, model.embed(run).summary)


def test_parcels_of_an_array_without_signal_are_filled(series):
    model = bids_brainfm.load_model('brainlm-demo', device='cpu')
    array = read_series(series).data.copy()
    array[:, [3, 100]] = np.nan
    embedding = model.embed(array, tr=TR)
    assert np.flatnonzero(embedding.donors >= 0).tolist() == [3, 100]
    assert np.isfinite(embedding.summary).all()


# --- models ----------------------------------------------------------------------------------


def test_weights_are_those_of_the_command(tmp_path):
    """A file in place of the card's own, as NAME=PATH; missing ones in the command's words."""
    folder = Path(bids_brainfm.__file__).parent / 'data' / 'models'
    own = folder / 'brain-jepa-demo.safetensors'
    model = bids_brainfm.load_model('brain-jepa-demo', weights=own, device='cpu')
    assert model.spec.checkpoint == own
    with pytest.raises(BrainfmError, match=r'run "bids_brainfm_models fetch brainlm-111m"'):
        bids_brainfm.load_model('brainlm-111m')
    with pytest.raises(BrainfmError, match='There is no model card brainlm: choose'):
        bids_brainfm.load_model('brainlm')
    control = bids_brainfm.load_model('brainlm-demo', random_weights=True)
    assert control.spec.label == 'brainlmdemorandom'


def test_cards_and_weights_in_folders_with_an_equals_sign(tmp_path):
    data = Path(bids_brainfm.__file__).parent / 'data' / 'models'
    folder = tmp_path / 'lr=0.1'
    shutil.copytree(data, folder)
    own = folder / 'brain-jepa-demo.safetensors'
    for weights in (None, own):
        model = bids_brainfm.load_model(folder / 'brain-jepa-demo.yml', weights, device='cpu')
        assert model.spec.checkpoint == own
    text = f'{folder}/brain-jepa-demo.yml'
    assert split_name(absolute(text)) == (text, None)
    assert split_name(absolute(f'{text}={own}')) == (text, own)
    assert split_name(absolute(f'brainlm-111m={own}')) == ('brainlm-111m', own)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'scale': 'bogus'}, "There is no scaling 'bogus'"),
        ({'scale': 'cohort'}, "'cohort' needs statistics of a cohort"),
        ({'scale_stats': 'absent.json'}, 'is used by --scale cohort only'),
        ({'scale': 'global-z', 'scale_stats': 'absent.json'}, 'is used by --scale cohort only'),
        ({'scale': 'cohort', 'scale_stats': 'absent.json'}, r'absent\.json cannot be read'),
        ({'stride': 0}, 'at least 1 sample, not 0'),
        ({'stride': 1.5}, r'at least 1 sample, not 1\.5'),
        ({'short_runs': 'bogus'}, "refuse, pad, tile, not 'bogus'"),
        ({'temporal': 'bogus'}, "resample, official, not 'bogus'"),
        ({'min_coverage': 2}, 'a proportion from 0 to 1, not 2'),
        ({'min_coverage': np.nan}, 'a proportion from 0 to 1, not nan'),
        ({'min_coverage': '0.5'}, 'a proportion from 0 to 1'),
        ({'block': 'cross-time'}, 'predicts no latents'),
        ({'device': 'bogus'}, "device 'bogus'"),
        ({'precision': 'bogus'}, "precision 'bogus'"),
    ],
)
def test_options_are_checked_when_the_model_is_loaded(options, said):
    with pytest.raises(BrainfmError, match=said):
        bids_brainfm.load_model('brainlm-demo', **{'device': 'cpu'} | options)


def test_statistics_are_checked_when_the_model_is_loaded(tmp_path):
    ones, path = np.ones(424), tmp_path / 'stats.json'
    for statistic, said in (
        ('series', None),
        ('temporal mean', 'statistics of the series of each'),
    ):
        bounds = () if said else (-ones, ones)
        stats = ScaleStats(ones, ones, 'Demo424', *bounds, statistic=statistic)
        path.write_text(json.dumps(stats_content(stats)))
        with pytest.raises(BrainfmError, match=said) if said else nullcontext():
            bids_brainfm.load_model('brainlm-demo', scale='cohort', scale_stats=path)


def test_options_of_the_command(series):
    array = read_series(series).data[:100]
    model = bids_brainfm.load_model('brainlm-demo', device='cpu', stride=50, scale='global-z')
    assert (model.contract.stride, model.contract.scaling) == (50, 'global-z')
    with pytest.raises(BrainfmError, match='choose --short-runs pad or tile'):
        model.embed(array, tr=TR)
    padded = bids_brainfm.load_model('brainlm-demo', device='cpu', short_runs='pad')
    assert padded.embed(array, tr=TR).real < 1
    with pytest.raises(BrainfmError, match='official'):
        bids_brainfm.load_model('brainlm-demo', temporal='official')


def test_exact_is_the_same_where_it_can_be():
    model = bids_brainfm.load_model('brainlm-demo', device='cpu')
    assert model.exact is model.encoder
    coarse = bids_brainfm.load_model('brainlm-demo', device='cpu', precision='bfloat16')
    assert coarse.exact is coarse.exact is not coarse.encoder
    assert coarse.exact.precision == 'float32'
    fast = dataclasses.replace(model, precision='tf32')  # on a GPU
    assert (fast.encoder.precision, fast.exact.precision) == ('tf32', 'float32')
    assert fast.exact.network is fast.encoder.network


# --- order of columns ------------------------------------------------------------------------


def test_columns_in_another_order_are_told(series):
    model = bids_brainfm.load_model('brainlm-demo', device='cpu')
    right, xyz = read_series(series).data, model.atlas.xyz
    with pytest.warns(UserWarning, match=r'better in the order ascending-y .* order of the atlas'):
        model.embed(right[:, ascending_y(xyz)], tr=TR)
    shuffled = np.random.default_rng(0).permutation(424)
    with pytest.warns(UserWarning, match='check that they are in the order of the atlas'):
        model.embed(right[:, shuffled], tr=TR)


@pytest.mark.parametrize('volumes', [8, 16, 40, 100, 210])
@pytest.mark.parametrize('noise', [0, 2, 8])
def test_short_and_noisy_runs_are_not_suspected(series, volumes, noise):
    atlas, data = load_atlas('Demo424'), read_series(series).data
    rng = np.random.default_rng(volumes)
    data = data + noise * data.std(0) * rng.standard_normal(data.shape)
    known = {**atlas.misorders, 'ascending-y': ascending_y(atlas.xyz)}
    assert misordered(data[:volumes], atlas.xyz, known) is None
    assert misordered(np.ones((volumes, 424)), atlas.xyz, known) is None


def test_real_runs_are_suspected_only_where_they_should(shared):
    """Five people, Schaefer-100, series that were not denoised."""
    runs = np.load(shared / 'data' / 'aomic_schaefer100-7net_5subj.npz')
    xyz, shuffled = runs['locs'], np.random.default_rng(5).permutation(100)
    order = ascending_y(xyz)
    known = {'ascending-y': order}
    for name in (name for name in runs if name.startswith('sub')):
        for volumes in (16, 40, 160, 470):
            data = runs[name][:volumes].astype(float)
            assert misordered(data, xyz, known) is None
        assert 'in the order ascending-y' in misordered(
            data[:, order], xyz, {'ascending-y': order}
        )
        assert 'no more alike' in misordered(data[:, shuffled], xyz, known)


# --- imports ---------------------------------------------------------------------------------


def test_importing_is_instant():
    code = (
        'import sys, bids_brainfm; dir(bids_brainfm);'
        'print([m for m in ("numpy", "torch", "yaml", "nibabel") if m in sys.modules])'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == '[]'


def test_public_names():
    names = {'load_model', 'load_atlas', 'parcellate', 'denoise', 'Model', 'Embedding'}
    assert names | {'ParcelSeries'} == set(bids_brainfm.__all__)
    for name in bids_brainfm.__all__:
        assert getattr(bids_brainfm, name).__doc__
        assert name in dir(bids_brainfm)
    with pytest.raises(AttributeError, match='nothing'):
        _ = bids_brainfm.nothing


@pytest.mark.parametrize(
    ('name', 'warns'),
    [
        ('load_atlas', False),
        ('load_model', False),
        ('denoise', True),
        ('parcellate', True),
        ('Model.embed', True),
        ('Model.embed_bold', True),
    ],
)
def test_docstrings_name_parameters_results_errors_and_warnings(name, warns):
    function = operator.attrgetter(name)(bids_brainfm)
    text = inspect.getdoc(function)
    headings = re.findall(r'^(.+)\n-+$', text, flags=re.MULTILINE)
    assert headings == ['Parameters', 'Returns', 'Raises'] + ['Warns'] * warns
    listed = re.search(r'Parameters\n-+\n(.*?)\n\n', text, flags=re.DOTALL)[1]
    named = re.findall(r'^\**(\w[\w, ]*?)(?: :.*)?$', listed, flags=re.MULTILINE)
    parameters = [p for p in inspect.signature(function).parameters if p != 'self']
    assert sorted(n for line in named for n in line.split(', ')) == sorted(parameters)
