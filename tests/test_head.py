"""Heads of fine-tuned networks, and the predictions that the app writes with them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.cli.run import main
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.encoder import Encoder, ascending_y
from bids_brainfm.models.gradient_table import read_gradients
from bids_brainfm.models.head import TAKEN, Head
from bids_brainfm.models.weights import build, initialise, load_checkpoint
from bids_brainfm.outputs import prediction
from bids_brainfm.outputs.words import WINDOW_COLUMNS
from bids_brainfm.resources import home, sha256_of
from bids_brainfm.signals.contract import Contract, prepare_input, windows_of
from bids_brainfm.signals.series import read_series

CARDS = Path(__file__).parents[1] / 'bids_brainfm' / 'data' / 'models'
STEM = 'task-rest_space-MNI152NLin2009cAsym_atlas-Demo424'
AGE = {'target': 'age', 'task': 'regression', 'mean': 43.0, 'sd': 12.5}
SEX = {'target': 'sex', 'task': 'classification', 'classes': ['F', 'M', 'X']}
WIDTH = 8


def settings(kind='mlp', pooling='mean', what=AGE, **more):
    return {'kind': kind, 'pooling': pooling, 'dropout': 0.5} | what | more


def some_state(head, seed=0):
    """Values for every tensor of a head that no initialisation would give."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(x.shape, generator=generator) + 0.1
        if name.endswith('running_var')
        else torch.randn(x.shape, generator=generator).to(x.dtype)
        for name, x in head.state_dict().items()
    }


