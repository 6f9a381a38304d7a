"""What --model means for a model with a table of gradients: which weights, sizes and table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from bids_brainfm.cli.models import main, model_present
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import load_card
from bids_brainfm.models.gradient_table import read_gradients, write_gradients
from bids_brainfm.models.spec import resolve_model
from bids_brainfm.models.weights import build, initialise, load_checkpoint
from bids_brainfm.resources import sha256_of

CARDS = Path(__file__).parents[1] / 'bids_brainfm' / 'data' / 'models'
DEMO = yaml.safe_load((CARDS / 'brain-jepa-demo.yml').read_text())


@pytest.fixture
def table(tmp_path):
    path = tmp_path / 'mine_gradients.csv'
    write_gradients(path, np.random.default_rng(0).standard_normal((424, 30)))
    return path


@pytest.fixture
def card(tmp_path, table):
    """Write a user's own card of a small Brain-JEPA, whose publisher gives no configuration."""

    def write(**changes):
        gradients = {'name': table.name, 'sha256': sha256_of(table)}
        text = DEMO | {'name': 'mine', 'gradients': gradients}
        text |= {'weights': [{'name': 'jepa-ep300.pth.tar'}]} | changes
        path = tmp_path / 'mine.yml'
        path.write_text(yaml.safe_dump(text))
        return path

    return write


@pytest.fixture
def checkpoint(tmp_path):
    """A file as the official code writes it: three networks, and what training needs."""
    state = initialise(build(DEMO['config']), 7).state_dict()
    parts = {'opt': {'state': {}}, 'scaler': None, 'epoch': 300, 'loss': 0.1, 'lr': 1e-3}
    for name, tensor in state.items():
        part, _, rest = name.partition('.')
        parts.setdefault(part, {})[f'module.{rest}'] = tensor
    folder = tmp_path / 'weights'
    folder.mkdir()
    torch.save(parts | {'batch_size': 16, 'world_size': 4}, folder / 'jepa-ep300.pth.tar')
    return folder / 'jepa-ep300.pth.tar'


def test_file_and_folder_mean_the_same(card, checkpoint, table, tmp_path):
    """Sizes come from the card where no configuration lies beside the weights."""
    for path in (checkpoint, checkpoint.parent):
        spec = resolve_model(str(card()), tmp_path, path)
        assert spec.sha256 == sha256_of(checkpoint)
        assert spec.capabilities.window == (424, spec.card.window) == (424, 160)
        assert spec.capabilities.pooling == 'mean over tokens'
        assert spec.capabilities.patches == 5
        assert spec.capabilities.predicts_latents
        assert spec.gradients.path == table
        assert spec.gradients.named


def test_configuration_beside_the_weights_holds(card, checkpoint, tmp_path):
    config = DEMO['config'] | {'depth': 3}
    for name in ('architecture.json', 'config.json'):
        (checkpoint.parent / name).write_text(json.dumps(config))
        with pytest.raises(BrainfmError, match=r'blocks\.2'):
            resolve_model(str(card()), tmp_path, checkpoint)


def test_table_beside_the_weights_goes_first_and_is_told(card, checkpoint, tmp_path):
    own = checkpoint.with_name('gradient_mapping.csv')
    write_gradients(own, np.random.default_rng(1).standard_normal((424, 30)))
    spec = resolve_model(str(card()), tmp_path, checkpoint)
    assert spec.gradients.path == own
    assert not spec.gradients.named
    assert spec.gradients.sha256 == sha256_of(own)
    write_gradients(own.with_name('gradients2.csv'), read_gradients(own))
    with pytest.raises(BrainfmError, match='2 tables of gradients'):
        resolve_model(str(card()), tmp_path, checkpoint)


def test_other_content_than_the_card_names_is_refused(card, checkpoint, table, tmp_path):
    path = card()
    table.write_text(table.read_text().replace('1', '2'))
    with pytest.raises(BrainfmError, match=r'sha256 .* was expected'):
        resolve_model(str(path), tmp_path, checkpoint)


