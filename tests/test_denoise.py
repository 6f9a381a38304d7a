"""Denoising strategies, confounds tables, the regression and what it leaves."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.bold import denoise as denoise_series
from bids_brainfm.signals.confounds import Confounds, Tables, read_confounds
from bids_brainfm.signals.denoise import denoise, regress, stop_band
from bids_brainfm.signals.motion import flag_short_segments
from bids_brainfm.signals.series import ParcelSeries
from bids_brainfm.signals.strategy import Strategy, describe, load_strategy, override

SHARED = Path(__file__).parents[1].parent / 'shared'
REAL_FOLDER = SHARED / 'data' / 'confounds'
T, P, TR = 150, 9, 2.0
STEM = 'sub-01_task-rest'


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
    sidecar = {}
    for kind, mask in (('a', 'combined'), ('w', 'WM'), ('c', 'CSF')):
        for k in range(7):
            name = f'{kind}_comp_cor_{k:02d}'
            table[name] = rng.standard_normal(n)
            sidecar[name] = {
                'Method': 'aCompCor', 'Mask': mask, 'Retained': True,
                'CumulativeVarianceExplained': 0.1 * (k + 1),
            }  # fmt: skip
    for k in range(3):
        table[f'aroma_motion_{2 * k + 1:02d}'] = rng.standard_normal(n)
    for k in range(dummy):
        table[f'non_steady_state_outlier{k:02d}'] = (np.arange(n) == k).astype(int)
    return pd.DataFrame(table), sidecar


def write(folder, table, sidecar=None):
    tsv = folder / f'{STEM}_desc-confounds_timeseries.tsv'
    table.to_csv(tsv, sep='\t', index=False, na_rep='n/a')
    if sidecar is not None:
        tsv.with_suffix('.json').write_text(json.dumps(sidecar))
    return tsv


def read(tsv, strategy='simple', n=T, json_path=None, **tables):
    strategy = strategy if isinstance(strategy, Strategy) else load_strategy(strategy)
    return read_confounds(Tables(tsv, json_path, **tables), strategy, n, TR)


def series(n=T, seed=1):
    return 9000 + 40 * np.random.default_rng(seed).standard_normal((n, P)).cumsum(0)


def parcels(n=T, tr=TR, seed=1, walk=True):
    """Independent parcels as a run without flags."""
    noise = np.random.default_rng(seed).standard_normal((n, P))
    data = (9000 + 40 * (noise.cumsum(0) if walk else noise)).astype(np.float32)
    return ParcelSeries(data, tr, np.ones(P), np.zeros(n, bool), 1000.0)


def plain(regressors, flagged=None, dummy=0):
    """Confounds of these regressors alone."""
    n = len(regressors)
    empty = np.empty((n, 0))
    names = tuple(f'r{k}' for k in range(regressors.shape[1]))
    flagged = np.zeros(n, bool) if flagged is None else flagged
    return Confounds(regressors, names, flagged, dummy, empty, empty)


def refused(match, function, *arguments, **options):
    with pytest.raises(BrainfmError, match=match) as caught:
        function(*arguments, **options)
    assert '\n' not in str(caught.value)


MOTION = 24
COLUMNS = {
    'none': 0, 'simple': MOTION + 2 + 3, 'scrubbing': MOTION + 8 + 3, '36P': 36 + 3,
    'compcor': MOTION + 7 + 3, 'acompcor': 12 + 5 + 5 + 3, 'aroma-aggressive': 3 + 2 + 3,
    'simple+gsr': MOTION + 3 + 3, 'scrubbing+gsr': MOTION + 12 + 3, 'none+gsr': 1,
    'compcor+gsr': MOTION + 7 + 1 + 3,
}  # fmt: skip


@pytest.mark.parametrize(('name', 'n_columns'), COLUMNS.items())
def test_strategies(tmp_path, name, n_columns):
    strategy = load_strategy(name)
    tsv = write(tmp_path, *make_table())
    found = read(tsv, strategy, json_path=tsv.with_suffix('.json'))
    assert strategy.name == name
    assert describe(strategy).endswith('.')
    assert found.regressors.shape == (T, n_columns)
    assert len(found.names) == n_columns
    assert np.isfinite(found.regressors).all()


def test_global_signal_is_expanded_as_white_matter_is(tmp_path):
    tsv = write(tmp_path, *make_table())
    added = lambda name: set(read(tsv, f'{name}+gsr').names) - set(read(tsv, name).names)
    assert added('simple') == {'global_signal'}
    assert len(added('scrubbing')) == 4
    refused(r'36P regresses the global signal out: leave \+gsr out', load_strategy, '36P+gsr')
    mine = tmp_path / 'mine.yml'
    mine.write_text('name: mine\ncolumns: [csf]\n')
    assert load_strategy(f'{mine}+gsr').columns == ('csf', 'global_signal')


def test_compcor_takes_so_many_or_so_much_variance(tmp_path):
    table, sidecar = make_table()
    tsv = write(tmp_path, table[table.columns[::-1]], sidecar)
    path, json_path = tmp_path / 'mine.yml', tsv.with_suffix('.json')
    taken = lambda: read(tsv, load_strategy(path), json_path=json_path).names
    path.write_text('compcor: {masks: [CSF], number: 2}\n')
    assert taken() == ('c_comp_cor_01', 'c_comp_cor_00')  # in the order of the table
    path.write_text('compcor: {masks: [CSF, WM], variance: 0.3}\n')
    assert len(taken()) == 6
    path.write_text('compcor: {masks: [WM], variance: 0.9}\n')
    refused('WM mask .* explain 70% .* than the 90%', taken)
    path.write_text('compcor: {masks: [WM], variance: 0.9, number: 3}\n')
    refused('a number or a variance, not both', load_strategy, path)


# Degrees of freedom


def flags(n, n_flagged):
    return np.isin(np.arange(n), np.random.default_rng(0).permutation(n)[:n_flagged])


@pytest.mark.parametrize(
    ('n', 'n_flagged', 'n_regressors', 'match'),
    [
        (300, 264, 34, (r'36 of 300 volumes are unflagged, and 34 nuisance regressors and the '
                        r'mean \(rank 35\) leave 1 degrees of freedom, 29 fewer than a tenth')),
        (200, 0, 190, r'\(rank 191\) leave 9 degrees of freedom, 11 fewer than a tenth'),
        (490, 416, 31, r'74 of 490 .* leave 42 degrees of freedom, 7 fewer than a tenth'),
        (150, 100, 34, r'50 of 150 .* leave 15 degrees of freedom, 5 fewer than the 20 of --min'),
        (100, 100, 3, 'All 100 volumes are flagged'),
    ],
)  # fmt: skip
def test_runs_without_enough_degrees_of_freedom_are_refused(n, n_flagged, n_regressors, match):
    """The first three gave |r| of 1.00 and .27 between independent parcels, and no warning."""
    regressors = np.random.default_rng(2).standard_normal((n, n_regressors))
    confounds = plain(regressors, flags(n, n_flagged))
    strategy = load_strategy('simple')
    refused(match, denoise, series(n), confounds, strategy, TR)


def test_the_rank_counts_and_not_the_number_of_regressors():
    columns = np.random.default_rng(2).standard_normal((T, 5))
    twice = np.hstack([columns, columns[:, :3] * 3 + 7, np.ones((T, 1))])
    _, freedom = denoise(series(), plain(twice), load_strategy('simple'), TR)
    assert (freedom.regressors, freedom.nuisance_rank, freedom.residual) == (9, 6, T - 6)
    assert freedom.minutes == T * TR / 60


@pytest.mark.parametrize(('n', 'tr', 'left'), [(490, 0.735, 24), (1200, 0.72, 95)])
def test_band_pass_of_fast_runs_is_accepted_with_a_warning(n, tr, left):
    """UK Biobank and HCP: 0.01 to 0.08 Hz with 26 nuisance regressors."""
    regressors = np.random.default_rng(2).standard_normal((n, 26))
    strategy = override(load_strategy('simple'), bandpass=(0.01, 0.08))
    _, freedom = denoise(series(n), plain(regressors), strategy, tr)
    assert freedom.residual == left
    assert freedom.unflagged - freedom.nuisance_rank == n - 27
    (sentence,) = freedom.warnings(strategy)
    assert sentence.startswith(f'{left} degrees of freedom are left of {n} volumes')
    stricter = override(strategy, min_dof=left + 1)
    if n == 1200:
        return
    match = rf'1 fewer than the {left + 1} of --min-dof: raise the upper limit .*--bandpass LOW 0'
    refused(match, denoise, series(n), plain(regressors), stricter, tr)
    high_pass = override(stricter, bandpass=(0.01, 0))
    assert not denoise(series(n), plain(regressors), high_pass, tr)[1].warnings(high_pass)


def test_minutes_of_unflagged_data():
    regressors = np.random.default_rng(2).standard_normal((T, 3))
    confounds, strategy = plain(regressors, flags(T, 60)), load_strategy('simple')
    _, freedom = denoise(series(), confounds, strategy, TR)
    assert freedom.minutes == 3.0
    (sentence,) = freedom.warnings(strategy)
    assert sentence.startswith('There are 3.0 minutes of unflagged data, fewer than 4')
    match = r'90 of 150 .* are 3 minutes, 2\.5 fewer than the 5\.5 of --min-minutes'
    refused(match, denoise, series(), confounds, override(strategy, min_minutes=5.5), TR)


def test_none_uses_nothing_up():
    """It only warns of a short run, unless --min-minutes says otherwise."""
    raw = parcels(15)
    with pytest.warns(UserWarning, match='14 degrees of freedom are left of 15 volumes'):
        clean = denoise_series(raw, None, 'none', keep_nonsteady=True)
    assert np.array_equal(clean.data, raw.data)
    refused(r'15 of 15 .* are 0\.5 minutes, 0\.5 fewer', denoise_series, raw, None, 'none',
            keep_nonsteady=True, min_minutes=1)  # fmt: skip


# Non-steady-state volumes


def test_none_drops_non_steady_volumes_unless_told_to_keep_them(tmp_path):
    """Four of 480 made independent parcels correlate by .80."""
    table, _ = make_table(480, dummy=4)
    tsv, raw = write(tmp_path, table), parcels(480, walk=False)
    raw.data[:4] += np.array([4000, 2000, 900, 400])[:, None]
    pairs = np.triu_indices(P, 1)
    mean_r = lambda run: np.corrcoef(run.data.T)[pairs].mean()
    clean = denoise_series(raw, tsv, 'none')
    assert np.array_equal(clean.data, raw.data[4:])
    assert clean.start == 4 * TR
    assert not clean.flagged.any()
    assert mean_r(raw) > 0.7
    assert abs(mean_r(clean)) < 0.05
    kept = denoise_series(raw, tsv, 'none', keep_nonsteady=True)
    assert np.array_equal(kept.data, raw.data)
    assert len(denoise_series(raw, tsv, 'none', dummy_scans=7).data) == 473
    with pytest.warns(UserWarning, match='no confounds table, so volumes before the steady state'):
        assert len(denoise_series(raw, None, 'none').data) == 480


def test_dummy_scans(tmp_path):
    tsv = write(tmp_path, *make_table(dummy=3))
    found = lambda **options: read(tsv, override(load_strategy('simple'), **options))
    assert found().dummy == found(dummy_scans='auto').dummy == 3
    one = found(dummy_scans=1)
    assert (one.dummy, list(np.flatnonzero(one.flagged))) == (1, [1, 2])
    assert found(dummy_scans=5).dummy == 5
    kept = found(keep_nonsteady=True)
    assert (kept.dummy, kept.flagged.sum()) == (0, 0)
    refused('All 150 volumes would be dropped', found, dummy_scans=150)


# Flags


def test_thresholds(tmp_path):
    table, _ = make_table()
    table.loc[10, 'framewise_displacement'] = 0.3
    table.loc[20, 'std_dvars'] = 1.6
    tsv = write(tmp_path, table)
    found = lambda **options: list(np.flatnonzero(
        read(tsv, override(load_strategy('simple'), **options)).flagged))  # fmt: skip
    assert found() == [20]
    assert found(fd_threshold=0.2) == [10, 20]
    assert found(fd_threshold=0.2, dvars_threshold=0) == [10]
    assert found(scrub=12, fd_threshold=0.2) == list(range(21))
    assert override(load_strategy('simple'), fd_threshold=0, dvars_threshold=0).outliers == {}


def test_segments_that_are_short_are_flagged():
    flagged = flag_short_segments(np.isin(np.arange(20), [3, 9, 15]), 5)
    assert list(np.flatnonzero(~flagged)) == [4, 5, 6, 7, 8, 10, 11, 12, 13, 14]
    assert not flag_short_segments(np.zeros(3, bool), 5).any()


# Band-pass


def test_high_pass_is_that_of_nilearn():
    from nilearn.signal import create_cosine_drift

    for n, tr, low in ((150, 2.0, 0.01), (490, 0.735, 1 / 128), (200, 2.5, 0.009)):
        theirs = create_cosine_drift(low, np.arange(n) * tr)[:, :-1]
        np.testing.assert_allclose(stop_band(n, tr, (low, None)), theirs, atol=1e-12)


@pytest.mark.parametrize('with_flags', [False, True])
def test_band_pass_and_regression_are_one_model(tmp_path, with_flags):
    """Neither brings back what the other removed; equal to signal.clean with all of them."""
    from nilearn.signal import clean

    n, strategy = 300, override(load_strategy('simple'), bandpass=(0.01, 0.08))
    confounds = read(write(tmp_path, *make_table(n)), strategy, n)
    assert len(confounds.names) == 26  # without cosines
    flagged = flags(n, 30 if with_flags else 0)
    confounds = dataclasses.replace(confounds, flagged=flagged)
    cleaned, _ = denoise(series(n), confounds, strategy, TR)
    outside = stop_band(n, TR, (0.01, 0.08))
    kept = np.flatnonzero(~flagged)
    everything = np.hstack([confounds.regressors, outside])
    expected = clean(series(n), detrend=False, standardize=None, confounds=everything,
                     sample_mask=kept)  # fmt: skip
    same(cleaned[kept], expected, series(n))
    if not with_flags:
        centred = cleaned - cleaned.mean(axis=0, dtype=float)
        power = np.abs(np.fft.rfft(np.vstack([centred, centred[::-1]]), axis=0)) ** 2
        frequency = np.fft.rfftfreq(2 * n, TR)
        inside = (frequency > 0.0095) & (frequency < 0.0805)
        assert power[~inside].sum() < 1e-6 * power.sum()
        motion = confounds.regressors - confounds.regressors.mean(axis=0)
        motion /= motion.std(axis=0)
        assert np.abs(motion.T @ centred / n / centred.std(axis=0)).max() < 1e-3


def test_one_end_of_the_band_may_be_open(tmp_path):
    tsv = write(tmp_path, *make_table())
    low = override(load_strategy('simple'), bandpass=(0, 0.1))
    assert len(read(tsv, low).names) == 29  # fMRIPrep's cosines stay
    slow = override(load_strategy('compcor'), bandpass=(0.005, 0))
    json_path = tsv.with_suffix('.json')
    assert 'cosine00' in read(tsv, slow, json_path=json_path).names
    assert 'above 0.1 Hz' in describe(low)
    assert 'below 0.005 Hz' in describe(slow)
    path = tmp_path / 'mine.yml'
    path.write_text('columns: [csf]\nbandpass: [0.01, null]\n')
    assert load_strategy(path).bandpass == (0.01, None)
    for band in ((0.08, 0.01), (0, 0)):
        refused('is not a band', override, low, bandpass=band)


# Equal to nilearn


def same(cleaned, expected, raw):
    """Equal within 1e-4 SD of the raw series, except for the mean, which is kept here."""
    difference = cleaned - cleaned.mean(axis=0, dtype=float) - (expected - expected.mean(axis=0))
    assert np.abs(difference / raw.std(axis=0)).max() < 1e-4


def nilearns(folder, n, strategy, **options):
    """What nilearn reads from the table of a folder: confounds and the volumes that it keeps."""
    import nibabel as nib
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    bold = folder / f'{STEM}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz'
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, n), np.float32), np.eye(4)), bold)
    theirs, kept = load_confounds_strategy(str(bold), denoise_strategy=strategy, **options)
    return theirs, np.arange(n) if kept is None else kept


def compare_with_nilearn(folder, table, sidecar, data, name, **options):
    from nilearn.signal import clean

    n, nilearn_name = len(table), name.removesuffix('+gsr')
    tsv = write(folder, table, sidecar)
    ours = read(tsv, name, n, tsv.with_suffix('.json'))
    theirs, kept = nilearns(folder, n, nilearn_name, **options)
    flagged = ours.flagged if nilearn_name == 'scrubbing' else np.zeros(n, bool)
    good = ~flagged & (np.arange(n) >= ours.dummy)
    assert list(np.flatnonzero(good)) == list(kept)
    assert set(ours.names) == set(theirs.columns)
    if not len(kept):
        return False
    mine = ours.regressors[:, [ours.names.index(c) for c in theirs.columns]]
    mine = mine - mine[kept].mean(axis=0)  # nilearn centres its table over the kept volumes
    np.testing.assert_allclose(mine, theirs.to_numpy(), atol=1e-6, rtol=1e-6)
    if len(kept) <= len(ours.names) + 2:
        return False
    expected = clean(data, detrend=False, standardize=None, confounds=theirs, sample_mask=kept)
    none = np.empty((n, 0))
    cleaned = regress(data, ours.regressors, good, none, none)
    same(cleaned[good], expected, data)
    np.testing.assert_allclose(cleaned[good].mean(axis=0), data[good].mean(axis=0), rtol=1e-6)
    return True


NAMES = ['simple', 'scrubbing', 'compcor']


@pytest.mark.parametrize('name', NAMES)
def test_equals_nilearn_on_a_synthetic_run(tmp_path, name):
    """Regressors, kept volumes and residuals are those of nilearn's strategy of this name."""
    table, sidecar = make_table(dummy=2)
    table.loc[[40, 44, 80, 147], 'framewise_displacement'] = 0.9
    table.loc[100, 'std_dvars'] = 2.0
    assert compare_with_nilearn(tmp_path, table, sidecar, series(), name)


