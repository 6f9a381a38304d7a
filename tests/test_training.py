"""``bids_brainfm_models pretrain`` and ``finetune`` as commands, on one process and on two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from bids_brainfm.api import load_model
from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.files import write_json, write_matrix, write_table
from bids_brainfm.bids.freshness import read_sidecar, sidecar_path, write_sidecar
from bids_brainfm.cli.models import main
from bids_brainfm.models.cards import read_parts
from bids_brainfm.outputs.prediction import run_prediction
from bids_brainfm.resources import home
from bids_brainfm.signals.series import read_series
from bids_brainfm.signals.simulate import neural_series
from bids_brainfm.training.cohort import CohortRun, Targets
from bids_brainfm.training.job import _features
from bids_brainfm.training.linear import fit_linear

PACKAGE = Path(__file__).parents[1] / 'bids_brainfm'
EXAMPLE = Path(__file__).with_name('example_family')
STEM = 'sub-{}_task-rest_space-MNI152NLin2009cAsym_atlas-Demo424'
TR, VOLUMES = 0.735, 490


def write_cohort(folder: Path, people: int, seed: int = 0, tr: float = TR) -> Path:
    """Parcel series of so many participants, as the participant level writes them."""
    atlas = load_atlas('Demo424', home())
    rng = np.random.default_rng(seed)
    traits = rng.standard_normal(people)
    for i, trait in enumerate(traits):
        label = f'{i + 1:02d}'
        func, stem = folder / f'sub-{label}' / 'func', STEM.format(label)
        coupling = float(np.clip(0.3 + 0.3 * trait, -0.9, 0.9))
        series = 10_000 + 60 * neural_series(atlas.xyz, VOLUMES, TR, coupling, rng)
        write_matrix(func / f'{stem}_stat-mean_timeseries.tsv', series, list(atlas.names))
        coverage = {'Node': list(atlas.names), 'coverage': np.ones(atlas.n_parcels)}
        write_table(func / f'{stem}_stat-coverage_bold.tsv', coverage)
        sidecar = {'ResultsVersion': 2, 'RepetitionTime': tr, 'StartTime': 0}
        sidecar |= {'FlaggedVolumes': [], 'BrainMean': 9e3}
        write_sidecar(func / f'{stem}_stat-mean_timeseries.tsv', sidecar)
    about = {'Name': 'test', 'BIDSVersion': '1.10.0', 'DatasetType': 'derivative'}
    write_json(folder / 'dataset_description.json', about)
    table = {
        'participant_id': [f'sub-{i + 1:02d}' for i in range(people)],
        'trait': traits.round(4),
        'sex': ['F', 'M'] * (people // 2) + ['F'] * (people % 2),
        'same': [1] * people,
        'site': [*'abc' * people][:people],
        'family': np.arange(people) // 2,
        'rare': ['x'] + ['y'] * (people - 1),
        'duration': traits,
        'holed': ['n/a', *map(str, range(1, people))],
    }
    pd.DataFrame(table).to_csv(folder / 'participants.tsv', sep='\t', index=False)
    return folder


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    """Derivatives of 12 participants; tests must not change them."""
    return write_cohort(tmp_path_factory.mktemp('cohort') / 'out', 12)


def shrink(tmp_path: Path, name: str, *changes: tuple[str, str]) -> Path:
    """A card of a small network, in the form of an embedded one."""
    text = (PACKAGE / 'data' / 'models' / f'{name}.yml').read_text()
    for pattern, new in (*changes, (r'^weights:(.|\n)*', 'weights: []\n')):
        text, n = re.subn(pattern, new, text, flags=re.MULTILINE)
        assert n, pattern
    path = tmp_path / f'tiny-{name}.yml'
    path.write_text(text)
    return path


@pytest.fixture
def mae(tmp_path):
    return shrink(
        tmp_path, 'brainlm-demo',
        (r'hidden_size: \d+', 'hidden_size: 16'),
        (r'num_hidden_layers: \d+', 'num_hidden_layers: 1'),
        (r'num_attention_heads: \d+', 'num_attention_heads: 2'),
        (r'intermediate_size: \d+', 'intermediate_size: 16'),
    )  # fmt: skip


@pytest.fixture
def legacy(tmp_path):
    card = shrink(
        tmp_path, 'brainlm-13m',
        (r'hidden_size: \d+', 'hidden_size: 8'),
        (r'num_hidden_layers: \d+', 'num_hidden_layers: 1'),
        (r'num_attention_heads: \d+', 'num_attention_heads: 1'),
        (r'intermediate_size: \d+', 'intermediate_size: 8'), ('atlas: A424', 'atlas: Demo424'),
    )  # fmt: skip
    return card


@pytest.fixture
def jepa(tmp_path):
    table = 'brain-jepa-demo_gradients.csv'
    (tmp_path / table).write_bytes((PACKAGE / 'data' / 'models' / table).read_bytes())
    return shrink(
        tmp_path, 'brain-jepa-demo',
        (r'embed_dim: \d+', 'embed_dim: 8'), (r'depth: \d+', 'depth: 1'),
        (r'num_heads: \d+', 'num_heads: 1'), (r'patch_size: \d+', 'patch_size: 16'),
    )  # fmt: skip


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Card of a family that another package declares."""
    place = Path(shutil.copytree(EXAMPLE, tmp_path / 'site'))
    about = place / 'example_family-1.dist-info'
    about.mkdir()
    (about / 'METADATA').write_text('Metadata-Version: 2.1\nName: example_family\nVersion: 1\n')
    declared = '[bids_brainfm.families]\nexample_mae = example_family:ExampleMAE\n'
    (about / 'entry_points.txt').write_text(declared)
    monkeypatch.syspath_prepend(place)
    return place / 'example.yml'


