"""Networks, weights and the encoder: sizes, masks, determinism, refusals."""

import csv
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bids_brainfm.config import PRECISIONS
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import files, weights
from bids_brainfm.models.brainlm_vitmae import (
    Grid,
    position_table,
    predict_last,
    predict_last_pixel,
)
from bids_brainfm.models.encoder import (
    Encoder,
    ascending_y,
    encode_runs,
    resolve_device,
    set_positions,
)
from bids_brainfm.models.masking import keep_lowest, keep_visible, masked_loss, masked_tokens
from bids_brainfm.models.precision import PrecisionCheck, products_in, resolve_precision

SHARED = Path(__file__).parents[1].parent / 'shared'


def config_of(family, hidden, layers, heads, wide, narrow, narrow_layers, narrow_wide, **more):
    return {
        'model_type': family,
        'num_brain_voxels': 424,
        'num_timepoints_per_voxel': 200,
        'num_channels': 3,
        'patch_size': 16,
        'hidden_size': hidden,
        'num_hidden_layers': layers,
        'num_attention_heads': heads,
        'intermediate_size': wide,
        'decoder_hidden_size': narrow,
        'decoder_num_hidden_layers': narrow_layers,
        'decoder_num_attention_heads': heads,
        'decoder_intermediate_size': narrow_wide,
        'layer_norm_eps': 1e-12,
        'mask_ratio': 0.75,
    } | more


def vit(*sizes, side=432, patch=16):
    return config_of('vit_mae', *sizes, image_size=[side, side], patch_size=patch)


def legacy(*sizes):
    more = {'timepoint_patching_size': 20, 'conv_kernel_size': 65}
    return config_of('brainlm_mae', *sizes, **more)


OFFICIAL = {
    '13m': legacy(512, 4, 4, 1024, 512, 2, 1024),
    'june': legacy(256, 4, 4, 1024, 256, 2, 1024),
    '111m': vit(768, 12, 4, 3072, 512, 8, 2048),
    '650m': vit(1280, 32, 16, 5120, 512, 8, 2048, side=434, patch=14),
}
SMALL = {
    'vit16': vit(32, 2, 4, 64, 16, 1, 32),
    'vit14': vit(32, 2, 4, 64, 16, 1, 32, side=434, patch=14),
    'legacy': legacy(32, 2, 4, 64, 32, 1, 64),
}
GRIDS = {16: Grid(424, 200, 432, 16), 14: Grid(424, 200, 434, 14)}


def network_of(name, seed=0):
    return weights.initialise(weights.build(SMALL[name]), seed)


def windows_of(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 424, 200), dtype=np.float32)


@pytest.fixture
def xyz():
    return np.random.default_rng(1).integers(-90, 70, (424, 3)).astype(np.float32)


def encoder_of(name, xyz, precision='float32'):
    order = None if name == 'legacy' else ascending_y(xyz)
    return Encoder(placed(name, xyz, order), order, 'cpu', precision, name)


def placed(name, xyz, order=None):
    network = network_of(name)
    set_positions(network, xyz, order)
    return network


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('size', 'tensors', 'elements', 'trainable', 'encoder'),
    [
        ('13m', 124, 18_549_292, 13_429_292, 10_986_512),
        ('june', 124, 7_607_724, 5_047_724, None),
        ('111m', 334, 112_590_080, 111_655_680, 86_208_000),
        ('650m', 654, 658_337_868, 656_613_964, 631_667_200),
    ],
)
def test_official_sizes(size, tensors, elements, trainable, encoder):
    network = weights.build(OFFICIAL[size])
    state = network.state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == elements
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == trainable
    if encoder:
        assert sum(t.numel() for name, t in state.items() if name.startswith('vit.')) == encoder


def test_unused_decoder_tensor_has_its_official_shape():
    state = weights.build(OFFICIAL['13m']).state_dict()
    assert state['decoder.decoder_pred.weight'].shape == (768, 512)
    assert state['decoder.decoder_pred1.weight'].shape == (256, 512)
    assert state['vit.encoder.layer.0.attention.self.conv.weight'].shape == (4, 1, 65, 1)


