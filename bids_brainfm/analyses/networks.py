"""Which functional network a parcel belongs to: clusters, and what features tell of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bids_brainfm.analyses.nulls import moran_basis, moran_surrogate
from bids_brainfm.errors import BrainfmError

# Numbers of clusters that are tried when none is given; 7 and 17 are the usual ones.
TRIED = range(4, 21)
UNMATCHED = 'unmatched'
# The labels are shuffled this often: the mean is then known to one percent in 100 parcels.
SHUFFLES = 20


def fisher_z(relmat: np.ndarray) -> np.ndarray:
    """Fisher z of correlations (P, P); NaN where one is missing, and of a parcel with itself."""
    relmat = np.array(relmat, float)
    np.fill_diagonal(relmat, np.nan)
    # two parcels with the same series would have an infinite z
    return np.arctanh(np.clip(relmat, -0.999999, 0.999999))


def fill_gaps(features: np.ndarray) -> np.ndarray:
    """Set to 0 what is missing of a parcel that has other features (P, F).

    >>> fill_gaps(np.array([[1.0, np.nan], [np.nan, np.nan]]))
    array([[ 1.,  0.],
           [nan, nan]])
    """
    some = np.isfinite(features).any(axis=1, keepdims=True)
    return np.where(some & np.isnan(features), 0.0, features)


def fc_features(relmat: np.ndarray) -> np.ndarray:
    """Features of parcels from connectivity: to whom each is connected.

    Parameters
    ----------
    relmat : (P, P) float
        Pearson correlations; NaN where parcels are missing.

    Returns
    -------
    (P, P) float64
        Fisher z of the rows, 0 for a parcel with itself. The row of a missing parcel, one without
        any correlation to others, is NaN; the others have 0 where a correlation is missing, and
        so are finite.

    Examples
    --------
    >>> fc_features(np.array([[1, 0.5, np.nan], [0.5, 1, np.nan], [np.nan] * 3])).round(2)
    array([[0.  , 0.55, 0.  ],
           [0.55, 0.  , 0.  ],
           [ nan,  nan,  nan]])
    """
    return fill_gaps(fisher_z(relmat))


@dataclass(frozen=True)
class Clusters:
    """Parcels in clusters, of which 1 is the largest."""

    labels: np.ndarray
    """(P,) int, 1 to the number of clusters; 0 for parcels without features."""
    confidence: np.ndarray
    """(P,) float, silhouette of each parcel, -1 to 1; NaN where the label is 0."""
    silhouette: dict[int, float]
    """Mean silhouette for each number of clusters that was tried."""

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return int(self.labels.max())


def cluster_parcels(features: np.ndarray, n_clusters: int | None, seed: int) -> Clusters:
    """Group parcels with alike features by k-means.

    Rows are centred and scaled to unit length, so that the squared distance of two parcels is
    2 (1 - r), r the correlation of their features. How well a parcel lies in its cluster is told
    by its silhouette, as in Yeo et al. (2011, doi:10.1152/jn.00338.2011).

    Parameters
    ----------
    features : (P, F) float
        Parcels whose features are not all finite, or all the same, are left out.
    n_clusters : int or None
        None tries 4 to 20 and takes the number with the best mean silhouette.
    seed : int
        The same seed gives the same clusters.

    Returns
    -------
    Clusters
        Numbered by decreasing size; of clusters of one size the one with the first parcel leads.

    Raises
    ------
    BrainfmError
        Fewer than two clusters are asked for, or there are too few parcels with different
        features.

    Examples
    --------
    >>> features = np.array([[1, 2, 4], [2, 4, 9], [5, 3, 1], [4, 2, 0], [5, 4, 2], [1, 1, 1]])
    >>> cluster_parcels(features, 2, seed=0).labels
    array([2, 2, 1, 1, 1, 0])
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_samples

    if n_clusters is not None and n_clusters < 2:
        raise BrainfmError(f'The number of clusters is {n_clusters}: ask for at least 2.')
    tried = TRIED if n_clusters is None else [n_clusters]
    unit = _unit_rows(features)
    usable = np.isfinite(unit).all(axis=1)
    unit = unit[usable]
    different = len(np.unique(unit, axis=0))
    if different <= max(tried):
        raise BrainfmError(
            f'{different} of {len(usable)} parcels have features, each of its own, too few for '
            f'{max(tried)} clusters: ask for fewer clusters, or look at the series of the parcels.'
        )
    silhouettes = {}
    for k in tried:
        found = KMeans(k, n_init=20, random_state=seed).fit_predict(unit)
        silhouettes[k] = silhouette_samples(unit, found), found
    means = {k: float(np.mean(values)) for k, (values, _) in silhouettes.items()}
    values, found = silhouettes[max(means, key=means.get)]
    labels, confidence = np.zeros(len(usable), int), np.full(len(usable), np.nan)
    labels[usable], confidence[usable] = _by_size(found), values
    return Clusters(labels, confidence, means)


