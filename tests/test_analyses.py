"""Reconstruction, forecast and perturbation: with networks whose answers are known in advance."""

import numpy as np
import pytest
import torch

from bids_brainfm.analyses.forecast import autoregress, forecast
from bids_brainfm.analyses.perturb import (
    Perturbation,
    departure,
    matched_null,
    perturb,
    sham_targets,
    stimuli,
    stimulus_times,
)
from bids_brainfm.analyses.reconstruct import (
    BASELINES,
    combine,
    gain_check,
    interpolate,
    reconstruct,
    seen_mean,
    visible_input,
)
from bids_brainfm.analyses.scores import score
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.brainlm_legacy import BrainLMLegacy
from bids_brainfm.models.brainlm_vitmae import BrainLMViT
from bids_brainfm.models.encoder import Encoder, set_positions
from bids_brainfm.models.masking import keep_lowest, leave_out, masked_tokens
from bids_brainfm.models.weights import initialise

COMMON = {
    'hidden_size': 16,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'intermediate_size': 16,
    'decoder_hidden_size': 16,
    'decoder_num_hidden_layers': 1,
    'decoder_num_attention_heads': 2,
    'decoder_intermediate_size': 16,
    'layer_norm_eps': 1e-12,
    'num_channels': 3,
    'num_brain_voxels': 24,
    'num_timepoints_per_voxel': 40,
}
VIT = COMMON | {'image_size': 48, 'patch_size': 8}
LEGACY = COMMON | {'timepoint_patching_size': 5, 'patch_size': 4, 'conv_kernel_size': 3}
FULL = {'num_brain_voxels': 424, 'num_timepoints_per_voxel': 200}
P, T = 24, 40
FAMILIES = {'vit': (BrainLMViT, VIT), 'legacy': (BrainLMLegacy, LEGACY)}


def network_of(family, **sizes):
    kind, config = FAMILIES[family]
    return initialise(kind(config | sizes), 0)


def encoder_of(network, order=None, xyz=None, precision='float32'):
    if xyz is None:
        xyz = np.random.default_rng(5).normal(0, 30, (network.capabilities.window[0], 3))
    set_positions(network, xyz, order)
    return Encoder(network, order=order, precision=precision)


def double(family, answer, **sizes):
    """A network that answers ``answer(signal)`` (B, P, T), whatever it is shown."""
    kind, config = FAMILIES[family]
    config = config | sizes

    class Double(kind):
        def encode(self, signal, keep=None, blank=None, return_attention=False):
            return signal, None

        def decode(self, hidden, keep=None):
            return answer(hidden)

    return encoder_of(initialise(Double(config), 0))


def copies(family):
    return double(family, lambda signal: signal)


def run_of(samples=T, seed=0):
    """Smooth, of unit variance, each parcel its own: (S, P) float32."""
    noise = np.random.default_rng(seed).standard_normal((samples + 8, P))
    smooth = np.stack([noise[i : i + samples] for i in range(8)]).mean(0)
    return ((smooth - smooth.mean(0)) / smooth.std(0)).astype(np.float32)


# --- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('n_tokens', 'ratio', 'kept', 'passes'),
    [(4240, 0.2, 3392, 5), (729, 0.75, 182, 2), (961, 0.75, 240, 2), (729, 0.2, 583, 5),
     (729, 0.9, 72, 2), (100, 0.3, 70, 4)],
)  # fmt: skip
def test_every_token_is_left_out(n_tokens, ratio, kept, passes):
    """The counts of the specification; only the last pass hides again."""
    found = leave_out(n_tokens, ratio, torch.Generator().manual_seed(0))
    assert len(found) == passes
    assert all(keep.shape == (kept,) for keep in found)
    hidden = torch.stack([masked_tokens(keep[None], n_tokens)[0] for keep in found])
    assert hidden[:-1].sum(0).max() == 1
    assert hidden.sum(0).min() == 1
    assert int(hidden.sum()) == passes * (n_tokens - kept)
    assert any((keep.diff() < 0).any() for keep in found)  # in random order, as in training


def test_masks_depend_on_the_seed_alone():
    a, b, c = (leave_out(729, 0.75, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])


def test_tokens_that_stay_visible():
    visible = torch.arange(100) < 40
    found = leave_out(100, 0.25, torch.Generator().manual_seed(0), visible)
    hidden = torch.stack([masked_tokens(keep[None], 100)[0] for keep in found])
    assert not hidden[:, :40].any()
    assert hidden[:, 40:].any(0).all()
    # more is asked for than there is: all that there is at once
    (keep,) = leave_out(100, 0.75, torch.Generator().manual_seed(0), visible)
    assert sorted(keep.tolist()) == list(range(40))


@pytest.mark.parametrize('ratio', [0, 1, 0.999, -0.5, 1.5])
def test_ratios_that_hide_all_or_nothing(ratio):
    with pytest.raises(BrainfmError, match=f'mask ratio of {ratio:g} hides all or none of 50'):
        leave_out(50, ratio, torch.Generator())


@pytest.mark.parametrize(
    ('config', 'mode', 'points'),
    [({'image_size': 432, 'patch_size': 16}, False, 28), ({'image_size': 434, 'patch_size': 14},
     False, 23), ({'image_size': 432, 'patch_size': 16}, True, 20),
     ({'image_size': 434, 'patch_size': 14}, True, 20)],
)  # fmt: skip
def test_last_points_of_the_vision_transformers(config, mode, points):
    """28 and 23 points by whole blocks, exactly 20 with what is blanked, for all parcels alike."""
    network = network_of('vit', **FULL, **config)
    tokens, blank = network.hide_last(20, mode)
    covered = network.points(tokens)[0]
    assert (covered == covered[0]).all()
    late = covered[0] if blank is None else blank
    assert late.nonzero().flatten().tolist() == list(range(200 - points, 200))
    if blank is not None:
        assert not (covered[0] & ~blank).any()  # no token hides more than was asked for