def start(*arguments, processes: int = 1, **how) -> subprocess.Popen:
    """Start the command in processes of its own."""
    launcher = [sys.executable, '-m']
    if processes > 1:
        launcher += ['torch.distributed.run', '--nproc-per-node', str(processes), '-m']
    return subprocess.Popen(
        [*launcher, 'bids_brainfm.cli.models', *map(str, arguments), '--device', 'cpu',
         '--nthreads', '1'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    return text


def losses(out: Path) -> np.ndarray:
    return pd.read_csv(out / 'train.csv')['loss'].to_numpy()


def kill_at(process: subprocess.Popen, out: Path, steps: int, how: int = signal.SIGKILL) -> None:
    """Send a signal once so many steps are in the log."""
    log = out / 'train.csv'
    deadline = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) <= steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    process.wait()


SPLIT = ('--validation-share', 0.2)
SHORT = ('--batch-size', 4, '--epochs', 6, '--checkpoint-steps', 3, *SPLIT)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['mae', 'legacy', 'jepa'])
def test_killed_and_continued_is_as_if_never_stopped(family, request, cohort, tmp_path):
    """Kill -9 twice: weights, log and scores equal those of an uninterrupted run, bit for bit."""
    card = request.getfixturevalue(family)
    arguments = ('pretrain', card, '{}', '--data', cohort, *SHORT, '--name', 'm')
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    finish(start(*(str(a).format(whole) for a in arguments)))
    for steps in (5, 11):
        kill_at(start(*(str(a).format(broken) for a in arguments)), broken, steps)
        assert not (broken / 'model.safetensors').exists()
    finish(start(*(str(a).format(broken) for a in arguments)))
    expected, found = (load_file(out / 'model.safetensors') for out in (whole, broken))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    drop = {'columns': 'windows_per_second'}
    tables = [pd.read_csv(out / 'train.csv').drop(**drop) for out in (whole, broken)]
    assert len(tables[0]) == 6 * 10 // 4
    pd.testing.assert_frame_equal(*tables)
    assert (whole / 'validation.csv').read_text() == (broken / 'validation.csv').read_text()
    cards = [(out / 'card.yml').read_text() for out in (whole, broken)]
    assert cards[0] == cards[1]
    assert not list(broken.glob('.*'))


@pytest.mark.slow
@pytest.mark.parametrize('family', ['mae', 'jepa'])
def test_two_processes_do_what_one_does(family, request, cohort, tmp_path):
    """Loss curves of one process and of two with half the batch each agree over 20 steps."""
    card = request.getfixturevalue(family)
    arguments = ('--data', cohort, *SPLIT, '--batch-size', 4, '--epochs', 8, '--lr', 0.003)
    one, two = tmp_path / 'one', tmp_path / 'two'
    finish(start('pretrain', card, one, *arguments))
    finish(start('pretrain', card, two, *arguments, processes=2))
    assert len(losses(one)) >= 20
    assert losses(one)[0] != losses(one)[10]
    np.testing.assert_allclose(losses(one)[:20], losses(two)[:20], rtol=1e-4, atol=0)
    scores = [pd.read_csv(out / 'validation.csv') for out in (one, two)]
    pd.testing.assert_frame_equal(*scores, rtol=2e-3)


