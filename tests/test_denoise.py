"""Denoising presets, confounds tables and the regression."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.bold import denoise as denoise_series
from bids_brainfm.signals.denoise import Confounds, denoise, load_preset, read_confounds
from bids_brainfm.signals.series import ParcelSeries

SHARED = Path(__file__).parents[1].parent / 'shared'
T, P = 150, 9


def make_table(n=T, seed=0, dummy=0):
    """A confounds table as fMRIPrep writes it, and its sidecar."""
    rng = np.random.default_rng(seed)
    table = {}
    motion = [f'{kind}_{axis}' for kind in ('trans', 'rot') for axis in 'xyz']
    for name in [*motion, 'csf', 'white_matter', 'global_signal']:
        x = rng.standard_normal(n).cumsum() * (1e-4 if name.startswith('rot') else 0.01)
        x = x + (0 if name in motion else 9000)
        d = np.r_[np.nan, np.diff(x)]
        table |= {name: x, f'{name}_derivative1': d}
        table |= {f'{name}_power2': x**2, f'{name}_derivative1_power2': d**2}
    table['framewise_displacement'] = np.r_[np.nan, np.full(n - 1, 0.1)]
    table['std_dvars'] = np.r_[np.nan, np.full(n - 1, 1.0)]
    for k in range(3):
        table[f'cosine{k:02d}'] = np.cos(np.pi * (k + 1) * (np.arange(n) + 0.5) / n)
    for k in range(4):
        table[f'a_comp_cor_{k:02d}'] = rng.standard_normal(n)
    for k in range(dummy):
        table[f'non_steady_state_outlier{k:02d}'] = (np.arange(n) == k).astype(int)
    sidecar = {
        f'a_comp_cor_{k:02d}': {
            'Method': 'aCompCor',
            'Mask': 'combined' if k < 3 else 'WM',
            'Retained': k != 2,
        }
        for k in range(4)
    }
    return pd.DataFrame(table), sidecar


def write(folder, table, sidecar=None):
    tsv = folder / 'sub-01_task-rest_desc-confounds_timeseries.tsv'
    table.to_csv(tsv, sep='\t', index=False, na_rep='n/a')
    if sidecar is not None:
        tsv.with_suffix('.json').write_text(json.dumps(sidecar))
    return tsv


def series(n=T, seed=1):
    return 9000 + 40 * np.random.default_rng(seed).standard_normal((n, P)).cumsum(0)


@pytest.mark.parametrize(
    ('name', 'n_columns'), [('none', 0), ('simple', 29), ('36P', 39), ('acompcor', 29)]
)
def test_presets(tmp_path, name, n_columns):
    preset = load_preset(name)
    tsv = write(tmp_path, *make_table())
    found = read_confounds(tsv, tsv.with_suffix('.json'), preset, T)
    assert preset.name == name
    assert preset.description.endswith('.')
    assert found.regressors.shape == (T, n_columns)
    assert len(found.names) == n_columns
    assert np.isfinite(found.regressors).all()


def test_none_touches_nothing(tmp_path):
    data = series().astype(np.float32)
    raw = ParcelSeries(data, 2.0, np.ones(data.shape[1]), np.arange(T) < 10, 1000.0)
    assert denoise_series(raw, tmp_path / 'absent.tsv', 'none') is raw


def test_equals_nilearn_on_a_synthetic_run(tmp_path):
    """Regressors and residuals are those of nilearn's strategy 'simple' and signal.clean."""
    compare_with_nilearn(tmp_path, *make_table(dummy=2), series())


def compare_with_nilearn(folder, table, sidecar, data):
    import nibabel as nib
    from nilearn.interfaces.fmriprep import load_confounds_strategy
    from nilearn.signal import clean

    n = len(table)
    tsv = write(folder, table, sidecar)
    bold = folder / 'sub-01_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz'
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, n), np.float32), np.eye(4)), bold)
    theirs, sample_mask = load_confounds_strategy(str(bold), denoise_strategy='simple')

    preset = load_preset('simple')
    ours = read_confounds(tsv, tsv.with_suffix('.json'), preset, n)
    ours = Confounds(ours.regressors, ours.names, np.zeros(n, bool), ours.dummy)
    kept = np.arange(n) if sample_mask is None else sample_mask
    assert ours.dummy == n - len(kept)
    assert set(ours.names) == set(theirs.columns)
    mine = ours.regressors[:, [ours.names.index(c) for c in theirs.columns]]
    mine = mine - mine[kept].mean(axis=0)  # nilearn centres its table over the kept volumes
    np.testing.assert_allclose(mine, theirs.to_numpy(), atol=1e-6, rtol=1e-6)
    if len(kept) > len(ours.names) + 2:
        expected = clean(
            data,
            detrend=False,
            standardize=None,
            confounds=theirs,
            sample_mask=sample_mask,
        )
        cleaned = denoise(data, ours)
        centred = expected - expected.mean(axis=0)
        np.testing.assert_allclose(cleaned - cleaned.mean(axis=0, dtype=float), centred, atol=2e-3)
        np.testing.assert_allclose(
            cleaned.mean(axis=0, dtype=float), data[kept].mean(axis=0), rtol=1e-6
        )