def test_points_that_are_whole_tokens_are_hidden_as_tokens():
    """28 points of patch 16 begin where a token begins: nothing has to be blanked beside it."""
    network = network_of('vit', **FULL, image_size=432, patch_size=16)
    tokens, blank = network.hide_last(28, True)
    assert torch.equal(network.points(tokens)[0, 0], blank)


def test_last_points_of_the_13m_family():
    network = network_of('legacy', **FULL, timepoint_patching_size=20)
    for asked, exactly, hidden in ((20, True, 20), (20, False, 20), (21, False, 40)):
        tokens, blank = network.hide_last(asked, exactly)
        assert blank is None
        assert tokens.sum() == 424 * hidden / 20
        assert network.points(tokens)[0, 7].nonzero().flatten()[0] == 200 - hidden
    with pytest.raises(BrainfmError, match=r'whole patches of 20 .* exactly the last 30'):
        network.hide_last(30, True)


@pytest.mark.parametrize('family', FAMILIES)
def test_tokens_and_points_are_each_others_reverse(family):
    network = network_of(family)
    one = torch.zeros(1, P, T, dtype=torch.bool)
    one[0, 3, 17] = True
    tokens = network.covering(one)
    assert tokens.sum() == 1
    assert network.points(tokens)[0, 3, 17]
    assert torch.equal(network.covering(network.points(tokens)), tokens)


# --- scores ----------------------------------------------------------------------------------


def test_scores():
    """Against NumPy and scikit-learn, with gaps; never floored."""
    from sklearn.metrics import r2_score

    rng = np.random.default_rng(0)
    target, prediction = rng.normal(3, 1, (2, 30, 4))
    target[5, 1] = prediction[7, 1] = np.nan
    found = score(prediction, target, axis=0)
    for p in range(4):
        good = np.isfinite(target[:, p] + prediction[:, p])
        a, b = target[good, p], prediction[good, p]
        assert found.r2[p] == pytest.approx(r2_score(a, b))
        assert found.r[p] == pytest.approx(np.corrcoef(a, b)[0, 1])
        assert found.mse[p] == pytest.approx(np.mean((a - b) ** 2))
    assert (found.r2 < 0).all()
    pooled = score(prediction, target)
    good = np.isfinite(target + prediction)
    assert pooled.r2 == pytest.approx(r2_score(target[good], prediction[good]))


def test_scores_where_there_is_nothing_to_score():
    constant, nothing = np.full((5, 1), 9000.1), np.full((5, 1), np.nan)
    varying = np.arange(5.0)[:, None]
    assert np.isnan(score(varying, constant).r2)
    assert np.isnan(score(constant, varying).r)
    assert score(constant - 8998.1, varying).r2 == pytest.approx(0)
    for measure in vars(score(varying, nothing, axis=0)).values():
        assert np.isnan(measure).all()


# --- reconstruction --------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('aggregate', ['first', 'mean'])
def test_who_copies_explains_everything_and_who_says_the_mean_nothing(family, aggregate):
    data = run_of()
    copied = reconstruct(copies(family), data, 0.5, aggregate)
    np.testing.assert_array_equal(copied.model, data)
    assert score(copied.model, copied.target).r2 == 1
    assert (score(copied.model, copied.target, axis=0).r2 == 1).all()
    mean = double(family, lambda x: x.mean(2, keepdim=True).expand_as(x))
    flat = reconstruct(mean, data, 0.5, aggregate)
    np.testing.assert_allclose(score(flat.model, flat.target, axis=0).r2, 0, atol=1e-6)
    assert score(flat.model, flat.target).r2 == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('family', FAMILIES)
def test_what_is_scored_was_not_seen(family):
    """Other values at the hidden points of the first pass change nothing of what it says there."""
    encoder, data = encoder_of(network_of(family)), run_of()
    before = reconstruct(encoder, data, 0.5)
    changed = np.where(before.hidden, data + 3, data)
    after = reconstruct(encoder, changed, 0.5)
    assert np.array_equal(before.hidden, after.hidden)
    np.testing.assert_allclose(after.model[before.hidden], before.model[before.hidden], atol=1e-6)
    assert not np.allclose(after.model[~before.hidden], before.model[~before.hidden], atol=1e-3)
    for name in BASELINES:  # they are held to the same
        a, b = getattr(before, name), getattr(after, name)
        np.testing.assert_allclose(a[before.hidden], b[before.hidden], atol=1e-6)


@pytest.mark.parametrize('samples', [T, T + 1, 3 * T - 7, 2 * T])
def test_the_whole_run_is_reconstructed(samples):
    data = run_of(samples)
    made = reconstruct(copies('vit'), data, 0.75)
    np.testing.assert_array_equal(made.model, data)
    assert all(np.isfinite(values).all() for values in made.predictions.values())
    assert 0.5 < made.hidden.mean() < 0.9


def test_overlap_is_taken_from_the_first_window():
    numbered = iter(range(100))
    network = double('vit', lambda x: torch.full_like(x, next(numbered)))
    made = reconstruct(network, run_of(T + 10), 0.5).model
    # two windows a pass: those of the first pass answer 0 and 1, of the second 2 and 3
    assert set(np.unique(made[:T])) == {0, 2}
    assert set(np.unique(made[T:])) == {1, 3}


def test_a_short_run_is_completed_and_only_what_is_real_comes_back():
    data = run_of(25)
    made = reconstruct(copies('legacy'), data, 0.5)
    np.testing.assert_array_equal(made.model, data)


def test_parcels_come_back_in_atlas_order():
    """With an order, the very numbers of a network that is shown rows in that order."""
    order, data = np.random.default_rng(2).permutation(P), run_of()
    for family in FAMILIES:
        network = network_of(family)
        xyz = np.random.default_rng(5).normal(0, 30, (P, 3))
        ordered = reconstruct(encoder_of(network, order, xyz), data, 0.5)
        plain = reconstruct(encoder_of(network, xyz=xyz[order]), data[:, order], 0.5)
        for name in ('model', 'hidden', 'interpolation'):
            found, expected = getattr(ordered, name), getattr(plain, name)
            assert np.array_equal(found[:, order], expected)


