"""Brain-JEPA: its sizes and codes, its checkpoints, its latent prediction, its way in Encoder."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import brain_jepa, files, weights
from bids_brainfm.models.brain_jepa import time_table
from bids_brainfm.models.encoder import Encoder, encode_runs
from bids_brainfm.models.masking import BLOCKS, spatiotemporal_block, token_error
from bids_brainfm.outputs import registry

PARCELS, TIMES, PATCH, COLUMNS = 9, 24, 4, 5
PATCHES = TIMES // PATCH
TOKENS = PARCELS * PATCHES
SMALL = {
    'model_type': 'brain_jepa',
    'crop_size': [PARCELS, TIMES],
    'patch_size': PATCH,
    'embed_dim': 24,
    'depth': 3,
    'num_heads': 3,
    'predictor_embed_dim': 16,
    'predictor_depth': 2,
    'predictor_num_heads': 4,
    'add_w': 'mapping',
    'gradients': COLUMNS,
}
OFFICIAL = SMALL | {'crop_size': [450, 160], 'patch_size': 16, 'gradients': 30}
BRAINLM = {
    'model_type': 'vit_mae',
    'num_brain_voxels': 9,
    'num_timepoints_per_voxel': 24,
    'image_size': 24,
    'patch_size': 4,
    'num_channels': 3,
    'hidden_size': 8,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'intermediate_size': 16,
    'decoder_hidden_size': 8,
    'decoder_num_hidden_layers': 1,
    'decoder_num_attention_heads': 2,
    'decoder_intermediate_size': 16,
    'layer_norm_eps': 1e-12,
}


def table_of(seed=0):
    return np.random.default_rng(seed).standard_normal((PARCELS, COLUMNS)).astype(np.float32)


def network_of(seed=0, spread=0.2):
    """A network whose parts all differ, with weights far from linear behaviour."""
    network = weights.initialise(weights.build(SMALL), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if not name.endswith('emb_h'):
            parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    network.set_positions(table_of())
    return network


def windows_of(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, PARCELS, TIMES), dtype=np.float32)


def signal_of(n, seed=0):
    return torch.from_numpy(windows_of(n, seed))


def some_tokens(n, seed=0):
    """Disjoint context and target of another choice for each window."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(n)])
    return order[:, :20].sort(1)[0], order[:, 20:37]


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('wide', 'narrow', 'encoder', 'trainable', 'predictor', 'tensors'),
    [
        ((384, 12, 6), (192, 6, 6), 22_170_816, 21_306_816, 3_252_768, (151, 82)),
        ((768, 12, 12), (384, 6, 12), 86_808_960, 85_080_960, 12_108_864, (151, 82)),
        ((1024, 24, 16), (384, 12, 16), 304_648_704, 302_344_704, 22_952_512, (295, 154)),
    ],
    ids=['S', 'B', 'L'],
)
def test_official_sizes(wide, narrow, encoder, trainable, predictor, tensors):
    names = ('embed_dim', 'depth', 'num_heads')
    sizes = dict(zip(names, wide, strict=True))
    sizes |= {f'predictor_{name}': size for name, size in zip(names, narrow, strict=True)}
    network = weights.build(OFFICIAL | sizes)

    def count(module, only_trained=False):
        parameters = module.parameters()
        return sum(p.numel() for p in parameters if p.requires_grad or not only_trained)

    assert count(network.encoder) == count(network.target_encoder) == encoder
    assert count(network.encoder, only_trained=True) == trainable
    assert count(network.target_encoder, only_trained=True) == 0
    assert count(network.predictor) == predictor
    assert len(network.encoder.state_dict()) == tensors[0]
    assert len(network.predictor.state_dict()) == tensors[1]
    assert len(network.state_dict()) == 2 * tensors[0] + tensors[1]
    if wide[0] == 768:
        assert len(network.state_dict()) == 384