def test_accumulated_gradients_are_those_of_the_batch(mae, cohort, tmp_path):
    """A batch in micro batches gives the losses of the batch at once."""
    arguments = ('--data', cohort, *SPLIT, '--batch-size', 4, '--epochs', 4, '--device', 'cpu')
    one, parts = tmp_path / 'one', tmp_path / 'parts'
    run('pretrain', mae, one, *arguments)
    run('pretrain', mae, parts, *arguments, '--micro-batch-size', 1)
    np.testing.assert_allclose(losses(one), losses(parts), rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_near_float32(mae, cohort, tmp_path):
    """Half the precision in products changes the loss by a part of a percent."""
    arguments = ('--data', cohort, *SPLIT, '--batch-size', 4, '--epochs', 4)
    full, half = tmp_path / 'full', tmp_path / 'half'
    finish(start('pretrain', mae, full, *arguments))
    finish(start('pretrain', mae, half, *arguments, '--precision', 'bfloat16'))
    np.testing.assert_allclose(losses(half), losses(full), rtol=0.01)
    assert (losses(half) != losses(full)).all()


@pytest.mark.slow
def test_told_to_end_it_writes_a_checkpoint(mae, cohort, tmp_path):
    """SIGTERM, as Slurm sends before it preempts, loses no step; and the rest follows."""
    out = tmp_path / 'out'
    arguments = ('pretrain', mae, out, '--data', cohort, *SPLIT, '--batch-size', 4, '--epochs', 40)
    process = start(*arguments, '--checkpoint-steps', 1000)
    kill_at(process, out, 8, signal.SIGTERM)
    assert process.returncode == 143
    assert 'goes on from there' in process.communicate()[0]
    (checkpoint,) = (out / 'checkpoints').glob('step-*')
    assert int(checkpoint.name[-8:]) == len(losses(out)) < 80
    finish(start(*arguments))
    assert len(losses(out)) == 40 * 10 // 4


def test_an_earlier_checkpoint_can_be_gone_on_from(mae, cohort, tmp_path, capsys):
    """--resume takes any whole checkpoint; what followed it is done again, to the same end."""
    out = tmp_path / 'out'
    arguments = ('pretrain', mae, out, '--data', cohort, *SHORT, '--device', 'cpu')
    run(*arguments)
    before = (out / 'model.safetensors').read_bytes()
    first, _ = sorted((out / 'checkpoints').glob('step-*'))
    run(*arguments, '--resume', first)
    assert (out / 'model.safetensors').read_bytes() == before
    weights = first / 'model.safetensors'
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = refused(capsys, *arguments, '--resume', first)
    assert f'{weights} is not as it was written: remove {first}' in said


def run(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_what_pretraining_writes(mae, cohort, tmp_path, capsys):
    """Checkpoint, card, split and logs; the card is a model, whose loss is the one it says."""
    from bids_brainfm.models.spec import resolve_model

    out = tmp_path / 'my net'
    run('pretrain', mae, out, '--data', cohort, *SHORT, '--mask-ratio', 0.5, '--device', 'cpu')
    assert f'The trained model is {out / "card.yml"}' in capsys.readouterr().out
    spec = resolve_model(str(out / 'card.yml'), tmp_path)
    assert spec.trained
    assert (spec.card.name, spec.label) == ('my-net', 'mynet')
    assert (
        spec.card.training['held_out']['loss'] < spec.card.training['held_out_untrained']['loss']
    )
    assert np.isfinite(spec.card.training['held_out']['r2_covariance'])
    assert spec.card.config['mask_ratio'] == 0.5
    assert spec.card.training['precision'] == 'float32'
    people = pd.read_csv(out / 'participants.tsv', sep='\t')
    assert list(people) == ['participant_id', 'part']
    assert dict(people['part'].value_counts()) == {'train': 10, 'validation': 2}
    assert read_parts(spec.card) == dict(
        zip(people['participant_id'].str[4:], people['part'], strict=True)
    )
    training = spec.card.training
    assert (training['runs'], training['runs_left_out'], training['flagged']) == (10, 0, 0)
    assert list((out / 'tensorboard' / 'train').glob('events*'))
    log = pd.read_csv(out / 'train.csv')
    assert {'loss', 'lr', 'gradient_norm', 'epoch'} < set(log)
    assert log['lr'].iloc[-1] == 0


@pytest.mark.slow
def test_a_family_of_another_package_is_trained(example, cohort, tmp_path):
    """By the protocol alone: pretrained, gone on from, and fine-tuned."""
    first, second, tuned = (tmp_path / name for name in ('first', 'second', 'tuned'))
    options = ('--data', cohort, '--device', 'cpu', '--batch-size', 4, '--epochs', 3)
    run('pretrain', example, first, *options, *SPLIT, '--lr', 0.01)
    run('pretrain', first / 'card.yml', second, *options, *SPLIT, '--warm-start')
    card = yaml.safe_load((first / 'card.yml').read_text())
    assert card['config']['model_type'] == 'example_mae'
    assert card['training']['held_out']['loss'] < card['training']['held_out_untrained']['loss']
    again = yaml.safe_load((second / 'card.yml').read_text())['training']
    assert again['held_out_untrained']['loss'] == card['training']['held_out']['loss']
    run('finetune', second / 'card.yml', tuned, *options, '--target', 'trait')
    head = json.loads((tuned / 'config.json').read_text())['head']
    assert (head['kind'], head['pooling']) == ('linear', 'mean')


@pytest.mark.slow
def test_a_model_of_ones_own_goes_through_the_app(mae, cohort, simulated, app, tmp_path):
    """--model OUT/card.yml: what was trained encodes."""
    out = tmp_path / 'net'
    run('pretrain', mae, out, '--data', cohort, *SHORT, '--device', 'cpu')
    assert app(simulated, 'derivatives', '--model', out / 'card.yml') == 0
    sidecar = json.loads(next(Path('derivatives').rglob('*desc-net_embedding.json')).read_text())
    assert sidecar['Model']['Trained'] is True
    assert sidecar['Model']['Training']['held_out']['loss'] > 0


def tune(model, out, cohort, *options):
    run('finetune', model, out, '--data', cohort, '--batch-size', 4, '--device', 'cpu', *options)
    return json.loads((out / 'scores.json').read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mode', 'target', 'pooling'),
    [('full', 'trait', None), ('head', 'sex', None), ('probe', 'trait', None),
     ('probe', 'sex', 'mean')],
)  # fmt: skip
def test_finetuning_from_cohort_to_predictions(mode, target, pooling, mae, cohort, tmp_path):
    """A head is fitted and tested on people it never saw, by what else can predict them."""
    out = tmp_path / 'tuned'
    options = ('--target', target, '--mode', mode, *(('--pooling', pooling) if pooling else ()))
    scores = tune(mae, out, cohort, *options, *(() if mode == 'probe' else ('--epochs', 3)))
    table = pd.read_csv(out / 'predictions.tsv', sep='\t')
    parts = pd.read_csv(out / 'participants.tsv', sep='\t').set_index('participant_id')['part']
    assert set(parts) == {'train', 'test'} | ({'validation'} if mode != 'probe' else set())
    assert len(table) == 12
    assert (table.set_index('participant_id')['part'] == parts.loc[table['participant_id']]).all()
    real = pd.read_csv(cohort / 'participants.tsv', sep='\t').set_index('participant_id')[target]
    assert (table['real'] == real.loc[table['participant_id']].to_numpy()).all()
    assert set(scores['test_baselines']) == {'constant', 'connectome'}
    assert ('validation' in scores) == (mode != 'probe')
    test = table[table['part'] == 'test']
    if target == 'trait':
        error = ((test['predicted_trait'] - test['real']) ** 2).mean()
        assert scores['test']['mse'] == pytest.approx(error, rel=1e-4)
        low, high = scores['test_intervals']['model']['mse']
        assert low <= scores['test']['mse'] <= high
    else:
        chosen = np.where(test['predicted_sex_F'] > test['predicted_sex_M'], 'F', 'M')
        assert scores['test']['accuracy'] == pytest.approx((chosen == test['real']).mean())


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory, cohort):
    """A small network that was trained for a moment."""
    folder = tmp_path_factory.mktemp('pretrained')
    changes = [(rf'{name}: \d+', f'{name}: {value}') for name, value in (
        ('hidden_size', 16), ('num_hidden_layers', 1), ('num_attention_heads', 2),
        ('intermediate_size', 16),
    )]  # fmt: skip
    card = shrink(folder, 'brainlm-demo', *changes)
    run('pretrain', card, folder / 'net', '--data', cohort, *SHORT, '--device', 'cpu')
    return folder / 'net' / 'card.yml'


@pytest.fixture(scope='module')
def planted(tmp_path_factory, cohort, pretrained):
    """The cohort with targets that the network knows, and what it makes of each participant."""
    folder = tmp_path_factory.mktemp('planted')
    for path in cohort.glob('sub-*'):
        (folder / path.name).symlink_to(path)
    model = load_model(pretrained, device='cpu')
    of = {
        path.name: model.embed(read_series(next(path.rglob('*timeseries.tsv')))).summary
        for path in sorted(cohort.glob('sub-*'))
    }
    x = np.stack([windows.mean(0, dtype=float) for windows in of.values()])
    main = np.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, 0]
    people = pd.DataFrame({'participant_id': list(of), 'value': 40 + 10 * main})
    people['kind'] = pd.qcut(people['value'], 3, labels=['a', 'b', 'c'])
    people.to_csv(folder / 'participants.tsv', sep='\t', index=False)
    shutil.copyfile(cohort / 'dataset_description.json', folder / 'dataset_description.json')
    return folder, x, people.set_index('participant_id')