@pytest.mark.parametrize(('name', 'kind'), [('simple+gsr', 'basic'), ('scrubbing+gsr', 'full')])
def test_global_signal_is_that_of_nilearn(tmp_path, name, kind):
    assert compare_with_nilearn(tmp_path, *make_table(), series(), name, global_signal=kind)


REAL = sorted(REAL_FOLDER.glob('*desc-confounds_*.tsv'))


@pytest.mark.skipif(not REAL, reason='the shared test material is absent')
@pytest.mark.parametrize('tsv', REAL, ids=lambda path: path.name)
@pytest.mark.parametrize('name', NAMES)
def test_equals_nilearn_on_real_tables(tmp_path, tsv, name):
    sidecar = tsv.with_suffix('.json')
    if not sidecar.exists():
        sidecar = tsv.with_name('test_desc-confounds_regressors.json')
    table = pd.read_csv(tsv, sep='\t', na_values='n/a')
    data = series(len(table))
    compare_with_nilearn(tmp_path, table, json.loads(sidecar.read_text()), data, name)
    # longer, since most strategies have more regressors than the 30 volumes of the tables
    rng, repeats = np.random.default_rng(3), 8
    long = pd.concat([table] * repeats, ignore_index=True)
    long.iloc[1:] = long.iloc[1:].bfill()
    numbers = long.columns[[c.startswith(('trans', 'rot', 'csf', 'white', 'a_comp'))
                            for c in long]]  # fmt: skip
    long[numbers] *= 1 + 0.3 * rng.standard_normal((len(long), len(numbers)))
    later = [c for c in long if c.startswith('non_steady')]
    long.loc[len(table):, later] = 0  # fmt: skip
    done = compare_with_nilearn(
        tmp_path, long, json.loads(sidecar.read_text()), series(len(long)), name
    )
    assert done or name == 'scrubbing'  # half of the volumes are flagged