def test_baselines_by_hand():
    windows = np.array([[[0.0, 1, 2, 9, 4], [5.0, 5, 5, 5, 7], [1.0, 2, 3, 4, 5]]])
    seen = np.array([[[1, 1, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]], bool)
    overall = (0 + 1 + 4 + 5) / 4
    found = interpolate(windows, seen)[0]
    np.testing.assert_allclose(found[0], [0, 1, 2, 3, 4])
    np.testing.assert_allclose(found[1], 5)
    np.testing.assert_allclose(found[2], overall)
    mean = seen_mean(windows, seen)[0]
    np.testing.assert_allclose(mean[:, 0], [5 / 3, 5, overall])


def test_interpolation_explains_a_line():
    """Where both ends of a gap are seen the line is found again to the last digit."""
    data = (np.linspace(0, 1, T)[:, None] * np.arange(1, P + 1)).astype(np.float32)
    made = reconstruct(copies('legacy'), data, 0.2)
    inside = slice(5, -5)  # the first and last patch have an end that is held
    assert score(made.interpolation[inside], made.target[inside]).r2 > 0.98
    assert score(made.mean, made.target).r2 < 0.7


def test_aggregates():
    values, seen = [np.full((1, 1, 3), v) for v in (1.0, 3.0)], np.zeros((2, 1, 1, 3), bool)
    seen[0, ..., 2] = True
    np.testing.assert_array_equal(combine(values, seen, 'first'), [[[1, 1, 3]]])
    np.testing.assert_array_equal(combine(values, seen, 'mean'), [[[2, 2, 3]]])
    with pytest.raises(BrainfmError, match="first, mean, not 'median'"):
        combine(values, seen, 'median')


def test_first_and_mean_differ_where_a_token_is_hidden_twice():
    encoder, data = encoder_of(network_of('vit')), run_of()
    first, mean = (reconstruct(encoder, data, 0.75, how) for how in ('first', 'mean'))
    alike = np.isclose(first.model, mean.model, atol=1e-6)
    assert 0.1 < alike.mean() < 0.95


def test_gain_check_finds_a_wrong_amplitude():
    """A model that knows values from -1 to 1 only, on data four times as large."""
    data = run_of() / 4
    network = double('vit', lambda x: x.clip(-1, 1))
    found = gain_check(network, 4 * 4 * data, 0.5)
    assert found.best < 1
    assert found.warned
    fine = gain_check(copies('vit'), data, 0.5)
    np.testing.assert_allclose(fine.r2, 1)
    assert not fine.warned
    noise = gain_check(double('vit', torch.zeros_like), data, 0.5)
    assert not noise.warned  # no gain helps a model that knows nothing


def test_gain_check_scores_measured_points_only():
    data, flagged, donors = run_of(), np.zeros(T, bool), np.full(P, -1)
    flagged[10:] = True
    donors[3:] = 1
    right = (~flagged[:, None] & (donors < 0)).T
    network = double('vit', lambda x: torch.where(torch.from_numpy(right), x, -x))
    assert gain_check(network, data, 0.5, 0, flagged, donors).r2 == pytest.approx(1)
    assert gain_check(network, data, 0.5).r2[3] < 0


def test_gain_check_takes_the_window_with_most_measured_samples():
    """A run whose first window is flagged throughout is checked in its second."""
    data, flagged = np.concatenate([run_of(), run_of()]), np.arange(2 * T) < T
    assert np.isnan(gain_check(copies('vit'), data[:T], 0.5, 0, flagged[:T]).r2).all()
    np.testing.assert_allclose(gain_check(copies('vit'), data, 0.5, 0, flagged).r2, 1)


def test_levels_of_parcels_flatter_no_gain():
    """A model that knows how bright parcels are, and nothing else, explains nothing."""
    data = (run_of() + 100 * np.arange(P)).astype(np.float32)
    network = double('legacy', lambda x: x.mean(2, keepdim=True).expand_as(x))
    assert (gain_check(network, data, 0.5).r2 < 0.05).all()
    future = forecast(network, np.concatenate([data, data]), 10)
    everything = np.ones((2 * T, P), bool)
    assert future.scores(everything, axis=None)['model'].r2 < 0.1
    assert future.scores(everything, axis=None)['mean'].r2 < 0.1


# --- nothing hidden shows --------------------------------------------------------------------


class Watched(Encoder):
    """Keeps what the network is shown: windows, and a mark where tokens are visible."""

    def reconstruct(self, windows, keep, blank=None, batch_size=8):
        hidden = masked_tokens(torch.as_tensor(keep).expand(len(windows), -1), self.network.tokens)
        self.shown = [*getattr(self, 'shown', []), np.where(self.points(hidden), 0, windows)]
        return super().reconstruct(windows, keep, blank, batch_size)


def preprocessed(truth, flagged, donors):
    """What denoising and the filling of parcels make of a run."""
    data, good = truth.copy(), np.flatnonzero(~flagged)
    for parcel in range(P):
        data[flagged, parcel] = np.interp(np.flatnonzero(flagged), good, truth[good, parcel])
    data[:, donors >= 0] = data[:, donors[donors >= 0]]
    return data


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('samples', [T, 30])
def test_hidden_points_change_nothing_that_is_shown(family, samples):
    """Neither through interpolated volumes, nor filled parcels, nor the completion of a run."""
    flagged, donors = np.zeros(samples, bool), np.full(P, -1)
    flagged[[4, 5, 6, 15, 20, 21]] = True
    donors[[2, 7]] = [12, 20]
    truth = run_of(samples)
    given = {'flagged': flagged, 'donors': donors}
    before, after = (Watched(encoder_of(network_of(family)).network) for _ in range(2))
    made = reconstruct(before, preprocessed(truth, flagged, donors), 0.5, **given)
    hidden = made.hidden
    changed = preprocessed(np.where(hidden, truth + 5, truth), flagged, donors)
    again = reconstruct(after, changed, 0.5, **given)
    np.testing.assert_array_equal(before.shown[0], after.shown[0])  # of the first pass
    for name, values in made.predictions.items():
        found = again.predictions[name]
        np.testing.assert_allclose(values[hidden], found[hidden], atol=1e-5, err_msg=name)
    visible = ~hidden & ~flagged[:, None] & (donors < 0)
    np.testing.assert_array_equal(before.shown[0][0].T[:samples][visible], truth[visible])


def test_visible_gaps_are_filled_from_visible_points():
    window = np.array([[[0.0, 9, 2, 9, 9, 5], [1.0, 9, 9, 9, 9, 9]]], np.float32)
    seen = np.array([[[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]]], bool)
    flagged = np.array([0, 1, 0, 1, 1], bool)
    samples = np.array([[0, 1, 2, 3, 4, -1]])
    shown, known = visible_input(window, seen, samples, flagged)
    assert shown[0, 0, :4].tolist() == [0, 1, 2, 2]
    assert shown[0, 1, [0, 1, 4, 5]].tolist() == [1, 1, 1, 1]
    assert known.sum() == 3
    shown, known = visible_input(window, seen, samples, flagged, np.array([-1, 0]))
    assert known[0, 1].tolist() == known[0, 0].tolist()


# --- forecast --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('family', 'points', 'mode', 'hidden'),
    [('legacy', 10, 'predict_last_pixel', 10), ('legacy', 7, 'predict_last', 10),
     ('vit', 7, 'predict_last_pixel', 7), ('vit', 7, 'predict_last', 12)],
)  # fmt: skip
@pytest.mark.parametrize('samples', [T, 3 * T + 3, 30])
def test_forecasts_lie_end_on_end_up_to_the_end(family, points, mode, hidden, samples):
    data = run_of(samples)
    made = forecast(copies(family), data, points, mode)
    flat = made.samples.ravel()
    assert made.target.shape[2] == hidden
    assert flat[-1] == samples - 1
    assert np.array_equal(flat, np.arange(flat[0], samples))
    assert samples < T or flat[0] < T - hidden + hidden  # the first window lies at the start
    np.testing.assert_array_equal(made.target[:, 5].ravel(), data[flat, 5])
    np.testing.assert_array_equal(made.along(made.model, samples)[flat], data[flat])
    assert np.isnan(made.along(made.model, samples)[: flat[0]]).all()
    if samples >= T:
        np.testing.assert_array_equal(
            made.persistence[:, :, 0], data[made.samples[:, 0] - 1], strict=False
        )
        past = [data[s - (T - hidden) : s].mean(0) for s in made.samples[:, 0]]
        np.testing.assert_allclose(made.mean[:, :, -1], past, atol=1e-6)
    else:  # the past is continued backwards by what is known before the forecast
        np.testing.assert_allclose(made.mean[0, :, 0], data[:-hidden].mean(0), atol=1e-6)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('mode', ['predict_last', 'predict_last_pixel'])
