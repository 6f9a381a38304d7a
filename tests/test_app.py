"""The command as a user runs it, on the simulated dataset."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_brainfm.bids.dataset import find_whole
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.training.cohort import find_cohort

STEM = 'sub-01_task-rest_space-MNI152NLin2009cAsym_atlas-Demo424'
MODELS = Path(__file__).parents[1] / 'bids_brainfm' / 'data' / 'models'
DEMO_WEIGHTS = MODELS / 'brainlm-demo.safetensors'


@pytest.fixture(scope='module')
def done(simulated, tmp_path_factory):
    """Output of one run over the simulated dataset, by the command in a process of its own."""
    place = tmp_path_factory.mktemp('done')
    command = [sys.executable, '-m', 'bids_brainfm.cli.run', simulated, place / 'out']
    command += ['participant', '--model', 'brainlm-demo', '--tokens', '-w', place / 'work']
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return place / 'out', ended.stderr


def tree(folder: Path) -> dict[str, float]:
    """Every file below a folder but the logs, and when it was written."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.rglob('*')
        if p.is_file() and 'logs' not in p.parts
    }


def test_outputs_are_those_of_the_list(done):
    """Every expected file is there, and no other."""
    expected = (Path(__file__).parent / 'expected_outputs.txt').read_text().split()
    found = [re.sub(r'logs/\d[^/]*/', 'logs/RUN/', str(p)) for p in tree_with_logs(done[0])]
    assert sorted(found) == sorted(expected)


def tree_with_logs(folder):
    return [p.relative_to(folder) for p in folder.rglob('*') if p.is_file()]


def test_validator_is_content(done):
    """No error and no warning from the real BIDS validator."""
    validator = Path(sys.executable).with_name('bids-validator-deno')
    ended = subprocess.run(
        [validator, done[0], '--format', 'json'], capture_output=True, text=True, check=False
    )
    issues = json.loads(ended.stdout)['issues']['issues']
    assert issues == []
    assert ended.returncode == 0


def test_progress_is_told(done):
    """The terminal and the log file say how far the work is."""
    out, stderr = done
    log = next((out / 'logs').glob('*/bids_brainfm.log')).read_text()
    for text in (stderr, log):
        assert '[1/2] ' in text
        assert '[2/2] sub-02_task-rest' in text
        assert 'Finished' in text
    assert 'sub-01.html' in stderr


def test_what_the_demo_was_trained_on_is_said(done):
    """The sidecar tells that the demonstration model knows simulated data only."""
    sidecar = json.loads(
        (done[0] / f'sub-01/func/{STEM}_desc-brainlmdemo_embedding.json').read_text()
    )
    assert sidecar['Model']['Trained'] is True
    assert 'trained on simulated data, for demonstration' in sidecar['Model']['Description']
    assert sidecar['Model']['Training']['held_out']['r2'] > 0.1
    assert 'Untrained' not in (done[0] / 'sub-01.html').read_text()


def test_untrained_is_in_plain_sight(simulated, tmp_path, app):
    """Name, sidecar and report of the control say that it is untrained."""
    out = tmp_path / 'out'
    assert app(simulated, out, '--participant-label', '01', '--random-weights') == 0
    (path,) = out.glob('sub-01/func/*_desc-brainlmdemorandom_embedding.json')
    sidecar = json.loads(path.read_text())
    assert sidecar['Model']['Trained'] is False
    assert 'untrained' in sidecar['Model']['Weights']
    assert any('untrained' in warning for warning in sidecar['Warnings'])
    assert 'Untrained' in (out / 'sub-01.html').read_text()


