"""What networks are pretrained for, and what their fine-tuning is compared with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from bids_brainfm.analyses.conditional import predict_windows
from bids_brainfm.analyses.reconstruct import interpolate, seen_mean
from bids_brainfm.analyses.scores import score
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import weights
from bids_brainfm.models.head import Head
from bids_brainfm.models.masking import masked_tokens, standardised
from bids_brainfm.training.cohort import Targets
from bids_brainfm.training.evaluation import describe_test, scores_of
from bids_brainfm.training.finetuning import Supervised, dummy, loss_of, mean_by_participant
from bids_brainfm.training.job import objective_for
from bids_brainfm.training.linear import fit_linear, folds_of
from bids_brainfm.training.masking import REGIONS
from bids_brainfm.training.pretraining import (
    LatentPrediction,
    MaskedAutoencoding,
    effective_rank,
    parcel_covariance,
)
from bids_brainfm.training.recipe import load_recipe
from bids_brainfm.training.settings import TrainingSettings

PARCELS, TIMES, PATCH = 9, 24, 4
LAYERS = {
    'num_brain_voxels': PARCELS,
    'num_timepoints_per_voxel': TIMES,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'intermediate_size': 16,
    'decoder_num_hidden_layers': 1,
    'decoder_num_attention_heads': 2,
    'decoder_intermediate_size': 16,
    'layer_norm_eps': 1e-12,
    'hidden_size': 8,
    'patch_size': PATCH,
    'num_channels': 3,
    'decoder_hidden_size': 8,
}
SMALL = {
    'vit': LAYERS | {'model_type': 'vit_mae', 'image_size': 32},
    'legacy': LAYERS
    | {'model_type': 'brainlm_mae', 'timepoint_patching_size': PATCH, 'conv_kernel_size': 3},
    'jepa': {
        'model_type': 'brain_jepa',
        'crop_size': [PARCELS, TIMES],
        'patch_size': PATCH,
        'embed_dim': 24,
        'depth': 2,
        'num_heads': 3,
        'predictor_embed_dim': 16,
        'predictor_depth': 1,
        'predictor_num_heads': 2,
        'gradients': 5,
    },
}
OFFICIAL = {'num_brain_voxels': 424, 'num_timepoints_per_voxel': 200}
WHOLE = {
    'legacy': SMALL['legacy'] | OFFICIAL | {'timepoint_patching_size': 20},
    'vit16': SMALL['vit'] | OFFICIAL | {'image_size': 432, 'patch_size': 16},
    'vit14': SMALL['vit'] | OFFICIAL | {'image_size': 434, 'patch_size': 14},
}


def network_of(family, seed=0):
    network = weights.initialise(weights.build(SMALL[family]), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name not in network.position_tables():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    if family == 'jepa':
        network.set_positions(torch.randn(PARCELS, 5, generator=generator))
    return network


def signal_of(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, PARCELS, TIMES, generator=generator)


def autoencoding(family, ratio=0.5, **options):
    network = network_of(family)
    if family == 'legacy':
        generator = torch.Generator().manual_seed(1)
        network.set_positions(50 * torch.randn(PARCELS, 3, generator=generator))
    return MaskedAutoencoding(network, ratio, **options)


def alone(tensor):
    """Reduce over a single process."""
    return tensor


def none_of(signal):
    """Flags of windows without flagged volumes."""
    return torch.zeros(len(signal), TIMES, dtype=torch.bool)


def evaluate(objective, batches, reduce):
    """Scores of windows without flagged volumes."""
    return objective.evaluate(((x, none_of(x), seeds) for x, seeds in batches), reduce)


# --- masked autoencoding ---------------------------------------------------------------------


@pytest.mark.parametrize('family', ['vit', 'legacy'])
@pytest.mark.parametrize('loss', ['mse', 'mae'])
@pytest.mark.parametrize('normalise', [False, True])
def test_a_batch_may_be_taken_in_parts(family, loss, normalise):
    """Its windows have different numbers of masked points, and each point counts as much."""
    objective = autoencoding(family, loss=loss, normalise=normalise)
    signal, keep = signal_of(6), objective.draw(range(6))['keep']
    with torch.no_grad():
        total, count, facts = objective(signal, keep, none_of(signal))
        flags = none_of(signal)
        parts = [objective(*(x[i : i + 2] for x in (signal, keep, flags))) for i in (0, 2, 4)]
        made = objective.network.reconstruct(signal, keep)
    assert facts == {}
    assert sum(int(part[1]) for part in parts) == int(count)
    torch.testing.assert_close(sum(part[0] for part in parts), total)
    points = objective.network.points(masked_tokens(keep, objective.network.tokens))
    wanted = signal
    if normalise:
        wanted = (signal - signal.mean(2, keepdim=True)) / signal.std(2, keepdim=True)
    error = (made - wanted)[points]
    assert int(count) == len(error)
    direct = error.square().sum() if loss == 'mse' else error.abs().sum()
    torch.testing.assert_close(total, direct, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ('name', 'ratio', 'kept', 'tokens'),
    [
        ('legacy', 0.2, 3392, 4240),
        ('legacy', 0.75, 1060, 4240),
        ('legacy', 0.9, 423, 4240),  # 1 - 0.9 is a little less than 0.1, officially too
        ('vit16', 0.75, 182, 729),
        ('vit14', 0.75, 240, 961),
        ('vit16', 0.2, 583, 729),
        ('vit16', 0.9, 72, 729),
    ],
)
def test_share_that_is_masked(name, ratio, kept, tokens):
    network = weights.build(WHOLE[name])
    assert network.tokens == tokens
    keep = MaskedAutoencoding(network, ratio).draw([3, 4, 5])['keep']
    assert keep.shape == (3, kept)
    assert all(len(row.unique()) == kept for row in keep)
    assert keep.min() >= 0
    assert keep.max() < tokens


@pytest.mark.parametrize(
    ('name', 'ratio', 'points'),
    [
        ('legacy', 0.2, 40),
        ('legacy', 0.75, 160),
        ('legacy', 0.9, 180),
        ('vit16', 0.1, 28),
        ('vit14', 0.1, 23),
    ],
)
def test_the_future_is_masked(name, ratio, points):
    """All of the last time points, for all parcels; whole tokens, so perhaps a few more."""
    network = weights.build(WHOLE[name])
    keep = MaskedAutoencoding(network, ratio, 'future').draw([1, 2])['keep']
    hidden = network.points(masked_tokens(keep, network.tokens))
    assert hidden.shape == (2, 424, 200)
    expected = (torch.arange(200) >= 200 - points).expand(2, 424, -1)
    assert torch.equal(hidden, expected)


def test_masks_are_those_of_the_window():
    """Whatever batch a window is in; tokens are masked at random, all as often."""
    objective = autoencoding('legacy', 0.25)
    keep = objective.draw([5, 6, 7])['keep']
    for i, seed in enumerate([5, 6, 7]):
        assert torch.equal(objective.draw([seed])['keep'][0], keep[i])
    assert len({tuple(row.tolist()) for row in keep}) == 3
    count = torch.bincount(objective.draw(range(2000))['keep'].flatten()) / 2000
    torch.testing.assert_close(count, torch.full_like(count, 40 / 54), atol=0.05, rtol=0)


@pytest.mark.parametrize('ratio', [0.0, -0.1, 0.91, 1.0, 75, float('nan')])
def test_ratios_that_cannot_be_masked(ratio):
    with pytest.raises(BrainfmError, match=f'--mask-ratio {ratio:g} is not above 0 and up to 0.9'):
        autoencoding('vit', ratio)


@pytest.mark.parametrize('ratio', [0.01, 0.2, 0.75, 0.9])
def test_ratios_that_can(ratio):
    assert autoencoding('vit', ratio).ratio == ratio


@pytest.mark.parametrize('family', ['vit', 'legacy'])
def test_all_that_reconstructs_learns(family):
    objective = autoencoding(family)
    signal = signal_of(2)
    total, *_ = objective(signal, objective.draw([0, 1])['keep'], none_of(signal))
    total.backward()
    tables = objective.network.position_tables()
    for name, parameter in objective.network.named_parameters():
        unused = family == 'legacy' and name.startswith('decoder.decoder_pred.')
        if name not in tables and not unused and not name.endswith('key.bias'):
            assert parameter.grad.abs().max() > 0, name


class Double(nn.Module):
    """Stands for a network; what it reconstructs is given."""

    unused = ()
    tokens = PARCELS * TIMES // PATCH

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def points(self, tokens):
        return tokens.repeat_interleave(PATCH, 1).view(-1, PARCELS, TIMES)

    def reconstruct(self, signal, keep):
        return self.answer(signal, self.points(masked_tokens(keep, self.tokens)))


def windows_with_levels(n=6):
    """Random walks about levels that differ much more than they vary."""
    generator = torch.Generator().manual_seed(5)
    levels = 100 * torch.randn(n, PARCELS, 1, generator=generator)
    return signal_of(n).cumsum(2) + levels


def level_of(signal, hidden):
    """Mean of the hidden points of each parcel of each window."""
    total = torch.where(hidden, signal, 0).sum(2, keepdim=True)
    return total / hidden.sum(2, keepdim=True).clamp(min=1)


ANSWERS = {
    'perfect': lambda signal, hidden: signal,
    'level': lambda signal, hidden: level_of(signal, hidden).expand_as(signal),
    'half': lambda signal, hidden: (signal + level_of(signal, hidden)) / 2,
    'turned': lambda signal, hidden: 2 * level_of(signal, hidden) - signal,
    'shifted': lambda signal, hidden: signal + 3,
    'zero': lambda signal, hidden: torch.zeros_like(signal),
}


def covariance_of(signal):
    return parcel_covariance(signal.numpy(), PARCELS, alone)


def evaluated(answer, batches=None, reduce=alone):
    objective = MaskedAutoencoding(Double(answer), 0.5)
    signal = windows_with_levels()
    objective.covariance = covariance_of(signal)
    batches = batches or [range(6)]
    return evaluate(objective, ((signal[list(b)], list(b)) for b in batches), reduce)


@pytest.mark.parametrize(
    ('name', 'r2', 'r'),
    [('perfect', 1, 1), ('level', 0, None), ('half', 0.75, 1), ('turned', -3, -1)],
)
def test_scores_of_known_reconstructions(name, r2, r):
    found = evaluated(ANSWERS[name])
    assert found['r2'] == pytest.approx(r2, abs=1e-4)
    if r is not None:
        assert found['r'] == pytest.approx(r, abs=1e-4)
    assert found['loss'] == pytest.approx(found['mse'], rel=1e-4, abs=1e-6)
    if name == 'perfect':
        assert found['mse'] == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings('error')
def test_a_constant_is_correlated_with_nothing():
    signal = torch.tensor([1.0, -1]).repeat(TIMES // 2).expand(2, PARCELS, -1)  # level 0
    objective = MaskedAutoencoding(Double(ANSWERS['zero']), 0.5)
    found = evaluate(objective, [(signal, [0, 1])], alone)
    assert np.isnan(found['r'])
    assert found['r2'] == 0
    assert found['mse'] == 1


def test_a_wrong_level_costs():
    """It is taken out of the target alone, and only the hidden points tell it."""
    perfect, shifted, zero = (evaluated(ANSWERS[n]) for n in ('perfect', 'shifted', 'zero'))
    assert perfect['r2_mean'] == shifted['r2_mean']
    assert shifted['mse'] == pytest.approx(9, rel=1e-4)
    assert shifted['r2'] < 0
    assert shifted['r'] == pytest.approx(1, abs=1e-4)
    assert zero['r2'] < -100  # levels are far from 0


def test_baselines_are_those_of_the_analysis():
    found = evaluated(ANSWERS['zero'])
    signal = windows_with_levels()
    objective = MaskedAutoencoding(Double(None), 0.5)
    keep = objective.draw(range(6))['keep']
    hidden = objective.network.points(masked_tokens(keep, objective.network.tokens))
    level = level_of(signal, hidden).numpy()
    windows, seen = signal.numpy(), ~hidden.numpy()
    ways = {'r2': 0 * windows, 'r2_mean': seen_mean(windows, seen)}
    ways['r2_interpolation'] = interpolate(windows, seen)
    made = predict_windows(windows, seen, ways['r2_mean'], covariance_of(signal))
    ways['r2_covariance'] = made
    for name, made in ways.items():
        wanted = score((made - level)[~seen], (windows - level)[~seen])
        assert found[name] == pytest.approx(float(wanted.r2), rel=1e-3)
    assert found['r2_interpolation'] > found['r2_mean'] + 0.1


def test_parcels_that_go_together_predict_each_other():
    """Held-out windows of one source: other parcels say what time cannot."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(8, 1, TIMES, generator=generator)
    signal = source + 0.3 * torch.randn(8, PARCELS, TIMES, generator=generator)
    for normalise in (False, True):
        objective = MaskedAutoencoding(Double(ANSWERS['zero']), 0.5, normalise=normalise)
        scale = 5 * torch.arange(1.0, PARCELS + 1)[:, None]
        objective.covariance = covariance_of(scale * signal[:4])
        found = evaluate(objective, [(scale * signal[4:], range(4))], alone)
        assert found['r2_covariance'] > 0.6 > 0 > found['r2_interpolation']