# --- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('n_tokens', 'ratio', 'kept'), [(4240, 0.2, 3392), (729, 0.75, 182), (961, 0.75, 240)]
)
def test_keep_counts(n_tokens, ratio, kept):
    noise = torch.rand(2, n_tokens, generator=torch.Generator().manual_seed(0))
    keep = keep_lowest(noise, ratio)
    masked = masked_tokens(keep, n_tokens)
    assert keep.shape == (2, kept)
    assert noise[~masked].max() < 1
    assert (noise.gather(1, keep).diff() >= 0).all()
    assert torch.equal(keep_visible(masked), keep.sort(1)[0])


@pytest.mark.parametrize(('patch', 'first', 'last'), [(16, 7, 19), (14, 8, 22)])
def test_data_columns(patch, first, last):
    grid = GRIDS[patch]
    window = grid.patches(torch.zeros(1, 424, 200))
    touched = (window == 0).any(-1).view(grid.across, grid.across).any(0)
    assert touched.nonzero().flatten().tolist() == list(range(first, last + 1))


@pytest.mark.parametrize('patch', [16, 14])
def test_patches_and_back(patch):
    signal = torch.from_numpy(windows_of(2))
    patches = GRIDS[patch].patches(signal)
    assert torch.equal(GRIDS[patch].signal(patches), signal)
    side = GRIDS[patch].side
    assert (patches == -1).sum() == 2 * (side**2 - 424 * 200)
    # first parcel and first time point of the window, in the token that holds them
    grid = GRIDS[patch]
    token = (grid.top // patch) * grid.across + grid.left // patch
    inside = (grid.top % patch) * patch + grid.left % patch
    assert torch.equal(patches[:, token, inside], signal[:, 0, 0])


@pytest.mark.parametrize(('patch', 'points'), [(16, 28), (14, 23)])
def test_predict_last(patch, points):
    tokens = predict_last(GRIDS[patch], 20)
    scored = GRIDS[patch].points(tokens)[0]
    assert (scored == scored[0]).all()
    assert scored[0].nonzero().flatten().tolist() == list(range(200 - points, 200))
    assert not tokens.view(GRIDS[patch].across, -1)[:, -1].any()  # padding stays visible


@pytest.mark.parametrize(('patch', 'by_token'), [(16, 12), (14, 9)])
def test_predict_last_pixel(patch, by_token):
    tokens, blank = predict_last_pixel(GRIDS[patch], 20)
    assert blank.nonzero().flatten().tolist() == list(range(180, 200))
    assert GRIDS[patch].points(tokens)[0, 0].sum() == by_token


@pytest.mark.parametrize('mode', [predict_last, predict_last_pixel])
@pytest.mark.parametrize('name', ['vit16', 'vit14'])
def test_what_is_scored_is_not_seen(mode, name):
    network = network_of(name)
    masks = mode(network.grid, 20)
    tokens, blank = masks if isinstance(masks, tuple) else (masks, None)
    points = network.grid.points(tokens) if blank is None else blank.expand(1, 424, 200)
    keep = keep_visible(tokens)
    signal = torch.from_numpy(windows_of(1))
    with torch.inference_mode():
        before = network.reconstruct(signal, keep, blank)
        after = network.reconstruct(signal.masked_fill(points, 7), keep, blank)
        seen = network.reconstruct(signal.masked_fill(~points, 7), keep, blank)
    assert torch.equal(before, after)
    assert not torch.equal(before, seen)


def test_masked_loss():
    target = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]]])
    points = torch.tensor([[[True, False, True], [False, False, False]]])
    prediction = torch.zeros_like(target)
    assert masked_loss(prediction, target, points) == 5
    assert masked_loss(prediction, target, points, 'mae') == 2
    assert masked_loss(prediction, target, points, normalise=True) == pytest.approx(1, abs=1e-5)
    assert masked_loss(prediction, target, points & False).isnan()


# --- what the networks do --------------------------------------------------------------------


def test_position_table():
    table = position_table(27, 64)[0]
    assert not table[0].any()
    token = table[1 + 5 * 27 + 3]  # row 5, column 3
    assert token[0] == pytest.approx(np.sin(3))
    assert token[16] == pytest.approx(np.cos(3))
    assert token[32] == pytest.approx(np.sin(5))
    assert token[33] == pytest.approx(np.sin(5 * 10000 ** (-1 / 16)))