def test_embedding_is_what_python_gives(done):
    """The table holds the numbers of the same steps from Python."""
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.models.cards import load_card
    from bids_brainfm.models.encoder import Encoder, ascending_y
    from bids_brainfm.models.weights import build, load_checkpoint
    from bids_brainfm.resources import home
    from bids_brainfm.signals.contract import Contract, prepare_input, windows_of
    from bids_brainfm.signals.series import read_series

    func = done[0] / 'sub-01' / 'func'
    card, atlas = load_card('brainlm-demo'), load_atlas('Demo424', home())
    series = read_series(func / f'{STEM}_stat-mean_timeseries.tsv')
    contract = Contract(card.tr, card.window, card.scaling, card.divide_by)
    windows = windows_of(prepare_input(series, contract, atlas.xyz, atlas.name), contract)
    network = build(card.config)
    load_checkpoint(network, card.weights[0]['name'])
    encoding = Encoder(network, order=ascending_y(atlas.xyz)).encode(windows.data)
    table = pd.read_csv(func / f'{STEM}_desc-brainlmdemo_embedding.tsv', sep='\t')
    first = ['window', 'onset', 'duration', 'real', 'flagged', 'excluded']
    assert list(table.columns[:6]) == first
    np.testing.assert_allclose(table.iloc[:, 6:], encoding.summary, atol=1e-5)


def test_connectome_is_the_relmat(done):
    """The baseline's row is the upper triangle of the correlation of unflagged volumes."""
    func = done[0] / 'sub-01' / 'func'
    series = pd.read_csv(func / f'{STEM}_stat-mean_timeseries.tsv', sep='\t')
    relmat = pd.read_csv(
        func / f'{STEM}_stat-pearsoncorrelation_relmat.tsv', sep='\t', index_col='Node'
    )
    row = pd.read_csv(func / f'{STEM}_desc-connectome_embedding.tsv', sep='\t').iloc[0]
    sidecar = json.loads((func / f'{STEM}_stat-mean_timeseries.json').read_text())
    proportion = sidecar['NumberOfVolumesFlagged'] / len(series)
    assert proportion > 0
    unflagged = series.drop(sidecar['FlaggedVolumes'])
    np.testing.assert_allclose(relmat, unflagged.corr(), atol=1e-5)
    np.testing.assert_allclose(row[:6], [0, 0, 210 * 0.735, 1, proportion, 0], rtol=1e-5)
    row = row[6:]
    np.testing.assert_allclose(row, relmat.to_numpy()[np.triu_indices(424, 1)], atol=1e-6)


def test_tokens(done):
    """Token embeddings have the canonical shape."""
    import h5py

    with h5py.File(done[0] / f'sub-01/func/{STEM}_desc-brainlmdemo_embedding.h5') as file:
        assert file['tokens'].shape == (1, 27 * 27, 128)
        assert len(file['parcel_names']) == 424


def test_settings_are_kept(done):
    """The run's TOML reads back to its settings."""
    text = next((done[0] / 'logs').glob('*/bids_brainfm.toml')).read_text()
    settings = Settings(**tomllib.loads(text))
    assert settings.tokens
    assert settings.model == ('brainlm-demo',)


def test_second_run_does_nothing_new(simulated, done, tmp_path, app, capfd):
    """Unchanged outputs are left alone, and a changed input or a lost output is done again."""
    out = Path(shutil.copytree(done[0], tmp_path / 'out'))
    before = tree(out)
    assert app(simulated, out, '--tokens') == 0
    assert tree(out) == before
    assert '0 parcel series to make' in capfd.readouterr().err

    lost = out / 'sub-02' / 'func' / f'{STEM.replace("01", "02")}_desc-brainlmdemo_embedding.tsv'
    content = lost.read_bytes()
    lost.unlink()
    assert app(simulated, out, '--tokens') == 0
    assert lost.read_bytes() == content
    changed = {name for name, when in tree(out).items() if before.get(name) != when}
    assert all('sub-02' in name for name in changed)


def test_changed_input_is_done_again(dataset, done, tmp_path, app):
    """A run whose BOLD file is another one is made anew, and only this one."""
    out = Path(shutil.copytree(done[0], tmp_path / 'out'))
    assert app(dataset, out) == 0  # a copy: other dates, so all is done again
    before = tree(out)
    next(dataset.glob('sub-02/func/*_bold.nii.gz')).touch()
    assert app(dataset, out) == 0
    changed = {name for name, when in tree(out).items() if before.get(name) != when}
    assert f'sub-02/func/{STEM.replace("01", "02")}_stat-mean_timeseries.tsv' in changed
    assert not any(name.startswith('sub-01/func') for name in changed)