def test_covariance_of_two_processes():
    series = windows_with_levels().numpy()
    sums = []
    parcel_covariance(series[::2], PARCELS, lambda tensor: sums.append(tensor) or tensor)
    found = parcel_covariance(series[1::2], PARCELS, lambda tensor: tensor + sums[0])
    np.testing.assert_allclose(found, parcel_covariance(series, PARCELS, alone))


@pytest.mark.parametrize('batches', [[range(2), range(2, 6)], [[i] for i in (5, 0, 3, 1, 2, 4)]])
def test_scores_do_not_depend_on_batches(batches):
    answer = lambda signal, hidden: 0.7 * signal + 1
    expected = evaluated(answer)
    found = evaluated(answer, batches)
    assert found == pytest.approx(expected, rel=1e-4)
    names = ['loss', 'mse', 'r2', 'r', 'r2_mean', 'r2_interpolation', 'r2_covariance']
    assert list(expected) == names


def test_scores_of_two_processes():
    answer = lambda signal, hidden: 0.7 * signal + 1
    sums = []
    evaluated(answer, [[0, 2, 4]], lambda tensor: sums.append(tensor.clone()) or tensor)
    others = iter(sums)
    found = evaluated(answer, [[1, 3], [5]], lambda tensor: tensor + next(others))
    assert found == pytest.approx(evaluated(answer), rel=1e-4)