@pytest.mark.skipif(not REAL, reason='the shared test material is absent')
@pytest.mark.parametrize('number', ['v21', 'older'])
def test_acompcor_takes_nilearns_separate_components(tmp_path, number):
    import nibabel as nib
    from nilearn.interfaces.fmriprep import load_confounds

    names = {
        'v21': 'test-v21_desc-confounds_timeseries',
        'older': 'test_desc-confounds_regressors',
    }
    source = REAL_FOLDER / f'{names[number]}.tsv'
    tsv = tmp_path / f'{STEM}_desc-confounds_timeseries.tsv'
    shutil.copy(source, tsv)
    shutil.copy(source.with_suffix('.json'), tsv.with_suffix('.json'))
    n = len(pd.read_csv(tsv, sep='\t'))
    bold = tmp_path / f'{STEM}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz'
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, n), np.float32), np.eye(4)), bold)
    theirs, _ = load_confounds(
        str(bold), strategy=('high_pass', 'motion', 'compcor'), motion='derivatives',
        compcor='anat_separated', n_compcor=5,
    )  # fmt: skip
    ours = read(tsv, 'acompcor', n, tsv.with_suffix('.json'))
    assert set(ours.names) == set(theirs.columns)


# Components of an ICA


def make_ica(n=T, n_components=12, seed=5):
    courses = np.random.default_rng(seed).standard_normal((n, n_components))
    return courses, np.arange(n_components) % 3 == 0  # which are noise


