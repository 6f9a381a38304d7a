"""Brain-JEPA through the command: alone, beside BrainLM, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from bids_brainfm.bids.files import read_matrix
from bids_brainfm.cli import demo

BOTH = ('--model', 'brainlm-demo', 'brain-jepa-demo')
JEPA = ('--model', 'brain-jepa-demo')


@pytest.fixture(scope='module')
def long_runs(tmp_path_factory):
    """One participant, 490 volumes of 0.735 s; tests must not change it."""
    folder = tmp_path_factory.mktemp('long') / 'data'
    demo.write_dataset(folder, participants=1, volumes=490)
    return folder


def one(out, pattern):
    (path,) = out.glob(f'sub-01/func/*{pattern}')
    return path


def sidecar(out, pattern):
    return json.loads(one(out, pattern).read_text())


@pytest.fixture
def resized(long_runs, tmp_path):
    """Copy of the dataset with the first volumes of its run, at another repetition time."""
    import nibabel as nib

    def make(volumes, tr):
        folder = shutil.copytree(long_runs, tmp_path / f'{volumes}x{tr}')
        (bold,) = folder.glob('sub-01/func/*_bold.nii.gz')
        image = nib.load(bold)
        data = np.asanyarray(image.dataobj)
        data = np.concatenate([data, data[..., ::-1]], axis=3)[..., :volumes]
        cut = nib.Nifti1Image(data, image.affine, image.header)
        cut.header.set_zooms((*image.header.get_zooms()[:3], tr))
        cut.to_filename(bold)
        (about,) = folder.glob('sub-01/func/*_bold.json')
        about.write_text(json.dumps(json.loads(about.read_text()) | {'RepetitionTime': tr}))
        (table,) = folder.glob('sub-01/func/*_timeseries.tsv')
        frame = pd.read_csv(table, sep='\t', na_values='n/a')
        frame = pd.concat([frame, frame[::-1]])[:volumes]
        frame.to_csv(table, sep='\t', index=False, na_rep='n/a')
        return folder

    return make


@pytest.fixture(scope='module')
def both(long_runs, tmp_path_factory):
    """Outputs of both models in one command, with what was read and loaded how often."""
    from bids_brainfm.cli.run import main
    from bids_brainfm.outputs import encoding
    from bids_brainfm.signals import parcellate

    folder = tmp_path_factory.mktemp('both')
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, name in ((encoding, 'load'), (parcellate, 'open_bold')):
            original = getattr(module, name)

            def counted(*args, original=original, name=name):
                calls.append(name)
                return original(*args)

            patch.setattr(module, name, counted)
        # one process, so that the calls are seen here
        plugin = folder / 'linear.yml'
        plugin.write_text('plugin: Linear\n')
        code = main(
            [
                str(long_runs),
                str(folder / 'out'),
                'participant',
                '-w',
                str(folder / 'work'),
                *BOTH,
                '--use-plugin',
                str(plugin),
                '--tokens',
            ]
        )
    assert code == 0
    return folder / 'out', calls


def test_both_models_share_one_reading(both):
    """The BOLD file is opened once per atlas, and each model is loaded once."""
    out, calls = both
    assert calls.count('open_bold') == 1
    assert calls.count('load') == 2
    for label in ('brainlmdemo', 'brainjepademo'):
        assert one(out, f'_desc-{label}_embedding.tsv').is_file()


def test_outputs_of_brain_jepa(both):
    """Summary, parcels, tokens and attention fit each other."""
    out, _ = both
    table = pd.read_csv(one(out, '_desc-brainjepademo_embedding.tsv'), sep='\t')
    about = sidecar(out, '_desc-brainjepademo_embedding.json')
    with h5py.File(one(out, '_desc-brainjepademo_embedding.h5')) as file:
        parcels, tokens = file['parcels'][:], file['tokens'][:]
        attention = file['attention'][:]
        assert len(file['parcel_names']) == 424
    assert parcels.shape == (1, 424, 64)
    assert tokens.shape == (1, 2120, 64)
    summary = table.filter(like='dim').to_numpy()
    np.testing.assert_allclose(summary, tokens.mean(1), atol=1e-5)
    np.testing.assert_allclose(parcels, tokens.reshape(1, 424, 5, 64).mean(2), atol=1e-5)
    np.testing.assert_allclose(attention.mean(), 1, atol=1e-3)
    assert about['Pooling'] == 'mean over tokens'
    assert about['Scaling'] == 'parcel-z'
    assert about['Resampled'] is True
    assert about['WindowLength'] == pytest.approx(160 * 2.2142)
    assert len(about['Model']['GradientTable']['SHA256']) == 64
    assert about['StaticVariance'] < 0.01  # each parcel's mean is taken out


def test_prediction_error_is_a_map(both):
    """A row a window and parcel; context is n/a; means are those of the row."""
    out, _ = both
    path = one(out, '_stat-latenterror_desc-brainjepademo_boldmap.tsv')
    table = pd.read_csv(path, sep='\t')
    about = json.loads(path.with_suffix('.json').read_text())
    patches = table.filter(like='patch').to_numpy()
    assert patches.shape == (424, 5)
    assert np.isnan(patches[:, :4]).all()
    assert np.isfinite(patches[:, 4:]).all()
    np.testing.assert_allclose(table['error'], patches[:, 4:].mean(1), rtol=1e-5)
    assert about['Block'] == 'cross-time'
    assert about['MeanError'] == pytest.approx(table['error'].mean(), rel=1e-5)
    assert about['MeanBaseline'] == pytest.approx(table['baseline'].mean(), rel=1e-5)


def test_prediction_error_makes_no_claim_of_quality(both):
    out, _ = both
    about = sidecar(out, '_stat-latenterror_desc-brainjepademo_boldmap.json')
    assert 'Prediction error' in about['Description']
    assert 'does not measure the quality' in about['Description']
    report, methods = (out / 'sub-01.html').read_text(), (out / 'logs/CITATION.md').read_text()
    assert 'The prediction error is the smooth L1 error' in methods
    assert 'does not measure the quality of the data' in report
    for text in (report, methods):
        assert 'unlike what the model was trained on' not in text
        assert 'check of quality' not in text
        assert 'Latent prediction' not in text


def test_prediction_error_is_no_higher_for_noise_than_for_a_run(long_runs):
    """As the caption says: the error does not reveal shuffled parcels or white noise."""
    import dataclasses

    import bids_brainfm
    from bids_brainfm.bids.inputs.fmriprep import run_of

    model = bids_brainfm.load_model('brain-jepa-demo', block='cross-time')
    (bold,) = long_runs.glob('sub-01/func/*_bold.nii.gz')
    series = bids_brainfm.parcellate(bold, model.atlas)
    series = bids_brainfm.denoise(series, run_of(bold).confounds, model.spec.card.denoising)
    rng, signal = np.random.default_rng(0), series.data
    noise = signal.mean(0) + signal.std(0) * rng.standard_normal(signal.shape)

    def error(data):
        given = dataclasses.replace(series, data=data.astype(np.float32))
        windows = model.windows(model.prepare_input(given)).data
        return np.nanmean(model.encoder.encode(windows).latent_error)

    good = error(signal)
    assert error(signal[:, rng.permutation(424)]) == pytest.approx(good, rel=0.03)
    assert error(noise) < good


def test_order_is_checked_against_connectivity(both):
    """The demonstration's own table fits its simulated connectivity, a shuffle does not."""
    out, _ = both
    check = sidecar(out, '_desc-brainjepademo_embedding.json')['OrderCheck']
    found = check['Correlation']
    assert found['as read'] > found['shuffled'] + 0.1
    assert check['Warning'] is None


