"""Families of networks: found by entry points, judged by the protocol, added by other packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import families
from bids_brainfm.models.encoder import Encoder
from bids_brainfm.models.families import family, family_names, working_families
from bids_brainfm.models.protocol import Capabilities, forecast_points
from bids_brainfm.models.weights import build, initialise

EXAMPLE = Path(__file__).parent / 'example_family'
STEM = 'sub-01_task-rest_space-MNI152NLin2009cAsym_atlas-Demo424'


def declare(folder: Path, package: str, **values: str) -> None:
    """Pretend that a package declares families, by what an installation leaves."""
    info = folder / f'{package}-1.0.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n')
    lines = [f'{name} = {value}' for name, value in values.items()]
    (info / 'entry_points.txt').write_text('\n'.join([f'[{families.GROUP}]', *lines]))


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """Declare families by packages that are on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(package, **values):
        declare(tmp_path, package, **values)

    return write


def test_our_families_are_declared_like_any_other():
    assert {'brain_jepa', 'brainlm_mae', 'vit_mae'} <= set(family_names())
    assert {kind.model_type for kind in working_families()} == set(family_names())


def test_listing_names_imports_nothing_heavy():
    code = (
        'import sys; from bids_brainfm.models.families import family_names; family_names();'
        'print([m for m in ("numpy", "torch") if m in sys.modules])'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == '[]'


def test_unknown_family():
    with pytest.raises(BrainfmError, match=r"model_type 'none_such', .* known are .*vit_mae"):
        build({'model_type': 'none_such'})


@pytest.mark.parametrize(
    ('value', 'said'),
    [
        ('no_such_module:Family', r'cannot be imported from no_such_module:Family \(ModuleNot'),
        ('torch.nn:NoSuchClass', r'cannot be imported .*AttributeError'),
        (
            'torch.nn:Linear',
            r'does not implement the protocol .* lacks at_parcels',
        ),
        (
            'bids_brainfm.models.brain_jepa:BrainJEPA',
            r'does not implement .* has model_type brain_jepa; update',
        ),
    ],
)
def test_a_family_that_cannot_be_used(declared, value, said):
    """The sentence names the package; other families work."""
    declared('faulty-package', faulty=value)
    with pytest.raises(BrainfmError, match=f'faulty of the package faulty-package .*{said}'):
        family('faulty')
    assert 'faulty' in family_names()
    assert 'vit_mae' in {kind.model_type for kind in working_families()}


def test_two_packages_with_the_same_family(declared):
    declared('another-package', vit_mae='another:Network')
    with pytest.raises(BrainfmError, match=r'vit_mae is declared by .*another-package.*uninstall'):
        family('vit_mae')
    assert family('brain_jepa').model_type == 'brain_jepa'


def test_a_family_of_another_layout_does_not_stop_the_others(declared, monkeypatch, tmp_path):
    """Every family is asked whether a checkpoint is its own, and some cannot read it."""
    from safetensors.torch import save_file

    from bids_brainfm.models import weights
    from bids_brainfm.models.brain_jepa import BrainJEPA
    from bids_brainfm.models.cards import load_card

    class Nested(BrainJEPA):
        model_type = 'nested'
        signature = ('none.of.these', 'a nested')
        unpack = staticmethod(lambda state: state['model'])

    monkeypatch.setattr('bids_brainfm.models.brain_jepa.Nested', Nested, raising=False)
    declared('nested-package', nested='bids_brainfm.models.brain_jepa:Nested')
    assert 'nested' in {kind.model_type for kind in working_families()}
    network = build(load_card('brainlm-demo').config)
    state = weights.initialise(network, 0).state_dict()
    save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / 'model.safetensors')
    assert weights.load_checkpoint(network, tmp_path) == tmp_path / 'model.safetensors'


@pytest.mark.parametrize('promised', [{'reconstructs': True}, {'predicts_latents': True}])
def test_a_network_that_does_not_keep_its_promise(declared, monkeypatch, promised):
    from bids_brainfm.models.brain_jepa import BrainJEPA

    class Promising(BrainJEPA):
        model_type = 'promising'
        context = property()  # not there

        def __init__(self, config):
            super().__init__(config)
            shape = {'window': (4, 8), 'width': 4, 'patches': 2, 'token_span': (1, 4)}
            self.capabilities = Capabilities(class_token=False, **shape, **promised)

    if 'predicts_latents' in promised:
        monkeypatch.delattr(BrainJEPA, 'context')
        del Promising.context
    monkeypatch.setattr('bids_brainfm.models.brain_jepa.Promising', Promising, raising=False)
    declared('promising-package', promising='bids_brainfm.models.brain_jepa:Promising')
    sizes = ('embed_dim', 'depth', 'num_heads')
    config = dict.fromkeys([*sizes, *(f'predictor_{n}' for n in sizes)], 4)
    config |= {'model_type': 'promising', 'crop_size': [4, 8], 'patch_size': 4}
    with pytest.raises(BrainfmError, match=r'promising lacks (decode|context), which its capab'):
        build(config)