def outputs_by_hand(kind, state, pooled):
    """Outputs of a head in evaluation mode, from its tensors in their order."""
    tensors = iter(state.values())
    if kind == 'mlp':
        for last in (False, False, True):
            pooled = pooled @ next(tensors).T + next(tensors)
            pooled = pooled if last else pooled.clamp(min=0)
        return pooled
    if kind == 'linear':
        centred = pooled - pooled.mean(1, keepdim=True)
        sd = (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        pooled = centred / sd * next(tensors) + next(tensors)
    else:
        pooled = (pooled - next(tensors)) / (next(tensors) + 1e-6).sqrt()
        next(tensors)  # the number of batches
    return pooled @ next(tensors).T + next(tensors)


@pytest.mark.parametrize('pooling', ['class-token', 'mean'])
@pytest.mark.parametrize('what', [AGE, SEX], ids=['regression', 'classification'])
@pytest.mark.parametrize('kind', ['mlp', 'linear', 'probe'])
def test_outputs_are_those_of_the_formula(kind, what, pooling):
    head = Head(settings(kind, pooling, what), WIDTH, class_token=True).eval()
    state = some_state(head)
    head.load_state_dict(state)
    hidden = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    pooled = hidden[:, 0] if pooling == 'class-token' else hidden.sum(1) / 5
    outputs = head(hidden)
    assert outputs.shape == (4, 3 if what is SEX else 1)
    torch.testing.assert_close(outputs, outputs_by_hand(kind, state, pooled))
    predicted = head.predict(outputs)
    if what is AGE:
        torch.testing.assert_close(predicted, outputs * 12.5 + 43)
        assert head.columns == ['age']
    else:
        shares = outputs.exp() / outputs.exp().sum(1, keepdim=True)
        torch.testing.assert_close(predicted, shares)
        assert head.columns == ['sex_F', 'sex_M', 'sex_X']


def test_columns_have_names_of_their_own():
    """What stands before the predictions in a table cannot be the name of one."""
    assert (*WINDOW_COLUMNS, 'part') == TAKEN
    classes = Head(settings(what=SEX | {'target': 'onset'}), WIDTH, class_token=True)
    assert not set(classes.columns) & set(TAKEN)


@pytest.mark.parametrize('kind', ['mlp', 'linear', 'probe'])
def test_dropout_is_for_training_only(kind):
    head = Head(settings(kind), WIDTH, class_token=True)
    head.load_state_dict(some_state(head))
    hidden = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    assert torch.equal(head.eval()(hidden), head(hidden))
    torch.manual_seed(0)
    assert not torch.equal(head.train()(hidden), head(hidden))


@pytest.mark.parametrize(('kind', 'sd'), [('mlp', None), ('linear', 2e-5), ('probe', 0.01)])
def test_initial_weights(kind, sd):
    """Kaiming-uniform, or normal of the official size; zero biases, and no effect of the norm."""
    many = SEX | {'classes': [f'class {i}' for i in range(40)]}
    head = Head(settings(kind, what=many), 64, class_token=True)
    wanted = {name: (x.shape, x.dtype) for name, x in head.state_dict().items()}
    state = head.initial_state(torch.Generator().manual_seed(0))
    assert {name: (x.shape, x.dtype) for name, x in state.items()} == wanted
    for name, x in state.items():
        if x.ndim == 2:
            assert x.std() == pytest.approx(sd or (2 / x.shape[1]) ** 0.5, rel=0.1)
            assert (x.abs().max() < 2 * x.std()) == (kind == 'mlp')
        else:
            assert (x == float(name.endswith(('weight', 'var')))).all()


@pytest.mark.parametrize(
    ('given', 'class_token', 'sentence'),
    [(settings('forest'), True, 'kind .*forest'), (settings(pooling='max'), True, 'pooling'),
     (settings(task='ranking'), True, 'task'),
     (settings(pooling='class-token'), False, 'no class token'),
     ({k: v for k, v in settings().items() if k != 'sd'}, True, 'lacks sd'),
     ({k: v for k, v in settings().items() if k != 'target'}, True, 'lacks target'),
     (settings(what=SEX | {'classes': ['F']}), True, 'two classes'),
     (settings(what=SEX | {'classes': ['F', 'F']}), True, 'two classes'),
     (settings(what=SEX | {'classes': 'FM'}), True, 'two classes'),
     (settings(what=SEX | {'classes': [True, False]}), True, 'classes .*texts'),
     (settings(classes=['F', 'M']), True, 'regression does not know classes'),
     (settings(sd=0.0), True, 'sd 0.0; give a number above 0'),
     (settings(mean=None), True, 'mean None; give a number'),
     (settings(dropout=1), True, 'dropout 1; give a proportion'),
     (settings(target='real'), True, 'other than window'),
     (settings(target='a\tb'), True, 'target'),
     ('mlp', True, 'give a mapping')],
)  # fmt: skip
def test_settings_that_make_no_head(given, class_token, sentence):
    with pytest.raises(BrainfmError, match=sentence):
        Head(given, WIDTH, class_token)


# --- with a network --------------------------------------------------------------------------


def config_of(name, head=None):
    """Configuration of a small network in the form of a demonstration model."""
    config = yaml.safe_load((CARDS / f'{name}.yml').read_text())['config']
    if name == 'brainlm-demo':
        config |= {'num_hidden_layers': 1, 'decoder_num_hidden_layers': 1}
    else:
        config |= {'depth': 1}
    return config | ({'head': head} if head else {})


@pytest.mark.parametrize('name', ['brainlm-demo', 'brain-jepa-demo'])
def test_initialisation_of_the_network_does_not_depend_on_the_head(name):
    bare = initialise(build(config_of(name)), 3).state_dict()
    for kind in ('mlp', 'linear', 'probe'):
        with_head = initialise(build(config_of(name, settings(kind))), 3)
        state = with_head.state_dict()
        assert all(torch.equal(state[key], value) for key, value in bare.items())
        assert {key.partition('.')[0] for key in set(state) - set(bare)} == {'head'}
        again = initialise(build(config_of(name, settings(kind))), 3).state_dict()
        assert all(torch.equal(again[key], value) for key, value in state.items())


def test_loading_is_strict_with_and_without_a_head(tmp_path):
    bare, headed = (config_of('brainlm-demo', head) for head in (None, settings()))
    for config, file in ((bare, 'bare'), (headed, 'headed')):
        state = initialise(build(config), 0).state_dict()
        save_file(state, tmp_path / f'{file}.safetensors')
    for config, file in ((bare, 'bare'), (headed, 'headed')):
        load_checkpoint(build(config), tmp_path / f'{file}.safetensors')
    with pytest.raises(BrainfmError, match=r'lacks 6 tensors \(head'):
        load_checkpoint(build(headed), tmp_path / 'bare.safetensors')
    with pytest.raises(BrainfmError, match=r'unexpected 6 tensors \(head'):
        load_checkpoint(build(bare), tmp_path / 'headed.safetensors')


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_encoder_predicts_from_all_tokens(precision):
    """Of the window as the network takes it; a network without a head predicts nothing."""
    config = config_of('brainlm-demo', settings())
    windows = np.random.default_rng(0).standard_normal((3, 424, 200), dtype=np.float32)
    network = initialise(build(config), 0)
    network.head.load_state_dict(some_state(network.head))
    state = {name: x.clone() for name, x in network.head.state_dict().items()}
    encoder = Encoder(network, precision=precision)
    found = encoder.encode(windows)
    with encoder._autocast(), torch.inference_mode():
        hidden = network.encode(torch.from_numpy(windows[:1]))[0].float()
    wanted = outputs_by_hand('mlp', state, hidden.mean(1)) * 12.5 + 43
    assert found.prediction.shape == (3, 1)
    assert found.prediction.dtype == np.float32
    np.testing.assert_allclose(found.prediction[:1], wanted, rtol=1e-4)
    assert np.ptp(found.prediction) > 0
    assert len(found.part(1, 3).prediction) == 2
    assert (
        Encoder(initialise(build(config_of('brainlm-demo')), 0)).encode(windows).prediction is None
    )


# --- through the command ---------------------------------------------------------------------

HEADS = {
    'brainlm-demo': settings('mlp', 'class-token'),
    'brain-jepa-demo': settings('linear', 'mean', SEX),
}
TRAINING = {
    'how': 'Fine-tuned',
    'test': {'r': 0.456, 'mae': 9.5},
    'test_baselines': {'constant': {'r': float('nan'), 'mae': 11.0}},
}


@pytest.fixture(scope='module')
def cards(tmp_path_factory):
    """Cards of two small fine-tuned networks, weights beside them."""
    folder = tmp_path_factory.mktemp('tuned')
    for name, head in HEADS.items():
        network = initialise(build(config_of(name, head)), 5)
        network.head.load_state_dict(some_state(network.head))
        weights = folder / f'{name}.safetensors'
        save_file(network.state_dict(), weights)
        card = yaml.safe_load((CARDS / f'{name}.yml').read_text())
        card |= {
            'config': config_of(name, head),
            'weights': [{'name': weights.name, 'sha256': sha256_of(weights)}],
            'label': label_of(name),
            'training': TRAINING if name == 'brainlm-demo' else None,
        }
        (folder / f'{name}.yml').write_text(yaml.safe_dump(card, sort_keys=False))
    table = 'brain-jepa-demo_gradients.csv'
    (folder / table).write_bytes((CARDS / table).read_bytes())
    return folder


def label_of(name):
    return name.replace('-', '') + 'tuned'


def call(data, out, cards, *options):
    models = [str(cards / f'{name}.yml') for name in HEADS]
    command = [str(data), str(out), 'participant', '-w', f'{out}_work', '--short-runs', 'pad']
    return main([*command, '--nprocs', '1', '--model', *models, *options])


@pytest.fixture(scope='module')
def done(simulated, cards, tmp_path_factory):
    out = tmp_path_factory.mktemp('predicted') / 'out'
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        assert call(simulated, out, cards) == 0
    return out


def prediction_of(out, name, sub='01'):
    stem = f'sub-{sub}_{STEM}_desc-{label_of(name)}_prediction'
    return out / f'sub-{sub}' / 'func' / f'{stem}.tsv'


@pytest.mark.parametrize('name', HEADS)
def test_predictions_are_those_by_hand(done, cards, name):
    """Series as written, windows as the contract cuts them, tensors as they lie in the file."""
    card = yaml.safe_load((cards / f'{name}.yml').read_text())
    atlas = load_atlas('Demo424', home())
    series = read_series(done / 'sub-01' / 'func' / f'sub-01_{STEM}_stat-mean_timeseries.tsv')
    contract = Contract(
        card['tr'], card['window'], card['scaling'], card['divide_by'], short_runs='pad'
    )
    windows = windows_of(prepare_input(series, contract, atlas.xyz, atlas.name), contract)
    state = load_file(cards / f'{name}.safetensors')
    network = build(config_of(name))
    network.load_state_dict({k: v for k, v in state.items() if k[:5] != 'head.'}, assign=True)
    data = windows.data
    if name == 'brainlm-demo':
        data = data[:, ascending_y(atlas.xyz)]
    else:
        network.set_positions(read_gradients(cards / 'brain-jepa-demo_gradients.csv'))
    with torch.inference_mode():
        hidden = network.encode(torch.from_numpy(np.ascontiguousarray(data)))[0]
    head = HEADS[name]
    pooled = hidden[:, 0] if head['pooling'] == 'class-token' else hidden.mean(1)
    # tensors of the file in the order of the network's
    order = Head(head, network.capabilities.width, network.capabilities.class_token).state_dict()
    outputs = outputs_by_hand(head['kind'], {k: state[f'head.{k}'] for k in order}, pooled)
    wanted = F.softmax(outputs, -1) if head['task'] == 'classification' else outputs * 12.5 + 43
    columns = ['age'] if name == 'brainlm-demo' else ['sex_F', 'sex_M', 'sex_X']
    table = pd.read_csv(prediction_of(done, name), sep='\t')
    first = ['window', 'onset', 'duration', 'real', 'flagged', 'excluded']
    assert list(table.columns) == [*first, 'part', *columns]
    np.testing.assert_allclose(table[columns], wanted, rtol=1e-3, atol=1e-4)
    embedding = pd.read_csv(
        str(prediction_of(done, name)).replace('_prediction', '_embedding'), sep='\t'
    )
    pd.testing.assert_frame_equal(table[first], embedding[first])
    sidecar = json.loads(prediction_of(done, name).with_suffix('.json').read_text())
    of_run = prediction.run_prediction(table[columns].to_numpy(), head['task'])
    for column, expected in zip(columns, of_run, strict=True):
        assert sidecar['RunPrediction'][column] == pytest.approx(expected, rel=1e-5)
        assert sidecar[column]['Description']
    assert sidecar['Target'] == head['target']
    assert sidecar['Task'] == head['task']
    assert sidecar.get('Classes') == head.get('classes')
    assert sidecar['Model']['Trained']
    assert sidecar['Sources'][0].endswith('_stat-mean_timeseries.tsv')


def test_predictions_of_classes_are_joined_by_their_logits():
    """As the mean embedding is predicted by a linear head."""
    logits = np.array([[4.0, 0, 0], [1, 2, 3], [0, 1, 9]])
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    found = prediction.run_prediction(softmax(logits).astype(np.float32), 'classification')
    np.testing.assert_allclose(found, softmax(logits.mean(0)), rtol=1e-5)
    sure = prediction.run_prediction(np.array([[1.0, 0.0]], np.float32), 'classification')
    np.testing.assert_allclose(sure, [1, 0], atol=1e-30)


def test_what_is_told_of_training(done):
    sidecar = json.loads(prediction_of(done, 'brainlm-demo').with_suffix('.json').read_text())
    assert sidecar['Part'] == 'n/a'  # the card lists no participants
    assert 'may not be held out' in sidecar['Warnings'][0]
    assert sidecar['TestScores'] == TRAINING['test']
    embedding = str(prediction_of(done, 'brainlm-demo')).replace('_prediction.tsv', '_embedding')
    model = json.loads(Path(f'{embedding}.json').read_text())['Model']
    assert model['Training']['how'] == 'Fine-tuned'
    assert model['Training']['test_baselines']['constant'] == {'r': None, 'mae': 11.0}
    assert sidecar['TestBaselines'] == model['Training']['test_baselines']
    other = prediction_of(done, 'brain-jepa-demo').with_suffix('.json').read_text()
    assert 'TestScores' not in json.loads(other)


def test_report_shows_predictions_and_how_good_they_are(done):
    page = (done / 'sub-01.html').read_text()
    sidecar = json.loads(prediction_of(done, 'brainlm-demo').with_suffix('.json').read_text())
    n = sidecar['NumberOfWindows']
    of = f'(mean of {n} window{"s" * (n > 1)})'
    assert 'Predicted age' in page
    assert f'{sidecar["RunPrediction"]["age"]:.4g} {of}' in page
    assert 'model: r 0.456, mae 9.5; constant: r n/a, mae 11' in page
    other = json.loads(prediction_of(done, 'brain-jepa-demo').with_suffix('.json').read_text())
    assert f'F with probability {other["RunPrediction"]["sex_F"]:.2f}, M with' in page
    assert 'head predicted age' in (done / 'logs' / 'CITATION.md').read_text()


@pytest.mark.parametrize(
    ('tested', 'baselines', 'said'),
    [({'r': 0.5, 'n': 40, 'by': 'us'}, {}, 'model: r 0.5, n 40, by us'),
     (0.25, [0.1], 'model: 0.25; baselines: [0.1]'),
     ({'site A': {'mse': 0.001234}}, {'constant': None},
      'model: site A (mse 0.00123); constant: n/a')],
)  # fmt: skip
def test_scores_in_any_form_are_told(tested, baselines, said):
    """A card that someone wrote by hand must not break the report."""
    found = {'Target': 'age', 'NumberOfWindows': 1, 'RunPrediction': {'age': 43.21}}
    shown = {'TestScores': tested, 'TestBaselines': baselines}
    lines = {'Predicted age': '43.21 (mean of 1 window)'}
    for part in ('test', 'unseen'):
        facts = prediction.facts(found | shown | {'Part': part})
        assert facts == lines | {'In the training': part, 'Test participants': said}
    for part in ('train', 'validation'):
        facts = prediction.facts(found | shown | {'Part': part})
        words = f'{part} part: not held out, test scores do not apply'
        assert facts == lines | {'In the training': words}


def test_the_dataset_validates_without_a_word(done):
    validator = Path(sys.executable).with_name('bids-validator-deno')
    found = subprocess.run(
        [validator, '--format', 'json', done], capture_output=True, text=True, check=False
    )
    assert json.loads(found.stdout)['issues']['issues'] == []


def times(out):
    return {p: p.stat().st_mtime_ns for p in out.rglob('*') if 'logs' not in p.parts}


def test_a_second_run_makes_what_is_missing_and_nothing_else(done, simulated, cards, monkeypatch):
    monkeypatch.chdir(done.parent)
    before = times(done)
    assert call(simulated, done, cards) == 0
    assert times(done) == before
    lost = prediction_of(done, 'brainlm-demo')
    content = lost.read_bytes()
    lost.unlink()
    assert call(simulated, done, cards) == 0
    assert lost.read_bytes() == content
    after = times(done)
    changed = {p for p in before if before[p] != after[p] and p.is_file()}
    assert changed == {lost, lost.with_suffix('.json')}


@pytest.mark.slow
def test_predictions_of_an_earlier_input_are_made_again(dataset, cards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'out'
    assert call(dataset, out, cards, '--participant-label', '01') == 0
    path = prediction_of(out, 'brainlm-demo')
    before = path.read_text()
    confounds = next(dataset.glob('sub-01/func/*confounds*.tsv'))
    table = pd.read_csv(confounds, sep='\t')
    table['trans_x'] = table['trans_x'].to_numpy()[::-1]
    table.to_csv(confounds, sep='\t', index=False, na_rep='n/a')
    assert call(dataset, out, cards, '--participant-label', '01') == 0
    assert path.read_text() != before


def test_a_random_head_is_no_result(simulated, cards, tmp_path, monkeypatch):
    """The control predicts under its own name, and no score of the trained model is beside it."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'out'
    assert call(simulated, out, cards, '--participant-label', '01', '--random-weights') == 0
    made = next(out.rglob(f'*_desc-{label_of("brainlm-demo")}random_prediction.json'))
    sidecar = json.loads(made.read_text())
    assert not sidecar['Model']['Trained']
    assert 'TestScores' not in sidecar
    assert sidecar['Part'] == 'unseen'