@pytest.mark.parametrize('target', ['value', 'kind'])
def test_a_probe_is_scikit_learn_from_series_to_predictions(target, pretrained, planted, tmp_path):
    """Ridge and logistic regression on the embeddings of the app, through both commands."""
    (data, x, people), out = planted, tmp_path / 'probe'
    scores = tune(pretrained, out, data, '--target', target, '--mode', 'probe')
    assert set(scores['test_baselines']) == {'constant', 'connectome', 'random weights'}
    parts, before = (
        pd.read_csv(folder / 'participants.tsv', sep='\t').set_index('participant_id')['part']
        for folder in (out, pretrained.parent)
    )
    both = [p for p in parts.index if parts[p] == 'test' and before[p] == 'train']
    assert scores['test_participants_in_pretraining'] == len(both)
    classes = ('a', 'b', 'c') if target == 'kind' else ()
    targets = Targets(target, 'classification' if classes else 'regression', {}, classes)
    values = people[target].map(classes.index) if classes else people[target]
    train = (parts[people.index] == 'train').to_numpy()
    y = values.to_numpy(float)
    fitted = fit_linear(x[train], y[train], None, targets, seed=0)
    wanted = fitted.predict(x)
    assert wanted.std(axis=0).min() > 0.1
    table = pd.read_csv(out / 'predictions.tsv', sep='\t').set_index('participant_id')
    columns = [name for name in table if name.startswith('predicted_')]
    found = table.loc[people.index, columns]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    model = load_model(out / 'card.yml', device='cpu')
    for person, expected in zip(people.index[:3], wanted, strict=False):
        series = read_series(next((data / person).rglob('*timeseries.tsv')))
        of_run = run_prediction(model.embed(series).prediction, targets.problem)
        np.testing.assert_allclose(of_run, expected, rtol=1e-5, atol=1e-5)


