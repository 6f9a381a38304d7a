"""Clusters, their match with known networks, the k-NN protocol and its spatial null."""

import numpy as np
import pytest

from bids_brainfm.analyses.knn import SHUFFLES, knn_protocol
from bids_brainfm.analyses.networks import (
    agreement,
    cluster_parcels,
    fc_features,
    match_networks,
)
from bids_brainfm.analyses.nulls import moran_basis, moran_surrogate
from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.connectome import connectome

NETWORKS = ('Cont', 'Default', 'DorsAttn', 'Limbic', 'SalVentAttn', 'SomMot', 'Vis')
ROWS = ['features', 'majority', 'xyz', 'shuffled', 'spatial null']


@pytest.fixture(scope='module')
def brain():
    """Centres (140, 3) of parcels in a head, in mm: evenly spread, as an atlas has them."""
    number = np.arange(140)
    angle, height = number * np.pi * (3 - 5**0.5), 1 - (2 * number + 1) / 140
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(angle) * 60, radius * np.sin(angle) * 80, height * 55], 1)


@pytest.fixture(scope='module')
def planted():
    """Five networks of unequal size, in mixed order, and series (300, 120) that they drive."""
    rng = np.random.default_rng(1)
    network = rng.permutation(np.repeat(np.arange(5), (40, 30, 22, 16, 12)))
    series = rng.normal(size=(300, 5))[:, network] + 0.8 * rng.normal(size=(300, 120))
    return np.array(NETWORKS)[network], series


def one_hot(names, noise=0.05, seed=0):
    """Features that are the labels, nearly."""
    hot = (np.asarray(names)[:, None] == np.unique(names)).astype(float)
    return hot + noise * np.random.default_rng(seed).normal(size=hot.shape)


def patches(xyz, seed):
    """Seven networks of near parcels."""
    centres = xyz[np.random.default_rng(seed).choice(len(xyz), 7, replace=False)]
    nearest = np.linalg.norm(xyz[:, None] - centres, axis=2).argmin(1)
    return np.array(NETWORKS)[nearest]


def smooth_maps(xyz, number, seed):
    """Waves over the brain of 80 to 250 mm."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(3, number, 4))
    direction /= np.linalg.norm(direction, axis=0) * rng.uniform(80, 250, (number, 4))
    phase = rng.uniform(0, 2 * np.pi, (number, 4))
    return np.cos(2 * np.pi * np.einsum('px,xfw->pfw', xyz, direction) + phase).sum(2)


def morans_i(values, xyz):
    """Moran's I from its definition, with inverse distances as weights."""
    above, weight = 0.0, 0.0
    centred = values - values.mean()
    for i in range(len(xyz)):
        for j in range(len(xyz)):
            if i != j:
                w = 1 / np.linalg.norm(xyz[i] - xyz[j])
                above += w * centred[i] * centred[j]
                weight += w
    return len(xyz) / weight * above / (centred**2).sum()


# Surrogates


def test_surrogates_keep_autocorrelation_and_relations(brain):
    """Moran's I, mean, variance and covariances stay, the maps do not."""
    xyz = brain[:60]
    features = np.hstack([smooth_maps(xyz, 3, 0), np.random.default_rng(0).normal(3, 2, (60, 2))])
    basis = moran_basis(xyz)
    autocorrelation = [morans_i(column, xyz) for column in features.T]
    assert min(autocorrelation[:3]) > 0.05 > max(np.abs(autocorrelation[3:]))
    rng = np.random.default_rng(1)
    alike = []
    for _ in range(5):
        moved = moran_surrogate(features, basis, rng)
        assert [morans_i(column, xyz) for column in moved.T] == pytest.approx(autocorrelation)
        np.testing.assert_allclose(moved.mean(0), features.mean(0))
        np.testing.assert_allclose(np.cov(moved.T), np.cov(features.T), atol=1e-9)
        alike += [np.corrcoef(a, b)[0, 1] for a, b in zip(moved.T, features.T, strict=True)]
    assert abs(np.mean(alike)) < 0.2
    assert np.max(alike) < 0.95


