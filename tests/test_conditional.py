"""The covariance baseline: hidden parcels from those visible at the same instant."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from bids_brainfm.analyses.conditional import (
    conditional_mean,
    covariance_of_visible,
    from_covariance,
    level_and_spread,
)
from bids_brainfm.analyses.reconstruct import in_all_windows
from bids_brainfm.analyses.scores import score
from bids_brainfm.signals.covariance import moments, positive_definite, shrunk, standardised

P = 12


def mixture(samples=400, seed=0, sources=3):
    """Series (T, P) of few sources and noise, and their covariance."""
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(99).standard_normal((sources, P))
    covariance = weights.T @ weights + 0.3 * np.eye(P)
    return rng.multivariate_normal(np.zeros(P), covariance, samples), covariance


# --- shrunk covariance -----------------------------------------------------------------------


@pytest.mark.parametrize('samples', [15, 400])
def test_shrinkage_is_that_of_ledoit_and_wolf(samples):
    data, _ = mixture(samples)
    expected, _ = ledoit_wolf(data, assume_centered=True)
    np.testing.assert_allclose(shrunk(moments(data, 1), 1), expected, rtol=1e-10)
    parts = sum(moments(part, 1) for part in np.array_split(data, 4))
    np.testing.assert_allclose(shrunk(parts, 1), expected, rtol=1e-10)


def test_autocorrelated_series_are_shrunk_more():
    """Each sample six times says no more than once."""
    rng = np.random.default_rng(2)
    data = rng.standard_normal((60, 40)) @ rng.standard_normal((40, 40)) / 6
    slow = np.repeat(data, 6, axis=0)
    off = lambda c: c[0, 1] / (data[:, 0] @ data[:, 1] / 60)
    once = off(ledoit_wolf(data, assume_centered=True)[0])
    assert off(ledoit_wolf(slow, assume_centered=True)[0]) > once + 0.2
    assert off(shrunk(moments(slow, 6), 6)) == pytest.approx(once, abs=1e-6)
    assert off(shrunk(moments(slow))) == pytest.approx(once, abs=0.15)


def test_parcels_that_some_runs_lack():
    first, second = mixture(300)[0], mixture(300, 1)[0]
    first[:, 2] = np.nan
    found = shrunk(moments(first) + moments(second))
    assert np.isfinite(found).all()
    alone = (second[:, 2] * second[:, 5]).mean()
    assert found[2, 5] == pytest.approx(alone, rel=0.05)
    nowhere = moments(np.where(np.arange(P) == 4, np.nan, second))
    assert (np.linalg.eigvalsh(positive_definite(shrunk(nowhere))) > 0).all()


def test_standardised_series():
    data, _ = mixture(50)
    data[:, 1], data[:, 3] = 7, np.nan
    used = np.arange(50) % 5 > 0
    data[~used] = 1000  # flagged volumes count for nothing
    found = standardised(data, used)
    assert found.shape == (40, P)
    assert np.isnan(found[:, [1, 3]]).all()
    np.testing.assert_allclose(np.delete(found, [1, 3], 1).std(0), 1)


# --- conditional mean ------------------------------------------------------------------------


def test_conditional_mean_by_hand():
    covariance = np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 4.0]])
    values = np.array([[2.0, 9, 9], [9, 4, 3], [9, 9, 9]])
    visible = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]], bool)
    found = conditional_mean(values, visible, covariance)
    np.testing.assert_allclose(found, [[2, 1, 0], [2, 4, 3], [0, 0, 0]])


def test_it_is_the_best_linear_prediction():
    data, covariance = mixture(4000)
    visible = np.tile(np.arange(P) % 3 > 0, (4000, 1))
    best = np.linalg.lstsq(data[visible].reshape(4000, -1), data[~visible].reshape(4000, -1))[0]
    expected = data[visible].reshape(4000, -1) @ best
    found = conditional_mean(data, visible, covariance)[~visible].reshape(4000, -1)
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert score(found, data[~visible].reshape(4000, -1)).r2 > 0.7


def test_hidden_values_are_never_used():
    data, _ = mixture()
    rng = np.random.default_rng(3)
    visible = rng.random(data.shape) > 0.4
    changed = np.where(visible, data, 1e6)
    for estimate in (covariance_of_visible, level_and_spread):
        np.testing.assert_array_equal(estimate(data, visible), estimate(changed, visible))


def test_estimate_approaches_that_of_complete_data():
    """Far nearer than the covariance of the visible products alone."""
    data, _ = mixture(1000)
    visible = np.random.default_rng(3).random(data.shape) > 0.4
    complete = shrunk(moments(data))
    found = covariance_of_visible(data, visible)
    alone = shrunk(moments(np.where(visible, data, 0)))
    distance = lambda c: np.linalg.norm(c - complete) / np.linalg.norm(complete)
    assert distance(found) < 0.1 < 0.4 < distance(alone)
    everything = covariance_of_visible(data, np.ones_like(visible))
    np.testing.assert_allclose(everything, complete, rtol=1e-6)


def test_parcels_without_a_visible_sample():
    data, _ = mixture(100)
    visible = np.ones(data.shape, bool)
    visible[:, 4] = False
    data[:, 7] = 3.0
    level, spread = level_and_spread(data, visible)
    assert level[4] == pytest.approx(data[:, np.arange(P) != 4].mean())
    assert spread[7] == pytest.approx(np.median(np.delete(data, [4, 7], 1).std(0)))
    windows = data[:100].T[None]
    found = from_covariance(windows, visible.T[None], data, visible)
    np.testing.assert_allclose(found[0, 4], level[4])
    np.testing.assert_allclose(np.delete(found[0], 4, 0), np.delete(windows[0], 4, 0))


def test_levels_and_units_of_parcels_are_kept():
    data, covariance = mixture(2000)
    unit, level = np.geomspace(0.01, 100, P), 50 * np.arange(P)
    series = level + unit * data
    visible = np.random.default_rng(1).random(data.shape) > 0.2
    sd = np.sqrt(np.diag(covariance))
    found = from_covariance(
        series.T[None], visible.T[None], series, visible, covariance / np.outer(sd, sd)
    )
    r2 = score(np.where(visible, np.nan, found[0].T), series, axis=0).r2
    assert (r2 > 0.4).all()


def test_points_visible_in_one_of_two_windows_are_not_in_the_estimate():
    samples = np.array([[0, 1, 2], [1, 2, 3]])
    points = np.ones((2, 1, 3), bool)
    points[0, 0, 2] = points[1, 0, 0] = False
    assert in_all_windows(points, samples, 4)[:, 0].tolist() == [True, False, False, True]


# --- real series -----------------------------------------------------------------------------


@pytest.mark.parametrize(('hidden', 'r2'), [(0.2, 0.57), (0.75, 0.49), (0.9, 0.36)])
def test_other_people_predict_real_series(shared, hidden, r2):
    """Five people of AOMIC, each by the others' covariance, points hidden at random."""
    file = np.load(shared / 'data' / 'aomic_schaefer100-7net_5subj.npz')
    people = {name: file[name] for name in file if name.startswith('sub_')}
    sums = {n: moments(standardised(x, np.ones(len(x), bool))) for n, x in people.items()}
    found = []
    for number, (name, series) in enumerate(people.items()):
        correlation = shrunk(sum(sums[other] for other in people if other != name))
        visible = np.random.default_rng(number).random(series.shape) > hidden
        made = from_covariance(series.T[None], visible.T[None], series, visible, correlation)
        spread = series.std(axis=0)
        target = np.where(visible, np.nan, (series - series.mean(axis=0)) / spread)
        prediction = (made[0].T - series.mean(axis=0)) / spread
        found.append(score(prediction, target).r2)
    assert np.mean(found) == pytest.approx(r2, abs=0.025)