def match_networks(labels: np.ndarray, reference: Sequence[str | None]) -> list[str]:
    """Name clusters after the known networks that they overlap.

    Each network is given to one cluster so that the sum of the Dice overlaps is largest. Clusters
    that are left over take the network of their largest overlap.

    Parameters
    ----------
    labels : (P,) int
        Clusters 1 to k; 0 for parcels in none.
    reference : sequence of P str or None
        Network of each parcel; parcels with an empty name, ``'n/a'`` or None, or with the label
        0, do not count.

    Returns
    -------
    list of k str
        Network of cluster 1, 2, ...; ``'unmatched'`` for a cluster that overlaps none.

    Raises
    ------
    BrainfmError
        The two are not of the same parcels, or no parcel has both a cluster and a network.

    Examples
    --------
    >>> match_networks(np.array([2, 2, 1, 1, 3, 0]), ['Vis', 'Vis', 'Cont', 'Cont', 'Vis', 'Vis'])
    ['Cont', 'Vis', 'Vis']
    """
    from scipy.optimize import linear_sum_assignment

    labels = np.asarray(labels)
    both, names = _both(labels, reference)
    networks = np.unique(names[both])
    in_cluster = (labels[both] == np.arange(1, labels.max() + 1)[:, None]).astype(float)
    in_network = (names[both] == networks[:, None]).astype(float)
    sizes = in_cluster.sum(axis=1)[:, None] + in_network.sum(axis=1)
    dice = 2 * in_cluster @ in_network.T / sizes
    matched = dice.argmax(axis=1)
    rows, columns = linear_sum_assignment(dice, maximize=True)
    # A cluster that gets a network it does not share a parcel with is left over, too.
    shares = dice[rows, columns] > 0
    matched[rows[shares]] = columns[shares]
    return [
        str(networks[network]) if overlap.any() else UNMATCHED
        for network, overlap in zip(matched, dice, strict=True)
    ]