def test_random_weights_are_a_control(pretrained, planted, tmp_path):
    """They score as if --random-weights had been given, which is not compared with itself."""
    options = (planted[0], '--target', 'value', '--mode', 'probe', '--test-share', 0.4)
    probed = tune(pretrained, tmp_path / 'probe', *options)
    control = tune(pretrained, tmp_path / 'control', *options, '--random-weights')
    assert 'random weights' not in control['test_baselines']
    assert control['test'] == pytest.approx(probed['test_baselines']['random weights'], rel=1e-4)
    assert control['test'] != pytest.approx(probed['test'], rel=1e-4)


def test_features_of_the_connectome(tmp_path):
    """Fisher z of the mean connectome of the runs of a participant, over unflagged volumes."""
    folder = write_cohort(tmp_path / 'out', 2)
    paths = sorted(folder.rglob('*timeseries.tsv'))
    clean = [np.corrcoef(read_series(path).data.T) for path in paths]
    for path in paths:
        frame = pd.read_csv(path, sep='\t')
        noise = np.random.default_rng(0).standard_normal((40, frame.shape[1]))
        frame = pd.concat([frame, pd.DataFrame(9000 + 500 * noise, columns=frame.columns)])
        frame.to_csv(path, sep='\t', index=False)
        flagged = {'FlaggedVolumes': list(range(VOLUMES, VOLUMES + 40))}
        write_sidecar(path, read_sidecar(sidecar_path(path)) | flagged)
    found = _features([CohortRun(path, folder, '01', TR) for path in paths])
    above = np.triu_indices(424, 1)
    wanted = np.mean([np.arctanh(r[above]) for r in clean], axis=0)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(('label', 'part'), [('01', 'train'), ('02', 'test')])
def test_predictions_say_in_which_part_a_participant_was(
    label, part, pretrained, cohort, simulated, app, tmp_path
):
    """In table, sidecar and report; test scores are not shown for participants in training."""
    out = tmp_path / 'tuned'
    for seed in range(20):  # until the participant is in the part
        shutil.rmtree(out, ignore_errors=True)
        tune(
            pretrained, out, cohort, '--target', 'trait', '--mode', 'probe', '--seed', seed,
            '--test-share', 0.4,
        )  # fmt: skip
        parts = pd.read_csv(out / 'participants.tsv', sep='\t').set_index('participant_id')['part']
        if parts[f'sub-{label}'] == part:
            break
    options = ('--model', out / 'card.yml', '--participant-label', label)
    assert app(simulated, 'derivatives', *options) == 0
    (path,) = Path('derivatives').rglob('*desc-tuned_prediction.tsv')
    table = pd.read_csv(path, sep='\t')
    assert set(table['part']) == {part}
    assert 'trait' in table
    sidecar = json.loads(path.with_suffix('.json').read_text())
    assert sidecar['Part'] == sidecar['RunPrediction']['part'] == part
    assert set(sidecar['part']['Levels']) == {'train', 'validation', 'test', 'unseen'}
    page = (Path('derivatives') / f'sub-{label}.html').read_text()
    warned = 'the prediction is not held out'
    assert any(warned in text for text in sidecar['Warnings']) == (part == 'train')
    assert (warned in page) == (part == 'train')
    assert ('train part: not held out' in page) == (part == 'train')
    assert ('Test participants' in page) == (part == 'test')
    assert ('One test part of' in page) == (part == 'test')