@pytest.mark.parametrize('rows', [423, 450])
def test_table_of_another_atlas_is_refused(card, checkpoint, table, tmp_path, rows):
    write_gradients(table, np.random.default_rng(0).standard_normal((rows, 30)))
    with pytest.raises(BrainfmError, match=f'{rows}×30'):
        resolve_model(str(card()), tmp_path, checkpoint)


def test_missing_table_says_how_to_get_it(card, checkpoint, table, tmp_path):
    path = card()
    table.unlink()
    for weights in (checkpoint, None):
        with pytest.raises(BrainfmError, match=r'table of brain gradients mine_gradients\.csv'):
            resolve_model(str(path), tmp_path, weights, random_weights=True)


def test_folder_with_the_table_only_has_no_weights(card, table, tmp_path):
    """As a fetch leaves it that found the table and not the weights."""
    path, folder = card(), tmp_path / 'models' / 'mine'
    folder.mkdir(parents=True)
    table.rename(folder / table.name)
    with pytest.raises(BrainfmError, match=r'not in .*: run "bids_brainfm_models fetch .*mine'):
        resolve_model(str(path), tmp_path)


def test_weights_that_are_not_there(card, tmp_path):
    with pytest.raises(BrainfmError, match='does not exist'):
        resolve_model(str(card()), tmp_path, tmp_path / 'nowhere')


@pytest.mark.parametrize('content', ['', 'a,b\n1,2\n', '1,2\n3\n', '1,nan\n2,3\n'])
def test_tables_that_are_none(tmp_path, content):
    path = tmp_path / 'table.csv'
    path.write_text(content)
    with pytest.raises(BrainfmError, match='table of gradients'):
        read_gradients(path)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [({'min_real': 0.0}, 'min_real'), ({'official_volumes': 100}, 'official_volumes'),
     ({'gradients': {'sha256': '0'}}, 'name of a file'), ({'cohort_scaling': 'x'}, 'scaling'),
     ({'citation': [1]}, 'citation'), ({'gradients': 'table.csv'}, 'gradients'),
     ({'weights': ['model.safetensors']}, "weights 'model.safetensors' is not a mapping"),
     ({'training': 'long'}, 'training')],
)  # fmt: skip
def test_faulty_cards(card, tmp_path, change, sentence):
    with pytest.raises(BrainfmError, match=sentence):
        resolve_model(str(card(**change)), tmp_path, random_weights=True)


@pytest.fixture
def trained(card, tmp_path):
    """Write such a card with weights beside it."""

    def write(**changes):
        weights = tmp_path / 'mine.safetensors'
        save_file(initialise(build(DEMO['config']), 7).state_dict(), weights)
        named = {'weights': [{'name': weights.name, 'sha256': sha256_of(weights)}]}
        return card(**named | changes)

    return write


def test_weights_beside_the_card_are_taken(trained, tmp_path):
    """Whatever their name; the card is all that is given, and it has the sizes."""
    path = trained(training={'test': {'r': 0.5}})
    weights = path.with_name('mine.safetensors')
    spec = resolve_model(str(path), tmp_path / 'home')
    assert spec.checkpoint == weights
    assert spec.trained
    assert spec.weights == f'sha256 {sha256_of(weights)}'
    assert spec.label == DEMO['label']
    assert spec.card.training == {'test': {'r': 0.5}}


def test_trained_weights_are_those_that_encode(trained, tmp_path):
    spec = resolve_model(str(trained()), tmp_path)
    network = build(spec.card.config)
    load_checkpoint(network, spec.checkpoint)
    wanted = initialise(build(DEMO['config']), 7).state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in network.state_dict().items())


def test_random_weights_stand_beside_trained_ones(trained, tmp_path):
    """And what the card tells of training is not said of them."""
    path = trained(training={'test': {'r': 0.5}})
    spec = resolve_model(str(path), tmp_path, random_weights=True)
    assert spec.label == f'{DEMO["label"]}random'
    assert not spec.trained
    assert spec.card.training is None