@torch.inference_mode()
def test_vit_does_not_mind_the_order_of_tokens():
    network, signal = network_of('vit16'), torch.from_numpy(windows_of(1))
    order = torch.randperm(729, generator=torch.Generator().manual_seed(0))[None]
    plain, attention = network.encode(signal, return_attention=True)
    shuffled, row = network.encode(signal, order, return_attention=True)
    assert torch.allclose(plain[:, 0], shuffled[:, 0], atol=1e-5)
    assert torch.allclose(plain[:, 1:][:, order[0]], shuffled[:, 1:], atol=1e-5)
    assert torch.allclose(attention[:, 1:][:, order[0]], row[:, 1:], atol=1e-6)
    restored = network.decode(shuffled, order)
    assert torch.allclose(network.decode(plain), restored, atol=1e-5)


@torch.inference_mode()
def test_legacy_minds_the_order_of_tokens(xyz):
    network, signal = placed('legacy', xyz), torch.from_numpy(windows_of(1))
    plain, _ = network.encode(signal)
    identity, _ = network.encode(signal, torch.arange(4240)[None])
    shuffle = torch.randperm(4240, generator=torch.Generator().manual_seed(0))[None]
    shuffled, _ = network.encode(signal, shuffle)
    assert torch.equal(plain, identity)
    assert (plain[:, 0] - shuffled[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize('name', SMALL)
def test_gradients_reach_every_used_weight(name, xyz):
    network = placed(name, xyz)
    keep = keep_lowest(torch.rand(1, network.tokens), 0.5)
    network.reconstruct(torch.from_numpy(windows_of(1)), keep).square().mean().backward()
    idle = {n for n, p in network.named_parameters() if p.requires_grad and p.grad is None}
    unused = {'decoder.decoder_pred.weight', 'decoder.decoder_pred.bias'}
    assert idle == (unused if name == 'legacy' else set())


# --- weights ---------------------------------------------------------------------------------


def save(folder, name, pickled=False, change=None):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(SMALL[name]))
    state = {key: tensor.clone() for key, tensor in network_of(name).state_dict().items()}
    if change:
        change(state)
    if pickled:
        torch.save(state, folder / 'pytorch_model.bin')
    else:
        save_file(state, folder / 'model.safetensors')
    return folder


def load(folder):
    network = weights.build(weights.read_config(folder))
    weights.load_checkpoint(network, folder)
    return network


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('pickled', [False, True])
def test_round_trip(tmp_path, name, pickled):
    network = load(save(tmp_path, name, pickled))
    for key, tensor in network_of(name).state_dict().items():
        assert torch.equal(network.state_dict()[key], tensor)
    assert not network.training


def test_initialisation_is_the_official_one_and_repeats():
    one, other = network_of('legacy').state_dict(), network_of('legacy', seed=1).state_dict()
    again = network_of('legacy').state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)
    dense = 'vit.encoder.layer.0.intermediate.dense'
    assert not torch.equal(one[f'{dense}.weight'], other[f'{dense}.weight'])
    bound = (6 / (32 + 64)) ** 0.5
    assert 0.95 * bound < one[f'{dense}.weight'].abs().max() <= bound
    assert not one[f'{dense}.bias'].any()
    assert (one['vit.layernorm.weight'] == 1).all()
    assert 0.005 < one['vit.embeddings.cls_token'].std() < 0.04
    digest = hashlib.sha256(one[f'{dense}.weight'].numpy().tobytes()).hexdigest()
    assert digest.startswith('68f3819bb2eaa11b')


def drop(state):
    del state['vit.layernorm.bias'], state['vit.layernorm.weight']


def add(state):
    state['pooler.weight'] = torch.zeros(2)


def reshape(state):
    state['vit.layernorm.bias'] = torch.zeros(33)


@pytest.mark.parametrize('pickled', [False, True])
@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (drop, r'lacks 2 tensors \(vit\.layernorm\.weight, vit\.layernorm\.bias\)'),
        (add, r'has unexpected 1 tensor \(pooler\.weight\)'),
        (reshape, r'vit\.layernorm\.bias is 33 where 32 is expected'),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, change, sentence, pickled):
    folder = save(tmp_path, 'vit16', pickled, change)
    file = 'pytorch_model.bin' if pickled else 'model.safetensors'
    with pytest.raises(BrainfmError, match=f'{file} .*{sentence}'):
        load(folder)


