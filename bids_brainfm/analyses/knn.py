"""How well features of parcels tell the networks of held-out parcels: k nearest neighbours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bids_brainfm.analyses.networks import named, unit_rows
from bids_brainfm.analyses.nulls import moran_basis, moran_surrogate
from bids_brainfm.errors import BrainfmError

# The labels are shuffled this often: the mean is then known to one percent in 100 parcels.
SHUFFLES = 20

Splits = list[tuple[np.ndarray, np.ndarray]]  # training and held-out parcels of each fold
Classifier = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (truth, train, test)


@dataclass(frozen=True)
class KnnScore:
    """How often the network of a held-out parcel was named correctly.

    Means and standard deviations are over repeats (shuffles, surrogates).
    """

    name: str
    accuracy: float  # proportion of parcels
    accuracy_sd: float
    balanced_accuracy: float  # mean over networks of the proportion of their parcels
    balanced_accuracy_sd: float
    n_parcels: int
    p: float  # proportion of surrogates that do as well, NaN except for the features


@dataclass(frozen=True)
class KnnResult:
    """Scores of the features and of what they are compared with."""

    scores: dict[str, KnnScore]  # features, majority, xyz, what else was given, and controls
    null: np.ndarray  # (N,) accuracy of each surrogate
    observed: float  # accuracy on the folds of the surrogates, what p compares with `null`
    n_neighbours: int
    left_aside: dict[str, int]  # networks with too few parcels to be held out, and their number


def knn_protocol(
    features: np.ndarray, reference: Sequence[str | None], xyz: np.ndarray,
    n_neighbours: int | None = None, folds: int = 5, repeats: int = 5, surrogates: int = 100,
    seed: int = 0, given: dict[str, np.ndarray] | None = None,
) -> KnnResult:  # fmt: skip
    """Tell the network of held-out parcels from the networks of those with similar features.

    The zero-shot protocol of BrainLM (Ortega Caro et al. 2024, ICLR,
    https://openreview.net/forum?id=RwI7ZEfR27): parcels of one recording are held out, 20 % with
    five folds, and a k-nearest-neighbour classifier names their networks from the others. Their
    layer, number of neighbours and distance are not published. The references:

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
    xyz : (P, 3) float, centres of the parcels in mm
    n_neighbours : int, optional
        Where not given, the square root of the number of training parcels, a rule of thumb.
        Of equally frequent networks among the neighbours the first by alphabet is taken.
    folds, repeats : int; each fold holds out an equal proportion of every network
    surrogates : int, N, each with the folds of the first repeat; the smallest p is 1 / (N + 1)
    given : dict of (P, G) float, optional
        What else a model knows of the place of parcels (gradients), scored like ``xyz``.

    Raises
    ------
    BrainfmError
        Fewer than two networks remain, fewer training parcels than neighbours, a number that
        makes no protocol, or arrays that are not of the same parcels.
    """
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    if folds < 2 or min(1 if n_neighbours is None else n_neighbours, repeats, surrogates) < 1:
        raise BrainfmError(
            f'{n_neighbours} neighbours, {folds} folds, {repeats} repeats and {surrogates} '
            'surrogates make no protocol: ask for at least 2 folds and 1 of the others.'
        )
    usable, names, left_aside = _comparable(features, reference, xyz, folds)
    raw = np.asarray(features, float)[usable]
    places = {n: np.asarray(x)[usable] for n, x in ({'xyz': xyz} | (given or {})).items()}
    truth = np.unique(names[usable], return_inverse=True)[1]

    def split(truth: np.ndarray, repeat: int) -> Splits:
        kfold = StratifiedKFold(folds, shuffle=True, random_state=seed + repeat)
        return list(kfold.split(truth, truth))

    splits = [split(truth, repeat) for repeat in range(repeats)]
    training = min(len(train) for train, _ in splits[0])
    n_neighbours = round(training**0.5) if n_neighbours is None else n_neighbours
    if training < n_neighbours:
        raise BrainfmError(
            f'{training} training parcels have no {n_neighbours} neighbours: ask for fewer '
            'neighbours or use an atlas with more parcels.'
        )

    by_features = _nearest(unit_rows(raw), n_neighbours)
    shuffle = np.random.default_rng([seed, 0])
    shuffled = [shuffle.permutation(truth) for _ in range(SHUFFLES)]
    flip = np.random.default_rng([seed, 1])
    basis = moran_basis(places['xyz'])
    moved = (unit_rows(moran_surrogate(raw, basis, flip)) for _ in range(surrogates))
    largest: Classifier = lambda truth, train, test: np.full(
        len(test), np.bincount(truth[train]).argmax()
    )
    classifiers = {'features': by_features, 'majority': largest} | {
        name: _nearest(StandardScaler().fit_transform(place), n_neighbours)
        for name, place in places.items()
    }
    runs = {
        name: [_held_out(classify, truth, folds) for folds in splits]
        for name, classify in classifiers.items()
    }
    runs['shuffled'] = [
        _held_out(by_features, labels, split(labels, n)) for n, labels in enumerate(shuffled)
    ]
    by_null = (_nearest(rows, n_neighbours) for rows in moved)
    runs['spatial null'] = [_held_out(classify, truth, splits[0]) for classify in by_null]
    null, observed = np.array(runs['spatial null'])[:, 0], runs['features'][0][0]
    p = float((1 + (null >= observed).sum()) / (1 + surrogates))
    scores = {}
    for name, run in runs.items():  # of the accuracy and of the balanced accuracy
        mean, sd = np.mean(run, axis=0).tolist(), np.std(run, axis=0).tolist()
        own_p = p if name == 'features' else np.nan
        scores[name] = KnnScore(name, mean[0], sd[0], mean[1], sd[1], len(truth), own_p)
    return KnnResult(scores, null, observed, n_neighbours, left_aside)


def _comparable(
    features: np.ndarray, reference: Sequence[str | None], xyz: np.ndarray, folds: int
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Which parcels take part in the protocol, all names, and networks that are too small."""
    names = named(reference, len(features))
    if len(xyz) != len(features):
        raise BrainfmError(
            f'There are centres of {len(xyz)} parcels and features of {len(features)}: give both '
            'of one atlas.'
        )
    usable = np.isfinite(unit_rows(features)).all(axis=1) & np.isfinite(xyz).all(axis=1)
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


def _nearest(rows: np.ndarray, n_neighbours: int) -> Classifier:
    """Classify by nearest rows; distances are computed once for all folds."""
    from sklearn.metrics import euclidean_distances
    from sklearn.neighbors import KNeighborsClassifier

    distance = euclidean_distances(rows)

    def classify(truth: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        model = KNeighborsClassifier(n_neighbours, metric='precomputed')
        model.fit(distance[np.ix_(train, train)], truth[train])
        return model.predict(distance[np.ix_(test, train)])

    return classify


def _held_out(classify: Classifier, truth: np.ndarray, splits: Splits) -> tuple[float, float]:
    """Accuracy and balanced accuracy once every parcel has been held out."""
    from sklearn.metrics import balanced_accuracy_score

    found = np.empty_like(truth)
    for train, test in splits:
        found[test] = classify(truth, train, test)
    return float(np.mean(found == truth)), float(balanced_accuracy_score(truth, found))