def test_the_future_is_not_seen(family, mode):
    encoder, data = encoder_of(network_of(family)), run_of()
    before = forecast(encoder, data, 10, mode)
    data = data.copy()
    data[before.samples[0]] += 5
    after = forecast(encoder, data, 10, mode)
    for name, values in before.predictions.items():
        np.testing.assert_array_equal(values, after.predictions[name], err_msg=name)
    data[:20] += 5
    assert not np.allclose(forecast(encoder, data, 10, mode).model, before.model, atol=1e-3)


def test_flagged_context_holds_no_future():
    """Two flagged volumes before a forecast: interpolated, they give the next volume away."""
    rng = np.random.default_rng(0)
    series = np.zeros((40 * T, P))
    for t in range(1, len(series)):  # r = .405 at a distance of three volumes, as of real series
        series[t] = 0.74 * series[t - 1] + rng.standard_normal(P)
    truth = (series / series.std(0)).astype(np.float32)
    origins = forecast(copies('vit'), truth, 8).samples[:, 0]
    flagged = np.zeros(len(truth), bool)
    flagged[origins - 1] = flagged[origins - 2] = True
    data = preprocessed(truth, flagged, np.full(P, -1))
    scored = ~flagged[:, None] & np.ones(P, bool)
    leaking = forecast(copies('vit'), data, 8).scores(scored)
    causal = forecast(copies('vit'), data, 8, flagged=flagged).scores(scored)
    assert leaking['persistence'].r2[0] == pytest.approx(0.87, abs=0.02)
    assert causal['persistence'].r2[0] == pytest.approx(-0.19, abs=0.06)
    assert leaking['ar'].r2[0] > causal['ar'].r2[0] + 0.3


@pytest.mark.parametrize('family', FAMILIES)
def test_the_future_is_not_seen_through_flagged_volumes(family):
    encoder, truth, donors = encoder_of(network_of(family)), run_of(), np.full(P, -1)
    flagged = np.zeros(T, bool)
    flagged[[0, 12, 27, 28, 29]] = True
    changed = truth.copy()
    changed[30:] += 5
    before, after = (
        forecast(encoder, preprocessed(x, flagged, donors), 10, flagged=flagged)
        for x in (truth, changed)
    )
    for name, values in before.predictions.items():
        np.testing.assert_array_equal(values, after.predictions[name], err_msg=name)
    np.testing.assert_array_equal(before.persistence[0, :, 0], truth[26])


def test_nothing_is_forecast_from_flagged_volumes_alone():
    flagged = np.arange(2 * T) < T
    made = forecast(copies('vit'), run_of(2 * T), 8, flagged=flagged)
    blind = made.samples[:, 0] <= T
    assert blind.any()
    for values in made.predictions.values():
        assert np.isnan(values[blind]).all()
        assert np.isfinite(values[~blind]).all()