def write_aroma(folder, courses, noise, space='_space-MNI152NLin6Asym_res-2'):
    mixing = folder / f'{STEM}{space}_desc-melodic_mixing.tsv'
    metrics = folder / f'{STEM}_desc-aroma_metrics.tsv'
    np.savetxt(mixing, courses, delimiter='\t')
    classes = np.where(noise, 'rejected', 'accepted')
    pd.DataFrame({'edge_fract': 0.1, 'classification': classes}).to_csv(
        metrics, sep='\t', index=False
    )
    return mixing, metrics


def test_aroma_without_confounds_is_regfilt():
    """All components are fitted, and the part of the noise is subtracted (FSL's fsl_regfilt)."""
    (courses, noise), data = make_ica(), series()
    good, none = ~flags(T, 20), np.empty((T, 0))
    cleaned = regress(data, none, good, courses[:, noise], courses[:, ~noise])
    centred = courses - courses[good].mean(axis=0)
    centred_data = data[good] - data[good].mean(axis=0)
    weights = np.linalg.lstsq(centred[good], centred_data, rcond=None)[0]
    expected = data - centred[:, noise] @ weights[noise]
    np.testing.assert_allclose(cleaned, expected, atol=1e-8)


def test_aroma_keeps_what_noise_shares_with_signal(tmp_path):
    """And removes confounds and slow drift wholly, also from what it keeps: as nilearn does."""
    from nilearn.signal import clean

    courses, noise = make_ica()
    courses[:, noise] += 0.8 * courses[:, ~noise][:, : noise.sum()]
    tsv = write(tmp_path, *make_table())
    mixing, metrics = write_aroma(tmp_path, courses, noise)
    strategy = load_strategy('aroma')
    found = read(tsv, strategy, mixing=mixing, metrics=metrics)
    assert found.noise_names == ('aroma_01', 'aroma_04', 'aroma_07', 'aroma_10')
    raw = ParcelSeries(series(), TR, np.ones(P), np.zeros(T, bool), 1.0)
    cleaned = denoise_series(raw, tsv, strategy).data  # finds the tables next to the confounds
    remove = lambda x: clean(x - x.mean(axis=0, dtype=float), detrend=False, standardize=None,
                             confounds=found.regressors)  # fmt: skip
    left = [remove(x) for x in (raw.data, courses[:, noise], courses[:, ~noise])]
    weights = np.linalg.lstsq(np.hstack(left[1:]), left[0], rcond=None)[0]
    same(cleaned, left[0] - left[1] @ weights[: noise.sum()], raw.data)
    regressors = found.regressors - found.regressors.mean(axis=0)
    rest = cleaned - cleaned.mean(axis=0, dtype=float)
    r = regressors.T @ rest / T / regressors.std(axis=0)[:, None] / rest.std(axis=0)
    assert np.abs(r).max() < 1e-4
    kept = np.hstack([courses[:, ~noise], regressors])
    kept -= kept.mean(axis=0)
    shared = kept @ np.linalg.lstsq(kept, courses, rcond=None)[0]
    out = rest - shared @ np.linalg.lstsq(shared, rest, rcond=None)[0]
    assert out.std() > 0  # the run has more than its components