def test_baselines_are_computed_once(monkeypatch):
    """They are the same at every evaluation, and cost more than the network."""
    objective = autoencoding('legacy')
    batches = [(signal_of(3), [0, 1, 2])]
    first = evaluate(objective, batches, alone)
    monkeypatch.setattr('bids_brainfm.training.pretraining.interpolate', None)
    assert evaluate(objective, batches, alone) == first


@pytest.mark.parametrize('family', ['vit', 'legacy'])
def test_evaluated_loss_is_that_of_training(family):
    objective = autoencoding(family, loss='mae')
    signal, seeds = signal_of(4), [3, 1, 4, 2]
    found = evaluate(objective, [(signal, seeds)], alone)
    with torch.no_grad():
        total, count, _ = objective(signal, objective.draw(seeds)['keep'], none_of(signal))
    assert found['loss'] == pytest.approx(float(total / count), rel=1e-5)
    assert found['loss'] != pytest.approx(found['mse'], rel=1e-2)


# --- flagged volumes -------------------------------------------------------------------------


def some_flagged(n, seed=3):
    """Bursts of flagged time points, other ones in each window."""
    flagged = torch.zeros(n, TIMES, dtype=torch.bool)
    starts = torch.randint(TIMES - 7, (n,), generator=torch.Generator().manual_seed(seed))
    for row, start in zip(flagged, starts.tolist(), strict=True):
        row[start : start + 7] = True
    return flagged


@pytest.mark.parametrize('normalise', [False, True])
def test_flagged_points_carry_no_gradient(normalise):
    made = torch.zeros(4, PARCELS, TIMES, requires_grad=True)
    objective = MaskedAutoencoding(Double(lambda *_: made), 0.5, normalise=normalise)
    signal, flagged = signal_of(4), some_flagged(4)
    keep = objective.draw(range(4))['keep']
    total, count, _ = objective(signal, keep, flagged)
    total.backward()
    hidden = objective.network.points(masked_tokens(keep, objective.network.tokens))
    scored = hidden & ~flagged[:, None]
    assert torch.equal(made.grad != 0, scored)
    assert int(count) == int(scored.sum()) < int(hidden.sum())