REAL = sorted((SHARED / 'data' / 'confounds').glob('*desc-confounds_*.tsv'))


@pytest.mark.skipif(not REAL, reason='the shared test material is absent')
@pytest.mark.parametrize('tsv', REAL, ids=lambda path: path.name)
def test_equals_nilearn_on_real_tables(tmp_path, tsv):
    sidecar = tsv.with_suffix('.json')
    if not sidecar.exists():
        sidecar = tsv.with_name('test_desc-confounds_regressors.json')
    table = pd.read_csv(tsv, sep='\t', na_values='n/a')
    compare_with_nilearn(tmp_path, table, json.loads(sidecar.read_text()), series(len(table)))


@pytest.mark.skipif(not REAL, reason='the shared test material is absent')
def test_acompcor_takes_nilearns_components_from_a_real_table(tmp_path):
    import nibabel as nib
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    source = SHARED / 'data' / 'confounds' / 'test-v21_desc-confounds_timeseries.tsv'
    tsv = tmp_path / 'sub-01_task-rest_desc-confounds_timeseries.tsv'
    shutil.copy(source, tsv)
    shutil.copy(source.with_suffix('.json'), tsv.with_suffix('.json'))
    n = len(pd.read_csv(tsv, sep='\t'))
    bold = tmp_path / 'sub-01_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz'
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, n), np.float32), np.eye(4)), bold)
    theirs, _ = load_confounds_strategy(str(bold), denoise_strategy='compcor')
    ours = read_confounds(tsv, tsv.with_suffix('.json'), load_preset('acompcor'), n)
    assert set(ours.names) == set(theirs.columns)


def test_regression_removes_confounds_and_keeps_the_mean(tmp_path):
    table, sidecar = make_table()
    confounds = read_confounds(write(tmp_path, table, sidecar), None, load_preset('36P'), T)
    rng = np.random.default_rng(2)
    noise = confounds.regressors @ rng.standard_normal((39, P)) + 9000
    noise[:, 4] = np.nan
    cleaned = denoise(noise, confounds)
    assert cleaned.dtype == np.float32
    assert np.isnan(cleaned[:, 4]).all()
    kept = np.delete(np.arange(P), 4)
    np.testing.assert_allclose(cleaned[:, kept], noise.mean(0)[kept] * np.ones((T, 1)), rtol=1e-5)


def test_dummy_volumes_are_dropped_and_flagged_ones_interpolated(tmp_path):
    table, sidecar = make_table(dummy=3)
    table.loc[[20, 21], 'framewise_displacement'] = 0.9
    table.loc[T - 1, 'std_dvars'] = 2.0
    table.loc[3, 'framewise_displacement'] = 0.6
    confounds = read_confounds(write(tmp_path, table, sidecar), None, load_preset('simple'), T)
    assert confounds.dummy == 3
    assert list(np.flatnonzero(confounds.flagged)) == [3, 20, 21, T - 1]
    data = series()
    spoilt = data.copy()
    spoilt[[0, 1, 2, 3, 20, 21, T - 1]] += 1e5
    cleaned = denoise(spoilt, confounds)
    assert cleaned.shape == (T - 3, P)
    # flagged volumes neither reach the fit nor the result
    np.testing.assert_array_equal(cleaned, denoise(data, confounds))
    early, late = cleaned[19 - 3], cleaned[22 - 3]
    np.testing.assert_allclose(cleaned[20 - 3], early + (late - early) / 3, rtol=1e-5)
    np.testing.assert_array_equal(cleaned[0], cleaned[1])
    np.testing.assert_array_equal(cleaned[-1], cleaned[-2])