def test_aggressive_aroma_is_that_of_nilearn(tmp_path):
    import nibabel as nib
    from nilearn.interfaces.fmriprep import load_confounds
    from nilearn.signal import clean

    tsv = write(tmp_path, *make_table())
    bold = tmp_path / f'{STEM}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz'
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, T), np.float32), np.eye(4)), bold)
    asked = {'strategy': ('high_pass', 'wm_csf', 'ica_aroma'), 'ica_aroma': 'basic'}
    theirs, _ = load_confounds(str(bold), **asked)
    ours = read(tsv, 'aroma-aggressive')
    assert set(ours.names) == set(theirs.columns)
    cleaned = denoise_series(parcels(), tsv, 'aroma-aggressive').data
    data = parcels().data.astype(float)
    same(cleaned, clean(data, detrend=False, standardize=None, confounds=theirs), data)


@pytest.mark.skipif(not REAL, reason='the shared test material is absent')
def test_tedana_components_are_those_of_nilearn(tmp_path):
    import nibabel as nib
    from nilearn.interfaces.fmriprep import load_confounds

    for name in ('ICA_mixing', 'tedana_metrics'):
        shutil.copy(REAL_FOLDER / f'test_desc-{name}.tsv', tmp_path / f'{STEM}_desc-{name}.tsv')
    bold = tmp_path / f'{STEM}_desc-optcom_bold.nii.gz'
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 30), np.float32), np.eye(4)), bold)
    theirs = {
        kind: load_confounds(str(bold), strategy=('tedana',), tedana=kind, demean=False)[0]
        for kind in ('aggressive', 'non-aggressive')
    }
    tsv = write(tmp_path, make_table(30)[0])
    mixing, metrics = (tmp_path / f'{STEM}_desc-{n}.tsv' for n in ('ICA_mixing', 'tedana_metrics'))
    ours = read(tsv, 'tedana', 30, mixing=mixing, metrics=metrics)
    names = [f'rejected_{name.removeprefix("tedana_")}' for name in ours.noise_names]
    assert set(names) == set(theirs['aggressive'].columns)
    np.testing.assert_allclose(ours.noise, theirs['aggressive'][names].to_numpy())
    both = np.hstack([ours.noise, ours.signal])
    order = lambda array: array[:, np.argsort(array[0])]
    np.testing.assert_allclose(order(both), order(theirs['non-aggressive'].to_numpy()))
    raw = parcels(30)
    match = '30 of 30 volumes .* fit them without a remainder|nuisance regressors and the mean'
    refused(match, denoise_series, raw, tsv, 'tedana')