def test_only_the_head_learns(mae, cohort, tmp_path):
    """In a full fine-tuning the network does, too, but not its decoder."""
    of = {}
    for mode in ('head', 'full'):
        tune(mae, tmp_path / mode, cohort, '--target', 'trait', '--mode', mode, '--epochs', 1)
        of[mode] = load_file(tmp_path / mode / 'model.safetensors')
    changed = {
        n for n in of['head'] if n in of['full'] and not torch.equal(of['head'][n], of['full'][n])
    }
    shared = {name for name in changed if not name.startswith('head.')}
    assert shared
    assert all(name.startswith('vit.') for name in shared)
    assert 'vit.embeddings.position_embeddings' not in shared


def test_families_stay_together(mae, cohort, tmp_path):
    """In all parts, and it is on record."""
    out = tmp_path / 'tuned'
    tune(mae, out, cohort, '--target', 'trait', '--mode', 'probe', '--group-column', 'family')
    parts = pd.read_csv(out / 'participants.tsv', sep='\t')
    assert list(parts) == ['participant_id', 'part', 'group']
    people = pd.read_csv(cohort / 'participants.tsv', sep='\t')
    merged = parts.merge(people, on='participant_id')
    assert (merged.groupby('family')[['part', 'group']].nunique() == 1).all(axis=None)
    assert merged['group'].nunique() == merged['family'].nunique() == 6
    settings = json.loads((out / 'settings.json').read_text())['settings']
    card = yaml.safe_load((out / 'card.yml').read_text())
    assert settings['group_column'] == card['training']['group_column'] == ['family']


def test_runs_with_many_flagged_volumes_are_left_out(mae, tmp_path, capsys):
    """Counted, named, and on record; at the limit of --max-flagged a run is kept."""
    cohort, out = write_cohort(tmp_path / 'flagged', 6), tmp_path / 'out'
    for label, n in (('02', 49), ('03', 50)):
        (path,) = (cohort / f'sub-{label}').rglob('*timeseries.tsv')
        content = {'FlaggedVolumes': list(range(n))}
        write_sidecar(path, read_sidecar(sidecar_path(path)) | content)
    run('pretrain', mae, out, '--data', cohort, '--epochs', 1, '--batch-size', 2, '--device',
        'cpu', '--validation-share', 0.4, '--max-flagged', 0.1)  # fmt: skip
    assert '1 of 6 runs are left out' in capsys.readouterr().out
    left = pd.read_csv(out / 'left_out.tsv', sep='\t')
    assert list(left['run']) == [STEM.format('03')]
    assert '10.2% of its samples are flagged, more than --max-flagged 0.1' in left['reason'][0]
    training = yaml.safe_load((out / 'card.yml').read_text())['training']
    parts = pd.read_csv(out / 'participants.tsv', sep='\t').set_index('participant_id')['part']
    trained = [p for p in parts.index if parts[p] == 'train' and p != 'sub-03']
    assert training['runs_left_out'] == 1
    flagged = 49 * ('sub-02' in trained) / (len(trained) * VOLUMES)
    assert training['flagged'] == pytest.approx(flagged, rel=1e-4)


def test_runs_that_the_participant_level_excluded_are_left_out(mae, tmp_path, capsys):
    cohort = write_cohort(tmp_path / 'flagged', 6)
    (path,) = (cohort / 'sub-03').rglob('*timeseries.tsv')
    write_sidecar(path, read_sidecar(sidecar_path(path)) | {'Excluded': True})
    options = '--data', cohort, '--epochs', 1, '--batch-size', 2, '--validation-share', 0.4
    options = *options, '--device', 'cpu'
    run('pretrain', mae, tmp_path / 'out', *options)
    left = pd.read_csv(tmp_path / 'out' / 'left_out.tsv', sep='\t')
    assert list(left['run']) == [STEM.format('03')]
    assert 'than --max-flagged of the participant level allowed' in left['reason'][0]
    run('pretrain', mae, tmp_path / 'own', *options, '--max-flagged', 1)
    assert not (tmp_path / 'own' / 'left_out.tsv').exists()


def test_a_training_by_an_earlier_version_is_not_continued(mae, cohort, tmp_path, capsys):
    """Its loss counted flagged volumes, and its series do not say which these are."""
    out = tmp_path / 'out'
    arguments = ('pretrain', mae, out, '--data', cohort, *SHORT, '--device', 'cpu')
    run(*arguments)
    settings = json.loads((out / 'settings.json').read_text())
    del settings['format']
    (out / 'settings.json').write_text(json.dumps(settings))
    assert 'which scored flagged volumes: name another folder' in refused(capsys, *arguments)