@pytest.mark.parametrize(
    ('options', 'difference'),
    [
        (['--scale', 'parcel-z'], "scaling was 'run-robust' and is now 'parcel-z'"),
        (['--denoise', 'none'], 'denoise was'),
        (['--stride', '100'], 'stride was None and is now 100'),
    ],
)
def test_other_settings_are_not_mixed_in(
    simulated, done, tmp_path, app, capfd, options, difference
):
    """Outputs of other settings are refused with the difference, and nothing changes."""
    out = Path(shutil.copytree(done[0], tmp_path / 'out'))
    before = tree(out)
    assert app(simulated, out, *options) == 2
    assert difference in capfd.readouterr().err
    assert tree(out) == before


def test_control_stands_beside(simulated, done, tmp_path, app):
    """A second model goes into the same output without touching the first one's files."""
    out = Path(shutil.copytree(done[0], tmp_path / 'out'))
    card = tmp_path / 'mine.yml'
    text = (Path(__file__).parents[1] / 'bids_brainfm/data/models/brainlm-demo.yml').read_text()
    card.write_text(
        text.replace('name: brainlm-demo', 'name: mine').replace('brainlmdemo', 'mine')
    )
    shutil.copy(DEMO_WEIGHTS, tmp_path / 'mine.safetensors')
    before = tree(out)
    assert app(simulated, out, '--model', card, '--participant-label', 'sub-02') == 0
    assert next(out.glob('sub-02/func/*desc-mine_embedding.tsv')).is_file()
    methods = (out / 'logs' / 'CITATION.md').read_text()
    assert 'For brainlm-demo' in methods
    assert 'For mine' in methods
    after = tree(out)
    assert all(after[name] == when for name, when in before.items() if name.startswith('sub-01'))


def test_reports_only_and_boilerplate_only(simulated, done, tmp_path, app):
    """The report comes back as it was from the outputs alone; the methods text needs no run."""
    out = Path(shutil.copytree(done[0], tmp_path / 'out'))
    report = out / 'sub-01.html'
    content = report.read_bytes()
    report.unlink()
    assert app(simulated, out, '--reports-only') == 0
    assert report.read_bytes() == content

    assert app(simulated, tmp_path / 'new', '--boilerplate-only') == 0
    text = (tmp_path / 'new' / 'logs' / 'CITATION.md').read_text()
    assert 'brainlm-demo' in text
    assert 'Demo424' in text
    assert 'fMRIPrep' in text
    assert not list((tmp_path / 'new').glob('sub-*'))


def test_config_file_is_overridden_by_what_is_typed(simulated, tmp_path, app):
    """A TOML file gives settings; the command line wins; a typo in it is refused."""
    config = tmp_path / 'my.toml'
    config.write_text('participant_label = ["01"]\nscale = "parcel-z"\n')
    out = tmp_path / 'out'
    assert app(simulated, out, '--config-file', config, '--scale', 'global-z') == 0
    sidecar = json.loads((out / f'sub-01/func/{STEM}_desc-brainlmdemo_embedding.json').read_text())
    assert sidecar['Scaling'] == 'global-z'
    assert not (out / 'sub-02').exists()
    config.write_text('scael = "parcel-z"\n')
    assert app(simulated, out, '--config-file', config) == 2