@pytest.mark.parametrize(
    ('config', 'held', 'sentence'),
    [
        ('vit16', 'legacy', 'holds a legacy 13M BrainLM .* says vit_mae'),
        ('legacy', 'vit16', 'holds a ViT-MAE BrainLM .* says brainlm_mae'),
    ],
)
def test_checkpoint_of_another_family(tmp_path, config, held, sentence):
    folder = save(tmp_path, held)
    (folder / 'config.json').write_text(json.dumps(SMALL[config]))
    with pytest.raises(BrainfmError, match=sentence):
        load(folder)


def test_brain_jepa_checkpoint_is_named(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(SMALL['vit16']))
    norm = {'module.norm.weight': torch.ones(2)}
    parts = {'encoder': norm, 'predictor': {}, 'target_encoder': norm, 'epoch': 300}
    torch.save(parts, tmp_path / 'pytorch_model.bin')
    with pytest.raises(BrainfmError, match=r'holds a Brain-JEPA \(brain_jepa\) checkpoint'):
        load(tmp_path)


@pytest.mark.parametrize('pickled', [False, True])
@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, pickled, share):
    folder = save(tmp_path, 'vit16', pickled)
    path = files.weights_file(folder)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(BrainfmError, match=f'{path.name} .*truncated or damaged'):
        load(folder)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('protocol', [None, 2, 4], ids=['torch', 'pickle2', 'pickle4'])
def test_malicious_pickle_does_not_run(tmp_path, protocol):
    trap = tmp_path / 'ran'

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    (tmp_path / 'config.json').write_text(json.dumps(SMALL['vit16']))
    path = tmp_path / 'pytorch_model.bin'
    if protocol is None:
        torch.save({'vit.layernorm.bias': Trap()}, path)
    else:
        path.write_bytes(pickle.dumps({'vit.layernorm.bias': Trap()}, protocol))
    with pytest.raises(BrainfmError, match=r'pytorch_model\.bin is refused: .* may run code'):
        load(tmp_path)
    assert not trap.exists()


def test_folder_without_weights(tmp_path):
    with pytest.raises(BrainfmError, match=r'config\.json cannot be read'):
        weights.read_config(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(BrainfmError, match='not valid JSON'):
        weights.read_config(tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(BrainfmError, match='no model_type'):
        weights.read_config(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(SMALL['vit16']))
    with pytest.raises(BrainfmError, match=r'holds no weights: neither model\.safetensors'):
        load(tmp_path)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'model_type': 'bert'}, "model_type 'bert', which is not known"),
        ({'hidden_act': 'relu'}, "hidden_act 'relu'"),
        ({'patch_size': 15}, 'does not fit'),
        ({'num_attention_heads': 5}, 'does not divide'),
        ({'hidden_size': None}, "lacks 'hidden_size'"),
    ],
)
def test_configuration_that_cannot_be_built(change, sentence):
    config = {k: v for k, v in (SMALL['vit16'] | change).items() if v is not None}
    with pytest.raises(BrainfmError, match=sentence):
        weights.build(config)


# --- encoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SMALL)
def test_encoding(name, xyz):
    encoding = encoder_of(name, xyz).encode(windows_of(3), tokens=True)
    n_tokens = {'vit16': 729, 'vit14': 961, 'legacy': 4240}[name]
    assert encoding.summary.shape == (3, 32)
    assert encoding.tokens.shape == (3, n_tokens, 32)
    if name == 'legacy':
        by_parcel = encoding.tokens.reshape(3, 424, 10, 32).mean(2)
        assert np.allclose(encoding.parcels, by_parcel, atol=1e-6)
        assert encoding.attention.shape == (3, 424)
        assert np.allclose(encoding.attention.mean(1), 1, atol=1e-5)
    else:
        assert encoding.parcels is None
        assert encoding.attention is None
    assert encoder_of(name, xyz).encode(windows_of(1)).attention is None
    for values in vars(encoding).values():
        assert values is None or values.dtype == np.float32


@pytest.mark.parametrize('name', SMALL)
def test_same_to_the_last_bit(name, xyz):
    encoder, windows = encoder_of(name, xyz), windows_of(3)
    together = encoder.encode(windows, tokens=True)
    again = encoder_of(name, xyz).encode(windows, tokens=True)
    alone = encoder.encode(windows[1:2])
    assert np.array_equal(together.summary, again.summary)
    assert np.array_equal(together.tokens, again.tokens)
    assert np.array_equal(together.summary[1:2], alone.summary)