@pytest.mark.slow
def test_finetuning_continues_with_its_best(mae, cohort, tmp_path):
    """Killed and continued, early stopping picks the same epoch and the same weights."""
    arguments = ('finetune', mae, '{}', '--data', cohort, '--target', 'trait', '--lr', 0.01,
                 '--epochs', 12, '--batch-size', 4, '--patience', 3, '--checkpoint-steps', 2,
                 '--name', 'm')  # fmt: skip
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    finish(start(*(str(a).format(whole) for a in arguments)))
    kill_at(start(*(str(a).format(broken) for a in arguments)), broken, 5)
    finish(start(*(str(a).format(broken) for a in arguments)))
    for name in ('model.safetensors', 'predictions.tsv', 'validation.csv', 'card.yml'):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    evaluated = pd.read_csv(whole / 'validation.csv')
    best = evaluated.loc[evaluated['loss'][1:].idxmin()]
    scores = json.loads((whole / 'scores.json').read_text())
    assert scores['validation']['mse'] == pytest.approx(best['mse'], rel=1e-4)


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert error.startswith('bids_brainfm_models: ')
    return error


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (('--target', 'missing'), 'no participants.tsv has a column missing'),
        (('--target', 'same'), 'all participants have the same value'),
        (('--target', 'duration'), 'duration'),
        (('--target', 'holed'), '1 of 12 participants have no value (sub-01)'),
        (('--target', 'sex', '--problem', 'regression'), 'cannot be regressed'),
        (('--target', 'trait', '--test-share', '0.05'), 'too few to split'),
        (('--target', 'trait', '--recipe', 'none'), 'There is no recipe none'),
        (('--target', 'trait', '--device', 'cpu', '--precision', 'tf32'), 'needs an NVIDIA GPU'),
        (('--target', 'trait', '--group-column', 'same'), '12 participants in 1 groups are too'),
        (('--target', 'trait', '--group-column', 'holed'), '--group-column holed: 1 of 12'),
        (('--target', 'trait', '--mode', 'probe', '--epochs', '2'), 'without --epochs: leave it'),
        (('--target', 'rare', '--test-share', '0.5'), 'at least 1 of each class'),
        (('--target', 'trait', '--batch-size', '6', '--micro-batch-size', '4'), 'does not divide'),
    ],
)
def test_bad_fine_tuning_is_refused(options, said, mae, cohort, tmp_path, capsys):
    """One sentence, and nothing written."""
    out = tmp_path / 'out'
    assert said in refused(capsys, 'finetune', mae, out, '--data', cohort, *options)
    assert not out.exists()


def test_bad_cohorts_are_refused(mae, jepa, cohort, tmp_path, capsys):
    """Too few people, mixed repetition times, another atlas, no outputs of ours."""
    out = tmp_path / 'out'
    few = write_cohort(tmp_path / 'few', 2)
    assert 'too few to split' in refused(capsys, 'pretrain', mae, out, '--data', few)
    slow = write_cohort(tmp_path / 'slow', 2, tr=2.0)
    assert 'different repetition times, from 0.735 s' in refused(
        capsys, 'pretrain', mae, out, '--data', cohort, slow
    )
    for path in (slow / 'sub-01' / 'func').iterdir():
        path.rename(path.with_name(path.name.replace('Demo424', 'A424')))
    assert 'atlases cannot be mixed' in refused(capsys, 'pretrain', mae, out, '--data', slow)
    assert 'holds no parcel series' in refused(
        capsys, 'pretrain', mae, out, '--data', tmp_path / 'x'
    )
    assert not out.exists()


def test_a_recipe_of_another_family_is_refused(mae, jepa, cohort, tmp_path, capsys):
    """Recipes hold what a family needs; masks that a network cannot have are said at once."""
    out = tmp_path / 'out'
    options = ('--data', cohort, *SPLIT, '--recipe')
    said = refused(capsys, 'pretrain', mae, out, *options, 'fixed')
    assert 'takes a recipe without masks and momentum, such as brainlm-vit' in said
    assert 'such as fixed' in refused(capsys, 'pretrain', jepa, out, *options, 'brainlm-vit')
    jepa.write_text(jepa.read_text().replace('patch_size: 16', 'patch_size: 32'))
    said = refused(capsys, 'pretrain', jepa, out, *options, 'official')
    assert 'official masks are for windows of 10 time patches' in said
    assert not out.exists()


def shorten(path):
    """Make of parcel series those of a short run, its sidecar included."""
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[:100]))
    write_sidecar(path, read_sidecar(sidecar_path(path)))