def test_dummy_volumes_and_a_header_that_disagrees(dataset, tmp_path, app):
    """Volumes before steady state are left out and times still count from the first volume."""
    func = dataset / 'sub-01' / 'func'
    table = next(func.glob('*_desc-confounds_timeseries.tsv'))
    confounds = pd.read_csv(table, sep='\t')
    for i in range(3):
        confounds[f'non_steady_state_outlier{i:02d}'] = (confounds.index == i).astype(int)
    confounds.to_csv(table, sep='\t', index=False, na_rep='n/a')
    sidecar = next(func.glob('*_bold.json'))
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {'RepetitionTime': 0.75}))
    out = tmp_path / 'out'
    assert app(dataset, out, '--participant-label', '01') == 0
    series = json.loads((out / f'sub-01/func/{STEM}_stat-mean_timeseries.json').read_text())
    assert series['NumberOfVolumesDiscardedByNonsteadyStatesDetector'] == 3
    assert series['StartTime'] == pytest.approx(2.25)
    assert any('0.735' in w and '0.75' in w for w in series['Warnings'])
    rows = pd.read_csv(out / f'sub-01/func/{STEM}_stat-mean_timeseries.tsv', sep='\t')
    assert len(rows) == 207
    windows = pd.read_csv(out / f'sub-01/func/{STEM}_desc-brainlmdemo_embedding.tsv', sep='\t')
    assert windows['onset'][0] == pytest.approx(2.25)
    whole = pd.read_csv(out / f'sub-01/func/{STEM}_desc-connectome_embedding.tsv', sep='\t')
    assert whole['onset'][0] == pytest.approx(2.25)


def test_flagged_volumes_are_counted_in_their_window(simulated, done):
    """The share of flagged samples is that of the confounds table in the window's time."""
    table = next(simulated.glob('sub-01/func/*_desc-confounds_timeseries.tsv'))
    confounds = pd.read_csv(table, sep='\t')
    bad = (confounds['framewise_displacement'] > 0.5) | (confounds['std_dvars'] > 1.5)
    assert bad[:200].any()
    windows = pd.read_csv(done[0] / f'sub-01/func/{STEM}_desc-brainlmdemo_embedding.tsv', sep='\t')
    assert windows['flagged'][0] == pytest.approx(bad[:200].mean())


def test_cards_of_ones_own(simulated, tmp_path, app):
    """A user's own model and atlas cards, beside their files, are as good as ours."""
    package = Path(__file__).parents[1] / 'bids_brainfm' / 'data'
    for name in ('Demo424_dseg.nii.gz', 'Demo424_dseg.tsv'):
        shutil.copy(package / 'atlases' / name, tmp_path / name)
    atlas = (package / 'atlases' / 'Demo424.yml').read_text()
    (tmp_path / 'my-atlas.yml').write_text(atlas.replace('name: Demo424\n', 'name: MyAtlas\n', 1))
    model = (package / 'models' / 'brainlm-demo.yml').read_text()
    model = model.replace('brainlmdemo', 'mymodel').replace('name: brainlm-demo', 'name: my-model')
    card = tmp_path / 'my-model.yml'
    card.write_text(model.replace('atlas: Demo424', 'atlas: my-atlas.yml'))
    shutil.copy(DEMO_WEIGHTS, tmp_path / 'my-model.safetensors')
    out = tmp_path / 'out'
    assert app(simulated, out, '--model', card, '--participant-label', '01') == 0
    path = next(out.glob('sub-01/func/*_atlas-MyAtlas_desc-mymodel_embedding.json'))
    assert json.loads(path.read_text())['Model']['Name'] == 'my-model'


@pytest.mark.slow
def test_raw_dataset_and_named_derivatives(simulated, tmp_path, app):
    """fMRIPrep's output is found inside a raw dataset, or where --derivatives says."""
    raw = tmp_path / 'raw'
    (raw / 'derivatives').mkdir(parents=True)
    (raw / 'dataset_description.json').write_text('{"Name": "raw", "BIDSVersion": "1.8.0"}')
    (raw / 'derivatives' / 'fmriprep').symlink_to(simulated)
    out = raw / 'derivatives' / 'brainfm'
    assert app(raw, out, '--participant-label', '01') == 0
    description = json.loads((out / 'dataset_description.json').read_text())
    assert list(description['DatasetLinks']) == ['fmriprep']
    other = tmp_path / 'out'
    assert app(raw, other, '-d', f'prep={simulated}', '--participant-label', '02') == 0
    sidecar = json.loads(next(other.glob('sub-02/func/*_timeseries.json')).read_text())
    assert sidecar['Sources'][0].startswith('bids:prep:sub-02/func/')