def test_report_and_validator(both):
    """The report has the new sections, and the dataset validates without a word."""
    out, _ = both
    page = (out / 'sub-01.html').read_text()
    for words in ('cross-time: mean', 'nearness in gradient space', 'Gradient table'):
        assert words in page
    for what in ('latent', 'order'):
        (figure,) = out.glob(f'sub-01/figures/*model-brainjepademo_desc-{what}_bold.svg')
        assert figure.name in page
    text = (out / 'logs' / 'CITATION.md').read_text()
    assert 'mean over tokens' in text
    assert 'predicted by the predictor of brain-jepa-demo' in text
    assert 'placed by the brain gradients brain-jepa-demo_gradients.csv' in text
    validator = Path(sys.executable).with_name('bids-validator-deno')
    found = subprocess.run(
        [validator, '--format', 'json', out], capture_output=True, text=True, check=False
    )
    assert json.loads(found.stdout)['issues']['issues'] == []


def test_second_run_does_nothing_and_a_missing_map_is_made(both, long_runs, tmp_path, app):
    """Outputs that stand are left alone; only the one that was deleted comes back."""
    out = shutil.copytree(both[0], tmp_path / 'out')
    before = {path: path.stat().st_mtime_ns for path in out.glob('sub-01/func/*')}
    assert app(long_runs, out, *BOTH) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob('sub-01/func/*')} == before
    lost = one(out, '_stat-latenterror_desc-brainjepademo_boldmap.tsv')
    lost.unlink()
    assert app(long_runs, out, *BOTH) == 0  # without --tokens: those that stand stay
    after = {path: path.stat().st_mtime_ns for path in out.glob('sub-01/func/*')}
    assert after.keys() == before.keys()
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {lost, lost.with_suffix('.json')}


