"""Contrasts of maps: against scipy parcel by parcel, and where values are missing."""

import warnings

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from bids_brainfm.analyses.contrast import contrast, contrast_tokens
from bids_brainfm.errors import BrainfmError


@pytest.fixture
def maps():
    """Two sides of 9 and 7 maps of 30 parcels; a is higher in the first five. Values missing."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 30)), rng.normal(0, 3, (7, 30))
    a[:, :5] += 8
    a[2, 3] = a[1, 8:12] = b[4, 10:20] = b[0, 11] = np.nan
    return a, b


@pytest.fixture(autouse=True)
def _no_warnings():
    """Missing values and few participants are no reason for a user to see a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def benjamini_hochberg(p):
    """From the definition: the smallest rate at which each would be told."""
    order = np.argsort(p)
    stepped = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(stepped[::-1])[::-1].clip(max=1)
    return q


def test_unpaired_is_welch_in_the_values_that_are_there(maps):
    a, b = maps
    found = contrast(a, b, paired=False)
    for parcel in range(30):
        one, two = (side[np.isfinite(side[:, parcel]), parcel] for side in maps)
        wanted = ttest_ind(one, two, equal_var=False)
        assert found.t[parcel] == pytest.approx(wanted.statistic)
        assert found.p[parcel] == pytest.approx(wanted.pvalue)
        assert found.difference[parcel] == pytest.approx(one.mean() - two.mean())
    np.testing.assert_allclose(found.q, benjamini_hochberg(found.p))
    assert (found.n_a, found.n_b) == (9, 7)
    assert (found.difference[:5] > 4).all()
    assert (found.q[:5] < 0.05).all()


def test_paired_leaves_out_both_of_a_pair(maps):
    a, b = maps[0][:7], maps[1]
    found = contrast(a, b, paired=True)
    for parcel in range(30):
        pairs = np.isfinite(a[:, parcel]) & np.isfinite(b[:, parcel])
        wanted = ttest_rel(a[pairs, parcel], b[pairs, parcel])
        assert found.t[parcel] == pytest.approx(wanted.statistic)
        assert found.p[parcel] == pytest.approx(wanted.pvalue)
        assert found.difference[parcel] == pytest.approx((a - b)[pairs, parcel].mean())
    np.testing.assert_allclose(found.q, benjamini_hochberg(found.p))
    assert (found.n_a, found.n_b) == (7, 7)


def test_pairs_find_what_groups_cannot():
    rng = np.random.default_rng(0)
    rest = 10 * rng.normal(size=(12, 20))
    task = rest + 1 + 0.5 * rng.normal(size=(12, 20))
    assert (contrast(task, rest, paired=True).q < 0.01).all()
    assert (contrast(task, rest, paired=False).q > 0.5).all()
    np.testing.assert_allclose(
        contrast(task, rest, paired=True).t, -contrast(rest, task, paired=True).t
    )


def test_false_discoveries_are_controlled():
    rng = np.random.default_rng(1)
    found = [contrast(*rng.normal(size=(2, 10, 50)), paired=False) for _ in range(40)]
    assert np.mean([side.p < 0.05 for side in found]) == pytest.approx(0.05, abs=0.015)
    assert np.mean([(side.q < 0.05).any() for side in found]) < 0.15