def test_own_denoising_by_a_relative_path(simulated, tmp_path, app):
    """The graph works in folders of its own and finds the file all the same."""
    (tmp_path / 'mine.yml').write_text(
        'name: mine\ndescription: Motion only.\ncolumns: ["(trans|rot)_[xyz]"]\n'
    )
    out = tmp_path / 'out'
    assert app(simulated, out, '--denoise', 'mine.yml', '--participant-label', '01') == 0
    sidecar = json.loads((out / f'sub-01/func/{STEM}_stat-mean_timeseries.json').read_text())
    assert len(sidecar['Denoising']['ConfoundRegressors']) == 6
    assert str(tmp_path / 'mine.yml') in next(out.glob('logs/*/bids_brainfm.toml')).read_text()


def series_sidecar(out, label='01'):
    stem = STEM.replace('01', label)
    return json.loads((out / f'sub-{label}/func/{stem}_stat-mean_timeseries.json').read_text())


def test_denoise_none_claims_nothing_about_confounds(simulated, tmp_path, app):
    """What was not read is no source, and what was not assessed is not zero."""
    out, asked = tmp_path / 'out', ('--denoise', 'none', '--participant-label', '01')
    assert app(simulated, out, *asked, '--keep-nonsteady') == 0
    sidecar = series_sidecar(out)
    assert not any('confounds' in source for source in sidecar['Sources'])
    assert 'NumberOfVolumesFlagged' not in sidecar
    assert sidecar['Denoising']['DegreesOfFreedom'] == 209
    table = pd.read_csv(out / f'sub-01/func/{STEM}_desc-brainlmdemo_embedding.tsv', sep='\t')
    assert np.isnan(table['flagged'][0])


def test_denoise_none_drops_non_steady_volumes(dataset, tmp_path, app):
    """They are found in the confounds; where there are none, the report says so."""
    path = next(dataset.glob('sub-01/func/*_desc-confounds_timeseries.tsv'))
    table = pd.read_csv(path, sep='\t', na_values='n/a')
    table['non_steady_state_outlier00'] = (np.arange(len(table)) == 0).astype(int)
    table.to_csv(path, sep='\t', index=False, na_rep='n/a')
    next(dataset.glob('sub-02/func/*_desc-confounds_timeseries.tsv')).unlink()
    out = tmp_path / 'out'
    assert app(dataset, out, '--denoise', 'none', '--stop-after', 'timeseries') == 0
    found, other = series_sidecar(out), series_sidecar(out, '02')
    assert found['NumberOfVolumesDiscardedByNonsteadyStatesDetector'] == 1
    assert any('confounds' in source for source in found['Sources'])
    assert found['Denoising']['NumberOfVolumesUnflagged'] == 209
    assert any('before the steady state could not be found' in w for w in other['Warnings'])


@pytest.mark.slow
def test_volumes_that_the_user_drops_count_nowhere(dataset, tmp_path, app, capfd):
    """Not in motion or tSNR; and to drop none is another setting than to drop those found."""
    path = next(dataset.glob('sub-01/func/*_desc-confounds_timeseries.tsv'))
    table = pd.read_csv(path, sep='\t', na_values='n/a')
    table['non_steady_state_outlier00'] = (table.index == 0).astype(int)
    table.loc[1:7, ['framewise_displacement', 'std_dvars']] = 30.0
    table.to_csv(path, sep='\t', index=False, na_rep='n/a')
    out, other = tmp_path / 'out', tmp_path / 'other'
    asked = ('--participant-label', '01', '--stop-after', 'timeseries', '--dummy-scans')
    assert app(dataset, out, *asked, '8') == 0
    row = pd.read_csv(next(out.glob('sub-01/func/*_desc-quality_bold.tsv')), sep='\t').iloc[0]
    kept = table[8:]
    assert row['num_volumes'] == 202
    assert row['mean_fd'] == pytest.approx(kept['framewise_displacement'].mean())
    assert row['mean_std_dvars'] == pytest.approx(kept['std_dvars'].mean())
    coverage = next(out.glob('sub-01/func/*_stat-coverage_bold.json'))
    assert json.loads(coverage.read_text())['NumberOfVolumesLeftOut'] == 8
    assert app(dataset, other, *asked, '0') == 0
    assert series_sidecar(other)['NumberOfVolumesDiscardedByUser'] == 0
    assert app(dataset, other, *asked, 'auto') == 2
    assert 'denoise_dummy_scans was 0 and is now None' in capfd.readouterr().err