@pytest.mark.slow
def test_arrays_come_when_asked_for_and_come_back(long_runs, tmp_path, app):
    out = tmp_path / 'out'
    assert app(long_runs, out, *JEPA) == 0
    arrays = one(out, '_desc-brainjepademo_embedding.h5')
    arrays.unlink()
    for options, names in (
        ((), {'onset', 'excluded', 'parcel_names', 'parcels'}),
        (('--tokens',), {'onset', 'excluded', 'parcel_names', 'parcels', 'tokens', 'attention'}),
    ):
        assert app(long_runs, out, *JEPA, *options) == 0
        with h5py.File(arrays) as file:
            assert set(file) == names


@pytest.mark.slow
def test_map_of_an_earlier_input_does_not_stay(long_runs, tmp_path, app):
    """With a new input and no latent prediction the old map goes, and the report forgets it."""
    data, out = shutil.copytree(long_runs, tmp_path / 'long'), tmp_path / 'out'
    assert app(data, out, *JEPA) == 0
    (bold,) = data.glob('sub-01/func/*_bold.nii.gz')
    bold.touch()
    assert app(data, out, *JEPA, '--latent-prediction', 'none') == 0
    assert not list(out.glob('sub-01/**/*latent*'))
    assert 'cross-time: mean' not in (out / 'sub-01.html').read_text()


def test_methods_keep_what_stands(both, long_runs, tmp_path, app):
    out = shutil.copytree(both[0], tmp_path / 'out')
    assert app(long_runs, out, *BOTH, '--latent-prediction', 'none') == 0
    assert 'by the predictor of' in (out / 'logs' / 'CITATION.md').read_text()


def test_latent_prediction_of_a_model_that_has_none(simulated, tmp_path, app, capsys):
    assert app(simulated, tmp_path / 'out', '--latent-prediction', 'cross-roi') == 2
    assert 'predicts no latents' in capsys.readouterr().err


def test_another_block_is_refused_beside_the_first(both, long_runs, tmp_path, app, capsys):
    out = shutil.copytree(both[0], tmp_path / 'out')
    assert app(long_runs, out, *BOTH, '--latent-prediction', 'cross-roi') == 2
    assert 'latent_prediction' in capsys.readouterr().err
    assert app(long_runs, out, *BOTH, '--latent-prediction', 'none') == 0


