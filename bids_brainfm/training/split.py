"""Which part of a cohort each participant is in: training, validation or test."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from bids_brainfm.bids.dataset import read_column
from bids_brainfm.errors import BrainfmError
from bids_brainfm.training.cohort import CohortRun, plain_value

PARTS = ('train', 'validation', 'test')
ATTEMPTS = 1000  # orders of the groups, of which the one with the best proportions is used


def read_groups(runs: Sequence[CohortRun], columns: Sequence[str]) -> dict[str, int]:
    """Number of the group of each participant, by columns of ``participants.tsv``.

    Participants with the same value in any of the columns are in one group, over all datasets.
    Raises BrainfmError where there is no such column, or a participant has no value.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    people = sorted({run.participant for run in runs})
    values: dict[tuple[str, str], set[str]] = {}
    for column in columns:
        known: set[str] = set()
        for dataset in dict.fromkeys(run.dataset for run in runs):
            found = read_column(dataset, column)
            for label in sorted({run.participant for run in runs if run.dataset == dataset}):
                if text := plain_value(found.get(label, '')):
                    values.setdefault((column, text), set()).add(label)
                    known.add(label)
        if missing := [label for label in people if label not in known]:
            raise BrainfmError(
                f'--group-column {column}: {len(missing)} of {len(people)} participants have no '
                f'value (sub-{", sub-".join(missing[:5])}{", ..." * (len(missing) > 5)}): '
                f'complete participants.tsv.'
            )
    number = {label: i for i, label in enumerate(people)}
    edges = [(number[min(of)], number[label]) for of in values.values() for label in of]
    rows, others = zip(*edges, strict=True)
    graph = coo_array((np.ones(len(edges)), (rows, others)), shape=(len(people),) * 2)
    _, groups = connected_components(graph, directed=False)
    return dict(zip(people, groups.tolist(), strict=True))


def split(
    participants: Sequence[str], proportions: dict[str, float], seed: int,
    classes: dict[str, float] | None = None, groups: dict[str, int] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Assign each participant to one part of the cohort.

    Where `classes` give the class of each participant, each part has its proportion of each class.
    Where `groups` give the group of each participant (a family, a site), a group is in one part;
    proportions are then met as far as the groups allow. Too few are refused: each part needs two
    participants, or one of each class.

    >>> parts = split(['01', '02', '03', '04', '05'], {'train': 0.6, 'validation': 0.4}, seed=1)
    >>> sorted(parts.values())
    ['train', 'train', 'train', 'validation', 'validation']
    """
    people = sorted(set(participants))
    rng = np.random.default_rng(seed)
    of_class = {person: classes[person] if classes else 0.0 for person in people}
    if groups is None:
        parts = _by_class(people, proportions, of_class, rng)
    else:
        parts = _by_group(people, proportions, of_class, groups, rng)
    least, what = (1, ' of each class') if classes else (2, '')
    counts = Counter((parts[person], of_class[person]) for person in people)
    for name in proportions:
        fewest = min(counts[name, each] for each in set(of_class.values()))
        if fewest < least:
            together = f' in {len({groups[p] for p in people})} groups' if groups else ''
            raise BrainfmError(
                f'{len(people)} participants{together} are too few to split into '
                f'{", ".join(f"{n} {p:.0%}" for n, p in proportions.items())}: {name} needs at '
                f'least {least}{what} and would have {fewest}; add participants or change the '
                f'proportions (--validation-share, --test-share).'
            )
    return parts


def _by_class(
    people: list[str], proportions: dict[str, float], of_class: dict[str, float],
    rng: np.random.Generator,
) -> dict[str, str]:  # fmt: skip
    """Divide each class in its proportions."""
    strata: dict[float, list[str]] = {}
    for person in (people[i] for i in rng.permutation(len(people))):
        strata.setdefault(of_class[person], []).append(person)
    parts: dict[str, str] = {}
    for members in strata.values():
        edges = np.rint(np.cumsum([0, *proportions.values()]) * len(members)).astype(int)
        for name, start, stop in zip(proportions, edges[:-1], edges[1:], strict=True):
            parts |= dict.fromkeys(members[start:stop], name)
    return parts


def _by_group(
    people: list[str], proportions: dict[str, float], of_class: dict[str, float],
    groups: dict[str, int], rng: np.random.Generator,
) -> dict[str, str]:  # fmt: skip
    """Divide whole groups, in the random order that meets the proportions of all classes best."""
    _, number = np.unique([groups[person] for person in people], return_inverse=True)
    _, kind = np.unique([of_class[person] for person in people], return_inverse=True)
    sizes = np.zeros((number.max() + 1, kind.max() + 1))
    np.add.at(sizes, (number, kind), 1)
    wanted = np.outer(list(proportions.values()), sizes.sum(0))
    edges = np.cumsum(list(proportions.values()))[:-1] * len(people)
    best, least = np.empty(0, int), np.inf
    for _ in range(ATTEMPTS):
        order = rng.permutation(len(sizes))
        total = sizes[order].sum(1)
        part = np.empty(len(sizes), int)  # that the middle of the group falls into
        part[order] = np.searchsorted(edges, total.cumsum() - total / 2)
        reached = np.zeros_like(wanted)
        np.add.at(reached, part, sizes)
        missed = ((reached - wanted) ** 2 / wanted).sum()
        if missed < least - 1e-9:
            best, least = part, missed
    names = list(proportions)
    return {person: names[best[i]] for person, i in zip(people, number, strict=True)}


def count_parts(parts: dict[str, str]) -> str:
    """Say how many participants are in each part: '2 train, 1 test'."""
    return ', '.join(f'{n} {name}' for name, n in Counter(parts.values()).items())