@pytest.mark.slow
def test_options_of_denoising(dataset, tmp_path, app, capfd):
    """They reach the series from the command line and from a file; others are not mixed in."""
    folder, out = tmp_path / 'tables', tmp_path / 'out'
    folder.mkdir()
    path = next(dataset.glob('sub-01/func/*_desc-confounds_timeseries.tsv'))
    mine = pd.DataFrame({'pulse': np.random.default_rng(0).standard_normal(210)})
    mine.to_csv(folder / path.name, sep='\t', index=False)
    config = tmp_path / 'mine.toml'
    config.write_text(
        'bandpass = [0.01, 0]\nscrub = 2\ndummy_scans = 3\nmin_minutes = 1.5\n'
        'motion_filter_type = "notch"\nband_stop_min = 12\nband_stop_max = 18.5\n'
    )
    asked = ('--config-file', config, '--denoise', 'simple+gsr', '--stop-after', 'timeseries')
    asked += ('--custom-confounds', folder)
    one = ('--participant-label', '01')
    assert app(dataset, out, *asked, *one) == 0
    sidecar = series_sidecar(out)
    found = sidecar['Denoising']
    assert {'global_signal', 'custom_pulse'} <= set(found['ConfoundRegressors'])
    assert not any(name.startswith('cosine') for name in found['ConfoundRegressors'])
    assert (found['NumberOfRegressors'], found['RankOfRegressors']) == (28, 29)
    left = found['NumberOfVolumesUnflagged'] - found['RankOfRegressorsAndFilter']
    assert found['DegreesOfFreedom'] == left
    assert found['RankOfRegressorsAndFilter'] > 29
    assert (found['BandPassFilter'], found['ShortestSegment']) == ([0.01, None], 2)
    assert sidecar['NumberOfVolumesDiscardedByUser'] == 3
    assert str(folder / path.name) in json.dumps(sidecar['InputFiles'])
    table = pd.read_csv(next(out.glob('sub-01/func/*_desc-quality_bold.tsv')), sep='\t')
    assert table['degrees_of_freedom'][0] == left
    assert table['num_regressors'][0] == 28
    assert found['MotionFilter']['band_stop_max'] == 18.5
    assert 0 < found['MeanFramewiseDisplacement'] < table['mean_fd'][0]
    written = next(out.glob('logs/*/bids_brainfm.toml'))
    assert app(dataset, out, '--config-file', written) == 0  # and is read back
    assert f'{left} (regressors of rank' in (out / 'sub-01.html').read_text()

    assert app(dataset, out, *asked, *one, '--min-dof', '25') == 0  # a limit changes no value
    assert app(dataset, out, *asked, *one, '--min-dof', '200') == 1  # but holds for what is there
    assert 'fewer than the 200 of --min-dof' in capfd.readouterr().err
    assert_left_out(out, 'fewer than the 200 of --min-dof', capfd)
    assert app(dataset, out, *asked, *one) == 0
    assert len(find_cohort([out], 'Demo424')) == 1
    assert app(dataset, out, *asked, *one, '--scrub', '4') == 2
    assert 'denoise_scrub was 2 and is now 4' in capfd.readouterr().err
    assert app(dataset, tmp_path / 'other', *asked) == 1  # sub-02 has no such table
    assert 'there is no table of this run in' in capfd.readouterr().err
    for wrong in ('bandpass = [0.01]', 'bandpass = ["low", 0.1]', 'custom_confounds = "/no"'):
        config.write_text(wrong)
        assert app(dataset, tmp_path / 'new', '--config-file', config) == 2