def test_components_of_other_programs(tmp_path):
    """fMRIPrep up to 23.0 wrote a list of noise components; tedana numbers them in two ways."""
    courses, noise = make_ica()
    tsv = write(tmp_path, *make_table())
    old = tmp_path / f'{STEM}_desc-MELODIC_mixing.tsv'
    numbers = tmp_path / f'{STEM}_AROMAnoiseICs.csv'
    np.savetxt(old, courses, delimiter='\t')
    numbers.write_text(','.join(map(str, np.flatnonzero(noise) + 1)))
    found = read(tsv, 'aroma', mixing=old, metrics=numbers)
    np.testing.assert_allclose(found.noise, courses[:, noise])
    mixing, metrics = tmp_path / 'mixing.tsv', tmp_path / 'metrics.tsv'
    pd.DataFrame(courses, columns=[f'ICA_{k:02d}' for k in range(12)]).to_csv(
        mixing, sep='\t', index=False
    )
    table = pd.DataFrame({
        'Component': [f'ICA_{k}' for k in range(12)],
        'classification': np.where(noise, 'rejected', 'ignored'),
    })[::-1]  # fmt: skip
    table.to_csv(metrics, sep='\t', index=False)
    found = read(tsv, 'tedana', mixing=mixing, metrics=metrics)
    np.testing.assert_allclose(found.noise, courses[:, noise])
    assert found.signal.shape == (T, 8)
    numbers.write_text('3,40')
    refused('names component 40 of 12', read, tsv, 'aroma', mixing=old, metrics=numbers)
    table[:5].to_csv(metrics, sep='\t', index=False)
    refused('does not classify the 12', read, tsv, 'tedana', mixing=mixing, metrics=metrics)
    refused(
        r'needs desc-aroma_metrics.tsv .* --custom-confounds names, or choose --denoise '
        'aroma-aggressive', read, tsv, 'aroma', mixing=old,
    )  # fmt: skip
    np.savetxt(old, courses[:-1])
    numbers.write_text('3')
    refused('has 149 rows but the run has 150', read, tsv, 'aroma', mixing=old, metrics=numbers)


def test_components_are_found_for_the_run_that_they_are_of(tmp_path):
    from bids_brainfm.bids.tables import custom_table, ica_tables

    confounds = tmp_path / 'prep' / 'sub-01_ses-a_task-rest_desc-confounds_timeseries.tsv'
    folder = tmp_path / 'aroma' / 'sub-01' / 'ses-a' / 'func'
    folder.mkdir(parents=True)
    confounds.parent.mkdir()
    ours = 'sub-01_ses-a_task-rest'
    for stem in (f'{ours}_run-2', 'sub-01_ses-a_task-rest2', ours):
        (folder / f'{stem}_space-MNI152NLin6Asym_res-2_desc-melodic_mixing.tsv').touch()
        (folder / f'{stem}_desc-aroma_metrics.tsv').touch()
    found = ica_tables(confounds, 'aroma', tmp_path / 'aroma')
    assert [path.name.partition('_space')[0].partition('_desc')[0] for path in found] == [ours] * 2
    assert ica_tables(confounds, 'aroma') == (None, None)
    assert ica_tables(confounds, 'tedana', tmp_path / 'aroma') == (None, None)
    assert custom_table(confounds, tmp_path / 'aroma') is None
    (folder / confounds.name).touch()
    assert custom_table(confounds, tmp_path / 'aroma') == folder / confounds.name


def test_custom_confounds_are_regressed_out(tmp_path):
    tsv, custom = write(tmp_path, *make_table()), tmp_path / 'custom.tsv'
    mine = np.random.default_rng(8).standard_normal((T, 2))
    pd.DataFrame(mine, columns=['pulse', 'breath']).to_csv(custom, sep='\t', index=False)
    raw = dataclasses.replace(parcels(), flagged=flags(T, 10))
    clean = denoise_series(raw, tsv, custom_confounds=custom)
    good = ~clean.flagged
    r = np.corrcoef(np.hstack([mine, clean.data])[good].T)[:2, 2:]
    assert np.abs(r).max() < 1e-4
    found = read(tsv, 'none', custom=custom)
    assert found.names == ('custom_pulse', 'custom_breath')
    pd.DataFrame(mine, columns=['signal__task', 'breath']).to_csv(custom, sep='\t', index=False)
    refused('has the column signal__task', read, tsv, 'none', custom=custom)
    pd.DataFrame(mine[1:], columns=['a', 'b']).to_csv(custom, sep='\t', index=False)
    refused('has 149 rows', read, tsv, 'none', custom=custom)


# Motion