# Tokens of 424 parcels in patches of 16 with 4 rows of padding at each end, and 14 with 5
TOKENS = {16: (4 + np.arange(424)) // 16, 14: (5 + np.arange(424)) // 14}


@pytest.mark.parametrize(('patch', 'tokens'), [(16, 27), (14, 31)])
@pytest.mark.parametrize('paired', [True, False])
def test_each_token_is_tested_once_and_shown_at_its_parcels(patch, tokens, paired):
    """Three planted tokens are found; q is adjusted for the tokens, not for the parcels."""
    rng, token = np.random.default_rng(2), TOKENS[patch]
    a, b = rng.normal(size=(2, 15, tokens))
    a[:, [0, 9, 20]] += 3
    found = contrast_tokens(a[:, token], b[:, token], paired, token)
    by_token = contrast(a, b, paired)
    for name in ('difference', 't', 'p', 'q'):
        np.testing.assert_array_equal(getattr(found, name), getattr(by_token, name)[token])
    first = np.unique(token, return_index=True)[1]
    np.testing.assert_allclose(found.q[first], benjamini_hochberg(found.p[first]))
    assert np.unique(token[found.q < 0.05]).tolist() == [0, 9, 20]
    assert len(first) == tokens


def test_false_discoveries_are_controlled_over_tokens():
    """Under the null few contrasts have any discovery; half of the tokens may have an effect."""
    rng, token = np.random.default_rng(3), TOKENS[16]
    effect = 2.0 * (np.arange(27) % 2)
    any_false, proportions, power = [], [], []
    for _ in range(200):
        a, b = rng.normal(size=(2, 12, 27))
        any_false.append((contrast_tokens(a[:, token], b[:, token], False, token).q < 0.05).any())
        q = contrast_tokens((a + effect)[:, token], b[:, token], False, token).q
        discovered = np.unique(token[q < 0.05])
        proportions.append(np.mean(discovered % 2 == 0) if discovered.size else 0)
        power.append((discovered % 2 == 1).sum() / 13)
    assert np.mean(any_false) < 0.09
    assert np.mean(proportions) < 0.05
    assert np.mean(power) > 0.9


def test_missing_parcels_of_a_token_do_not_hide_the_others():
    """A parcel without a value in one map is n/a there; one without any value stays n/a."""
    rng, token = np.random.default_rng(4), TOKENS[16]
    a, b = rng.normal(size=(2, 8, 27))
    whole = contrast_tokens(a[:, token], b[:, token], True, token)
    maps = a[:, token]
    maps[2, 20:25] = maps[:, 100] = np.nan
    found = contrast_tokens(maps, b[:, token], True, token)
    for name in ('difference', 't', 'p', 'q'):
        values = getattr(found, name)
        assert np.flatnonzero(np.isnan(values)).tolist() == [100]
        np.testing.assert_allclose(np.delete(values, 100), np.delete(getattr(whole, name), 100))


def test_too_few_values():
    """Parcels: both have 2, a has 1, a has none, pairs do not meet, b has none."""
    nan = np.nan
    a = np.array([[4, 1, nan, 3, 5], [6.0, nan, nan, nan, 7]])
    b = np.array([[1, 2, 2, nan, nan], [2.0, 3, 5, 4, nan]])
    groups, pairs = contrast(a, b, paired=False), contrast(a, b, paired=True)
    np.testing.assert_allclose(groups.difference, [3.5, -1.5, nan, -1, nan])
    np.testing.assert_allclose(pairs.difference, [3.5, -1, nan, nan, nan])
    for found in groups, pairs:
        for values in found.t, found.p, found.q:
            assert np.isfinite(values).tolist() == [True, False, False, False, False]
        assert found.q[0] == found.p[0]


def test_one_map_a_side():
    found = contrast(np.array([[3.0, np.nan]]), np.array([[1.0, 2]]), paired=False)
    assert found.difference[0] == 2
    assert np.isnan(found.difference[1])
    assert np.isnan([found.t, found.p, found.q]).all()


def test_values_that_are_all_the_same_have_no_test():
    """Not p = 0; rounding is no spread. One side may be constant in groups."""
    a = np.array([[1, 0.1], [1, 0.2], [1, 0.7]])
    moved = contrast(a + 0.3, a, paired=True)
    np.testing.assert_allclose(moved.difference, 0.3)
    assert np.isnan(moved.p).all()
    groups = contrast(a, a * 0 + 5, paired=False)
    assert np.isnan(groups.p).tolist() == [True, False]


def test_the_maps_are_left_as_they_were(maps):
    before = [side.copy() for side in maps]
    contrast(maps[0][:7], maps[1], paired=True)
    for side, was in zip(maps, before, strict=True):
        np.testing.assert_array_equal(side, was)


@pytest.mark.parametrize(
    ('a', 'b', 'paired', 'said'),
    [
        ((0, 5), (3, 5), False, 'first side of the contrast has no maps'),
        ((3, 5), (0, 5), True, 'second side of the contrast has no maps'),
        ((3, 5), (4, 5), True, r'not 3 and 4 maps: leave out'),
        ((3, 5), (3, 6), False, 'has 5 parcels, the second 6'),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, paired, said):
    with pytest.raises(BrainfmError, match=said):
        contrast(np.ones(a), np.ones(b), paired)