def test_official_names():
    state = weights.build(OFFICIAL | {'embed_dim': 768, 'num_heads': 12}).state_dict()
    shapes = {
        'encoder.patch_embed.proj.weight': (768, 1, 1, 16),
        'encoder.pos_embed_proj.emb_h': (4500, 384),
        'encoder.pos_embed_proj.predictor_pos_embed_proj.weight': (384, 30),
        'target_encoder.blocks.0.attn.qkv.weight': (2304, 768),
        'target_encoder.blocks.2.mlp.fc2.bias': (768,),
        'predictor.mask_token': (1, 1, 16),
        'predictor.predictor_2dpe_proj.emb_h': (4500, 8),
        'predictor.predictor_blocks.1.attn.proj.weight': (16, 16),
        'predictor.predictor_proj.weight': (768, 16),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'add_w': 'origin'}, "add_w 'origin'; only mapping"),
        ({'patch_size': 5}, '24 time points in patches of 5, which does not divide'),
        ({'num_heads': 5}, 'width of 24 in 5 attention heads'),
        ({'embed_dim': 18}, 'width of 18 in 3 attention heads and 4 parts'),
        ({'predictor_num_heads': 3}, 'correct predictor_embed_dim or predictor_num_heads'),
        ({'predictor_depth': 0}, 'predictor_depth 0, which is not above 0'),
        ({'crop_size': [0, 24]}, 'crop_size 0, which is not above 0'),
        ({'depth': None}, "lacks 'depth'"),
    ],
)
def test_configuration_that_cannot_be_built(change, sentence):
    config = {name: value for name, value in (SMALL | change).items() if value is not None}
    with pytest.raises(BrainfmError, match=sentence):
        weights.build(config)


# --- tokens and their places -----------------------------------------------------------------