def agreement(labels: np.ndarray, reference: Sequence[str | None]) -> dict[str, float]:
    """How well clusters agree with known networks.

    Parameters
    ----------
    labels, reference
        As :func:`match_networks` takes them.

    Returns
    -------
    dict of float
        ``AdjustedRandIndex`` (0 by chance), ``NormalisedMutualInformation``, and ``Accuracy``,
        the share of parcels whose cluster :func:`match_networks` names after their network.
        Accuracy grows with the number of clusters beyond that of networks, since several may
        bear one name.

    Raises
    ------
    BrainfmError
        As :func:`match_networks`.

    Examples
    --------
    >>> agreement(np.array([2, 2, 1, 1]), ['Vis', 'Vis', 'Cont', 'Cont'])['AdjustedRandIndex']
    1.0
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    labels = np.asarray(labels)
    both, names = _both(labels, reference)
    matched = np.array(match_networks(labels, reference))[labels[both] - 1]
    return {
        'AdjustedRandIndex': float(adjusted_rand_score(names[both], labels[both])),
        'NormalisedMutualInformation': float(
            normalized_mutual_info_score(names[both], labels[both])
        ),
        'Accuracy': float(np.mean(matched == names[both])),
    }


@dataclass(frozen=True)
class KnnScore:
    """How often the network of a held-out parcel was named rightly."""

    name: str
    accuracy: float
    """Share of parcels, mean over repeats (shuffles, surrogates)."""
    accuracy_sd: float
    """Standard deviation over these."""
    balanced_accuracy: float
    """Mean over networks of the share of their parcels, so that large networks count no more."""
    balanced_accuracy_sd: float
    n_parcels: int
    p: float
    """Share of surrogates that do as well, NaN where this is not asked."""


@dataclass(frozen=True)
class KnnResult:
    """What :func:`knn_protocol` found."""

    scores: dict[str, KnnScore]
    """By name: features, majority, xyz, what else was given, shuffled, spatial null."""
    null: np.ndarray
    """(N,) float, accuracy of each surrogate."""
    observed: float
    """Accuracy of the features on the folds of the surrogates, what p compares with `null`."""
    n_neighbours: int
    """Number of neighbours that voted."""
    left_aside: dict[str, int]
    """Networks that have too few parcels to be held out, with their number of parcels."""


def knn_protocol(
    features: np.ndarray,
    reference: Sequence[str | None],
    xyz: np.ndarray,
    n_neighbours: int | None = None,
    folds: int = 5,
    repeats: int = 5,
    surrogates: int = 100,
    seed: int = 0,
    given: dict[str, np.ndarray] | None = None,
) -> KnnResult:
    """Tell the network of held-out parcels from the networks of those with alike features.

    The zero-shot protocol of BrainLM (Ortega Caro et al. 2024, ICLR,
    https://openreview.net/forum?id=RwI7ZEfR27): parcels of one recording are held out, 20 % with
    five folds, and a k-nearest-neighbour classifier names their networks from the others. Their
    layer, number of neighbours and distance are not published. Features that merely vary smoothly
    over the brain do this better than chance, hence the references:

    - ``majority``: always the largest network of the training parcels;
    - ``xyz``: neighbours in the brain instead of in features;
    - ``shuffled``: the same with shuffled labels, a control of the protocol;
    - ``spatial null``: Moran surrogates of the features (:mod:`~bids_brainfm.analyses.nulls`),
      smooth as these are but laid out at random. Features that hold the place of a parcel itself
      beat them too, and must be compared with ``xyz``.

    Parameters
    ----------
    features : (P, F) float
        Rows are centred and scaled to unit length, so that near means highly correlated.
    reference : sequence of P str or None
        Network of each parcel. Parcels without one (empty, ``'n/a'``, None), without finite
        features or without a centre are left aside, and so are networks with fewer parcels than
        folds.
    xyz : (P, 3) float
        Centres of the parcels in mm.
    n_neighbours : int, optional
        The square root of the number of training parcels where not given, a usual rule of thumb.
        Of equally frequent networks among the neighbours the first by alphabet is taken.
    folds : int
        Each holds out a like share of every network.
    repeats : int
        How often the parcels are divided anew.
    surrogates : int
        Number N of surrogates, each with the folds of the first repeat; the smallest p is
        1 / (N + 1).
    seed : int
    given : dict of (P, G) float, optional
        What else a model is told of the place of each parcel, by name: a table of gradients.
        Networks that are in there already need no model, so each is scored like ``xyz``.

    Returns
    -------
    KnnResult

    Raises
    ------
    BrainfmError
        Fewer than two networks remain, fewer training parcels than neighbours, a number that
        makes no protocol, or arrays that are not of the same parcels.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> names = ['Vis', 'Default'] * 20
    >>> features = np.tile(np.eye(2), (20, 1)) @ rng.normal(size=(2, 8))
    >>> found = knn_protocol(features, names, rng.normal(0, 40, (40, 3)), surrogates=19)
    >>> found.scores['features'].accuracy, found.scores['features'].p
    (1.0, 0.05)
    """
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    if folds < 2 or min(1 if n_neighbours is None else n_neighbours, repeats, surrogates) < 1:
        raise BrainfmError(
            f'{n_neighbours} neighbours, {folds} folds, {repeats} repeats and {surrogates} '
            'surrogates make no protocol: ask for at least 2 folds and 1 of the others.'
        )
    usable, names, left_aside = _comparable(features, reference, xyz, folds)
    places = {'xyz': xyz} | (given or {})
    raw, xyz = np.asarray(features, float)[usable], np.asarray(xyz, float)[usable]
    truth = np.unique(names[usable], return_inverse=True)[1]

    def split(truth, repeat):
        kfold = StratifiedKFold(folds, shuffle=True, random_state=seed + repeat)
        return list(kfold.split(truth, truth))

    splits = [split(truth, repeat) for repeat in range(repeats)]
    training = min(len(train) for train, _ in splits[0])
    if n_neighbours is None:
        n_neighbours = round(training**0.5)
    if training < n_neighbours:
        raise BrainfmError(
            f'{training} training parcels have no {n_neighbours} neighbours: ask for fewer '
            'neighbours or use an atlas with more parcels.'
        )

    by_features = _nearest(_unit_rows(raw), n_neighbours)
    by_place = {
        name: _nearest(StandardScaler().fit_transform(np.asarray(place)[usable]), n_neighbours)
        for name, place in places.items()
    }
    shuffle = np.random.default_rng([seed, 0])
    shuffled = [shuffle.permutation(truth) for _ in range(SHUFFLES)]
    flip, basis = np.random.default_rng([seed, 1]), moran_basis(xyz)
    moved = (_unit_rows(moran_surrogate(raw, basis, flip)) for _ in range(surrogates))
    runs = {
        'features': [_held_out(by_features, truth, held) for held in splits],
        'majority': [_held_out(_largest, truth, held) for held in splits],
        **{
            name: [_held_out(near, truth, held) for held in splits]
            for name, near in by_place.items()
        },
        'shuffled': [
            _held_out(by_features, labels, split(labels, repeat))
            for repeat, labels in enumerate(shuffled)
        ],
        'spatial null': [
            _held_out(_nearest(rows, n_neighbours), truth, splits[0]) for rows in moved
        ],
    }
    null, observed = np.array(runs['spatial null'])[:, 0], runs['features'][0][0]
    p = float((1 + (null >= observed).sum()) / (1 + surrogates))
    scores = {
        name: _score(name, run, len(truth), p if name == 'features' else np.nan)
        for name, run in runs.items()
    }
    return KnnResult(scores, null, observed, n_neighbours, left_aside)


def _unit_rows(features):
    """(P, F) rows centred and of unit length; NaN those that are constant or not finite."""
    features = np.asarray(features, float)
    finite = np.isfinite(features).all(axis=1)
    features = np.where(finite[:, None], features, np.nan)
    centred = features - features.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1)
    # a constant row is constant up to the rounding of its mean
    usable = norm > 1e-6 * np.abs(features).max(axis=1)
    norm[~usable] = np.nan
    return centred / norm[:, None]


def _by_size(found):
    """(P,) clusters numbered from 1 by decreasing size, then by their first parcel."""
    _, first, inverse, size = np.unique(
        found, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(size), int)
    rank[np.lexsort((first, -size))] = np.arange(1, len(size) + 1)
    return rank[inverse]


def _named(reference, parcels):
    """(P,) names of networks, empty for parcels without one."""
    if len(reference) != parcels:
        raise BrainfmError(
            f'The networks are given for {len(reference)} parcels, there are {parcels}: give the '
            'networks of the same atlas, one for each row of its table.'
        )
    # pandas reads an empty cell as NaN, a float
    return np.array([n if isinstance(n, str) and n != 'n/a' else '' for n in reference])


def _both(labels, reference):
    """Which parcels have a cluster and a network, and the names of all."""
    names = _named(reference, len(labels))
    both = (labels > 0) & (names != '')
    if not both.any():
        raise BrainfmError(
            'No parcel has both a cluster and a network to compare with: use an atlas whose '
            'table names networks.'
        )
    return both, names


def _comparable(features, reference, xyz, folds):
    """Which parcels take part in the protocol, all names, and networks that are too small."""
    names = _named(reference, len(features))
    if len(xyz) != len(features):
        raise BrainfmError(
            f'There are centres of {len(xyz)} parcels and features of {len(features)}: give both '
            'of one atlas.'
        )
    usable = np.isfinite(_unit_rows(features)).all(axis=1) & np.isfinite(xyz).all(axis=1)
    usable &= names != ''
    networks, members = np.unique(names[usable], return_counts=True)
    small = members < folds
    left_aside = {str(n): int(m) for n, m in zip(networks[small], members[small], strict=True)}
    if len(networks) - len(left_aside) < 2:
        raise BrainfmError(
            f'The number of networks with at least {folds} parcels that have features and a '
            f'centre is {len(networks) - len(left_aside)}, and two are needed to tell them '
            'apart: use an atlas whose table names networks, or fewer folds.'
        )
    return usable & ~np.isin(names, networks[small]), names, left_aside


def _nearest(rows, n_neighbours) -> Callable:
    """A classifier by nearest rows; distances are computed once for all folds."""
    from sklearn.metrics import euclidean_distances
    from sklearn.neighbors import KNeighborsClassifier

    distance = euclidean_distances(rows)

    def predict(truth, train, test):
        model = KNeighborsClassifier(n_neighbours, metric='precomputed')
        model.fit(distance[np.ix_(train, train)], truth[train])
        return model.predict(distance[np.ix_(test, train)])

    return predict


def _largest(truth, train, _):
    """The network that most training parcels are of."""
    return np.bincount(truth[train]).argmax()


def _held_out(predict, truth, splits):
    """Accuracy and balanced accuracy once every parcel has been held out."""
    from sklearn.metrics import balanced_accuracy_score

    found = np.empty_like(truth)
    for train, test in splits:
        found[test] = predict(truth, train, test)
    return float(np.mean(found == truth)), float(balanced_accuracy_score(truth, found))


def _score(name, run, parcels, p):
    """Mean and spread over repeats."""
    (accuracy, balanced), (sd, balanced_sd) = np.mean(run, axis=0), np.std(run, axis=0)
    return KnnScore(
        name, float(accuracy), float(sd), float(balanced), float(balanced_sd), parcels, float(p)
    )