@pytest.mark.parametrize(
    ('volumes', 'tr', 'share'),
    [
        pytest.param(490, 0.735, 1, marks=pytest.mark.slow),
        pytest.param(200, 2.0, 1, marks=pytest.mark.slow),
        (420, 0.8, 0.95),
    ],
)
def test_any_repetition_time_is_windowed_recorded_and_encoded(
    resized, tmp_path, app, volumes, tr, share
):
    out = tmp_path / 'out'
    assert app(resized(volumes, tr), out, *JEPA) == 0
    about = sidecar(out, '_desc-brainjepademo_embedding.json')
    assert about['RepetitionTime'] == tr
    assert about['NumberOfWindows'] == 1
    assert about['ProportionReal'] == [share]
    completed = [w for w in about['Warnings'] if 'recorded in part' in w]
    assert len(completed) == (share < 1)
    assert all('down to 95%, and completed as by --short-runs pad' in w for w in completed)


@pytest.mark.slow
def test_short_run_is_refused_with_what_is_needed_and_padded_on_request(resized, tmp_path, app):
    data, out = resized(150, 2.0), tmp_path / 'out'
    assert app(data, out, *JEPA) == 1
    (reason,) = (out / 'sub-01' / 'log').glob('failed-*.txt')
    assert '150 volumes' in reason.read_text()
    assert '178' in reason.read_text()
    assert app(data, out.with_name('padded'), *JEPA, '--short-runs', 'pad') == 0
    about = sidecar(out.with_name('padded'), '_desc-brainjepademo_embedding.json')
    assert about['ProportionReal'] == [pytest.approx(135 / 160)]


def test_official_sampling(long_runs, tmp_path, app):
    """Frames are picked, not filtered, and the sidecar and methods say so."""
    out = tmp_path / 'out'
    assert app(long_runs, out, *BOTH, '--temporal', 'official') == 0
    about = sidecar(out, '_desc-brainjepademo_embedding.json')
    assert 'official' in about['ResamplingMethod']
    assert 1 / about['SamplingFrequency'] == pytest.approx(0.735 * 479 / 159)
    assert about['WindowLength'] == about['WindowStride'] == pytest.approx(480 * 0.735)
    assert not any('official frame sampling' in w for w in about['Warnings'])
    assert 'ResamplingMethod' not in sidecar(out, '_desc-brainlmdemo_embedding.json')
    text = (out / 'logs' / 'CITATION.md').read_text()
    assert 'spread evenly over 480 volumes' in text
    assert 'divided by 0.2, and windows of 160 samples were taken' in text  # scaled first
    page = (out / 'sub-01.html').read_text()
    assert 'one in 2.2142 s (frames picked as by the official code)' in page


@pytest.mark.slow
def test_official_sampling_at_another_repetition_time_is_told(resized, tmp_path, app):
    """As the official code does, frames are picked all the same: but it is said."""
    out = tmp_path / 'out'
    assert app(resized(490, 0.8), out, *JEPA, '--temporal', 'official') == 0
    about = sidecar(out, '_desc-brainjepademo_embedding.json')
    assert any('one sample in 2.41 s' in w for w in about['Warnings'])


def test_official_sampling_needs_a_model_that_has_it(long_runs, tmp_path, app, capsys):
    assert app(long_runs, tmp_path / 'out', '--temporal', 'official') == 2
    assert '--temporal official' in capsys.readouterr().err


def test_cohort_statistics_of_temporal_means(long_runs, both, tmp_path, app, capsys):
    """Fitted medians and IQRs are applied; BrainLM's kind of file is refused."""
    series, _ = read_matrix(one(both[0], '_stat-mean_timeseries.tsv'))
    level = series.mean(0).astype(float)
    to_grand_mean = 10_000 / sidecar(both[0], '_stat-mean_timeseries.json')['BrainMean']
    stats = {
        'Atlas': 'Demo424', 'Statistic': 'temporal mean',
        'FormatVersion': 2, 'Median': (to_grand_mean * level - 50).tolist(),
        'IQR': [0.0, *[100.0] * 423],
    }  # fmt: skip
    file, out = tmp_path / 'stats.json', tmp_path / 'out'
    file.write_text(json.dumps(stats))
    arguments = (*JEPA, '--scale', 'cohort', '--scale-stats', file)
    assert app(long_runs, out, *arguments) == 0
    about = sidecar(out, '_desc-brainjepademo_embedding.json')
    assert about['Scaling'] == 'cohort-means'
    assert any('1 parcels have no usable statistics' in w for w in about['Warnings'])
    file.write_text(
        json.dumps(
            stats | {'Statistic': 'series', 'FormatVersion': 1, 'Lower': [-1] * 424}
            | {'Upper': [1] * 424}
        )
    )  # fmt: skip
    assert app(long_runs, tmp_path / 'other', *arguments) == 2
    assert 'temporal mean' in capsys.readouterr().err
    file.write_text(json.dumps(stats | {'FormatVersion': 1}))
    assert app(long_runs, tmp_path / 'other', *arguments) == 2
    assert f'{file} are of format 1, without a grand mean' in capsys.readouterr().err


