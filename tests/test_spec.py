"""What --model means for a model with a table of gradients: which weights, sizes and table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bids_brainfm.atlases.fetch import sha256_of
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.gradient_table import read_gradients, write_gradients
from bids_brainfm.models.spec import resolve_model
from bids_brainfm.models.weights import build, initialise

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
        spec = resolve_model(f'{card()}={path}', tmp_path)
        assert spec.sha256 == sha256_of(checkpoint)
        assert (spec.n_parcels, spec.card.window) == (424, 160)
        assert spec.pooling == 'mean over tokens'
        assert spec.per_parcel
        assert spec.predicts_latents
        assert spec.gradients.path == table
        assert spec.gradients.named


def test_configuration_beside_the_weights_holds(card, checkpoint, tmp_path):
    config = DEMO['config'] | {'depth': 3}
    for name in ('architecture.json', 'config.json'):
        (checkpoint.parent / name).write_text(json.dumps(config))
        with pytest.raises(BrainfmError, match=r'blocks\.2'):
            resolve_model(f'{card()}={checkpoint}', tmp_path)


def test_table_beside_the_weights_goes_first_and_is_told(card, checkpoint, tmp_path):
    own = checkpoint.with_name('gradient_mapping.csv')
    write_gradients(own, np.random.default_rng(1).standard_normal((424, 30)))
    spec = resolve_model(f'{card()}={checkpoint}', tmp_path)
    assert spec.gradients.path == own
    assert not spec.gradients.named
    assert spec.gradients.sha256 == sha256_of(own)
    write_gradients(own.with_name('gradients2.csv'), read_gradients(own))
    with pytest.raises(BrainfmError, match='2 tables of gradients'):
        resolve_model(f'{card()}={checkpoint}', tmp_path)


def test_other_content_than_the_card_names_is_refused(card, checkpoint, table, tmp_path):
    path = card()
    table.write_text(table.read_text().replace('1', '2'))
    with pytest.raises(BrainfmError, match=r'sha256 .* was expected'):
        resolve_model(f'{path}={checkpoint}', tmp_path)


@pytest.mark.parametrize('rows', [423, 450])
def test_table_of_another_atlas_is_refused(card, checkpoint, table, tmp_path, rows):
    write_gradients(table, np.random.default_rng(0).standard_normal((rows, 30)))
    with pytest.raises(BrainfmError, match=f'{rows}×30'):
        resolve_model(f'{card()}={checkpoint}', tmp_path)


def test_missing_table_says_how_to_get_it(card, checkpoint, table, tmp_path):
    path = card()
    table.unlink()
    for text in (f'{path}={checkpoint}', str(path)):
        with pytest.raises(BrainfmError, match=r'table of brain gradients mine_gradients\.csv'):
            resolve_model(text, tmp_path, random_weights=True)


def test_folder_with_the_table_only_has_no_weights(card, table, tmp_path):
    """As a fetch leaves it that found the table and not the weights."""
    path, folder = card(), tmp_path / 'models' / 'mine'
    folder.mkdir(parents=True)
    table.rename(folder / table.name)
    with pytest.raises(BrainfmError, match=r'not in .*: run "bids_brainfm_models fetch .*mine'):
        resolve_model(str(path), tmp_path)


def test_weights_that_are_not_there(card, tmp_path):
    with pytest.raises(BrainfmError, match='does not exist'):
        resolve_model(f'{card()}={tmp_path / "nowhere"}', tmp_path)


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
     ({'citation': [1]}, 'citation'), ({'gradients': 'table.csv'}, 'gradients')],
)  # fmt: skip
def test_faulty_cards(card, tmp_path, change, sentence):
    with pytest.raises(BrainfmError, match=sentence):
        resolve_model(str(card(**change)), tmp_path, random_weights=True)