def test_basis_spans_all_maps_but_the_constant(brain):
    basis = moran_basis(brain)
    assert basis.shape == (140, 139)
    np.testing.assert_allclose(basis.T @ basis, np.eye(139), atol=1e-10)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-10)
    found = [morans_i(basis[:, column], brain) for column in (0, 1, 69, 138)]
    assert found == sorted(found, reverse=True)


def test_parcels_with_one_centre(brain):
    """They count as 1 mm apart: the basis stays whole and the variance is kept."""
    xyz = brain.copy()
    xyz[1:4] = xyz[0]
    basis = moran_basis(xyz)
    np.testing.assert_allclose(basis.T @ basis, np.eye(139), atol=1e-10)
    features = smooth_maps(brain, 2, 0)
    moved = moran_surrogate(features, basis, np.random.default_rng(0))
    np.testing.assert_allclose(moved.std(0), features.std(0))
    np.testing.assert_allclose(
        moran_basis(brain[:3] * 0 + [[0, 0, 0], [0.2, 0, 0], [50, 0, 0]]),
        moran_basis(brain[:3] * 0 + [[0, 0, 0], [0, 0, 0], [50, 0, 0]]),
        atol=1e-2,
    )
    with pytest.raises(BrainfmError, match=r'without a centre \(2 of 140\).*leave them out'):
        moran_basis(np.where(np.arange(140)[:, None] < 2, np.nan, brain))


# Features from connectivity


def test_fc_features_are_fisher_z():
    relmat = connectome(np.random.default_rng(0).normal(size=(50, 6)))
    relmat[2], relmat[:, 2], relmat[0, 1], relmat[1, 0] = np.nan, np.nan, 1, 1
    relmat[3, 4] = relmat[4, 3] = np.nan
    features = fc_features(relmat)
    there = np.array([0, 1, 3, 4, 5])
    assert np.isnan(features[2]).all()
    assert np.isfinite(features[there]).all()
    assert (features[there, 2] == 0).all()
    assert (np.diag(features)[there] == 0).all()
    assert features[3, 4] == 0
    assert features[5, 0] == pytest.approx(np.arctanh(relmat[5, 0]))
    assert 7 < features[0, 1] < 8  # not infinite
    assert np.isnan(relmat[2, 2])  # the input is left as it was


def test_a_missing_parcel_with_one_on_the_diagonal_is_missing():
    relmat = np.full((4, 4), 0.5)
    relmat[1], relmat[:, 1], relmat[1, 1] = np.nan, np.nan, 1
    assert np.isnan(fc_features(relmat)).all(1).tolist() == [False, True, False, False]


# Clusters


def test_planted_networks_are_recovered(planted):
    names, series = planted
    series = series.copy()
    series[:, [3, 77]] = np.nan, 1.0  # no data, no variance
    found = cluster_parcels(fc_features(connectome(series)), None, seed=0)
    assert found.n_clusters == 5
    assert list(found.silhouette) == list(range(4, 21))
    assert max(found.silhouette, key=found.silhouette.get) == 5
    assert np.flatnonzero(found.labels == 0).tolist() == [3, 77]
    assert np.flatnonzero(np.isnan(found.confidence)).tolist() == [3, 77]
    assert np.nanmean(found.confidence) == pytest.approx(found.silhouette[5])
    assert np.nanmean(found.confidence) > 0.3
    sizes = np.bincount(found.labels)[1:]
    assert sizes.tolist() == sorted(sizes, reverse=True)
    assert agreement(found.labels, names) == pytest.approx(
        {'AdjustedRandIndex': 1, 'NormalisedMutualInformation': 1, 'Accuracy': 1}
    )
    there = np.arange(120)[found.labels > 0]
    matched = match_networks(found.labels, names)
    assert [matched[label - 1] for label in found.labels[there]] == names[there].tolist()


def test_a_parcel_between_networks_has_little_confidence(planted):
    names, series = planted
    series = series.copy()
    first, second = (np.flatnonzero(names == name)[:5] for name in NETWORKS[:2])
    series[:, first[0]] = series[:, first[1:]].mean(1) + series[:, second].mean(1)
    found = cluster_parcels(fc_features(connectome(series)), 5, seed=0)
    assert np.argmin(found.confidence) == first[0]
    assert found.confidence[first[0]] < np.median(found.confidence) / 2