def test_scores_of_each_step():
    data = run_of(4 * T)
    made = forecast(copies('vit'), data, 8)
    parcels = np.arange(P) % 2 == 0
    scored = np.ones((4 * T, 1), bool) & parcels
    scored[made.samples[0, 2]] = False
    scores = made.scores(scored)
    assert list(scores) == ['model', 'persistence', 'mean', 'ar']
    assert (scores['model'].r2 == 1).all()
    error = (made.ar[:, parcels] - made.target[:, parcels]) ** 2
    error[0, :, 2] = np.nan
    by_hand = np.nanmean(error, axis=(0, 1))
    np.testing.assert_allclose(scores['ar'].mse, by_hand, rtol=1e-5)
    # smooth data: the near future is told by the last value, the far one is not
    assert scores['persistence'].r2[0] > 0.5 > 0 > scores['persistence'].r2[-1]


def test_autoregression_finds_its_own_process():
    """Coefficients of x[t] = 0.9 x[t-1] - 0.4 x[t-2] + e show in what is forecast."""
    rng = np.random.default_rng(0)
    series = np.zeros(4000)
    for t in range(2, 4000):
        series[t] = 0.9 * series[t - 1] - 0.4 * series[t - 2] + rng.standard_normal()
    past = series[None, None] + 100
    made = autoregress(past, 3, order=2)[0, 0] - 100
    x = [series[-2], series[-1]]
    for value in made:
        x.append(0.9 * x[-1] - 0.4 * x[-2])
        assert value == pytest.approx(x[-1], abs=0.15)
    assert np.array_equal(autoregress(np.full((1, 2, 30), 7.0), 4), np.full((1, 2, 4), 7.0))
    trend = autoregress(np.arange(180.0)[None, None], 1000)[0, 0]
    assert abs(trend[-1] - np.arange(180).mean()) < 20  # it returns to the mean


@pytest.mark.parametrize('points', [0, T, T + 5])
def test_forecasts_of_a_whole_window(points):
    with pytest.raises(BrainfmError, match=r'1 to 39 of them'):
        forecast(copies('vit'), run_of(), points)


def test_a_run_shorter_than_half_a_window_is_forecast():
    """Before its start nothing is known; flags of its end are not taken for flags of that time."""
    flagged = np.arange(16) >= 14
    made = forecast(copies('vit'), run_of(16), 8, flagged=flagged)
    assert made.samples.tolist() == [list(range(8, 16))]
    np.testing.assert_allclose(made.persistence[0, :, 0], run_of(16)[7])


def test_forecasts_of_a_run_that_is_too_short():
    forecast(copies('vit'), run_of(20), 10)
    with pytest.raises(BrainfmError, match=r'has 19 samples .* forecasting 10 of them takes 20'):
        forecast(copies('vit'), run_of(19), 10)


def test_forecasts_that_leave_nothing_to_see():
    with pytest.raises(BrainfmError, match='sees nothing to forecast from'):
        forecast(copies('legacy'), run_of(), 36, 'predict_last')
    with pytest.raises(BrainfmError, match="not 'next'"):
        forecast(copies('legacy'), run_of(), 5, 'next')


# --- perturbation ----------------------------------------------------------------------------


XYZ = np.random.default_rng(3).normal(0, 30, (P, 3))


def neighbour(family, reach=1, lag=0):
    """A network in which every parcel follows the one before it, `lag` points later."""
    return double(family, lambda x: x.roll((reach, lag), (1, 2)))


def perturbed(encoder, window, target, k_sd=2.0, ratio=0.5, **options):
    return perturb(
        encoder, window, target, window.mean(1), window.std(1), XYZ, k_sd, ratio, **options
    )


@pytest.mark.parametrize('mode', ['pulse', 'clamp'])
@pytest.mark.parametrize('k_sd', [1.0, -3.0])
def test_only_the_follower_of_a_perturbed_parcel_changes(mode, k_sd):
    window = run_of().T
    sd = window.std(1)
    target = np.arange(P) == 6
    found = perturbed(neighbour('legacy'), window, target, k_sd, 0.2, mode=mode)
    expected = np.zeros(P)
    expected[7] = k_sd * sd[6] / sd[7]
    expected[6] = np.nan
    np.testing.assert_allclose(found.change, expected, atol=1e-5)
    assert (found.p[[3, 15]] == 1).all()
    assert np.isnan(found.p[6])
    assert len(found.null) == 19
    assert np.isfinite(found.null).all()


def test_pulses_last_one_token_and_are_spread_over_the_window():
    """The grid of a vision transformer does not begin with the window: its tokens are used."""
    everything, late = np.ones(T, bool), np.arange(T) >= 11
    vit, legacy = (encoder_of(network_of(family)) for family in ('vit', 'legacy'))
    for encoder, recorded, onsets, points in (
        (legacy, everything, [5, 15, 25, 35], 5),
        (vit, everything, [4, 12, 20, 28], 8),  # the padding at the left is 4
        (legacy, late, [15, 20, 30, 35], 5),
        (legacy, np.arange(T) < 7, [0], 5),
    ):
        times = stimulus_times(encoder, recorded, 'pulse')
        assert times.argmax(axis=1).tolist() == onsets
        assert (times.sum(axis=1) == points).all()
        for span in times:
            tokens = encoder.covering((np.arange(P) == 6)[:, None] & span)
            assert tokens.sum() == 1
            assert np.array_equal(encoder.points(tokens[None])[0, 6], span)
    assert stimulus_times(vit, late, 'clamp').all()
    with pytest.raises(BrainfmError, match='shorter than a token'):
        stimulus_times(vit, np.arange(T) < 7, 'pulse')
    with pytest.raises(BrainfmError, match="'step' is no mode"):
        stimulus_times(vit, everything, 'step')