def test_order_moves_rows_of_the_input(xyz):
    """An encoder with an order gives what one without gives on rows in that order."""
    order, windows = ascending_y(xyz), windows_of(1)
    sorted_rows = windows[:, order]
    for name in ('vit16', 'legacy'):
        ordered = Encoder(placed(name, xyz, order), order).encode(windows, tokens=True)
        plain = Encoder(placed(name, xyz[order])).encode(sorted_rows, tokens=True)
        assert np.array_equal(ordered.summary, plain.summary)
    # and what belongs to a parcel comes back in atlas order
    assert np.array_equal(ordered.parcels[:, order], plain.parcels)
    assert np.array_equal(ordered.attention[:, order], plain.attention)
    tokens = ordered.tokens.reshape(1, 424, 10, 32)[:, order]
    assert np.array_equal(tokens, plain.tokens.reshape(1, 424, 10, 32))


@pytest.mark.parametrize(('name', 'bound'), [('vit16', 0.02), ('vit14', 0.02), ('legacy', 0.05)])
def test_bfloat16_is_near(name, bound, xyz):
    windows = windows_of(2)
    exact = encoder_of(name, xyz).encode(windows, tokens=True)
    coarse = encoder_of(name, xyz, 'bfloat16').encode(windows, tokens=True)
    for field in ('summary', 'tokens'):
        a, b = getattr(exact, field), getattr(coarse, field)
        assert b.dtype == np.float32
        assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < bound


def test_encoder_refuses_what_does_not_fit(xyz):
    with pytest.raises(BrainfmError, match=r'424 parcels × 200 time points, .* have shape'):
        encoder_of('vit16', xyz).encode(windows_of(1)[:, :100])
    with pytest.raises(BrainfmError, match='needs the coordinates of its 424 parcels'):
        Encoder(network_of('legacy')).encode(windows_of(1))
    with pytest.raises(BrainfmError, match=r'coordinates of its 424 parcels .* got \(423, 3\)'):
        placed('legacy', xyz[1:])
    with pytest.raises(BrainfmError, match='the model has no weights yet'):
        Encoder(weights.build(SMALL['vit16']))
    with pytest.raises(BrainfmError, match='not a permutation of 424'):
        Encoder(network_of('vit16'), np.zeros(424, int))


@pytest.mark.parametrize(
    ('name', 'batch_size'), [('vit16', 1), ('vit16', 4), ('vit16', 100), ('legacy', 3)]
)
def test_encode_runs_batches_across_runs(xyz, name, batch_size):
    encoder = encoder_of(name, xyz)
    runs = {'a': windows_of(2, 0), 'b': windows_of(5, 1), 'c': windows_of(1, 2)}
    sizes, progress = [], []
    encode = encoder.encode

    def counted(windows, *asked):
        sizes.append(len(windows))
        return encode(windows, *asked)

    encoder.encode = counted
    found = dict(encode_runs(encoder, runs.items(), batch_size, progress=progress.append))
    assert list(found) == list(runs)
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert progress == list(np.cumsum(sizes))
    for key, windows in runs.items():
        alone = encode(windows)
        assert len(found[key]) == len(windows)
        for field, values in vars(alone).items():
            assert np.array_equal(getattr(found[key], field), values)


def test_encode_runs_yields_a_run_before_it_takes_all(xyz):
    taken = []

    def runs():
        for key in 'abcd':
            taken.append(key)
            yield key, windows_of(2)

    encoded = encode_runs(encoder_of('vit16', xyz), runs(), batch_size=3)
    assert next(encoded)[0] == 'a'
    assert taken == ['a', 'b']


def test_encode_runs_names_the_run_that_does_not_fit(xyz):
    with pytest.raises(BrainfmError, match='the windows of sub-01 have shape'):
        list(encode_runs(encoder_of('vit16', xyz), [('sub-01', windows_of(1)[:, :3])], 2))


def test_ascending_y_order_of_a424():
    table = SHARED / 'specs' / 'a424_parcels.csv'
    if not table.exists():
        pytest.skip('the A424 coordinates are not beside the repository')
    with table.open() as file:
        xyz = np.array([[row['x_mm'], row['y_mm'], row['z_mm']] for row in csv.DictReader(file)])
    xyz = xyz.astype(float)
    order = ascending_y(xyz)
    digest = hashlib.sha256(','.join(map(str, order)).encode()).hexdigest()
    assert digest == '71938922d770ec36bceb8ff3c86e9c961c1d3e91ed0c6318edb8cd5bd6544dd6'
    assert len(set(xyz[:, 1])) == 77