def assert_left_out(out, reason, capfd):
    """The group level and training read nothing of a run whose last attempt failed."""
    for product in map(BY_NAME.get, ('series', 'connectome')):
        version, stat = product.results_version, product.stat
        assert find_whole(out, product.suffix, {}, version, stat=stat) == []
        said = capfd.readouterr().err
        assert (
            f'{product.suffix}.tsv is left out, since the last attempt to make it failed' in said
        )
        assert reason in said
    with pytest.raises(BrainfmError, match='last attempt at every run'):
        find_cohort([out], 'Demo424')
    assert reason in capfd.readouterr().err
    page = (out / 'sub-01.html').read_text()
    assert 'networks, training and the group level leave it out' in page


def test_aroma_takes_the_files_of_fmripost_aroma(simulated, tmp_path, app, capfd):
    """They are inputs of the run; what is missing is named."""
    func, stem = tmp_path / 'aroma' / 'sub-01' / 'func', 'sub-01_task-rest'
    func.mkdir(parents=True)
    mixing = func / f'{stem}_space-MNI152NLin6Asym_res-2_desc-melodic_mixing.tsv'
    metrics = func / f'{stem}_desc-aroma_metrics.tsv'
    np.savetxt(mixing, np.random.default_rng(0).standard_normal((210, 6)), delimiter='\t')
    metrics.write_text('classification\n' + 'rejected\naccepted\n' * 3)
    asked = ('--denoise', 'aroma', '--stop-after', 'timeseries')
    folder, out = ('--custom-confounds', tmp_path / 'aroma'), tmp_path / 'out'
    assert app(simulated, out, *asked, *folder) == 1
    sidecar = series_sidecar(out)
    names = sidecar['Denoising']['ConfoundRegressors']
    assert names[-3:] == ['aroma_01', 'aroma_03', 'aroma_05']
    assert {'csf', 'white_matter'} <= set(names)
    assert {mixing.as_uri(), metrics.as_uri()} <= set(sidecar['InputFiles'])
    said = capfd.readouterr().err
    assert 'sub-02_task-rest: there is no table of this run in' in said
    assert app(simulated, tmp_path / 'other', *asked, '--participant-label', '02') == 1
    assert 'needs desc-melodic_mixing.tsv and desc-aroma_metrics.tsv' in capfd.readouterr().err


def test_a_run_without_degrees_of_freedom_fails(simulated, tmp_path, app, capfd):
    """Such a run used to pass without a warning."""
    path = next(simulated.glob('sub-01/func/*_desc-confounds_timeseries.tsv'))
    displacement = pd.read_csv(path, sep='\t', na_values='n/a')['framewise_displacement']
    limit = displacement.quantile(0.2)
    asked = ('--fd-threshold', limit, '--stop-after', 'timeseries', '--participant-label', '01')
    assert app(simulated, tmp_path / 'out', *asked) == 1
    said = capfd.readouterr().err
    assert 'volumes are unflagged, and' in said
    assert 'fewer than a tenth of the volumes: choose a --denoise with fewer' in said


@pytest.mark.slow
def test_jobs_side_by_side_in_one_folder(simulated, tmp_path):
    """Two jobs, started in one folder with its default work folder, write one dataset."""
    jobs = [
        subprocess.Popen(
            [sys.executable, '-m', 'bids_brainfm.cli.run', simulated, 'out', 'participant',
             '--model', 'brainlm-demo', '--participant-label', label],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )
        for label in ('01', '02')
    ]  # fmt: skip
    for job in jobs:
        assert job.wait() == 0, job.stderr.read()
        job.stderr.close()
    for label in ('01', '02'):
        assert next(tmp_path.glob(f'out/sub-{label}/func/*brainlmdemo_embedding.tsv')).is_file()
        assert (tmp_path / 'out' / f'sub-{label}.html').is_file()


def test_random_weights_of_a_trained_model_have_their_own_name(tmp_path):
    """The control never takes the name of the model."""
    from bids_brainfm.models.spec import resolve_model

    spec = resolve_model('brainlm-13m', tmp_path, random_weights=True)
    assert spec.label == 'brainlm13mrandom'
    assert not spec.trained
    assert 'random' in spec.weights