def test_statistics_of_several_atlases(tmp_path):
    """Each model takes the file of its atlas and way of scaling; doubles and gaps are told."""
    from bids_brainfm.errors import BrainfmError
    from bids_brainfm.workflows.resolve import _stats_of

    means = {'Statistic': 'temporal mean', 'FormatVersion': 2, 'Median': [0.0], 'IQR': [1.0]}
    series = {'Median': [0.0], 'IQR': [1.0], 'Lower': [-1.0], 'Upper': [1.0]}
    files = []
    for name, stats in (
        ('A424', means), ('Demo424', means), ('Demo424', series), ('A424', means),
    ):  # fmt: skip
        files.append(tmp_path / f'{len(files)}.json')
        files[-1].write_text(json.dumps({'Atlas': name} | stats))
    assert _stats_of(tuple(files[:3]), 'Demo424', 'cohort-means') == files[1]
    assert _stats_of(tuple(files[:3]), 'Demo424', 'cohort') == files[2]
    assert _stats_of(tuple(files[:1]), 'Demo424', 'cohort') == files[0]  # refused where it is read
    assert _stats_of((), 'Demo424', 'cohort') is None
    with pytest.raises(BrainfmError, match='both of the temporal mean of the atlas A424'):
        _stats_of(tuple(files), 'A424', 'cohort-means')
    with pytest.raises(BrainfmError, match='of the atlas A424: they are of temporal mean of A424'):
        _stats_of(tuple(files[:3]), 'A424', 'cohort')


def test_own_table_is_used_told_and_held_to(long_runs, tmp_path, app, capsys):
    """A table beside the weights is taken; it is said, checked and not exchanged silently."""
    from safetensors.torch import save_file

    from bids_brainfm.models.cards import load_card
    from bids_brainfm.models.gradient_table import write_gradients
    from bids_brainfm.models.weights import build, initialise

    folder, out = tmp_path / 'weights', tmp_path / 'out'
    folder.mkdir()
    config = load_card('brain-jepa-demo').config
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(initialise(build(config), 3).state_dict(), folder / 'model.safetensors')
    table, random = folder / 'gradients.csv', np.random.default_rng(5)
    write_gradients(table, random.standard_normal((424, 30)))
    arguments = ('--model', f'brain-jepa-demo={folder}', '--latent-prediction', 'none')
    assert app(long_runs, out, *arguments) == 0
    about = sidecar(out, '_desc-brainjepademo_embedding.json')
    assert about['Model']['Trained'] is True
    assert about['Model']['GradientTable']['Name'] == 'gradients.csv'
    assert any('next to its weights' in w for w in about['Warnings'])
    assert any('no better' in w and 'than shuffled' in w for w in about['Warnings'])
    assert about['OrderCheck']['Expected'] is None  # known for another table only
    assert not list(out.glob('sub-01/func/*latenterror*'))
    write_gradients(table, random.standard_normal((424, 30)))
    assert app(long_runs, out, *arguments) == 2
    assert 'gradients was' in capsys.readouterr().err


def test_blocks_are_the_same_everywhere():
    """The command line names them without importing torch, the sidecars describe them."""
    from bids_brainfm.models import masking
    from bids_brainfm.outputs import prediction_error, registry

    assert registry.BLOCKS == masking.BLOCKS == tuple(prediction_error.DESCRIBED)
