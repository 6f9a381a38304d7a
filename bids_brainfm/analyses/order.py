"""Whether the parcels come in the order that a table of brain gradients means.

Parcels that are near in gradient space are strongly connected. Rows in another order put the
wrong gradient to each parcel, which nothing in the network can notice, but that relation weakens:
a check that needs no labels.
"""

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.connectome import connectome_vector

AS_READ, SHUFFLED = 'as read', 'shuffled'
# Of Brain-JEPA's table (by its sha256) with the HCP group connectivity of BrainSpace (400 cortical
# parcels), in the right order and when rows in 7-network order are taken for 17-network order.
# A single run is noisier and lies lower.
EXPECTED_OF = 'c9bc667e49aae442e12607bee8be86c31c330f2844cf72e7c84b16de312ed007'
EXPECTED = {'right order': 0.41, '7-network order': 0.16}
# Runs simulated from that connectivity (80 to 320 volumes, noise up to three times the signal):
# of 360 in random order none led its shuffled self by 0.05. In the right order 2 of 360 led theirs
# by less and none was outdone by the 7-network order; of 360 in that order 334 are told.
MARGIN = 0.05


def proximity(gradients: np.ndarray) -> np.ndarray:
    """Minus the Euclidean distance in gradient space for all pairs of parcels.

    Parameters
    ----------
    gradients : (P, G) float

    Returns
    -------
    (P * (P - 1) / 2,) float
        In the order of :func:`~bids_brainfm.models.connectome.connectome_vector`.

    Examples
    --------
    >>> proximity(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])).round(1).tolist()
    [-5.0, -1.0, -4.2]
    """
    from scipy.spatial.distance import pdist

    return -pdist(gradients)


def order_check(
    gradients: np.ndarray, fc: np.ndarray, misorders: dict[str, np.ndarray]
) -> dict[str, float]:
    """Correlate proximity in gradient space with connectivity, as read and in other orders.

    Parameters
    ----------
    gradients : (P, G) float
        Row i is of parcel i.
    fc : (P, P) float
        Connectivity of a run or a group; NaN where parcels are missing.
    misorders : dict of (P,) int
        Known wrong orders by name: row i of `fc` would be parcel ``misorders[name][i]``.

    Returns
    -------
    dict of float
        Pearson r over the pairs of parcels that have connectivity: ``'as read'``, where row i is
        taken for parcel i, then what r would be if the rows came in each wrong order, and last
        ``'shuffled'``, one random order, the same in every call.

    Raises
    ------
    BrainfmError
        `fc` is not of the parcels of `gradients`, or has nothing to correlate.

    Examples
    --------
    >>> place = np.array([[0.0], [1.0], [5.0]])
    >>> fc = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    >>> found = order_check(place, fc, {'backwards': np.array([2, 1, 0])})
    >>> found['as read'] > 0.9 > found['backwards']
    True
    """
    parcels = len(gradients)
    if fc.shape != (parcels, parcels):
        raise BrainfmError(
            f'The table of gradients has {parcels} rows, the connectivity is of shape '
            f'{fc.shape}: both must be of the same parcels.'
        )
    values = connectome_vector(np.asarray(fc, float))
    there = np.isfinite(values)
    if not there.any() or np.ptp(values[there]) == 0:
        raise BrainfmError(
            'The connectivity has no two values that differ, so that the order of its parcels '
            'cannot be checked: look at the series of the run.'
        )
    readings = {
        AS_READ: np.arange(parcels),
        **misorders,
        SHUFFLED: np.random.default_rng(0).permutation(parcels),
    }
    return {
        name: float(np.corrcoef(proximity(gradients[rows])[there], values[there])[0, 1])
        for name, rows in readings.items()
    }


def order_warning(found: dict[str, float]) -> str | None:
    """What :func:`order_check` gives reason to say, None if the order as read fits best.

    A wrong order counts only when it leads by more than a margin, and the order as read must
    lead the shuffled one by as much. Left and right swapped is the hardest to tell, since
    homologous parcels are alike: 0.25 where the right order has 0.41.
    """
    as_read = found[AS_READ]
    wrong = {name: r for name, r in found.items() if name not in (AS_READ, SHUFFLED)}
    best = max(wrong, key=wrong.get, default=AS_READ)
    if found[best] > as_read + MARGIN:
        return (
            f'The parcels fit the brain gradients better in another order, {best} '
            f'(r = {found[best]:.2f}), than as they were read ({as_read:.2f}): check the atlas '
            'and the series.'
        )
    if as_read < found[SHUFFLED] + MARGIN:
        return (
            f'In the order in which they were read the parcels fit the brain gradients no better '
            f'(r = {as_read:.2f}) than shuffled ({found[SHUFFLED]:.2f}): the order is another, '
            'or the run is too short or too noisy to tell.'
        )
    return None