def breathing(n=400, tr=0.8):
    """A table of slow motion with breathing at 18 per minute along y."""
    table, _ = make_table(n)
    times = np.arange(n) * tr
    slow = table['trans_y'].to_numpy(copy=True)
    table['trans_y'] += 0.2 * np.sin(2 * np.pi * 0.3 * times)
    return table, slow


@pytest.mark.parametrize(
    'options',
    [
        {'motion_filter_type': 'notch', 'band_stop_min': 12, 'band_stop_max': 24},
        {'motion_filter_type': 'lp', 'band_stop_min': 6, 'motion_filter_order': 2},
    ],
)
def test_breathing_is_filtered_from_motion(tmp_path, options):
    table, slow = breathing()
    tsv, strategy = write(tmp_path, table), override(load_strategy('simple'), **options)
    found = read_confounds(Tables(tsv), strategy, 400, 0.8)
    raw = read_confounds(Tables(tsv), load_strategy('simple'), 400, 0.8)
    get = lambda name, of=found: of.regressors[:, of.names.index(name)]
    middle = slice(40, -40)
    assert np.abs(get('trans_y', raw) - slow)[middle].max() > 0.15
    assert np.abs(get('trans_y') - slow)[middle].max() < 0.05
    np.testing.assert_allclose(get('trans_y_power2'), get('trans_y') ** 2)
    np.testing.assert_allclose(get('trans_y_derivative1')[1:], np.diff(get('trans_y')))
    slope = get('trans_y_derivative1')
    np.testing.assert_allclose(get('trans_y_derivative1_power2'), slope**2)
    steps = np.abs(np.diff([get(f'trans_{a}') for a in 'xyz']))
    arcs = 50 * np.abs(np.diff([get(f'rot_{a}') for a in 'xyz']))
    np.testing.assert_allclose(found.displacement[1:], steps.sum(0) + arcs.sum(0))
    assert np.array_equal(get('csf'), get('csf', raw))
    assert np.nanmean(found.displacement) < np.abs(np.diff(get('trans_y', raw))).mean() / 2
    assert 'Motion parameters were filtered' in describe(strategy)


def test_framewise_displacement_with_another_head_radius(tmp_path):
    table, _ = make_table()
    table.loc[60:, 'rot_x'] += 0.012
    tsv = write(tmp_path, table)
    small = override(load_strategy('simple'), head_radius=35)
    large = override(load_strategy('simple'), head_radius=50)
    assert not read(tsv, small).flagged.any()
    assert list(np.flatnonzero(read(tsv, large).flagged)) == [60]


def test_filters_of_motion_that_cannot_be_are_refused(tmp_path):
    tsv, simple = write(tmp_path, *make_table()), load_strategy('simple')
    notch = {'motion_filter_type': 'notch', 'band_stop_min': 12}
    slow = override(simple, **notch, band_stop_max=18)  # 15 is the Nyquist frequency of 2 s
    refused(r'time of 2 s resolves less than 15 breaths .* up to 18', read, tsv, slow)
    refused(
        'needs a band_stop_max above band_stop_min 12 .*it is not given', override, simple, **notch
    )
    refused('notch needs --band-stop-min and --band-stop-max', override, simple,
            motion_filter_type='notch')  # fmt: skip
    refused('must be a multiple of 4', override, simple, **notch, band_stop_max=18,
            motion_filter_order=2)  # fmt: skip
    refused('has no band_stop_max', override, simple, motion_filter_type='lp', band_stop_min=6,
            band_stop_max=9)  # fmt: skip
    refused('belong to --motion-filter-type', override, simple, band_stop_min=6)
    refused("type 'hp' is not one of notch, lp", override, simple, motion_filter_type='hp',
            band_stop_min=6)  # fmt: skip
    none = write(tmp_path, make_table()[0].drop(columns='rot_x'))
    fast = override(load_strategy('none'), fd_threshold=0.5, head_radius=50)
    refused('has no column rot_x', read, none, fast)


# The regression


def test_regression_removes_confounds_and_keeps_the_mean(tmp_path):
    confounds, strategy = read(write(tmp_path, *make_table()), '36P'), load_strategy('36P')
    rng = np.random.default_rng(2)
    noise = confounds.regressors @ rng.standard_normal((39, P)) + 9000
    noise[:, 4] = np.nan
    cleaned, _ = denoise(noise, confounds, strategy, TR)
    assert cleaned.dtype == np.float32
    assert np.isnan(cleaned[:, 4]).all()
    kept = np.delete(np.arange(P), 4)
    np.testing.assert_allclose(cleaned[:, kept], noise.mean(0)[kept] * np.ones((T, 1)), rtol=1e-5)


def test_dummy_volumes_are_dropped_and_flagged_ones_interpolated(tmp_path):
    table, sidecar = make_table(dummy=3)
    table.loc[[20, 21], 'framewise_displacement'] = 0.9
    table.loc[T - 1, 'std_dvars'] = 2.0
    table.loc[3, 'framewise_displacement'] = 0.6
    confounds, strategy = read(write(tmp_path, table, sidecar)), load_strategy('simple')
    assert confounds.dummy == 3
    assert list(np.flatnonzero(confounds.flagged)) == [3, 20, 21, T - 1]
    data = series()
    spoilt = data.copy()
    spoilt[[0, 1, 2, 3, 20, 21, T - 1]] += 1e5
    cleaned, _ = denoise(spoilt, confounds, strategy, TR)
    assert cleaned.shape == (T - 3, P)
    # flagged volumes neither reach the fit nor the result
    np.testing.assert_array_equal(cleaned, denoise(data, confounds, strategy, TR)[0])
    early, late = cleaned[19 - 3], cleaned[22 - 3]
    np.testing.assert_allclose(cleaned[20 - 3], early + (late - early) / 3, rtol=1e-5)
    np.testing.assert_array_equal(cleaned[0], cleaned[1])
    np.testing.assert_array_equal(cleaned[-1], cleaned[-2])


