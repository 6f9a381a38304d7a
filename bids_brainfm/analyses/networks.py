"""Which functional network a parcel belongs to: clusters, and what features tell of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.connectome import fisher_z

# Numbers of clusters that are tried when none is given; 7 and 17 are the usual ones.
TRIED = range(4, 21)


def fc_rows(relmat: np.ndarray) -> np.ndarray:
    """Fisher z of correlations (P, P); NaN where one is missing, and of a parcel with itself."""
    relmat = np.array(relmat, float)
    np.fill_diagonal(relmat, np.nan)
    return fisher_z(relmat)


def fill_gaps(features: np.ndarray) -> np.ndarray:
    """Set to 0 what is missing of a parcel that has other features (P, F)."""
    some = np.isfinite(features).any(axis=1, keepdims=True)
    return np.where(some & np.isnan(features), 0.0, features)


def fc_features(relmat: np.ndarray) -> np.ndarray:
    """Features of parcels from connectivity (P, P): Fisher z of the rows, 0 where one is missing.

    The row of a parcel without any correlation to others is NaN.
    """
    return fill_gaps(fc_rows(relmat))


@dataclass(frozen=True)
class Clusters:
    """Parcels in clusters, of which 1 is the largest."""

    labels: np.ndarray  # (P,) int, 1 to the number of clusters; 0 for parcels without features
    confidence: np.ndarray  # (P,) silhouette of each parcel, -1 to 1; NaN where the label is 0
    silhouette: dict[int, float]  # mean silhouette for each number of clusters that was tried

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return int(self.labels.max())


def cluster_parcels(features: np.ndarray, n_clusters: int | None, seed: int) -> Clusters:
    """Group parcels with similar features by k-means.

    Rows are centred and scaled to unit length, so that the squared distance of two parcels is
    2 (1 - r), r the correlation of their features. Silhouettes measure how well parcels fit into
    their clusters, as in Yeo et al. (2011, doi:10.1152/jn.00338.2011).

    Parcels whose features (P, F) are not all finite, or all the same, are left out. `n_clusters`
    None tries 4 to 20 and takes the number with the best mean silhouette. Clusters are numbered
    by decreasing size; of clusters of one size the one with the first parcel leads.

    Raises
    ------
    BrainfmError
        Fewer than two clusters are asked for, or too few parcels have different features.

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
    unit = unit_rows(features)
    usable = np.isfinite(unit).all(axis=1)
    unit = unit[usable]
    different = len(np.unique(unit, axis=0))
    if different <= max(tried):
        raise BrainfmError(
            f'{different} of {len(usable)} parcels have features, each of its own, too few for '
            f'{max(tried)} clusters: ask for fewer clusters, or look at the series of the parcels.'
        )
    clusters = {k: KMeans(k, n_init=20, random_state=seed).fit_predict(unit) for k in tried}
    silhouettes = {k: silhouette_samples(unit, labels) for k, labels in clusters.items()}
    means = {k: float(np.mean(values)) for k, values in silhouettes.items()}
    best = max(means, key=lambda k: means[k])
    labels, confidence = np.zeros(len(usable), int), np.full(len(usable), np.nan)
    labels[usable], confidence[usable] = _by_size(clusters[best]), silhouettes[best]
    return Clusters(labels, confidence, means)


def match_networks(labels: np.ndarray, reference: Sequence[str | None]) -> list[str]:
    """Name clusters after the known networks that they overlap.

    Each network is given to one cluster so that the sum of the Dice overlaps is largest. Clusters
    that are left over take the network of their largest overlap.

    `labels` (P,) int are clusters 1 to k, 0 for parcels in none; `reference` has the network of
    each parcel, of which an empty name, ``'n/a'`` or None does not count. Returns the network of
    cluster 1, 2, ...; ``'unmatched'`` for a cluster that overlaps none.

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
    overlaps = dice[rows, columns] > 0
    matched[rows[overlaps]] = columns[overlaps]
    return [str(n) for n in np.where(dice.any(axis=1), networks[matched], 'unmatched')]


def agreement(labels: np.ndarray, reference: Sequence[str | None]) -> dict[str, float]:
    """How well clusters agree with known networks, both as :func:`match_networks` takes them.

    Returns ``AdjustedRandIndex`` (0 by chance), ``NormalisedMutualInformation``, and ``Accuracy``,
    the proportion of parcels whose cluster :func:`match_networks` names after their network. It
    grows with the number of clusters, since several may have one name.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    labels = np.asarray(labels)
    both, names = _both(labels, reference)
    known, found = names[both], labels[both]
    matched = np.array(match_networks(labels, reference))[found - 1]
    return {
        'AdjustedRandIndex': float(adjusted_rand_score(known, found)),
        'NormalisedMutualInformation': float(normalized_mutual_info_score(known, found)),
        'Accuracy': float(np.mean(matched == known)),
    }


def unit_rows(features: np.ndarray) -> np.ndarray:
    """(P, F) rows centred and of unit length; NaN those that are constant or not finite."""
    features = np.asarray(features, float)
    features = np.where(np.isfinite(features).all(axis=1, keepdims=True), features, np.nan)
    centred = features - features.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1)
    # a constant row is constant up to the rounding of its mean
    norm[~(norm > 1e-6 * np.abs(features).max(axis=1))] = np.nan
    return centred / norm[:, None]


def _by_size(labels: np.ndarray) -> np.ndarray:
    """(P,) clusters numbered from 1 by decreasing size, then by their first parcel."""
    _, first, inverse, size = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(size), int)
    rank[np.lexsort((first, -size))] = np.arange(1, len(size) + 1)
    return rank[inverse]


def named(reference: Sequence[str | None], parcels: int) -> np.ndarray:
    """(P,) names of networks, empty for parcels without one."""
    if len(reference) != parcels:
        raise BrainfmError(
            f'The networks are given for {len(reference)} parcels, there are {parcels}: give the '
            'networks of the same atlas, one for each row of its table.'
        )
    # pandas reads an empty cell as NaN, a float
    return np.array([n if isinstance(n, str) and n != 'n/a' else '' for n in reference])


def _both(labels: np.ndarray, reference: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Which parcels have a cluster and a network, and the names of all."""
    names = named(reference, len(labels))
    both = (labels > 0) & (names != '')
    if not both.any():
        raise BrainfmError(
            'No parcel has both a cluster and a network to compare with: use an atlas whose '
            'table names networks.'
        )
    return both, names