def test_scale_and_mean_of_a_row_do_not_matter(planted):
    features = fc_features(connectome(planted[1]))
    rng = np.random.default_rng(0)
    stretched = features * rng.uniform(0.1, 50, (120, 1)) + rng.normal(0, 9, (120, 1))
    np.testing.assert_array_equal(
        cluster_parcels(stretched, 5, 0).labels, cluster_parcels(features, 5, 0).labels
    )


def test_clusters_repeat_with_the_seed():
    """In noise the clusters depend on the seed, and on nothing else."""
    features = np.random.default_rng(0).normal(size=(80, 10))
    first, again, other = (cluster_parcels(features, 6, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.confidence, again.confidence)
    assert (first.labels != other.labels).any()


def test_clusters_of_one_size_are_numbered_by_their_first_parcel():
    features = one_hot(list('cabbca'))
    for seed in range(5):
        assert cluster_parcels(features, 3, seed).labels.tolist() == [1, 2, 3, 3, 1, 2]


@pytest.mark.parametrize(
    ('features', 'n_clusters', 'said'),
    [
        (np.eye(30), 1, 'number of clusters is 1: ask for at least 2'),
        (np.eye(20), None, '20 of 20 parcels .* too few for 20 clusters'),
        (np.full((30, 4), np.nan), 3, '0 of 30 parcels .* too few for 3'),
        (np.tile([[1.0, 2, 4], [3, 1, 0]], (9, 1)), 3, '2 of 18 parcels .* too few for 3'),
        (np.tile(np.arange(30) / 7, (11, 1)).T, 2, '0 of 30 parcels'),  # constant but for rounding
    ],
)
def test_too_little_to_cluster_is_refused(features, n_clusters, said):
    with pytest.raises(BrainfmError, match=said):
        cluster_parcels(features, n_clusters, 0)


# Matching


def test_matching_does_not_mind_how_clusters_are_numbered(planted):
    names = planted[0]
    rng = np.random.default_rng(0)
    truth = np.unique(names, return_inverse=True)[1] + 1
    for _ in range(5):
        number = rng.permutation(5) + 1
        labels = number[truth - 1]
        wanted = np.array(NETWORKS[:5])[np.argsort(number)].tolist()
        assert match_networks(labels, names) == wanted
        noisy = np.where(rng.random(120) < 0.2, rng.integers(1, 6, 120), labels)
        assert match_networks(noisy, names) == wanted
        assert agreement(noisy, names)['Accuracy'] == np.mean(noisy == labels) > 0.7


def test_matching_is_one_to_one_before_it_is_greedy():
    """Both clusters overlap Vis most; the total is largest when the second takes Cont."""
    labels = np.repeat([1, 2], [6, 5])
    names = ['Vis'] * 10 + ['Cont']
    assert match_networks(labels, names) == ['Vis', 'Cont']
    assert agreement(labels, names)['Accuracy'] == pytest.approx(7 / 11)


def test_no_cluster_gets_a_network_that_it_does_not_touch():
    """Default is left for cluster 2, which is all Vis."""
    labels = np.repeat([1, 2, 3], [4, 2, 3])
    names = ['Vis'] * 6 + ['Cont'] * 2 + ['Default']
    assert match_networks(labels, names) == ['Vis', 'Vis', 'Cont']


def test_more_clusters_than_networks():
    labels = np.array([1, 1, 1, 2, 2, 3, 3, 4, 5, 5, 0])
    names = ['Vis', 'Vis', 'Vis', 'Vis', 'Vis', 'Cont', 'Cont', 'Cont', 'n/a', None, 'Cont']
    assert match_networks(labels, names) == ['Vis', 'Vis', 'Cont', 'Cont', 'unmatched']
    assert agreement(labels, names)['Accuracy'] == 1
    assert match_networks(labels, [*names[:8], '', float('nan'), 'Cont'])[4] == 'unmatched'


def test_overlap_is_dice():
    """A leftover takes the network it shares most with in proportion, not in parcels."""
    labels = np.repeat([1, 2, 3], [20, 4, 5])
    names = ['Vis'] * 20 + ['Cont'] * 4 + ['Vis'] * 3 + ['Cont'] * 2
    # shares 3 of 5 + 23 parcels with Vis, 2 of 5 + 6 with Cont
    assert match_networks(labels, names) == ['Vis', 'Cont', 'Cont']


def test_agreement_of_chance_is_nil():
    rng = np.random.default_rng(0)
    names = rng.choice(NETWORKS, 2000)
    found = agreement(rng.integers(1, 8, 2000), names)
    assert abs(found['AdjustedRandIndex']) < 0.01
    assert found['Accuracy'] < 0.2


@pytest.mark.parametrize(
    ('names', 'said'),
    [
        (['Vis'] * 3, 'for 3 parcels, there are 4'),
        (['', None, 'n/a', 'Vis'], 'No parcel has both'),
    ],
)
def test_nothing_to_match_is_refused(names, said):
    for compare in match_networks, agreement:
        with pytest.raises(BrainfmError, match=said):
            compare(np.array([1, 1, 2, 0]), names)


# The protocol


def test_features_that_are_the_labels_beat_everything(brain):
    names = np.random.default_rng(3).choice(NETWORKS, 140)
    found = knn_protocol(one_hot(names), names, brain, surrogates=60)
    scores = found.scores
    assert list(scores) == ROWS
    assert [score.name for score in scores.values()] == ROWS
    assert scores['features'].accuracy > 0.99
    assert scores['features'].balanced_accuracy > 0.99
    assert scores['features'].p == pytest.approx(1 / 61)
    assert found.observed > found.null.max() + 0.3
    assert found.null.shape == (60,)
    assert scores['spatial null'].accuracy == pytest.approx(found.null.mean())
    assert scores['spatial null'].accuracy_sd == pytest.approx(found.null.std())
    assert {score.n_parcels for score in scores.values()} == {140}
    assert np.isnan([scores[name].p for name in ROWS[1:]]).all()
    assert found.left_aside == {}


def test_chance(brain):
    """Shuffled labels are met as often as two parcels share one; the largest network is known."""
    names = np.repeat(NETWORKS, (40, 30, 25, 20, 10, 8, 7))
    share = np.array((40, 30, 25, 20, 10, 8, 7)) / 140
    scores = knn_protocol(one_hot(names), names, brain, surrogates=1).scores
    shuffled, majority = scores['shuffled'], scores['majority']
    chance = (share**2).sum()
    sd = np.sqrt(chance * (1 - chance) / 140)
    # The majority of neighbours favours large networks, hence between chance and majority.
    assert chance - 4 * sd / np.sqrt(SHUFFLES) < shuffled.accuracy < share[0]
    assert 0.5 * sd < shuffled.accuracy_sd < 2 * sd
    assert shuffled.balanced_accuracy == pytest.approx(1 / 7, abs=0.02)
    assert majority.accuracy == share[0]
    assert majority.balanced_accuracy == pytest.approx(1 / 7)
    assert majority.accuracy_sd == 0


def test_one_neighbour_meets_chance_exactly(brain):
    names = np.repeat(NETWORKS[:3], (70, 40, 30))
    share = np.array((70, 40, 30)) / 140
    found = knn_protocol(one_hot(names), names, brain, n_neighbours=1, surrogates=1)
    chance = (share**2).sum()
    tolerance = 4 * np.sqrt(chance * (1 - chance) / 140 / SHUFFLES)
    assert found.scores['shuffled'].accuracy == pytest.approx(chance, abs=tolerance)


def test_features_without_information_are_at_chance(brain):
    names = np.repeat(NETWORKS, 20)
    p, ties = [], 0
    for seed in range(4):
        noise = np.random.default_rng(seed).normal(size=(140, 30))
        found = knn_protocol(noise, names, brain, repeats=1, surrogates=20, seed=seed)
        score = found.scores['features']
        assert score.accuracy == pytest.approx(1 / 7, abs=4 * np.sqrt(1 / 7 * 6 / 7 / 140))
        assert score.p == (1 + sum(found.null >= found.observed)) / 21
        p.append(score.p)
        ties += sum(found.null == found.observed)
    assert ties > 0  # which count against the features
    assert np.median(p) > 0.1


@pytest.mark.slow
def test_smooth_features_do_not_beat_their_spatial_null(brain):
    """They tell networks of near parcels far better than chance, as their surrogates do."""
    p, accuracy = [], []
    for seed in range(6):
        names = patches(brain, seed)
        features = smooth_maps(brain, 40, seed)
        found = knn_protocol(features, names, brain, repeats=1, surrogates=30, seed=seed)
        majority = found.scores['majority'].accuracy
        assert found.scores['features'].accuracy > majority + 0.2
        assert found.scores['spatial null'].accuracy > majority + 0.1
        assert found.scores['xyz'].accuracy > 0.7
        p.append(found.scores['features'].p)
        accuracy.append(found.scores['features'].accuracy)
    print('smooth features: accuracy', np.round(accuracy, 2), 'p', np.round(p, 2))
    assert np.median(p) > 0.2
    assert np.sum(np.array(p) < 0.05) <= 1


def test_parcels_and_networks_left_aside(brain):
    """What is missing does not change what is found in the others."""
    names = np.random.default_rng(4).choice(NETWORKS[:4], 140).astype(object)
    features, xyz = one_hot(names, 0.6), brain.copy()
    out = np.arange(0, 28)
    whole = knn_protocol(features[28:], names[28:], xyz[28:], surrogates=10)
    names[:4], names[4:8], names[8:12], names[12:15] = '', 'n/a', None, 'Vis'
    features[15:20], features[20:24, 2], xyz[24:28] = np.nan, np.inf, np.nan
    features[16] = 2.0
    found = knn_protocol(features, names, xyz, surrogates=10)
    assert found.left_aside == {'Vis': 3}
    assert found.scores['features'].n_parcels == 140 - out.size
    np.testing.assert_array_equal(found.null, whole.null)
    assert repr(found.scores) == repr(whole.scores)


def test_p_compares_one_repeat_with_the_same_folds(brain):
    names = np.repeat(NETWORKS, 20)
    features = one_hot(names, 0.8)
    found = knn_protocol(features, names, brain, surrogates=30)
    once = knn_protocol(features, names, brain, repeats=1, surrogates=30)
    assert found.observed == once.scores['features'].accuracy == once.observed
    assert found.observed != found.scores['features'].accuracy
    assert found.scores['features'].accuracy_sd > 0
    np.testing.assert_array_equal(found.null, once.null)
    as_good = sum(value >= found.observed for value in found.null)
    assert found.scores['features'].p == pytest.approx((1 + as_good) / 31)


def test_neighbours_written_with_loops(brain):
    """Against an implementation from the definition, with the correlation distance."""
    from scipy.spatial.distance import cdist
    from sklearn.model_selection import StratifiedKFold

    names = np.repeat(NETWORKS, 20)
    features = one_hot(names, 0.7)
    found = knn_protocol(features, names, brain, repeats=1, surrogates=1, seed=7)
    assert found.n_neighbours == 11  # the root of 112
    distance = cdist(features, features, 'correlation')
    z = (brain - brain.mean(0)) / brain.std(0)
    place = cdist(z, z)
    told = {'features': np.empty(140, object), 'xyz': np.empty(140, object)}
    folds = StratifiedKFold(5, shuffle=True, random_state=7).split(names, names)
    for train, test in folds:
        assert test.size == 28
        for parcel in test:
            for name, far in (('features', distance), ('xyz', place)):
                near = names[train[np.argsort(far[parcel, train])[:11]]]
                kinds, votes = np.unique(near, return_counts=True)
                told[name][parcel] = kinds[votes.argmax()]
    for name, guess in told.items():
        right = guess == names
        assert found.scores[name].accuracy == pytest.approx(right.mean())
        each = [right[names == network].mean() for network in NETWORKS]
        assert found.scores[name].balanced_accuracy == pytest.approx(np.mean(each))


def test_protocol_repeats_with_the_seed(brain):
    names = np.repeat(NETWORKS, 20)
    first, again, other = (
        knn_protocol(one_hot(names, 0.8), names, brain, repeats=2, surrogates=8, seed=seed)
        for seed in (1, 1, 2)
    )
    assert repr(first) == repr(again)
    assert (first.null != other.null).any()
    assert first.scores['features'] != other.scores['features']
    assert first.scores['shuffled'] != other.scores['shuffled']


@pytest.mark.parametrize(
    ('changed', 'said'),
    [
        ({'reference': ['Vis'] * 20}, 'at least 5 parcels .* is 1, and two'),
        ({'reference': ['Vis'] * 16 + ['Cont'] * 4}, 'is 1, and two'),
        ({'reference': [''] * 20}, 'is 0, and two'),
        ({'reference': ['Vis', 'Cont']}, 'for 2 parcels, there are 20'),
        ({'features': np.full((20, 3), np.nan)}, 'is 0, and two'),
        ({'xyz': np.zeros((19, 3))}, 'centres of 19 parcels and features of 20'),
        ({'n_neighbours': 17}, '16 training parcels have no 17 neighbours'),
        ({'folds': 1}, '1 folds'),
        ({'surrogates': 0}, '0 surrogates make no protocol'),
    ],
)
def test_no_protocol_is_refused(changed, said):
    rng = np.random.default_rng(0)
    given = {
        'features': rng.normal(size=(20, 3)),
        'reference': ['Vis', 'Cont'] * 10,
        'xyz': rng.normal(0, 40, (20, 3)),
    }
    with pytest.raises(BrainfmError, match=said):
        knn_protocol(**given | changed)


# Real recordings


@pytest.mark.slow
def test_connectivity_tells_the_networks_of_real_brains(shared):
    """Five people, Schaefer-100: far beyond the best surrogate and beyond the parcels' places."""
    runs = np.load(shared / 'data' / 'aomic_schaefer100-7net_5subj.npz')
    names = [name.split('_')[2] for name in runs['names']]
    people = [name for name in runs if name.startswith('sub')]
    assert len(people) == 5
    for person in people:
        features = fc_features(connectome(runs[person].astype(float)))
        found = knn_protocol(features, names, runs['locs'])
        scores = found.scores
        print(person, f'null max {found.null.max():.2f}', *(
            f'{name} {score.accuracy:.3f} ({score.balanced_accuracy:.3f})'
            for name, score in scores.items()
        ), sep=', ')  # fmt: skip
        assert scores['features'].p == pytest.approx(1 / 101)
        assert scores['features'].accuracy > found.null.max() + 0.1
        assert scores['features'].accuracy > scores['xyz'].accuracy + 0.15
        assert 0.5 < scores['features'].accuracy < 0.75
        assert scores['features'].balanced_accuracy > 0.45
        assert scores['spatial null'].accuracy < scores['xyz'].accuracy
        assert scores['majority'].accuracy == pytest.approx(0.24)
        assert scores['shuffled'].accuracy < 0.24
        clusters = cluster_parcels(features, 7, seed=0)
        assert agreement(clusters.labels, names)['AdjustedRandIndex'] > 0.15


def test_what_a_model_is_told_of_places_is_scored_like_the_centres():
    """A table that holds the networks gives them away; one of noise does not."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 20)
    names = [f'network {k}' for k in truth]
    centres = rng.normal(0, 40, (80, 3))
    given = {'gradient table': np.eye(4)[truth] + 0.01 * rng.normal(size=(80, 4)),
             'noise': rng.normal(size=(80, 4))}  # fmt: skip
    found = knn_protocol(rng.normal(size=(80, 6)), names, centres, surrogates=9, given=given)
    assert found.scores['gradient table'].accuracy == 1
    assert found.scores['noise'].accuracy < 0.5
    assert list(found.scores) == [
        'features', 'majority', 'xyz', 'gradient table', 'noise', 'shuffled', 'spatial null',
    ]  # fmt: skip