def test_the_first_volume_is_not_flagged_for_the_second(tmp_path):
    """Its displacement is n/a, and n/a exceeds nothing."""
    table, _ = make_table()
    table.loc[0, 'framewise_displacement'] = np.nan
    table.loc[1, 'framewise_displacement'] = 2.0
    assert list(np.flatnonzero(read(write(tmp_path, table)).flagged)) == [1]


def test_a_non_steady_volume_in_the_middle_is_flagged(tmp_path):
    table, _ = make_table(dummy=2)
    table['non_steady_state_outlier02'] = (np.arange(T) == 40).astype(int)
    confounds = read(write(tmp_path, table))
    assert confounds.dummy == 2
    assert list(np.flatnonzero(confounds.flagged)) == [40]


def test_tables_that_do_not_fit_are_refused(tmp_path):
    table, sidecar = make_table()
    refused('does not exist', read, tmp_path / 'absent.tsv')
    refused('needs the confounds of the run', read, None)
    tsv = write(tmp_path, table, sidecar)
    refused('has 150 rows but the run has 149', read, tsv, n=149)
    refused('describes no retained', read, tsv, 'compcor')
    refused('cannot be read', read, tsv, 'compcor', json_path=tmp_path / 'absent.json')

    tsv = write(tmp_path, table.drop(columns='csf'))
    refused('no column csf.*csf_derivative1', read, tsv)
    tsv = write(tmp_path, table.drop(columns='rot_z_power2'))
    refused('no column rot_z_power2', read, tsv)
    tsv = write(tmp_path, table.drop(columns='std_dvars'))
    refused('no column std_dvars', read, tsv)
    tsv = write(tmp_path, table.drop(columns=[c for c in table if c.startswith('cosine')]))
    assert len(read(tsv).names) == 26

    gap = table.copy()
    gap.loc[7, 'csf'] = np.nan
    refused('csf of .* no value in row 8', read, write(tmp_path, gap))
    text = table.astype({'csf': object})
    text.loc[7, 'csf'] = 'oops'
    tsv = write(tmp_path, text)
    refused('Column csf .* not a number', read, tsv)
    tsv.write_text('')
    refused('cannot be read', read, tsv)


def test_a_users_own_file(tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_text('name: mine\ncolumns: ["trans_[xyz]", csf]\noutliers: {rmsd: 1}\n')
    table, _ = make_table()
    table['rmsd'] = 0.0
    confounds = read(write(tmp_path, table), load_strategy(path))
    assert confounds.names == ('trans_x', 'trans_y', 'trans_z', 'csf')


@pytest.mark.parametrize(
    ('text', 'match'),
    [
        ('kolumns: [csf]', 'unknown key kolumns; the keys are name,'),
        ('columns: csf', "columns 'csf' is not a list"),
        ('columns: ["csf("]', 'not a regular expression'),
        ('outliers: {std_dvars: high}', "outliers 'high' is not a number"),
        ('compcor: {masks: [GM]}', 'a list of combined, CSF, WM'),
        ('ica: fix', "ica 'fix' is not one of aroma, tedana"),
        ('bandpass: [0.1, 0.01]', 'band-pass 0.1 to 0.01 Hz is not a band'),
        ('bandpass: 0.1', 'bandpass 0.1 is not a list of 2 values'),
        ('scrub: -1', 'scrub -1 is not 0 or above'),
        ('- csf', 'is not a YAML mapping .it is a list'),
        ('columns: [', 'is not a YAML mapping'),
    ],
)
def test_malformed_strategies_are_refused(tmp_path, text, match):
    path = tmp_path / 'mine.yml'
    path.write_text(text)
    refused(match, load_strategy, path)


def test_unknown_strategies_are_refused(tmp_path):
    refused('no denoising strategy 24P: choose 36P, acompcor', load_strategy, '24P')
    refused('no denoising strategy 24P: choose 36P, acompcor', load_strategy, '24P+gsr')
    refused('does not exist', load_strategy, tmp_path / 'absent.yml')
    refused('min_dof 2.5 is not a whole number', override, load_strategy('none'), min_dof=2.5)


def test_a_column_without_a_value_points_to_another_denoising(tmp_path):
    """fMRIPrep writes n/a throughout where a mask is empty: the table is as it wrote it."""
    table, sidecar = make_table()
    table[['csf', 'white_matter']] = np.nan
    tsv = write(tmp_path, table, sidecar)
    refused(r'Every value of white_matter, csf in|Every value of csf, white_matter in', read, tsv)
    refused('choose another --denoise', read, tsv)
    read(tsv, 'compcor', json_path=tsv.with_suffix('.json'))
    table['std_dvars'] = np.nan
    refused('std_dvars .* threshold of 0', read, write(tmp_path, table, sidecar), 'compcor',
            json_path=tsv.with_suffix('.json'))  # fmt: skip
