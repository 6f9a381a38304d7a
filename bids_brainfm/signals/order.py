"""Whether the parcels come in the right order: a check that needs no labels.

Parcels that are near in gradient space, or in the brain, are strongly connected. In another order
each parcel is taken for another, which nothing in a network can notice, but that relation weakens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.connectome import connectome, connectome_vector

AS_READ, SHUFFLED = 'as read', 'shuffled'
# Of Brain-JEPA's table (by its sha256) with the HCP group connectivity of BrainSpace (400 cortical
# parcels), also with rows in 7- for 17-network order; a single run is noisier and lies lower.
EXPECTED_OF = 'c9bc667e49aae442e12607bee8be86c31c330f2844cf72e7c84b16de312ed007'
EXPECTED = {'right order': 0.41, '7-network order': 0.16}
# Runs simulated from that connectivity (80 to 320 volumes, noise up to three times the signal):
# of 360 in random order none led its shuffled self by 0.05. In the right order 2 of 360 led theirs
# by less and none was outdone by the 7-network order; of 360 in that order 334 are told.
MARGIN = 0.05
# For the check by coordinates: five runs of AOMIC (Schaefer-100) and simulated ones, whole and cut
# down to 16 volumes, with white or global noise of up to eight times the signal. Read rightly, no
# wrong order led by more than 0.02, and r was 0.15 or more where halves agreed; shuffled columns
# of 100 volumes or more gave 0.06 at most. Random drifts of twice the signal, left in the series,
# look like a wrong order.
LEAST_NEARNESS, RELIABLE = 0.08, 0.3


def proximity(gradients: np.ndarray) -> np.ndarray:
    """Minus the Euclidean distance in gradient space (P, G) for all pairs of parcels.

    In the order of :func:`~bids_brainfm.signals.connectome.connectome_vector`.
    """
    from scipy.spatial.distance import pdist

    return -pdist(gradients)


def order_check(
    gradients: np.ndarray, fc: np.ndarray, misorders: dict[str, np.ndarray]
) -> dict[str, float]:
    """Correlate proximity in gradient space with connectivity, as read and in other orders.

    Parameters
    ----------
    gradients : (P, G) float, row i of parcel i
    fc : (P, P) float, connectivity of a run or a group; NaN where parcels are missing
    misorders : (P,) int by name: in a wrong order, row i of `fc` is parcel ``misorders[name][i]``

    Returns
    -------
    dict of float : Pearson r over the pairs of parcels that have connectivity, ``'as read'``, in
        each wrong order, and last ``'shuffled'``, one random order, the same in every call

    Raises
    ------
    BrainfmError : `fc` is not of the parcels of `gradients`, or has nothing to correlate
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
    shuffled = np.random.default_rng(0).permutation(parcels)
    readings = {AS_READ: np.arange(parcels), **misorders, SHUFFLED: shuffled}
    return {
        name: float(np.corrcoef(proximity(gradients[rows])[there], values[there])[0, 1])
        for name, rows in readings.items()
    }


def order_warning(found: dict[str, float]) -> str | None:
    """What :func:`order_check` gives reason to say, None if the order as read fits best.

    A wrong order counts only when it leads by more than a margin, and the order as read must
    lead the shuffled one by as much. Left and right swapped is the hardest to tell: r = 0.25.
    """
    as_read = found[AS_READ]
    if best := _better({n: r for n, r in found.items() if n != SHUFFLED}, as_read):
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


def _better(found: Mapping[str, float], as_read: float) -> str | None:
    """The order that fits best, if clearly better than the one as read."""
    best = max(found, key=found.__getitem__, default=None)
    return best if best is not None and found[best] > as_read + MARGIN else None


@dataclass(frozen=True)
class Nearness:
    """How far connectivity goes with closeness in the brain, Pearson r over pairs of parcels."""

    as_read: float  # in the order as read
    misordered: dict[str, float]  # in known wrong orders
    reliability: float  # of connectivity in one half of the run with that in the other


def nearness(
    data: np.ndarray, xyz: np.ndarray, misorders: Mapping[str, np.ndarray] = MappingProxyType({})
) -> Nearness | None:
    """Relate the connectivity of a run to where its parcels lie, drifts and global signal out.

    Parameters
    ----------
    data : (T, P) float, parcel series; NaN columns are left out
    xyz : (P, 3) float, parcel centres in mm, in the order that the columns should have
    misorders : (P,) int by name: in a wrong order, column i is parcel ``misorders[name][i]``

    Returns
    -------
    Nearness, or None for fewer than 8 volumes or 20 parcels that vary
    """
    from scipy.spatial.distance import pdist

    usable = np.isfinite(data).all(axis=0) & (np.ptp(data, axis=0) > 0)
    if len(data) < 8 or usable.sum() < 20:
        return None
    clean = np.asarray(data[:, usable], float)
    clean = (clean - clean.mean(axis=0)) / clean.std(axis=0)
    # slow drifts and the mean of all
    degree, time = min(6, len(clean) // 20 + 1), np.linspace(-1, 1, len(clean))
    drift = np.polynomial.legendre.legvander(time, degree)
    drift = np.column_stack([drift, clean.mean(axis=1)])
    clean = clean - drift @ np.linalg.lstsq(drift, clean, rcond=None)[0]
    connectivity = connectome_vector(connectome(clean))

    def correlate(rows: np.ndarray) -> float:
        distance = pdist(xyz[rows][usable])
        close = np.exp(-0.5 * (distance / np.quantile(distance, 0.05)) ** 2)
        return float(np.corrcoef(close, connectivity)[0, 1])

    halves = [connectome_vector(connectome(half)) for half in np.array_split(clean, 2)]
    return Nearness(
        as_read=correlate(np.arange(len(xyz))),
        misordered={name: correlate(rows) for name, rows in misorders.items()},
        reliability=float(np.corrcoef(halves)[0, 1]),
    )


def misordered(
    data: np.ndarray, xyz: np.ndarray, misorders: Mapping[str, np.ndarray]
) -> str | None:
    """Say that the columns of a run seem to be in another order than their coordinates.

    Parcels that lie close together fluctuate alike, once drifts and the global signal are out. A
    known wrong order is reported where it fits this clearly better; an unknown one only where
    connectivity is the same in both halves of the run and yet has nothing to do with closeness.
    Arguments are those of :func:`nearness`.
    """
    found = nearness(data, xyz, misorders)
    if found is None:
        return None
    if best := _better(found.misordered, found.as_read):
        return (
            f'The columns fit the coordinates of the parcels better in the order {best} '
            f'(r = {found.misordered[best]:.2f}) than in that of the atlas '
            f'({found.as_read:.2f}): they must be in the order of the atlas.'
        )
    if found.as_read < LEAST_NEARNESS and found.reliability > RELIABLE:
        return (
            f'Columns of parcels that lie close to each other are no more alike than others '
            f'(r = {found.as_read:.2f}), though connectivity is alike in both halves of the run '
            f'(r = {found.reliability:.2f}): check that they are in the order of the atlas.'
        )
    return None