@pytest.mark.slow
def test_tokens_of_another_input_are_not_left_beside_a_new_table(dataset, tmp_path, app):
    """Without --tokens, a run whose input changed loses its old token file."""
    out = tmp_path / 'out'
    assert app(dataset, out, '--participant-label', '01', '--tokens') == 0
    tokens = out / f'sub-01/func/{STEM}_desc-brainlmdemo_embedding.h5'
    assert app(dataset, out, '--participant-label', '01') == 0
    assert tokens.is_file()
    tokens.unlink()  # the sidecar lists it: the embedding is written again, without it
    assert app(dataset, out, '--participant-label', '01') == 0
    assert json.loads(tokens.with_suffix('.json').read_text())['Arrays'] == []
    assert app(dataset, out, '--participant-label', '01', '--tokens') == 0
    next(dataset.glob('sub-01/func/*_bold.nii.gz')).touch()
    assert app(dataset, out, '--participant-label', '01') == 0
    assert not tokens.exists()


@pytest.mark.slow
def test_bfloat16_is_compared_with_float32(simulated, tmp_path, app, capsys):
    """By the SD of the embeddings; above 5 % of it sidecar, report and log warn."""
    from bids_brainfm import load_model
    from bids_brainfm.signals.series import read_series

    out = tmp_path / 'out'
    assert app(simulated, out, '--device', 'cpu', '--precision', 'tf32') == 2
    assert 'tf32 needs an NVIDIA GPU' in capsys.readouterr().err
    assert app(simulated, out, '--device', 'cpu', '--precision', 'bfloat16') == 0
    model = load_model('brainlm-demo', device='cpu')
    tables = sorted(out.glob('sub-*/func/*_desc-brainlmdemo_embedding.tsv'))
    found = np.concatenate([pd.read_csv(t, sep='\t').filter(like='dim') for t in tables])
    series = sorted(out.glob('sub-*/func/*_stat-mean_timeseries.tsv'))
    exact = np.concatenate([model.embed(read_series(path)).summary for path in series])
    error = np.sqrt(((found - exact) ** 2).mean(0)) / found.std(0, ddof=1)
    log = next((out / 'logs').glob('*/bids_brainfm.log')).read_text()
    said = capsys.readouterr().err
    for table in tables:
        sidecar = json.loads(table.with_suffix('.json').read_text())
        check = sidecar['PrecisionCheck']
        assert sidecar['Precision'] == 'bfloat16'
        assert (check['WindowsCompared'], check['WindowsEncoded']) == (2, 2)
        assert check['RelativeError'] == pytest.approx(np.sqrt((error**2).mean()), rel=0.02)
        assert check['RelativeError'] > 0.05
        assert f'brainlmdemo: {check["Warning"]}' in sidecar['Warnings']
        report = (out / f'{table.name[:6]}.html').read_text()
        assert all(check['Warning'] in text for text in (report, log, said))
    assert app(simulated, out, '--device', 'cpu') == 2
    assert "precision was 'bfloat16' and is now 'float32'" in capsys.readouterr().err


def test_what_one_window_cannot_tell_and_a_static_input(simulated, tmp_path, app, capsys):
    """One window has no SD; global-z leaves little but the level of the parcels."""
    from bids_brainfm.signals.scale import static_proportion
    from bids_brainfm.signals.series import read_series

    out, coarse = tmp_path / 'out', ('--device', 'cpu', '--precision', 'bfloat16')
    options = (*coarse, '--scale', 'global-z', '--participant-label', '01')
    assert app(simulated, out, *options) == 0
    said = capsys.readouterr().err
    func, report = out / 'sub-01' / 'func', (out / 'sub-01.html').read_text()
    sidecar = json.loads((func / f'{STEM}_desc-brainlmdemo_embedding.json').read_text())
    assert sidecar['PrecisionCheck']['RelativeError'] is None
    assert 'could not be assessed: no two windows' in report
    series = read_series(func / f'{STEM}_stat-mean_timeseries.tsv').data[:200]
    static = static_proportion(series)
    assert static > 0.9
    assert sidecar['StaticVariance'] == pytest.approx(static, abs=0.002)
    (warning,) = [w for w in sidecar['Warnings'] if 'global-z' in w]
    assert warning.startswith(f'brainlmdemo: After --scale global-z, {static:.1%}')
    assert warning in report
    assert warning in said