@pytest.mark.parametrize('step', [1, 4, 16, 20])
def test_forecast_points_can_always_be_forecast(step):
    for window in range(step, 300, step):
        points = forecast_points(window, step)
        if points is None:
            assert window <= max(step + 1, 2)
        else:
            assert points % step == 0
            assert 1 <= points <= window - 2
    assert forecast_points(200, step) in (20, 16)


# --- a package of somebody else --------------------------------------------------------------


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The example package, installed as pip does it, without a network."""
    pytest.importorskip('hatchling', reason='the backend that builds the example package')
    place = tmp_path_factory.mktemp('installed')
    source = shutil.copytree(EXAMPLE, place / 'source')
    pip = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '-q']
    pip += ['--no-build-isolation', '--target', str(place / 'target'), str(source)]
    ended = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return place / 'target'


@pytest.fixture
def example(installed, monkeypatch):
    """Its family, in this process."""
    monkeypatch.syspath_prepend(installed)
    return yaml.safe_load((EXAMPLE / 'example.yml').read_text())['config']


def test_the_example_is_short():
    files = [path for path in EXAMPLE.iterdir() if path.suffix in ('.py', '.yml', '.toml')]
    assert len(files) == 3
    assert sum(len(path.read_text().splitlines()) for path in files) < 100


@pytest.mark.parametrize('rows', [1, 8])
def test_tokens_need_not_be_square_nor_of_one_parcel(example, rows):
    network = initialise(build(example | {'rows': rows}), 0)
    network.set_positions(np.random.default_rng(0).normal(0, 40, (424, 3)))
    windows = np.random.default_rng(1).standard_normal((2, 424, 16), dtype=np.float32)
    encoder = Encoder(network, np.random.default_rng(2).permutation(424))
    encoding = encoder.encode(windows, tokens=True, attention=True)
    assert encoding.tokens.shape == (2, network.tokens, 8)
    assert network.tokens == 424 // rows * 4
    assert (encoding.parcels is None) == (rows > 1)
    assert encoding.attention.shape == (2, 424)
    assert encoding.attention.mean(1) == pytest.approx(1, abs=1e-5)
    marked = torch.zeros(1, network.tokens, dtype=torch.bool)
    marked[0, [0, 7]] = True
    assert network.points(marked).sum() == 2 * rows * 4
    assert torch.equal(network.covering(network.points(marked)), marked)
    tokens, blank = network.hide_last(4, exactly=True)
    assert blank is None
    keep = torch.nonzero(~tokens[0])[:, 0]
    assert encoder.reconstruct(windows, keep).shape == windows.shape


@pytest.mark.slow
def test_the_whole_command_with_a_family_of_another_package(installed, simulated, tmp_path):
    """All outputs, with windows of 16 time points and tokens of one and of eight parcels."""
    card = yaml.safe_load((EXAMPLE / 'example.yml').read_text())
    wide = card | {'name': 'wide', 'label': 'wide', 'config': card['config'] | {'rows': 8}}
    (tmp_path / 'wide.yml').write_text(yaml.safe_dump(wide))
    out = tmp_path / 'out'
    command = [sys.executable, '-m', 'bids_brainfm.cli.run', simulated, out, 'participant']
    command += ['--model', EXAMPLE / 'example.yml', tmp_path / 'wide.yml', '--outputs', 'all']
    command += ['--participant-label', '01', '-w', tmp_path / 'work', '--network-clusters', '7']
    paths = [str(installed), *filter(None, [os.environ.get('PYTHONPATH')])]
    env = os.environ | {'PYTHONPATH': os.pathsep.join(paths)}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert ended.returncode == 0, ended.stderr
    func = out / 'sub-01' / 'func'
    for label in ('example', 'wide'):
        embedding = pd.read_csv(func / f'{STEM}_desc-{label}_embedding.tsv', sep='\t')
        assert len(embedding) > 5
        assert 'dim7' in embedding
        forecast = pd.read_csv(func / f'{STEM}_desc-{label}_forecast.tsv', sep='\t')
        assert len(forecast) == 4
        for stat in ('r2', 'attention', 'perturbation'):
            table = pd.read_csv(func / f'{STEM}_stat-{stat}_desc-{label}_boldmap.tsv', sep='\t')
            assert len(table) == 424
    assert (out / 'sub-01.html').is_file()