def test_stimuli_are_added_as_pulses_and_held_as_clamps():
    window, target = run_of().T, np.arange(P) == 6
    mean, sd = window.mean(1), window.std(1)
    times = np.stack([np.arange(T) // 5 == k for k in (2, 6)])
    given = stimuli(window, target, times, mean, sd, 2.0, 'pulse')
    change = given - window
    assert (change[:, ~target] == 0).all()
    np.testing.assert_allclose(change[:, 6], np.where(times, 2 * sd[6], 0), atol=1e-6)
    (held,) = stimuli(window, target, np.ones((1, T), bool), mean, sd, 2.0, 'clamp')
    np.testing.assert_allclose(held[6], mean[6] + 2 * sd[6], rtol=1e-6)
    assert np.array_equal(held[~target], window[~target])


def test_response_before_and_after_the_pulse():
    """A network that answers one token later has its response after the pulse."""
    window, target = run_of().T, np.arange(P) == 6
    found = perturbed(neighbour('legacy', lag=5), window, target, shams=0)
    size = 2 * window[6].std() / window[7].std()
    change, before, after = found.response[:, 7]
    assert (change, before) == pytest.approx((0, 0), abs=1e-6)
    assert after == pytest.approx(size, rel=1e-5)
    assert len(perturbed(neighbour('legacy'), window, target, mode='clamp').response) == 1


def test_the_token_of_the_pulse_stays_visible_and_the_others_are_hidden():
    encoder, seen = neighbour('vit', reach=8), []
    reconstruct = encoder.reconstruct
    encoder.reconstruct = lambda windows, keep: (seen.append(keep), reconstruct(windows, keep))[1]
    target = np.arange(P) == 6
    found = perturbed(encoder, run_of().T, target, shams=0)
    visible = encoder.covering(target[:, None] & found.times.any(axis=0))
    assert visible.sum() == len(found.times) == 4
    hidden = torch.stack([masked_tokens(keep[None], 36)[0] for keep in seen])
    assert torch.equal(hidden.any(0), ~visible)


def driven(weights):
    """A network whose answer is a weighted sum of parcels (P, P), with 8 time patches."""
    weights = torch.from_numpy(weights).float()
    sizes = {'num_brain_voxels': len(weights)}
    return double('legacy', lambda x: torch.einsum('pq,bqt->bpt', weights, x), **sizes)


def significance(weights, xyz, parcel, seed=0):
    window = np.random.default_rng(0).standard_normal((len(xyz), T)).astype(np.float32)
    target = np.arange(len(xyz)) == parcel
    mean, sd = np.zeros(len(xyz)), np.ones(len(xyz))
    return perturb(driven(weights), window, target, mean, sd, xyz, 1.0, 0.75, seed=seed)


@pytest.fixture(scope='module')
def near_and_far():
    """150 parcels in a ball; influence falls with distance, and is the same law for all."""
    rng = np.random.default_rng(7)
    xyz = rng.normal(size=(150, 3))
    xyz *= 70 * rng.random((150, 1)) ** (1 / 3) / np.linalg.norm(xyz, axis=1, keepdims=True)
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=2)
    weights = np.exp(-distance / 15) * (1 + 0.3 * rng.normal(size=distance.shape))
    weights += 0.01 * rng.normal(size=distance.shape)
    return xyz, distance, weights * (0.5 + rng.random((150, 1)))  # some respond more than others


def test_as_many_parcels_as_by_chance_where_influence_depends_on_distance_alone(near_and_far):
    """Near parcels, too: shams at any distance would make nearly all of them significant."""
    xyz, distance, weights = near_and_far
    counts, near = [], []
    for parcel in range(0, 150, 6):
        found = significance(weights, xyz, parcel, seed=parcel)
        assert found.expected == pytest.approx(149 / 20)
        assert found.mismatch < 2
        assert np.mean(found.sham_counts) == pytest.approx(149 / 20, rel=0.5)
        counts.append(found.significant.sum())
        near += list(found.significant[(distance[parcel] < 20) & (distance[parcel] > 0)])
    assert np.mean(counts) == pytest.approx(149 / 20, rel=0.3)
    assert len(near) > 50
    assert np.mean(near) < 0.12


def test_what_a_parcel_drives_is_found(near_and_far):
    """Distant parcels that parcel 40 drives, more than others at their distance are."""
    xyz, distance, weights = near_and_far
    driven_by_it = np.argsort(-distance[40])[:30]
    planted = weights.copy()
    planted[driven_by_it, 40] += 0.3
    found, before = (significance(w, xyz, 40) for w in (planted, weights))
    assert found.significant[driven_by_it].mean() > 0.9
    assert (found.sham_counts < found.significant.sum()).all()
    assert before.significant[driven_by_it].mean() < 0.2
    others = np.setdiff1d(np.arange(150), driven_by_it)
    assert found.significant[others].mean() < 0.1


def test_null_pairs_parcels_at_the_same_distance():
    """Parcels on a line; each answers the target by how near it is, and half of them twice."""
    gain = np.where(np.arange(8) % 2, 2.0, 1.0)
    places = np.arange(8.0)
    distance = np.abs(places - np.array([0, 3, 7])[:, None])
    changes = gain / (1 + distance)
    changes[[0, 1, 2], [0, 3, 7]] = np.nan
    null, mismatch = matched_null(changes, distance)
    scale = np.sqrt(np.nanmean(changes**2, axis=0))
    assert null[1, 2] == pytest.approx(changes[2, 5] / scale[5] * scale[2])
    assert null[0, 7] == pytest.approx(changes[1, 7] / scale[7] * scale[7])  # 4 is the farthest
    assert mismatch == pytest.approx(0)
    empty, unknown = matched_null(changes[:1], distance[:1])
    assert empty.shape == (0, 8)
    assert np.isnan(unknown)


def test_expected_count_follows_the_number_of_shams():
    change = np.append(np.nan, np.arange(1.0, 101))[None]
    for shams, proportion in ((19, 1 / 20), (24, 1 / 25), (39, 2 / 40), (18, 0)):
        null = np.zeros((shams, 101))
        found = Perturbation(change[0] > 0, change, null, 0.0, np.zeros(shams), np.ones((1, 9)))
        assert found.expected == pytest.approx(100 * proportion)
        assert found.significant.sum() == (100 if shams >= 19 else 0)


def test_departure_counts_sd_of_means_over_equally_long_stretches():
    run = run_of(300)
    window, target = run[:T].T, np.arange(P) == 6
    times = (np.arange(T) // 5 == 3)[None]
    given = window[None].copy()
    means = np.convolve(run[:, 6], np.ones(5) / 5, 'valid')
    given[0, 6, 15:20] = means.mean() + 3.5 * means.std()
    assert departure(run, given, target, times) == pytest.approx(3.5, rel=1e-4)
    assert np.isnan(departure(run[:T], given, target, np.ones((1, T), bool)))


def test_pulses_stay_near_what_data_do_and_clamps_do_not(shared):
    """Real series, high-passed as by default: 1 SD for 12 s against 1 or 2 SD for 150 s."""
    from nilearn.signal import clean

    runs = np.load(shared / 'data' / 'aomic_schaefer100-7net_5subj.npz')
    high_passed = {'filter': 'cosine', 'high_pass': 1 / 128, 't_r': float(runs['tr'])}
    run = clean(runs['sub_0001'].astype(float), standardize='zscore_sample', **high_passed)
    window = run[:200].T
    pulses = np.stack([np.arange(200) // 16 == k for k in (1, 4, 7, 10)])
    always = np.ones((1, 200), bool)

    def mean_departure(k_sd, times, mode):
        found = []
        for target in np.eye(100, dtype=bool):
            given = stimuli(window, target, times, run.mean(0), run.std(0), k_sd, mode)
            found.append(departure(run, given, target, times))
        return np.mean(found)

    assert mean_departure(0, pulses, 'pulse') < 1
    assert mean_departure(1, pulses, 'pulse') < 2.5
    assert mean_departure(1, always, 'clamp') > 15
    assert mean_departure(2, always, 'clamp') > 30


@pytest.mark.parametrize('mode', ['pulse', 'clamp'])
def test_parcels_that_share_a_token_with_the_target_are_missing(mode):
    """In a vision transformer all rows of a token are visible or hidden together."""
    window = run_of().T
    target = np.arange(P) == 6  # rows 0 to 7 are one block: the padding above is 12 of 8
    network = neighbour('vit', reach=8)
    found = perturbed(network, window, target, mode=mode)
    tokens = network.covering(np.repeat(target[:, None], T, axis=1))
    mates = network.points(tokens[None])[0].any(1)
    assert mates[6]
    assert 1 < mates.sum() < P
    assert np.array_equal(np.isnan(found.change), mates)
    assert found.change[14] == pytest.approx(2 * window[6].std() / window[14].std(), rel=1e-4)


def test_order_of_rows_does_not_move_the_target():
    """Rows are shown in another order, and the network still moves what follows in that order."""
    order = np.random.default_rng(0).permutation(P)
    encoder = encoder_of(neighbour('legacy').network, order)
    window = run_of().T
    target = np.arange(P) == order[4]
    found = perturbed(encoder, window, target, ratio=0.2, shams=0)
    moved = np.flatnonzero(np.abs(np.nan_to_num(found.change)) > 0.1)
    assert moved.tolist() == [order[5]]
    assert np.isnan(found.p).all()  # without shams nothing is known of chance


def test_points_that_were_not_recorded_are_left_out():
    """The change of a clamp is a mean over the recorded points."""
    window, target = run_of().T, np.arange(P) == 6
    mean, sd = window.mean(1), window.std(1)
    recorded = np.arange(T) < 15
    options = {'shams': 0, 'recorded': recorded, 'mode': 'clamp'}
    found = perturbed(neighbour('legacy'), window, target, ratio=0.2, **options)
    expected = (mean[6] + 2 * sd[6] - window[6, :15].mean()) / sd[7]
    assert found.change[7] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_sham_targets_are_the_target_moved_along_the_rows(family):
    order = np.random.default_rng(1).permutation(P)
    network = network_of(family)
    encoder = encoder_of(network, order)
    target = np.zeros(P, bool)
    target[order[[2, 3, 6]]] = True  # rows 2, 3 and 6
    eligible = np.arange(P) != order[9]
    found = sham_targets(encoder, target, eligible, 19, seed=0)
    assert len(found) == 19
    assert len({sham.tobytes() for sham in found}) == 19
    for sham in found:
        rows = np.flatnonzero(sham[order])
        assert 9 not in rows
        moved = [{(r + s) % P for r in (2, 3, 6)} - {9} for s in range(1, P)]
        assert set(rows) in moved
    assert not any(np.array_equal(sham, target) for sham in found)
    again = sham_targets(encoder, target, eligible, 19, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert len(sham_targets(encoder, target, eligible, 100, seed=0)) == P - 1


def test_a_wide_target_of_a_vision_transformer_has_shams():
    """Shams that would hold every token are skipped; with fewer than 19 shams there is no p."""
    network = neighbour('vit', reach=8)
    window = run_of().T
    target = np.isin(np.arange(P), [0, 1, 2, 4, 5, 20, 21])  # three of four blocks of rows
    found = perturbed(network, window, target)
    assert np.isfinite(found.change).sum() == 8
    assert np.isfinite(found.p).sum() == 8
    few = perturbed(network, window, target, shams=18)
    assert len(few.null) == 18
    assert np.isnan(few.p).all()


def test_targets_that_cannot_be():
    window = run_of().T
    network = neighbour('vit')
    for target, sentence in (
        (np.zeros(P, bool), 'no parcel with a signal of its own'),
        (np.arange(P) % 4 == 0, r'each token .* one of the 6 perturbed'),
    ):
        with pytest.raises(BrainfmError, match=sentence):
            perturbed(network, window, target)


# --- the encoder -----------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
def test_encoder_reconstructs_as_the_network_does(family):
    network = network_of(family)
    encoder, windows = encoder_of(network), np.stack([run_of(seed=s).T for s in range(3)])
    keep = keep_lowest(torch.rand(3, network.tokens), 0.5)
    with torch.inference_mode():
        expected = network.reconstruct(torch.from_numpy(windows), keep)
    np.testing.assert_allclose(encoder.reconstruct(windows, keep), expected, atol=1e-5)
    np.testing.assert_allclose(
        encoder.reconstruct(windows, keep[0])[1],
        encoder.reconstruct(windows[1:2], keep[:1])[0],
        atol=1e-6,
    )


def test_bfloat16_reconstructs_nearly_the_same():
    for family in FAMILIES:
        windows = run_of().T[None]
        keep = torch.arange(0, network_of(family).tokens, 2)
        exact, coarse = (
            encoder_of(network_of(family), precision=p).reconstruct(windows, keep)
            for p in ('float32', 'bfloat16')
        )
        assert coarse.dtype == np.float32
        assert 0 < np.linalg.norm(exact - coarse) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize(
    ('config', 'tokens', 'patches'),
    [
        ({'image_size': 432, 'patch_size': 16}, 27, 13),
        ({'image_size': 434, 'patch_size': 14}, 31, 15),
        (LEGACY | FULL | {'model_type': 'brainlm_mae', 'timepoint_patching_size': 20}, 424, 10),
        ({'model_type': 'brain_jepa'}, 424, 10),
    ],
)
def test_uniform_attention_is_one_in_every_parcel(config, tokens, patches, monkeypatch):
    """Whatever the tokens hold: the first and last ones of a vision transformer are half empty."""
    from bids_brainfm.models.cards import load_card
    from bids_brainfm.models.weights import build

    kind = config.get('model_type', 'vit_mae')
    sizes = load_card('brain-jepa-demo').config if kind == 'brain_jepa' else COMMON | FULL | config
    network = initialise(build({'model_type': kind} | sizes), 0)
    order = np.random.default_rng(0).permutation(424)
    encoder = Encoder(network, order)
    extra, (parcels, times) = int(network.capabilities.class_token), network.capabilities.window
    windows = np.zeros((2, parcels, times), np.float32)
    row = torch.full((2, extra + network.tokens), 1 / (extra + network.tokens))
    hidden = torch.zeros(2, extra + network.tokens, 4)
    monkeypatch.setattr(network, 'encode', lambda *_, **__: (hidden[:1], row[:1]))
    encoding = encoder.encode(windows, attention=True)
    assert encoding.attention_profile.shape == (2, 424, network.capabilities.patches or patches)
    np.testing.assert_allclose(encoding.attention_profile, 1, rtol=1e-6)
    np.testing.assert_allclose(encoding.attention, 1, rtol=1e-6)
    row[:, :extra] = 0.9  # attention of a class token to itself changes nothing
    row[:, extra:] = 0.1 / network.tokens
    encoding = encoder.encode(windows, attention=True)
    np.testing.assert_allclose(encoding.attention_profile, 1, rtol=1e-6)
    assert len(np.unique(encoder.parcel_tokens[:, 0])) == tokens


def test_parcels_show_the_attention_of_their_token():
    """In atlas order, relative to the mean over all tokens, those of the padding included."""
    network = network_of('vit')
    order = np.random.default_rng(0).permutation(P)
    encoder = encoder_of(network, order)
    window = run_of().T[None]
    profile = encoder.encode(window, attention=True).attention_profile
    with torch.inference_mode():
        _, row = network.encode(torch.from_numpy(window[:, order]), return_attention=True)
    blocks = row[0, 1:] / row[0, 1:].mean()
    rows = (network.grid.top + np.arange(P)) // 8
    assert profile.shape == (1, P, 6)
    np.testing.assert_allclose(profile[0, order], blocks.view(6, 6)[rows], rtol=1e-5)
    np.testing.assert_array_equal(encoder.parcel_tokens[order, 0], 6 * rows)


def test_token_orders_are_averaged_over():
    """What the 13M family makes of a window is the mean over orders, in the order of parcels."""
    network, windows = network_of('legacy'), run_of().T[None]
    set_positions(network, np.random.default_rng(5).normal(0, 30, (P, 3)))
    plain, averaged = Encoder(network), Encoder(network, shuffles=3, seed=7)
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(network.tokens, generator=generator) for _ in range(3)]
    hidden = []
    with torch.inference_mode():
        for order in orders:
            found, _ = network.encode(torch.from_numpy(windows), order[None])
            hidden.append(torch.cat([found[:, :1], found[:, 1:][:, order.argsort()]], 1))
    expected = torch.stack(hidden).mean(0).numpy()
    made = averaged.encode(windows, tokens=True)
    np.testing.assert_allclose(made.summary, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(made.tokens, expected[:, 1:], atol=1e-5)
    np.testing.assert_allclose(made.attention.sum(), plain.encode(windows, True).attention.sum())
    assert not np.allclose(made.summary, plain.encode(windows).summary, atol=1e-4)

    keep, generator = torch.arange(0, network.tokens, 2), torch.Generator().manual_seed(7)
    draws = [torch.randperm(len(keep), generator=generator) for _ in range(3)]
    single = [plain.reconstruct(windows, keep[draw]) for draw in draws]
    np.testing.assert_allclose(
        averaged.reconstruct(windows, keep), np.mean(single, axis=0), atol=1e-5
    )
    with pytest.raises(BrainfmError, match='order of tokens does not matter to the model'):
        Encoder(network_of('vit'), shuffles=2)


def test_a_model_without_decoder_says_so():
    from bids_brainfm.models.cards import load_card
    from bids_brainfm.models.weights import build

    card = load_card('brain-jepa-demo')
    encoder = Encoder(initialise(build(card.config), 0), name='Brain-JEPA')
    windows = np.zeros((1, 424, 160), np.float32)
    with pytest.raises(BrainfmError, match='Brain-JEPA has no decoder'):
        encoder.reconstruct(windows, torch.arange(3))