def test_a_window_of_flagged_volumes_only_counts_nothing():
    objective, signal = autoencoding('vit'), signal_of(2)
    total, count, _ = objective(signal, objective.draw([0, 1])['keep'], ~none_of(signal))
    total.backward()
    assert (float(total.detach()), int(count)) == (0, 0)
    gradients = [p.grad for p in objective.network.parameters() if p.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


def test_flagged_points_are_not_scored():
    """A model that is wrong there and nowhere else is perfect; baselines are scored alike."""
    signal, flagged = windows_with_levels(), some_flagged(6)
    wrong = lambda x, hidden: x + 50 * flagged[:, None] * torch.randn(x.shape)
    objective = MaskedAutoencoding(Double(wrong), 0.5)
    batch = [(signal, flagged, list(range(6)))]
    found = objective.evaluate(batch, alone)
    assert found['r2'] == pytest.approx(1, abs=1e-4)
    assert found['loss'] == pytest.approx(0, abs=1e-6)
    broken = torch.where(flagged[:, None], 1e4 * torch.randn(signal.shape), signal)
    objective = MaskedAutoencoding(Double(lambda x, hidden: signal), 0.5)
    assert objective.evaluate([(broken, flagged, range(6))], alone)['r2'] > 0.99


# --- latent prediction -----------------------------------------------------------------------


def latent(seed=0):
    objective = LatentPrediction(network_of('jepa', seed), 'fixed')
    other = network_of('jepa', seed + 1)  # else the target encoder would be the encoder
    objective.network.target_encoder.load_state_dict(other.target_encoder.state_dict())
    return objective


def blocks_of(objective, n, seed=0):
    """Masks of n windows, none of them with flagged volumes."""
    return objective.draw([seed] * n) | {'flagged': torch.zeros(n, TIMES, dtype=torch.bool)}


def test_latents_may_be_taken_in_parts():
    objective = latent()
    signal, given = signal_of(6), blocks_of(objective, 6)
    with torch.no_grad():
        total, count, facts = objective(signal, **given)
        halves = [
            objective(signal[part], **{k: v[part] for k, v in given.items()})
            for part in (slice(0, 2), slice(2, 6))
        ]
    assert int(count) == given['target'].numel()
    assert sum(int(half[1]) for half in halves) == int(count)
    torch.testing.assert_close(sum(half[0] for half in halves), total)
    assert set(facts) == {*(f'loss_{name}' for name in REGIONS), 'target_sd'}
    for number, name in enumerate(REGIONS):
        pair = facts[f'loss_{name}']
        assert int(pair[1]) == int((given['region'] == number).sum())
        torch.testing.assert_close(sum(half[2][f'loss_{name}'] for half in halves), pair)
    in_all = sum(facts[f'loss_{name}'] for name in REGIONS)
    torch.testing.assert_close(in_all, torch.stack([total, count.float()]))


def predicted_and_wanted(network, signal, given):
    """Latents of target tokens, predicted and wanted, and those of all tokens, normalised."""
    hidden = F.layer_norm(network.encode(signal)[0], (24,))
    wanted = torch.stack([h[t] for h, t in zip(hidden, given['target'], strict=True)])
    context = network.context(signal, given['context'])
    return network.predict(context, given['context'], given['target']), wanted, hidden


@torch.no_grad()
def test_latent_error_is_smooth_l1_of_normalised_targets():
    objective = latent()
    network, signal, given = objective.network, signal_of(3), blocks_of(objective, 3)
    total, count, facts = objective(signal, **given)
    found, wanted, hidden = predicted_and_wanted(network, signal, given)
    torch.testing.assert_close(total / count, F.smooth_l1_loss(found, wanted))
    error = F.smooth_l1_loss(found, wanted, reduction='none').mean(2)
    for number, name in enumerate(REGIONS):
        there = error[given['region'] == number].sum()
        torch.testing.assert_close(facts[f'loss_{name}'][0], there)
    torch.testing.assert_close(facts['target_sd'], torch.stack([hidden.std(0).mean(), total**0]))


def test_target_sd_needs_two_windows_and_sees_collapse():
    objective = latent()
    signal, given = signal_of(1), blocks_of(objective, 1)
    assert 'target_sd' not in objective(signal, **given)[2]
    given = blocks_of(objective, 3)
    _, _, facts = objective(signal.expand(3, -1, -1), **given)
    assert facts['target_sd'][0] < 1e-5


def test_no_gradient_reaches_the_target_encoder():
    objective = latent()
    network = objective.network
    assert not any(p.requires_grad for p in network.target_encoder.parameters())
    network.target_encoder.requires_grad_(True)  # not even if it asked for some
    total, *_ = objective(signal_of(2), **blocks_of(objective, 2))
    total.backward()
    assert all(p.grad is None for p in network.target_encoder.parameters())
    for part in (network.encoder, network.predictor):
        for name, parameter in part.named_parameters():
            if not name.endswith('emb_h'):
                assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize('momentum', [0.996, 0.5, 1.0, 0.0])
def test_target_encoder_is_a_moving_average(momentum):
    objective = latent()
    network = objective.network
    before = {k: v.clone() for k, v in network.state_dict().items()}
    objective.after_step(momentum)
    after = network.state_dict()
    for name, old in before.items():
        if not name.startswith('target_encoder.'):
            assert torch.equal(after[name], old)
            continue
        source = before[name.removeprefix('target_')]
        torch.testing.assert_close(after[name], momentum * old + (1 - momentum) * source)
    assert not any(p.requires_grad for p in network.target_encoder.parameters())


def test_average_over_many_steps():
    objective = latent()
    network = objective.network
    name = 'blocks.0.mlp.fc1.weight'
    target = network.target_encoder.get_parameter(name)
    source = network.encoder.get_parameter(name)
    start = target.clone()
    for _ in range(10):
        objective.after_step(0.9)
    torch.testing.assert_close(target.data, source + 0.9**10 * (start - source))


def test_masks_of_latent_prediction():
    objective = latent()
    given = objective.draw([3, 4, 5])
    assert {k: len(v) for k, v in given.items()} == {'context': 3, 'target': 3, 'region': 3}
    again, other = objective.draw([3, 4, 5]), objective.draw([4, 5, 6])
    assert all(torch.equal(given[k], again[k]) for k in given)
    assert not torch.equal(given['context'], other['context'])
    assert given['target'].max() < PARCELS * TIMES // PATCH
    with pytest.raises(BrainfmError, match=f'this model has {TIMES // PATCH}'):
        LatentPrediction(objective.network, 'official').draw([3])


def test_latent_scores():
    """Each window under one of eight masks, which its number picks."""
    objective = latent()
    network, signal = objective.network, 3 * signal_of(5)
    numbers = [7, 8, 1, 25, 3]
    found = evaluate(objective, [(signal[:2], numbers[:2]), (signal[2:], numbers[2:])], alone)
    losses, guesses = [], []
    masks = objective.draw(range(8))
    with torch.no_grad():
        hidden = network.encode(signal)[0]
        normal = F.layer_norm(hidden, (24,))
        still = network.encode(signal.mean(2, keepdim=True).expand_as(signal))[0]
        for i, number in enumerate(numbers):
            given = {k: v[[number % 8]] for k, v in masks.items()}
            total, count, _ = objective(signal[[i]], **given, flagged=none_of(signal[[i]]))
            losses.append(float(total / count))
            context, target = given['context'][0], given['target'][0]
            guess = normal[i, context].mean(0).expand(len(target), -1)
            guesses.append(float(F.smooth_l1_loss(guess, normal[i, target])))
    assert list(found) == ['loss', 'baseline', 'target_sd', 'rank', 'static']
    assert found['loss'] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found['baseline'] == pytest.approx(np.mean(guesses), rel=1e-4)
    spread = normal.double().std(0, correction=0).mean()
    assert found['target_sd'] == pytest.approx(float(spread), rel=1e-4)
    static = F.smooth_l1_loss(F.layer_norm(still, (24,)), normal)
    assert found['static'] == pytest.approx(float(static), rel=1e-4)
    covariance = torch.cov(hidden.mean(1).double().T, correction=0)
    assert found['rank'] == pytest.approx(effective_rank(covariance), rel=1e-3)
    assert 1 < found['rank'] <= 4.01  # five windows


def test_latent_scores_do_not_depend_on_batches():
    objective, signal = latent(), signal_of(5)
    expected = evaluate(objective, [(signal, range(5))], alone)
    parts = [(signal[[4, 0]], [4, 0]), (signal[[1]], [1]), (signal[2:4], [2, 3])]
    assert evaluate(objective, parts, alone) == pytest.approx(expected, rel=1e-4)


def test_latent_scores_of_two_processes():
    objective, signal, sums = latent(), signal_of(4), []
    both = [(signal[:2], [0, 1]), (signal[2:], [2, 3])]
    evaluate(objective, both[:1], lambda tensor: sums.append(tensor.clone()) or tensor)
    others = iter(sums)
    found = evaluate(objective, both[1:], lambda tensor: tensor + next(others))
    assert found == pytest.approx(evaluate(objective, both, alone), rel=1e-4)


def test_latent_scores_tell_collapse_and_levels():
    objective = latent()
    level = signal_of(3).mean(2, keepdim=True).expand(-1, -1, TIMES).contiguous()
    found = evaluate(objective, [(level, [0, 1, 2])], alone)
    assert found['static'] == pytest.approx(0, abs=1e-6)
    assert found['target_sd'] > 0.01
    same = signal_of(1).expand(4, -1, -1)
    found = evaluate(objective, [(same, [0, 1, 2, 3])], alone)
    assert found['target_sd'] < 1e-3
    assert found['static'] > 1e-3


def test_tokens_of_flagged_volumes_are_left_out():
    """Those with half of their four time points flagged, of all parcels."""
    objective, flagged = latent(), torch.zeros(1, TIMES, dtype=torch.bool)
    flagged[0, [0, 4, 5, 8, 9, 10, 11]] = True
    measured = objective.measured(flagged).view(PARCELS, -1)
    assert measured.tolist() == [[True, False, False, True, True, True]] * PARCELS


@torch.no_grad()
def test_flagged_tokens_are_not_learned():
    """Loss, its number of terms and the spread are those of the other tokens."""
    objective, signal, flagged = latent(), signal_of(4), some_flagged(4)
    network, given = objective.network, blocks_of(objective, 4) | {'flagged': flagged}
    patch = int(given['target'][0, 0]) % (TIMES // PATCH)  # of a token that is to be predicted
    flagged[:2, patch * PATCH : (patch + 1) * PATCH] = True
    total, count, facts = objective(signal, **given)
    found, wanted, hidden = predicted_and_wanted(network, signal, given)
    kept = objective.measured(flagged).gather(1, given['target'])
    error = F.smooth_l1_loss(found, wanted, reduction='none').mean(2)
    assert int(count) == int(kept.sum()) < kept.numel()
    torch.testing.assert_close(total, error[kept].sum())
    assert sum(int(facts[f'loss_{name}'][1]) for name in REGIONS) == int(count)
    by_token = [
        hidden[rows, token].std(0).mean()
        for token, rows in enumerate(objective.measured(flagged).T)
        if rows.sum() > 1
    ]
    torch.testing.assert_close(facts['target_sd'][0], torch.stack(by_token).mean())


def test_flagged_tokens_are_not_scored():
    objective, signal, flagged = latent(), signal_of(3), some_flagged(3)
    flagged[2] = True  # a window without one token to score
    found = objective.evaluate([(signal, flagged, [0, 1, 2])], alone)
    masks, losses = objective.draw(range(8)), []
    with torch.no_grad():
        for i in range(2):
            given = {k: v[[i]] for k, v in masks.items()}
            total, count, _ = objective(signal[[i]], **given, flagged=flagged[[i]])
            losses.append(float(total / count))
    assert found['loss'] == pytest.approx(np.mean(losses), rel=1e-4)
    assert all(np.isfinite(value) for value in found.values())


def test_effective_rank():
    one = torch.zeros(5, 5, dtype=torch.float64)
    assert effective_rank(one) == pytest.approx(1)
    one[2, 2] = 3
    assert effective_rank(one) == pytest.approx(1)
    assert effective_rank(1e-6 * torch.eye(7, dtype=torch.float64)) == pytest.approx(7)
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turned = turn.double() @ torch.diag(10 * shares) @ turn.double().T
    assert effective_rank(turned) == pytest.approx(2**1.5, rel=1e-5)


# --- which objective -------------------------------------------------------------------------


def objective_of(family, recipe, **capabilities):
    """The objective of a network that can do something else than its family."""
    network = network_of(family)
    network.capabilities = replace(network.capabilities, **capabilities)
    settings = TrainingSettings('m', Path(), (), Path())
    return objective_for(settings, load_recipe(recipe), network)


def test_objective_follows_from_capabilities_and_recipe():
    assert isinstance(objective_of('vit', 'brainlm-vit'), MaskedAutoencoding)
    assert isinstance(objective_of('jepa', 'official'), LatentPrediction)
    assert isinstance(objective_of('jepa', 'fixed', reconstructs=True), LatentPrediction)
    both = objective_of('jepa', 'brainlm-vit', reconstructs=True, mask_ratio=0.4)
    assert isinstance(both, MaskedAutoencoding)
    assert both.ratio == 0.4


@pytest.mark.parametrize(
    ('family', 'recipe', 'capabilities', 'said'),
    [
        ('vit', 'brainlm-vit', {'reconstructs': False}, 'vit_mae neither reconstructs nor'),
        ('vit', 'fixed', {}, 'takes a recipe without masks and momentum, such as brainlm-vit'),
        ('jepa', 'brainlm-vit', {}, 'takes a recipe with masks and momentum, such as fixed'),
        ('vit', 'brainlm-vit', {'mask_ratio': None}, 'vit_mae does not say .* give --mask-ratio'),
        ('jepa', 'fixed', {'patches': None}, 'brain_jepa has tokens that span several parcels'),
    ],
)
def test_what_a_network_cannot_be_pretrained_for(family, recipe, capabilities, said):
    with pytest.raises(BrainfmError, match=said):
        objective_of(family, recipe, **capabilities)


# --- fine-tuning -----------------------------------------------------------------------------

AGE = Targets('age', 'regression', {})
SEX = Targets('sex', 'classification', {}, ('F', 'M'))
SITE = Targets('site', 'classification', {}, ('a', 'b', 'c'))


def test_scores_of_a_regression():
    target = np.array([1.0, 2.0, 3.0, 4.0])
    found = scores_of(np.array([[1.0], [2.0], [3.0], [6.0]]), target, AGE)
    assert found == pytest.approx({'mse': 1, 'mae': 0.5, 'r2': 0.2, 'r': 0.9561829}, rel=1e-5)
    constant = scores_of(np.full((4, 1), 2.5), target, AGE)
    assert constant['r2'] == pytest.approx(0)
    assert np.isnan(constant['r'])


@pytest.mark.filterwarnings('ignore:A single label')
def test_scores_of_a_classification():
    target = np.array([0.0, 0, 0, 1, 1])
    sure = np.array([-3.0, -1, 2, 1, 3])
    found = scores_of(np.stack([-sure, sure], 1), target, SEX)
    assert found == pytest.approx(
        {'accuracy': 0.8, 'balanced_accuracy': 5 / 6, 'f1': 0.8, 'auroc': 5 / 6}
    )
    logits = np.stack([-sure, sure], 1)
    assert scores_of(-logits, target, SEX)['auroc'] == pytest.approx(1 / 6)
    assert np.isnan(scores_of(logits[:2], target[:2], SEX)['auroc'])


def test_scores_of_three_classes():
    prediction = np.eye(3)[[0, 1, 1, 2, 2, 2]]
    found = scores_of(prediction, np.array([0.0, 0, 1, 1, 2, 2]), SITE)
    f1 = np.mean([2 / 3, 1 / 2, 4 / 5])
    assert found == pytest.approx({'accuracy': 4 / 6, 'balanced_accuracy': 4 / 6, 'f1': f1})
    assert 'auroc' not in scores_of(np.eye(3)[:2], np.array([0.0, 1]), SITE)


def test_dummies():
    assert dummy(np.array([1.0, 2, 6]), 2, AGE).tolist() == [[3], [3]]
    assert dummy(np.array([1.0, 1, 0]), 2, SEX).tolist() == [[0, 1], [0, 1]]
    assert dummy(np.array([0.0, 1, 1]), 1, SITE).tolist() == [[0, 1, 0]]
    tied = dummy(np.array([0.0, 1]), 3, SEX)
    assert tied.tolist() == [[0.5, 0.5]] * 3
    found = scores_of(dummy(np.array([1.0, 1, 0]), 4, SEX), np.array([0.0, 1, 1, 1]), SEX)
    assert found['balanced_accuracy'] == found['auroc'] == 0.5
    assert found['accuracy'] == 0.75


def features(n, seed, width=60):
    return 0.2 * np.random.default_rng(seed).standard_normal((n, width))


def planted(x, noise=0.3):
    way = np.random.default_rng(9).standard_normal(x.shape[1])
    return x @ way + noise * np.random.default_rng(8).standard_normal(len(x))


@pytest.mark.parametrize('width', [20, 400])
def test_ridge_is_that_of_scikit_learn(width):
    """As a pipeline without rotation, with the penalty of the same cross-validation."""
    x = features(120, 0, width)
    y = 50 + 10 * planted(x)
    found = fit_linear(x[:80], y[:80], None, AGE, 3).predict(x[80:])
    penalties = {'ridge__alpha': np.logspace(-5, 3, 17) * max(80, width)}
    plain = make_pipeline(StandardScaler(), Ridge())
    # standardised once, as it is done there
    z = StandardScaler().fit(x[:80])
    search = GridSearchCV(
        Ridge(), {'alpha': penalties['ridge__alpha']}, scoring='neg_mean_squared_error',
        cv=KFold(5, shuffle=True, random_state=3),
    ).fit(z.transform(x[:80]), y[:80])  # fmt: skip
    plain.set_params(ridge__alpha=search.best_params_['alpha']).fit(x[:80], y[:80])
    np.testing.assert_allclose(found[:, 0], plain.predict(x[80:]), rtol=1e-6)
    assert scores_of(found, y[80:], AGE)['r2'] > (0.75 if width == 20 else 0)


def test_ridge_makes_nothing_of_noise():
    """The penalty is chosen so that hardly more than the mean is left."""
    spreads, means = [], []
    for seed in range(8):
        x = features(140, seed, 400)
        y = 50 + 10 * np.random.default_rng(100 + seed).standard_normal(140)
        found = fit_linear(x[:100], y[:100], None, AGE, 0).predict(x[100:])[:, 0]
        spreads.append(found.std() / y.std())
        means.append(found.mean() - y[:100].mean())
    assert np.median(spreads) < 0.3
    assert np.abs(means).max() < 3


@pytest.mark.parametrize('targets', [SEX, SITE])
def test_logistic_regression_of_classes(targets):
    x = features(400, 1, 20)
    y = planted(x, noise=0.05)
    y = np.digitize(y, np.quantile(y, [1 / 2] if targets is SEX else [1 / 3, 2 / 3])).astype(float)
    found = fit_linear(x[:300], y[:300], None, targets, 0).predict(x[300:])
    assert found.shape == (100, len(targets.classes))
    np.testing.assert_allclose(found.sum(1), 1)
    scores = scores_of(found, y[300:], targets)
    assert scores['balanced_accuracy'] > 0.85
    if targets is SEX:
        assert scores['auroc'] > 0.95


@pytest.mark.parametrize('targets', [AGE, SEX, SITE])
def test_a_linear_model_as_a_head(targets):
    """The head gives what scikit-learn predicts, where features hardly differ between people."""
    x = features(90, 2, 8)
    trait, x = planted(x), 3 + 0.01 * x
    y = np.digitize(trait, np.quantile(trait, [1 / 3, 2 / 3])).astype(float)
    y = 40 + 10 * trait if targets is AGE else np.minimum(y, len(targets.classes) - 1)
    fitted = fit_linear(x, y, None, targets, 0)
    settings = {'kind': 'probe', 'pooling': 'mean', 'target': targets.column}
    settings |= {'task': targets.problem}
    statistics = {'mean': 3.0, 'sd': 2.0} if targets is AGE else {'classes': list(targets.classes)}
    head = Head(settings | statistics, 8, False).eval()
    head.set_linear(fitted.weight, fitted.bias, fitted.centre)
    x = x.astype(np.float32)
    with torch.no_grad():
        found = head.predict(head(torch.from_numpy(x)[:, None])).numpy()
    expected = fitted.predict(x.astype(float))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[:, 0].std() > 0.1


def test_inner_folds_keep_groups_together():
    y, groups = np.arange(30.0), np.repeat(np.arange(10), 3)
    for rows, others in folds_of(y, AGE, 0, groups):
        assert not set(groups[rows]) & set(groups[others])
    y = np.tile([0.0, 1], 15)
    for rows, others in folds_of(y, SEX, 0, groups):
        assert not set(groups[rows]) & set(groups[others])
        assert set(y[rows]) == {0, 1}
    assert len(folds_of(np.array([0.0] * 9 + [1] * 3), SEX, 0)) == 3


@pytest.mark.parametrize(
    ('y', 'targets', 'groups', 'said'),
    [
        ([0.0] * 9 + [1], SEX, None, 'has 1 participants of one of the classes'),
        ([0.0, 1] * 5, SEX, [0] * 10, 'has 1 groups of one of the classes'),
        ([1.0, 2, 3], AGE, [4] * 3, 'has 1 groups, and'),
    ],
)
def test_too_few_for_inner_folds(y, targets, groups, said):
    with pytest.raises(BrainfmError, match=said):
        folds_of(np.array(y), targets, 0, groups)


@pytest.mark.parametrize('targets', [AGE, SEX, SITE])
def test_scores_of_resampled_participants(targets):
    """Weights count participants: as scikit-learn and NumPy score the sample itself."""
    rng = np.random.default_rng(0)
    n, classes = 30, len(targets.classes)
    target = rng.integers(classes, size=n).astype(float) if classes else rng.standard_normal(n)
    prediction = rng.dirichlet(np.ones(classes), n) if classes else rng.standard_normal((n, 1))
    sample = rng.integers(n, size=(4, n))
    weights = np.stack([np.bincount(rows, minlength=n) for rows in sample])
    found = scores_of(prediction, target, targets, weights)
    for i, rows in enumerate(sample):
        real, guess = target[rows], prediction[rows]
        if not classes:
            wanted = {'r': np.corrcoef(guess[:, 0], real)[0, 1]}
            wanted |= {'r2': metrics.r2_score(real, guess)}
            wanted |= {'mae': metrics.mean_absolute_error(real, guess)}
        else:
            chosen = guess.argmax(1)
            wanted = {'f1': metrics.f1_score(real, chosen, average='macro')}
            wanted |= {'balanced_accuracy': metrics.balanced_accuracy_score(real, chosen)}
        if classes == 2:
            wanted['auroc'] = metrics.roc_auc_score(real, guess[:, 1])
        for name, value in wanted.items():
            assert found[name][i] == pytest.approx(value), name


def test_intervals_say_what_one_split_can_show():
    """The interval of r is that of Fisher's z; a constant has none."""
    rng = np.random.default_rng(0)
    target = rng.standard_normal(80)
    seen = lambda noise: (target + noise * rng.standard_normal(80))[:, None]
    predictions = {'model': seen(1.0), 'connectome': seen(1.5), 'constant': np.ones((80, 1))}
    facts = describe_test(predictions, target, AGE, seed=1)
    r = facts['test']['r']
    low, high = facts['test_intervals']['model']['r']
    wanted = np.tanh(np.arctanh(r) + 1.96 / np.sqrt(77) * np.array([-1, 1]))
    assert [low, high] == pytest.approx(wanted, abs=0.05)
    assert 'r' not in facts['test_intervals']['constant']
    assert 'mse' in facts['test_intervals']['constant']
    difference = facts['test_difference']
    assert difference['measure'] == 'r'
    assert difference['model_minus_connectome'] == pytest.approx(
        r - facts['test_baselines']['connectome']['r']
    )
    low, high = difference['interval']
    assert high - low == pytest.approx(2 * 1.96 * difference['sd'], rel=0.15)
    smallest = f'participants cannot show differences smaller than about {(high - low) / 2:.2f}.'
    assert difference['statement'].endswith(f'One test part of 80 {smallest}')
    again = describe_test(predictions, target, AGE, seed=1)
    assert again['test_intervals'] == facts['test_intervals']
    same = {'model': predictions['model'], 'connectome': predictions['model']}
    assert describe_test(same, target, AGE, 1)['test_difference']['interval'] == [0, 0]


def supervised(frozen, task='regression', family='vit'):
    head = {'kind': 'probe' if frozen else 'mlp', 'pooling': 'mean', 'target': 'age', 'task': task}
    head |= {'mean': 1.0, 'sd': 2.0} if task == 'regression' else {'classes': ['a', 'b', 'c']}
    network = weights.initialise(weights.build(SMALL[family] | {'head': head}), 0)
    return Supervised(network, frozen)


@pytest.mark.parametrize('task', ['regression', 'classification'])
def test_supervised_loss_is_a_sum(task):
    objective, signal = supervised(False, task), signal_of(6)
    target = torch.tensor([0.0, 1, 2, 0, 1, 1])
    total, count, facts = objective(signal, target)
    halves = [objective(signal[part], target[part]) for part in (slice(2), slice(2, 6))]
    assert (int(count), facts) == (6, {})
    torch.testing.assert_close(sum(half[0] for half in halves), total)
    outputs = objective.outputs(signal)
    if task == 'regression':
        direct = (outputs[:, 0] - target).square().sum()
    else:
        direct = -outputs.log_softmax(1)[torch.arange(6), target.long()].sum()
    torch.testing.assert_close(total, direct)
    torch.testing.assert_close(loss_of(outputs, target, task), total / 6)


def test_a_probe_leaves_the_network():
    objective = supervised(True)
    objective.train()
    network = objective.network
    assert network.head.training
    assert not network.vit.training
    total, *_ = objective(signal_of(4), torch.zeros(4))
    total.backward()
    learning = {n for n, p in network.named_parameters() if p.grad is not None}
    assert learning == {n for n, p in network.named_parameters() if n.startswith('head.')}


def test_fine_tuning_moves_trunk_and_head():
    objective = supervised(False)
    objective.train()
    network, tables = objective.network, objective.network.position_tables()
    asked = {n for n, p in network.named_parameters() if p.requires_grad}
    assert asked == {
        n
        for n, _ in network.named_parameters()
        if n.startswith(('vit.', 'head.')) and n not in tables
    }
    assert network.vit.training
    total, *_ = objective(signal_of(4), torch.arange(4.0))
    total.backward()
    assert network.vit.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0


def test_outputs_are_averaged_over_windows_of_a_participant():
    objective, signal = supervised(True), signal_of(5)
    objective.eval()
    batches = [(signal[:3], ['b', 'a', 'b']), (signal[3:], ['a', 'c'])]
    found = mean_by_participant(objective.outputs, batches, lambda rows: rows[::-1])
    with torch.no_grad():
        outputs = objective.outputs(signal).double().numpy()
    assert list(found) == ['a', 'b', 'c']
    for person, rows in {'a': [1, 3], 'b': [0, 2], 'c': [4]}.items():
        np.testing.assert_allclose(found[person], outputs[rows].mean(0))


def test_standardised_targets_are_scored_as_such():
    """With norm_pix_loss the network answers in standardised values, and is scored in them."""
    signal = 3 * windows_with_levels()
    objective = MaskedAutoencoding(Double(lambda x, hidden: standardised(x)), 0.5, normalise=True)
    found = evaluate(objective, [(signal, list(range(6)))], alone)
    assert found['r2'] == pytest.approx(1, abs=1e-4)
    assert found['loss'] == pytest.approx(0, abs=1e-6)
    assert found['r2_mean'] < 0.2
