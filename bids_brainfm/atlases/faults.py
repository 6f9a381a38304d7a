"""Name the fault of labels that are not those of an atlas: by their names, by their places."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

FAR_MM = 10.0  # images of one atlas agree within a few mm
FAR_PROPORTION = 0.02  # of A424's parcels 0.7 % lie farther off, in wrong orders 11 % or more
FLIPPED = 'flipped left to right'
OTHER = 'numbered in another order'


@dataclass(frozen=True)
class Places:
    """Where the P parcels of an atlas lie, and the known ways to get their order wrong."""

    xyz: np.ndarray  # (P, 3) float, centres in mm (MNI, RAS)
    structures: tuple[str, ...] | None = None  # P times 'subcortex' or 'cortex'
    # (P,) int by fault: row i of a file in that wrong order is parcel misorders[name][i], from 0
    misorders: Mapping[str, np.ndarray] = field(default_factory=dict)

    def fault(self, centres: np.ndarray, rows: np.ndarray) -> str | None:
        """What is wrong with labels at these centres, in words; None if they lie as they should.

        Of several faults it is that with the least distance. `centres` (R, 3) are in mm, NaN where
        a label lies in no voxel; `rows` (R,) are the parcels that they should be, from 0.

        >>> xyz = np.array([[-40.0, 0, 0], [30, 0, 0], [-30, 50, 0]])
        >>> places = Places(xyz, misorders={'second first': np.array([1, 0, 2])})
        >>> wrong = [xyz, xyz * [-1, 1, 1], xyz[[1, 0, 2]], xyz[[2, 1, 0]]]
        >>> [places.fault(centres, np.arange(3)) for centres in wrong]
        [None, 'flipped left to right', 'second first', 'numbered in another order']
        """
        seen = np.isfinite(centres).all(axis=1)
        distance = lambda xyz: np.linalg.norm(xyz[rows][seen] - centres[seen], axis=1)
        misplaced = lambda mm: (mm > FAR_MM).sum() > FAR_PROPORTION * mm.size
        right = distance(self.xyz)
        if not misplaced(right):
            return None
        wrong = {FLIPPED: distance(self.xyz * [-1, 1, 1])}
        wrong |= {name: distance(self.xyz[order]) for name, order in self.misorders.items()}
        nearest = min(wrong, key=lambda name: wrong[name].mean())
        is_known = wrong[nearest].mean() < right.mean() and not misplaced(wrong[nearest])
        return nearest if is_known else OTHER

    def kept_without(self, structure: str) -> np.ndarray:
        """Parcels outside a structure, counted from 0."""
        return np.flatnonzero(np.array(self.structures) != structure)

    def lacking(self, structure: str) -> str:
        """The fault of a file that leaves a structure out, in words."""
        n_lost = (self.structures or ()).count(structure)
        return f'the {n_lost} parcels of the {structure} are missing'


def fault_of_names(names: Sequence[str], patterns: Sequence[str], places: Places) -> str | None:
    """What is wrong with the names of labels, in words; None if nothing is.

    The names are in the order of a file's labels; `patterns` (P) are what they should be, with
    ``*`` for any text, whose sequence in ``*-rh`` and ``*-lh`` must be the same on both sides.

    >>> places = Places(np.zeros((3, 3)), ('subcortex',) * 2 + ('cortex',),
    ...                 {'left first': np.array([1, 0, 2])})
    >>> patterns = ['*-rh', '*-lh', '17Networks_LH_*']
    >>> for names in ['p-rh p-lh 17Networks_LH_A_1', 'p-lh p-rh 17Networks_LH_A_1',
    ...               'p-rh p-lh 7Networks_LH_A_1', '17Networks_LH_A_1',
    ...               'p-rh q-lh 17Networks_LH_A_1']:
    ...     print(fault_of_names(names.split(), patterns, places))
    None
    left first
    7-network order
    the 2 parcels of the subcortex are missing
    numbered in another order
    """
    if _named(names, patterns):
        return None
    networks, wanted = (_networks(texts) for texts in (names, patterns))
    if networks and networks != wanted:
        return f'{networks}-network order'
    for fault, order in places.misorders.items():
        if len(names) == len(order) and _named([names[i] for i in np.argsort(order)], patterns):
            return fault
    for structure in dict.fromkeys(places.structures or ()):
        if _named(names, [patterns[i] for i in places.kept_without(structure)]):
            return places.lacking(structure)
    return OTHER


def _named(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether names are what patterns say, and the two hemispheres alike."""
    right, left = ([n[:-3] for n in names if n.endswith(side)] for side in ('-rh', '-lh'))
    fit = len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))
    return fit and right == left


def _networks(texts: Sequence[str]) -> str | None:
    """Number of networks in names like ``17Networks_LH_VisCent_1``, None where there is none."""
    return next((found[1] for text in texts if (found := re.match(r'(\d+)Networks_', text))), None)