def test_the_first_volume_is_not_flagged_for_the_second(tmp_path):
    """Its displacement is n/a, and n/a exceeds nothing."""
    table, _ = make_table()
    table.loc[0, 'framewise_displacement'] = np.nan
    table.loc[1, 'framewise_displacement'] = 2.0
    confounds = read_confounds(write(tmp_path, table), None, load_preset('simple'), T)
    assert list(np.flatnonzero(confounds.flagged)) == [1]


def test_a_non_steady_volume_in_the_middle_is_flagged(tmp_path):
    table, _ = make_table(dummy=2)
    table['non_steady_state_outlier02'] = (np.arange(T) == 40).astype(int)
    confounds = read_confounds(write(tmp_path, table), None, load_preset('simple'), T)
    assert confounds.dummy == 2
    assert list(np.flatnonzero(confounds.flagged)) == [40]


def test_too_few_volumes_for_the_confounds(tmp_path):
    table, _ = make_table(30)
    confounds = read_confounds(write(tmp_path, table), None, load_preset('simple'), 30)
    with pytest.raises(BrainfmError, match=r'Only 30 of 30 volumes.*29 confounds.*31'):
        denoise(series(30), confounds)


def refused(match, function, *arguments):
    with pytest.raises(BrainfmError, match=match) as caught:
        function(*arguments)
    assert '\n' not in str(caught.value)


def test_tables_that_do_not_fit_are_refused(tmp_path):
    table, sidecar = make_table()
    simple, compcor = load_preset('simple'), load_preset('acompcor')
    refused('does not exist', read_confounds, tmp_path / 'absent.tsv', None, simple, T)
    tsv = write(tmp_path, table, sidecar)
    refused('has 150 rows but the run has 149', read_confounds, tsv, None, simple, 149)
    refused('describes no retained', read_confounds, tsv, None, compcor, T)
    refused('cannot be read', read_confounds, tsv, tmp_path / 'absent.json', compcor, T)

    tsv = write(tmp_path, table.drop(columns='csf'))
    refused('no column csf.*csf_derivative1', read_confounds, tsv, None, simple, T)
    tsv = write(tmp_path, table.drop(columns='rot_z_power2'))
    refused('no column rot_z_power2', read_confounds, tsv, None, simple, T)
    tsv = write(tmp_path, table.drop(columns='std_dvars'))
    refused('no column std_dvars', read_confounds, tsv, None, simple, T)
    tsv = write(tmp_path, table.drop(columns=[c for c in table if c.startswith('cosine')]))
    assert len(read_confounds(tsv, None, simple, T).names) == 26

    gap = table.copy()
    gap.loc[7, 'csf'] = np.nan
    tsv = write(tmp_path, gap)
    refused('csf of .* no value in row 8', read_confounds, tsv, None, simple, T)
    text = table.astype({'csf': object})
    text.loc[7, 'csf'] = 'oops'
    tsv = write(tmp_path, text)
    refused('Column csf .* not a number', read_confounds, tsv, None, simple, T)
    tsv.write_text('')
    refused('cannot be read', read_confounds, tsv, None, simple, T)


def test_a_users_own_file(tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_text('name: mine\ncolumns: ["trans_[xyz]", csf]\noutliers: {rmsd: 1}\n')
    preset = load_preset(path)
    table, _ = make_table()
    table['rmsd'] = 0.0
    confounds = read_confounds(write(tmp_path, table), None, preset, T)
    assert confounds.names == ('trans_x', 'trans_y', 'trans_z', 'csf')


@pytest.mark.parametrize(
    ('text', 'match'),
    [
        ('kolumns: [csf]', 'unknown key kolumns; the keys are name,'),
        ('columns: csf', "columns 'csf' is not a list"),
        ('columns: ["csf("]', 'not a regular expression'),
        ('outliers: {std_dvars: high}', "outliers 'high' is not a number"),
        ('components: {masks: WM}', 'the one key mask'),
        ('- csf', 'is not a YAML mapping .it is a list'),
        ('columns: [', 'is not a YAML mapping'),
    ],
)
def test_malformed_presets_are_refused(tmp_path, text, match):
    path = tmp_path / 'mine.yml'
    path.write_text(text)
    refused(match, load_preset, path)


def test_unknown_presets_are_refused(tmp_path):
    refused('no denoising preset 24P: choose 36P, acompcor', load_preset, '24P')
    refused('does not exist', load_preset, tmp_path / 'absent.yml')