def test_precision_is_what_the_device_has(monkeypatch):
    """TF32 on a GPU of the Ampere generation or later; float32 elsewhere, unless asked for."""
    cpu, gpu = torch.device('cpu'), torch.device('cuda')
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    for capability, default in (((9, 0), 'tf32'), ((8, 0), 'tf32'), ((7, 5), 'float32')):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _, c=capability: c)
        assert resolve_precision(None, gpu) == default
        assert resolve_precision('bfloat16', gpu) == 'bfloat16'
        assert resolve_precision('float32', gpu) == 'float32'
    with pytest.raises(BrainfmError, match='tf32 needs an NVIDIA GPU of the Ampere generation'):
        resolve_precision('tf32', gpu)
    assert resolve_precision(None, cpu) == 'float32'
    assert resolve_precision('bfloat16', cpu) == 'bfloat16'
    with pytest.raises(BrainfmError, match='runs on cpu without it: choose float32'):
        resolve_precision('tf32', cpu)
    with pytest.raises(BrainfmError, match='float16'):
        resolve_precision('float16', cpu)


def allowed():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('before', [True, False])
def test_only_tf32_is_tf32(xyz, monkeypatch, precision, before):
    """Convolutions, for which PyTorch takes TF32 by itself, are in float32 unless asked."""
    encoder, seen = encoder_of('vit16', xyz, precision), []

    def watch(function):
        def watched(*args, **more):
            seen.append(allowed())
            return function(*args, **more)

        return watched

    for name in ('encode', 'decode'):
        monkeypatch.setattr(encoder.network, name, watch(getattr(encoder.network, name)))
    with products_in('tf32' if before else 'float32'):
        encoder.encode(windows_of(1))
        encoder.reconstruct(windows_of(1), torch.arange(0, encoder.network.tokens, 2))
        assert allowed() == (before, before)
    assert seen == [(precision == 'tf32',) * 2] * 3


def test_precision_is_checked_against_float32(xyz):
    """The error of each dimension in SD over the windows so far, by its definition."""
    coarse, exact = encoder_of('vit16', xyz, 'bfloat16'), encoder_of('vit16', xyz)
    runs = [(key, windows_of(2, seed)) for seed, key in enumerate('abc')]
    asked = []
    check = PrecisionCheck('bfloat16', lambda: asked.append(1) or exact)
    every = np.concatenate([windows for _, windows in runs])
    given, wanted = (e.encode(every).summary.astype(float) for e in (coarse, exact))
    for count, _ in zip((4, 4, 6), encode_runs(coarse, runs, 4, check=check), strict=True):
        found = check.found()
        error = np.sqrt(((given - wanted)[:4] ** 2).mean(0)) / given[:count].std(0, ddof=1)
        assert found['RelativeError'] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-6)
        assert found['LargestOfDimensions'] == pytest.approx(error.max(), rel=1e-6)
        assert (found['WindowsCompared'], found['WindowsEncoded']) == (4, count)
    assert len(asked) == 4  # the windows of the first batch, and no other
    assert found['RelativeError'] > 0.05
    assert f'off by {found["RelativeError"]:.1%}' in found['Warning']


def test_precision_that_cannot_be_checked(xyz):
    """One window has no SD; neither have windows that are all the same."""
    exact = encoder_of('vit16', xyz)
    check = PrecisionCheck('tf32', lambda: exact)
    for _ in range(3):
        check.add(windows_of(1), exact.encode(windows_of(1)).summary)
        found = check.found()
        assert found['RelativeError'] is found['LargestOfDimensions'] is found['Warning'] is None
    summary = exact.encode(windows_of(1, 1)).summary
    check.add(windows_of(1, 1), summary)
    assert check.found()['RelativeError'] == 0
    assert check.found()['Warning'] is None


def test_devices():
    cpu = resolve_device('cpu')
    assert cpu.type == 'cpu'
    assert resolve_device('auto').type in ('cpu', 'cuda')
    with pytest.raises(BrainfmError, match='tpu'):
        resolve_device('tpu')
    if not torch.cuda.is_available():
        with pytest.raises(BrainfmError, match='PyTorch finds none'):
            resolve_device('cuda')