@pytest.mark.parametrize('kind', ['parcel', 'patch'])
@torch.inference_mode()
def test_order_of_tokens(kind):
    """A token depends on its own parcel and time patch: conformance 1."""
    network = network_of()
    parcel, time = torch.meshgrid(torch.arange(PARCELS), torch.arange(TIMES), indexing='ij')
    signal = (parcel if kind == 'parcel' else time // PATCH)[None].float()
    positions = network.encoder.pos_embed_proj(network.positions)
    content = network.encoder.embed(signal, network.positions)[0] - positions
    grid = content.unflatten(0, (PARCELS, PATCHES))
    alike, apart = (1, 0) if kind == 'parcel' else (0, 1)
    assert grid.diff(dim=alike).abs().max() < 1e-5
    assert (grid.diff(dim=apart).abs().amax(-1) > 1e-2).all()


def test_time_half():
    """Conformance 2."""
    table = time_table(450, 10, 384)
    assert table.shape == (4500, 384)
    assert table[1, :3].tolist() == pytest.approx([0.8415, 0.8153, 0.7886], abs=5e-5)
    assert not table[0, :192].any()
    assert (table[0, 192:] == 1).all()
    assert torch.equal(table[:10], table[4490:])


@pytest.mark.parametrize('seed', range(3))
def test_parcel_half_is_stretched_over_all_parcels(seed):
    """Conformance 3."""
    network = network_of(seed, spread=seed + 1)
    code = network.target_encoder.pos_embed_proj(network.positions)
    time, place = code.view(PARCELS, PATCHES, 2, -1).unbind(2)
    assert (time == time[:1]).all()
    assert (place == place[:, :1]).all()
    assert (place.min(), place.max()) == (-1, 1)
    drawn = network.target_encoder.pos_embed_proj.predictor_pos_embed_proj(network.positions)
    low, high = drawn.min(), drawn.max()  # of all channels together
    assert torch.allclose(place[:, 0], (2 * drawn - low - high) / (high - low), atol=1e-5)
    far = table_of()
    far[0] *= 10  # the extremes are this parcel's then, and all others move
    network.set_positions(far)
    moved = network.target_encoder.pos_embed_proj(network.positions)
    moved = moved.view(PARCELS, PATCHES, 2, -1)[:, :, 1]
    assert ((moved - place).abs().amax((1, 2)) > 0.05).all()


def test_gradients_are_needed_and_checked():
    network, tokens = weights.initialise(weights.build(SMALL), 0), torch.arange(3)
    uses = [
        lambda: network.encode(signal_of(1)),
        lambda: network.context(signal_of(1), tokens),
        lambda: network.predict(torch.zeros(1, 3, 24), tokens, tokens),
        lambda: Encoder(network).encode(windows_of(1)),
    ]
    for use in uses:
        with pytest.raises(BrainfmError, match='has no table of brain gradients'):
            use()
    with pytest.raises(BrainfmError, match=r'gradients is 9×4, .* takes 9 parcels × 5 gradients'):
        network.set_positions(table_of()[:, :4])
    wrong = table_of()
    wrong[2, 1] = np.nan
    for table in (wrong, np.zeros((PARCELS, COLUMNS))):
        with pytest.raises(BrainfmError, match='NaN or infinite values, or the same'):
            network.set_positions(table)
    network.set_positions(table_of())
    assert 'positions' not in network.state_dict()
    assert network.encode(signal_of(1))[0].isfinite().all()


# --- what the networks do --------------------------------------------------------------------


def layers_of_pytorch(blocks, x):
    """The same layers by PyTorch's own module."""
    for block in blocks:
        width = x.shape[-1]
        layer = nn.TransformerEncoderLayer(
            width, block.attn.heads, 4 * width, 0, 'gelu', 1e-6, batch_first=True, norm_first=True
        )
        state = block.state_dict()
        ours = {
            'self_attn.in_proj_': 'attn.qkv.',
            'self_attn.out_proj.': 'attn.proj.',
            'linear1.': 'mlp.fc1.',
            'linear2.': 'mlp.fc2.',
            'norm1.': 'norm1.',
            'norm2.': 'norm2.',
        }
        layer.load_state_dict(
            {a + kind: state[b + kind] for a, b in ours.items() for kind in ('weight', 'bias')}
        )
        x = layer(x)
    return x


def tokens_of_pytorch(encoder, signal, gradients):
    proj, position = encoder.patch_embed.proj, encoder.pos_embed_proj
    x = F.conv2d(signal[:, None], proj.weight, proj.bias, stride=(1, PATCH)).flatten(2).mT
    return x + position(gradients)


@torch.no_grad()
def test_networks_are_those_of_pytorch():
    network, signal = network_of(), signal_of(2)
    context_idx, target_idx = some_tokens(2)
    rows = torch.arange(2)[:, None]

    target_encoder = network.target_encoder
    x = tokens_of_pytorch(target_encoder, signal, network.positions)
    hidden = target_encoder.norm(layers_of_pytorch(target_encoder.blocks, x))
    assert torch.allclose(network.encode(signal)[0], hidden, atol=1e-4)

    encoder = network.encoder
    x = tokens_of_pytorch(encoder, signal, network.positions)[rows, context_idx]
    context = encoder.norm(layers_of_pytorch(encoder.blocks, x))
    assert torch.allclose(network.context(signal, context_idx), context, atol=1e-4)

    predictor = network.predictor
    position = predictor.predictor_2dpe_proj(network.positions)
    seen = predictor.predictor_embed(context) + position[context_idx]
    x = torch.cat([seen, predictor.mask_token + position[target_idx]], 1)
    x = predictor.predictor_norm(layers_of_pytorch(predictor.predictor_blocks, x))
    prediction = predictor.predictor_proj(x)[:, context_idx.shape[1] :]
    found = network.predict(context, context_idx, target_idx)
    assert torch.allclose(found, prediction, atol=1e-4)

    target = network.targets(hidden, target_idx)
    assert torch.allclose(target.mean(-1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(target.var(-1, correction=0), torch.ones(()), atol=1e-3)
    centred = hidden - hidden.mean(-1, keepdim=True)
    scaled = centred / (hidden.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert torch.allclose(target, scaled[rows, target_idx], atol=1e-5)


@torch.no_grad()
def test_attention_received(monkeypatch):
    monkeypatch.setattr(brain_jepa, 'QUERIES', 5)  # so that blocks of queries are uneven
    network, signal = network_of(), signal_of(2)
    received = network.encode(signal, return_attention=True)[1]
    *blocks, last = network.target_encoder.blocks
    x = network.target_encoder.embed(signal, network.positions)
    query, key, _ = last.attn.split(last.attn.qkv(last.norm1(layers_of_pytorch(blocks, x))))
    attention = (query @ key.mT / 8**0.5).softmax(-1)
    assert torch.allclose(received, attention.mean((1, 2)), atol=1e-6)
    assert torch.allclose(received.sum(1), torch.ones(2))
    assert received.std() > 0.1 / TOKENS  # weights were not all alike


@torch.no_grad()
def test_only_the_context_is_seen():
    network, signal = network_of(), signal_of(1)
    context_idx, target_idx = spatiotemporal_block('double-cross', PARCELS, PATCHES)
    seen = torch.zeros(TOKENS, dtype=torch.bool)
    seen[context_idx] = True
    points = seen.view(PARCELS, PATCHES).repeat_interleave(PATCH, 1)
    before = network.context(signal, context_idx)
    assert torch.equal(before, network.context(signal.masked_fill(~points, 7), context_idx))
    assert not torch.allclose(before, network.context(signal + points * 0.1, context_idx))
    prediction = network.predict(before, context_idx, target_idx)
    turned = network.predict(before, context_idx, target_idx.flip(0))
    assert torch.allclose(prediction.flip(1), turned, atol=1e-5)


@torch.no_grad()
def test_latent_error():
    network, signal = network_of(), signal_of(2)
    context_idx, target_idx = some_tokens(2)
    hidden = network.encode(signal)[0]
    error, baseline = network.latent_error(signal, hidden, context_idx, target_idx)
    assert error.shape == baseline.shape == (2, TOKENS)
    prediction = network.predict(network.context(signal, context_idx), context_idx, target_idx)
    latents = F.layer_norm(hidden, (24,))
    for window in range(2):
        targets = target_idx[window].tolist()
        for values in (error, baseline):
            there = values[window].isfinite().nonzero().flatten().tolist()
            assert there == sorted(targets)
        guess = latents[window, context_idx[window]].mean(0)
        for i, token in enumerate(targets):
            for values, made in ((error, prediction[window, i]), (baseline, guess)):
                off = (made - latents[window, token]).abs()
                by_hand = torch.where(off < 1, off**2 / 2, off - 0.5).mean()
                assert values[window, token] == pytest.approx(by_hand.item(), rel=1e-4)
    target = network.targets(hidden, target_idx)
    assert token_error(prediction, target).mean() == pytest.approx(error.nanmean().item())
    # indices for all windows alike
    one, base = network.latent_error(signal, hidden, context_idx[0], target_idx[0])
    assert torch.allclose(one[0], error[0], equal_nan=True, atol=1e-5)
    assert torch.allclose(base[0], baseline[0], equal_nan=True, atol=1e-5)


def test_what_is_trained():
    network, signal = network_of(), signal_of(1)
    context_idx, target_idx = some_tokens(1)
    network.latent_error(signal, network.encode(signal)[0], context_idx, target_idx)[0][
        0, target_idx[0]
    ].mean().backward()
    idle = {name for name, p in network.named_parameters() if p.grad is None}
    assert all(name.startswith('target_encoder.') or name.endswith('emb_h') for name in idle)
    assert 'target_encoder.blocks.0.attn.qkv.weight' in idle


# --- blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'n_context', 'n_target'),
    [('cross-time', 3150, 1350), ('cross-roi', 2250, 2250), ('double-cross', 1575, 675)],
)
def test_blocks(name, n_context, n_target):
    context, target = spatiotemporal_block(name, 450, 10)
    assert (len(context), len(target)) == (n_context, n_target)
    assert context.dtype == target.dtype == torch.int64
    for part in (context, target):
        assert (part.diff() > 0).all()
    assert not set(context.tolist()) & set(target.tolist())
    if name != 'cross-roi':
        assert set((context % 10).tolist()) == set(range(7))
        assert set((target % 10).tolist()) == {7, 8, 9}
    if name != 'cross-time':
        assert set((context // 10).tolist()) == set(range(0, 450, 2))
        assert set((target // 10).tolist()) == set(range(1, 450, 2))


def test_blocks_of_small_windows():
    assert spatiotemporal_block('cross-time', 1, 2)[1].tolist() == [1]  # at least one
    assert spatiotemporal_block('cross-time', 1, 19)[1].tolist() == [14, 15, 16, 17, 18]
    for parcels, patches, name in [(5, 1, 'cross-time'), (1, 5, 'cross-roi')]:
        with pytest.raises(BrainfmError, match='too small for the block'):
            spatiotemporal_block(name, parcels, patches)
    with pytest.raises(BrainfmError, match="'cross' is not known; choose cross-time, cross-roi"):
        spatiotemporal_block('cross', 4, 4)


def test_blocks_are_those_on_offer():
    assert registry.BLOCKS == BLOCKS


# --- weights ---------------------------------------------------------------------------------


def official(state, prefix='module.'):
    """A checkpoint of the official training: three networks and what else is kept."""
    parts = ('encoder', 'predictor', 'target_encoder')
    nested = {
        part: {
            prefix + name.removeprefix(f'{part}.'): tensor
            for name, tensor in state.items()
            if name.startswith(f'{part}.')
        }
        for part in parts
    }
    training = {'opt': {'state': {}, 'param_groups': [{'lr': 1e-3}]}, 'scaler': None}
    numbers = {'epoch': 299, 'loss': 0.1, 'batch_size': 16, 'world_size': 4, 'lr': 1e-3}
    return nested | training | numbers


def put(folder, state, kind='official'):
    """Save a state dict in one of the forms that are read."""
    folder.mkdir(exist_ok=True)
    if kind.startswith('official'):
        prefix = '' if kind.endswith('plain') else 'module.'
        path = folder / 'jepa-ep300.pth.tar'
        torch.save(official(state, prefix), path)
        (folder / 'architecture.json').write_text(json.dumps(architecture()))
        return path
    (folder / 'config.json').write_text(json.dumps(SMALL))
    if kind == 'module':
        state = {name.replace('.', '.module.', 1): x for name, x in state.items()}
    path = folder / ('pytorch_model.bin' if kind == 'bin' else 'model.safetensors')
    (torch.save if kind == 'bin' else save_file)(state, path)
    return path


def architecture():
    return {name: value for name, value in SMALL.items() if name != 'model_type'}


def state_of(seed=0):
    return {name: x.clone() for name, x in network_of(seed).state_dict().items()}


def load(folder, file=None):
    network = weights.build(weights.read_config(folder))
    weights.load_checkpoint(network, file or folder)
    return network


@pytest.mark.parametrize('kind', ['official', 'official plain', 'module', 'flat', 'bin'])
@pytest.mark.parametrize('by_file', [False, True])
def test_checkpoints(tmp_path, kind, by_file):
    path = put(tmp_path, state_of(), kind)
    network = load(tmp_path, path if by_file else None)
    found, expected = network.state_dict(), state_of()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not network.training


def drop(state):
    del state['target_encoder.norm.bias'], state['predictor.mask_token']


def add(state):
    state['encoder.head.weight'] = torch.zeros(2)


def reshape(state):
    state['predictor.mask_token'] = torch.zeros(1, 1, 20)


@pytest.mark.parametrize('kind', ['official', 'flat'])
@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (drop, r'lacks 2 tensors \(predictor\.mask_token, target_encoder\.norm\.bias\)'),
        (add, r'has unexpected 1 tensor \(encoder\.head\.weight\)'),
        (reshape, r'predictor\.mask_token is 1×1×20 where 1×1×16 is expected'),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, kind, change, sentence):
    state = state_of()
    change(state)
    path = put(tmp_path, state, kind)
    with pytest.raises(BrainfmError, match=f'{path.name} .*{sentence}'):
        load(tmp_path)


def test_checkpoint_with_something_beside(tmp_path):
    path = put(tmp_path, state_of())
    torch.save(official(state_of()) | {'ema': {'norm': torch.ones(2)}}, path)
    with pytest.raises(BrainfmError, match=r'has unexpected 1 tensor \(ema\)'):
        load(tmp_path)


@pytest.mark.parametrize('kind', ['official', 'module', 'flat'])
def test_checkpoint_of_another_family(tmp_path, kind):
    path = put(tmp_path, state_of(), kind)
    with pytest.raises(BrainfmError, match=r'holds a Brain-JEPA \(brain_jepa\) .* says vit_mae'):
        weights.load_checkpoint(weights.build(BRAINLM), path)
    brainlm = weights.initialise(weights.build(BRAINLM), 0)
    save_file(brainlm.state_dict(), tmp_path / 'other.safetensors')
    with pytest.raises(BrainfmError, match=r'holds a ViT-MAE BrainLM .* says brain_jepa'):
        load(tmp_path, tmp_path / 'other.safetensors')


def test_which_file_holds_the_weights(tmp_path):
    for name in ('jepa-ep290.pth.tar', 'jepa-ep300.pth.tar'):
        (tmp_path / name).touch()
    with pytest.raises(BrainfmError, match=r'2 checkpoints \(jepa-ep290.*\); give the one file'):
        files.weights_file(tmp_path)
    (tmp_path / 'model.safetensors').touch()
    assert files.weights_file(tmp_path).name == 'model.safetensors'


def test_truncated_checkpoint(tmp_path):
    path = put(tmp_path, state_of())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BrainfmError, match='truncated or damaged'):
        load(tmp_path)


def test_configuration_is_found(tmp_path):
    assert weights.read_config(tmp_path, default=SMALL) == SMALL
    (tmp_path / 'architecture.json').write_text(json.dumps(architecture()))
    assert weights.read_config(tmp_path, default={}) == SMALL
    (tmp_path / 'config.json').write_text(json.dumps(BRAINLM))
    assert weights.read_config(tmp_path, default=SMALL) == BRAINLM


def test_initialisation_is_the_official_one_and_repeats():
    one, again, other = (
        weights.initialise(weights.build(SMALL | {'embed_dim': 96}), seed).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    weight = 'encoder.blocks.2.mlp.fc2.weight'
    assert not torch.equal(one[weight], other[weight])
    for name, tensor in one.items():
        if name.endswith('emb_h'):
            assert torch.equal(tensor, time_table(PARCELS, PATCHES, tensor.shape[1]))
        elif name.endswith('bias'):
            assert not tensor.any()
        elif 'norm' in name:
            assert (tensor == 1).all()
        else:
            bound = 4 * 0.02 / (2 * tensor.numel()) ** 0.5  # four standard errors
            assert abs(tensor.std() - 0.02) < bound
    for name in one:
        if name.startswith('encoder.'):
            copy = one[f'target_{name}']
            assert torch.equal(one[name], copy)
            assert one[name].data_ptr() != copy.data_ptr()


# --- encoder ---------------------------------------------------------------------------------


def encoder_of(block='cross-time', precision='float32', order=None):
    return Encoder(network_of(), order, 'cpu', precision, 'a JEPA', block)


def given(encoding):
    """What an encoding holds, by name."""
    return {name: values for name, values in vars(encoding).items() if values is not None}


def test_encoding():
    network = network_of()
    encoding = encoder_of().encode(windows_of(3), tokens=True)
    assert encoding.tokens.shape == (3, TOKENS, 24)
    assert np.allclose(encoding.summary, encoding.tokens.mean(1), atol=1e-6)
    by_parcel = encoding.tokens.reshape(3, PARCELS, PATCHES, 24)
    assert np.allclose(encoding.parcels, by_parcel.mean(2), atol=1e-6)
    with torch.inference_mode():
        hidden, received = network.encode(signal_of(3), return_attention=True)
        block = spatiotemporal_block('cross-time', PARCELS, PATCHES)
        errors = network.latent_error(signal_of(3), hidden, *block)
    assert np.allclose(encoding.tokens, hidden, atol=1e-5)
    relative = TOKENS * received.view(3, PARCELS, -1)
    assert np.allclose(encoding.attention_profile, relative, atol=1e-4)
    assert np.allclose(encoding.attention, relative.mean(2), atol=1e-4)
    for found, error in zip(
        (encoding.latent_error, encoding.latent_baseline), errors, strict=True
    ):
        assert np.allclose(found, error.view(3, PARCELS, PATCHES), atol=1e-5, equal_nan=True)
        assert (np.isfinite(found) == (np.arange(PATCHES) >= PATCHES - 1)).all()
    assert encoding.prediction is None
    for values in given(encoding).values():
        assert values.dtype == np.float32


def test_encoding_holds_what_was_asked_for():
    plain = encoder_of(block=None).encode(windows_of(1))
    assert set(given(plain)) == {'summary', 'parcels'}
    with pytest.raises(BrainfmError, match=r'BrainLM predicts no latents, .* cross-roi'):
        Encoder(weights.initialise(weights.build(BRAINLM), 0), name='BrainLM', block='cross-roi')
    with pytest.raises(BrainfmError, match="'all' is not known"):
        encoder_of(block='all')


def test_same_to_the_last_bit():
    windows = windows_of(3)
    together = encoder_of('cross-roi').encode(windows, tokens=True)
    again = encoder_of('cross-roi').encode(windows, tokens=True)
    alone = encoder_of('cross-roi').encode(windows[1:2], tokens=True)
    for name, values in given(together).items():
        assert np.array_equal(values, getattr(again, name), equal_nan=True)
        assert np.array_equal(values[1:2], getattr(alone, name), equal_nan=True)


def test_order_moves_rows_of_the_input():
    order = np.random.default_rng(3).permutation(PARCELS)
    windows = windows_of(2)
    ordered = encoder_of(order=order).encode(windows, tokens=True)
    plain = encoder_of().encode(windows[:, order], tokens=True)
    assert np.array_equal(ordered.summary, plain.summary)
    for name in ('parcels', 'attention', 'latent_error', 'latent_baseline'):
        found, expected = getattr(ordered, name), getattr(plain, name)
        assert np.array_equal(found[:, order], expected, equal_nan=True)


@pytest.mark.parametrize('batch_size', [1, 4, 100])
def test_encode_runs_carries_latent_errors(batch_size):
    encoder = encoder_of('double-cross')
    runs = {'a': windows_of(2, 0), 'b': windows_of(5, 1), 'c': windows_of(1, 2)}
    found = dict(encode_runs(encoder, runs.items(), batch_size))
    for key, windows in runs.items():
        alone = encoder.encode(windows)
        for name in ('summary', 'latent_error', 'latent_baseline'):
            assert np.array_equal(getattr(found[key], name), getattr(alone, name), equal_nan=True)


def test_bfloat16_is_near():
    windows = 1 + 0.1 * windows_of(2)  # small fluctuations on a level, as the model is used to
    exact = encoder_of().encode(windows, tokens=True)
    coarse = encoder_of(precision='bfloat16').encode(windows, tokens=True)
    bounds = {'summary': 0.01, 'parcels': 0.01, 'tokens': 0.02, 'attention_profile': 0.01}
    bounds |= {'latent_error': 0.01, 'latent_baseline': 0.02}
    assert bounds.keys() == given(exact).keys()
    for name, bound in bounds.items():
        a, b = (np.nan_to_num(getattr(one, name)) for one in (exact, coarse))
        assert b.dtype == np.float32
        assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < bound, name


def test_bfloat16_is_for_the_layers():
    network = encoder_of(precision='bfloat16').network
    coarse = {name for name, p in network.named_parameters() if p.dtype == torch.bfloat16}
    products = ('.qkv.', '.proj.', '.fc1.', '.fc2.')
    expected = {
        name
        for name in network.state_dict()
        if 'blocks.' in name and any(product in name for product in products)
    }
    assert coarse == expected


@torch.inference_mode()
def test_bfloat16_leaves_signals_and_places_alone():
    network, signal = network_of(), 1 + 0.01 * signal_of(1)
    exact = network.encoder.embed(signal, network.positions)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(network.encoder.embed(signal, network.positions), exact)
