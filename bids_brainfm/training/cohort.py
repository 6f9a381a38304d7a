"""Who is trained on: runs of our own derivatives, targets of participants, and splits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.bids.freshness import is_whole, read_sidecar
from bids_brainfm.bids.naming import parse_name
from bids_brainfm.bids.participants import read_column
from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.resample import same_rate

SERIES = '_stat-mean_timeseries.tsv'
MISSING = ('', 'n/a', 'nan', 'na')


@dataclass(frozen=True)
class CohortRun:
    """Parcel series of one run.

    Attributes
    ----------
    path : Path
        ``..._stat-mean_timeseries.tsv``.
    dataset : Path
        The derivatives dataset that it stands in.
    participant : str
        Label, ``01``. The same label in two datasets is taken for one person, so that nobody is
        in two splits.
    tr : float
        Repetition time of the recording in seconds.
    """

    path: Path
    dataset: Path
    participant: str
    tr: float

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(SERIES)


def find_cohort(datasets: Sequence[Path], atlas: str, mix_trs: bool = False) -> list[CohortRun]:
    """Find the parcel series of an atlas in outputs of ``bids_brainfm ... participant``.

    Parameters
    ----------
    datasets : sequence of Path
    atlas : str
        Atlas of the model.
    mix_trs : bool
        Whether runs of different repetition times may stand side by side.

    Raises
    ------
    BrainfmError
        A folder is no such output, a recording has series of another atlas only or in several
        spaces, or repetition times differ.
    """
    runs = []
    for dataset in dict.fromkeys(Path(path).resolve() for path in datasets):
        recordings: dict[str, dict[str, list[Path]]] = {}
        for path in sorted(Path(dataset).glob(f'sub-*/**/*{SERIES}')):
            entities = parse_name(path.name)[0]
            place = ('space', 'res', 'den', 'atlas', 'stat')
            name = '_'.join(f'{k}-{v}' for k, v in entities.items() if k not in place)
            recordings.setdefault(name, {}).setdefault(entities.get('atlas'), []).append(path)
        if not recordings:
            raise BrainfmError(
                f'{dataset} holds no parcel series (sub-*/**/*{SERIES}): give the output of '
                f'"bids_brainfm DATA OUT participant".'
            )
        for name, found in recordings.items():
            if atlas not in found:
                raise BrainfmError(
                    f'{dataset}: {name} has parcel series of {", ".join(map(str, found))}, but '
                    f'the model takes {atlas}: atlases cannot be mixed; run "bids_brainfm" with '
                    f'a model of that atlas on all data first.'
                )
            if len(found[atlas]) > 1:
                raise BrainfmError(
                    f'{dataset}: {name} has parcel series of {atlas} in {len(found[atlas])} '
                    f'spaces ({", ".join(path.name for path in found[atlas])}): keep one of them.'
                )
            (path,) = found[atlas]
            sidecar = read_sidecar(path.with_suffix('.json'))
            if not is_whole(path) or 'RepetitionTime' not in sidecar:
                raise BrainfmError(
                    f'{path} is not whole, or has no sidecar (.json) with a RepetitionTime: run '
                    f'"bids_brainfm" on it again.'
                )
            label = parse_name(path.name)[0]['sub']
            runs.append(CohortRun(path, Path(dataset), label, float(sidecar['RepetitionTime'])))
    slowest, fastest = (pick(runs, key=lambda run: run.tr) for pick in (max, min))
    if not mix_trs and not same_rate(slowest.tr, fastest.tr):
        raise BrainfmError(
            f'The runs have different repetition times, from {fastest.tr:g} s ({fastest.name}) to '
            f'{slowest.tr:g} s ({slowest.name}): a model can tell one from the other; train on '
            f'one of them, or say --mix-trs, and all are resampled to the repetition time of the '
            f'model.'
        )
    return runs


@dataclass(frozen=True)
class Targets:
    """What a head is to predict.

    Attributes
    ----------
    column : str
        Of ``participants.tsv``.
    problem : {'regression', 'classification'}
    values : dict of str to float
        By participant: the value, or the number of its class.
    classes : tuple of str
        Empty for a regression.
    """

    column: str
    problem: str
    values: dict[str, float]
    classes: tuple[str, ...] = ()


def read_targets(
    runs: Sequence[CohortRun],
    column: str,
    problem: str | None = None,
    drop_missing: bool = False,
) -> Targets:
    """Read the targets of the participants of a cohort.

    Parameters
    ----------
    runs : sequence of CohortRun
    column : str
        Of ``participants.tsv``.
    problem : {'regression', 'classification'}, optional
        Where not given: text and whatever has but two values is classified, other numbers are
        regressed.
    drop_missing : bool
        Whether participants without a value are left out.

    Raises
    ------
    BrainfmError
        There is no such column, values are missing, or all are the same.
    """
    texts: dict[str, str] = {}
    for dataset in dict.fromkeys(run.dataset for run in runs):
        found = read_column(dataset, column)
        people = {run.participant for run in runs if run.dataset == dataset}
        for label in sorted(people):
            text = _plain(found.get(label, ''))
            if not texts.get(label):
                texts[label] = text
            if text and texts[label] != text:
                raise BrainfmError(
                    f'--target {column}: sub-{label} has {texts[label]!r} in one dataset and '
                    f'{text!r} in {dataset}; people must not share a label.'
                )
    missing = [label for label, text in texts.items() if not text]
    if missing and not drop_missing:
        raise BrainfmError(
            f'--target {column}: {len(missing)} of {len(texts)} participants have no value '
            f'(sub-{", sub-".join(missing[:5])}{", ..." * (len(missing) > 5)}): complete '
            f'participants.tsv, or say --drop-missing.'
        )
    texts = {label: text for label, text in texts.items() if label not in set(missing)}
    distinct = set(texts.values())
    if len(distinct) < 2:
        raise BrainfmError(
            f'--target {column}: all participants have the same value '
            f'({", ".join(distinct) or "none"}), so there is nothing to learn.'
        )
    numbers = {label: _number(text) for label, text in texts.items()}
    numeric = all(np.isfinite(value) for value in numbers.values())
    problem = problem or ('regression' if numeric and len(distinct) > 2 else 'classification')
    if problem == 'regression':
        wrong = [text for label, text in texts.items() if not np.isfinite(numbers[label])]
        if wrong:
            raise BrainfmError(
                f'--target {column}: {wrong[0]!r} is no number, so it cannot be regressed; say '
                f'--problem classification.'
            )
        return Targets(column, problem, numbers)
    classes = tuple(sorted(distinct, key=lambda text: (_number(text), text)))
    return Targets(
        column, problem, {k: float(classes.index(v)) for k, v in texts.items()}, classes
    )


def _plain(text: str) -> str:
    """Write equal numbers alike, and nothing where a value is missing.

    >>> _plain('2.0'), _plain(' F '), _plain('n/a')
    ('2', 'F', '')
    """
    text = text.strip()
    if text.lower() in MISSING:
        return ''
    return f'{_number(text):.10g}' if np.isfinite(_number(text)) else text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.inf  # text stands behind numbers


def split(
    participants: Sequence[str],
    shares: dict[str, float],
    seed: int,
    groups: dict[str, float] | None = None,
) -> dict[str, str]:
    """Give each participant to one part of the cohort.

    Parameters
    ----------
    participants : sequence of str
        Repetitions do no harm.
    shares : dict of str to float
        Of each part, e.g. ``{'train': 0.6, 'validation': 0.2, 'test': 0.2}``.
    seed : int
    groups : dict, optional
        Class of each participant: each part then has its share of each class.

    Returns
    -------
    dict of str to str
        Part of each participant.

    Raises
    ------
    BrainfmError
        There are too few: each part needs two participants, or one of each class.

    Examples
    --------
    >>> parts = split(['01', '02', '03', '04', '05'], {'train': 0.6, 'validation': 0.4}, seed=1)
    >>> sorted(parts.values())
    ['train', 'train', 'train', 'validation', 'validation']
    """
    people = sorted(set(participants))
    rng = np.random.default_rng(seed)
    strata: dict[float, list[str]] = {}
    for person in (people[i] for i in rng.permutation(len(people))):
        strata.setdefault(groups[person] if groups else 0.0, []).append(person)
    least = 1 if groups else 2
    parts = {}
    for members in strata.values():
        edges = np.rint(np.cumsum([0, *shares.values()]) * len(members)).astype(int)
        for name, start, stop in zip(shares, edges[:-1], edges[1:], strict=True):
            if stop - start < least:
                what = ' of each class' if groups else ''
                raise BrainfmError(
                    f'{len(people)} participants are too few to split into '
                    f'{", ".join(f"{n} {s:.0%}" for n, s in shares.items())}: {name} needs at '
                    f'least {least}{what} and would have {stop - start}; add participants or '
                    f'change the shares (--validation-share, --test-share).'
                )
            parts |= dict.fromkeys(members[start:stop], name)
    return parts


def count_parts(parts: dict[str, str]) -> str:
    """Say how many participants are in each part.

    >>> count_parts({'01': 'train', '02': 'train', '03': 'test'})
    '2 train, 1 test'
    """
    return ', '.join(f'{n} {name}' for name, n in Counter(parts.values()).items())