def test_short_runs_are_left_out_and_named(mae, cohort, tmp_path, capsys):
    """A run shorter than a window is no reason to stop; all of them are."""
    mixed = write_cohort(tmp_path / 'mixed', 6)
    shorten(mixed / 'sub-02' / 'func' / f'{STEM.format("02")}_stat-mean_timeseries.tsv')
    out = tmp_path / 'out'
    options = ('--epochs', 1, '--batch-size', 2, '--validation-share', 0.4, '--device', 'cpu')
    run('pretrain', mae, out, '--data', mixed, *options)
    assert '1 of 6 runs are left out' in capsys.readouterr().out
    left = pd.read_csv(out / 'left_out.tsv', sep='\t')
    assert '99 samples of 0.735 s, and a window takes 200' in left['reason'][0]
    for other in mixed.rglob('*timeseries.tsv'):
        shorten(other)
    nowhere = tmp_path / 'nowhere'
    said = refused(capsys, 'pretrain', mae, nowhere, '--data', mixed, *options)
    assert 'part can be trained on' in said
    assert not nowhere.exists()
    shutil.rmtree(out / 'series')  # as the documentation allows, once a training is done
    refused(capsys, 'pretrain', mae, out, '--data', mixed, *options)
    assert (out / 'model.safetensors').is_file()


def test_killed_while_data_are_prepared(mae, cohort, tmp_path, monkeypatch):
    """What was prepared by halves is prepared again by the same command."""
    from bids_brainfm.training import preparation

    def write_half(folder, parcels, series):
        folder.mkdir(parents=True)
        (folder / 'shard-0000.f32').write_bytes(b'half')
        raise KeyboardInterrupt

    out = tmp_path / 'out'
    arguments = ('pretrain', mae, out, '--data', cohort, *SHORT, '--device', 'cpu')
    with monkeypatch.context() as patch:
        patch.setattr(preparation, 'write_store', write_half)
        assert main([str(argument) for argument in arguments]) == 130
    run(*arguments)
    assert (out / 'model.safetensors').is_file()


def test_another_training_is_not_mixed_in(mae, cohort, tmp_path, capsys):
    """A folder that holds a training takes that training only."""
    out = tmp_path / 'out'
    run('pretrain', mae, out, '--data', cohort, *SHORT, '--device', 'cpu')
    before = (out / 'model.safetensors').read_bytes()
    said = refused(capsys, 'pretrain', mae, out, '--data', cohort, *SHORT, '--seed', 1)
    assert 'holds a training with seed 0, now it is 1' in said
    assert (out / 'model.safetensors').read_bytes() == before
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'thesis.txt').write_text('mine')
    assert 'holds no training' in refused(capsys, 'pretrain', mae, other, '--data', cohort)


def test_collapse_is_seen(jepa, cohort, tmp_path, capsys, monkeypatch):
    """Latents that become the same for all windows stop the training, in one sentence."""
    from bids_brainfm.training.pretraining import LatentPrediction

    def collapse(self, momentum):
        with torch.no_grad():
            for parameter in self.network.target_encoder.patch_embed.parameters():
                parameter.zero_()

    monkeypatch.setattr(LatentPrediction, 'after_step', collapse)
    said = refused(
        capsys, 'pretrain', jepa, tmp_path / 'out', '--data', cohort, *SPLIT, '--batch-size', 2,
        '--epochs', 4, '--device', 'cpu',
    )  # fmt: skip
    assert 'The latents have collapsed at step 11' in said


def test_a_loss_that_is_no_number_is_said(mae, cohort, tmp_path, capsys):
    """Wrong values or too high a learning rate do not pass for a trained network."""
    out = tmp_path / 'out'
    said = refused(
        capsys, 'pretrain', mae, out, '--data', cohort, *SPLIT, '--batch-size', 2, '--epochs', 20,
        '--lr', 1e30, '--device', 'cpu',
    )  # fmt: skip
    assert 'lower --lr' in said
    assert not (out / 'model.safetensors').exists()


def test_rank_is_told_by_slurm():
    """srun alone starts the processes; torchrun needs nothing of it."""
    from bids_brainfm.cli.training import join_slurm

    step = {
        'SLURM_STEP_NUM_TASKS': '8', 'SLURM_PROCID': '5', 'SLURM_LOCALID': '1',
        'SLURM_JOB_ID': '7', 'SLURM_STEP_TASKS_PER_NODE': '4(x2)',
        'SLURM_STEP_NODELIST': 'gpu[1-2]',
    }  # fmt: skip
    assert join_slurm(step) == {
        'RANK': '5', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '4',
        'MASTER_ADDR': 'gpu1', 'MASTER_PORT': '20007',
    }  # fmt: skip
    assert join_slurm(step | {'RANK': '0'}) == {}
    assert join_slurm(dict(os.environ)) == {}