def test_other_weights_are_not_said_to_be_the_trained_ones(trained, checkpoint, tmp_path):
    path = trained(training={'test': {'r': 0.5}}, weights=[{'name': 'mine.safetensors'}])
    spec = resolve_model(str(path), tmp_path, checkpoint)
    assert spec.sha256 == sha256_of(checkpoint)
    assert spec.card.training is None


def test_weights_with_other_content_than_the_card_gives_are_refused(trained, tmp_path):
    path = trained()
    save_file(
        initialise(build(DEMO['config']), 8).state_dict(), path.with_name('mine.safetensors')
    )
    with pytest.raises(BrainfmError, match=r'mine\.safetensors has sha256 .* where the card of'):
        resolve_model(str(path), tmp_path)
    assert not resolve_model(str(path), tmp_path, random_weights=True).trained


def test_weights_that_do_not_lie_beside_the_card_are_fetched(trained, tmp_path):
    path = trained()
    path.with_name('mine.safetensors').unlink()
    with pytest.raises(BrainfmError, match=r'not in .*home/models/mine: run "bids_brainfm_models'):
        resolve_model(str(path), tmp_path / 'home')


def test_a_part_of_a_checkpoint_beside_the_card_is_none(trained, tmp_path):
    path = trained(weights=[{'name': 'config.json'}, {'name': 'mine.safetensors'}])
    with pytest.raises(BrainfmError, match=r'not in .*home/models/mine'):
        resolve_model(str(path), tmp_path / 'home')
    path.with_name('config.json').write_text(json.dumps(DEMO['config']))
    spec = resolve_model(str(path), tmp_path / 'home')
    assert spec.checkpoint == path.with_name('mine.safetensors')


def test_card_without_weights_is_untrained(card, tmp_path):
    for random_weights in (False, True):
        spec = resolve_model(str(card(weights=[])), tmp_path, random_weights=random_weights)
        assert (spec.label, spec.trained, spec.sha256) == (DEMO['label'], False, None)


def test_what_training_writes_is_a_model(trained, table, tmp_path):
    """A folder of card, configuration, weights and gradients, wherever it is moved."""
    content = yaml.safe_load(trained().read_text())
    folder = tmp_path / 'OUT'
    folder.mkdir()
    table.rename(folder / 'gradients.csv')
    (tmp_path / 'mine.safetensors').rename(folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(DEMO['config']))
    content['weights'][0]['name'] = 'model.safetensors'
    content['gradients']['name'] = 'gradients.csv'
    (folder / 'card.yml').write_text(yaml.safe_dump(content | {'training': {'steps': 3}}))
    moved = folder.rename(tmp_path / 'moved')
    spec = resolve_model(str(moved / 'card.yml'), tmp_path / 'home')
    assert spec.checkpoint == moved / 'model.safetensors'
    assert spec.gradients.path == moved / 'gradients.csv'
    assert spec.gradients.named
    assert spec.card.training == {'steps': 3}


def test_nothing_is_fetched_that_lies_beside_the_card(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    path = trained()
    assert main(['fetch', str(path)]) == 0
    assert 'nothing to fetch' in capsys.readouterr().out
    assert not (tmp_path / 'home').exists()
    assert model_present(load_card(path), tmp_path) == 'yes (embedded)'
    assert model_present(load_card(trained(weights=[])), tmp_path) == 'yes (embedded, untrained)'


def test_a_table_is_fetched_for_weights_beside_the_card(trained, table, tmp_path, monkeypatch):
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'home'))
    path, source = trained(), tmp_path / 'usb'
    source.mkdir()
    table.rename(source / table.name)
    assert main(['fetch', str(path), '--from', str(source)]) == 0
    spec = resolve_model(str(path), tmp_path / 'home')
    assert spec.gradients.path == tmp_path / 'home' / 'models' / 'mine' / table.name
