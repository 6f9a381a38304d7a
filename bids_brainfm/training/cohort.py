"""Who is trained on: runs of our own derivatives, and targets of participants."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.bids.dataset import Record, check_settings, find_records, read_column
from bids_brainfm.bids.naming import parcels_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.resample import same_rate
from bids_brainfm.validation import is_number

LOGGER = logging.getLogger('bids_brainfm')
MISSING = ('', 'n/a', 'nan', 'na')


@dataclass(frozen=True)
class CohortRun:
    """Parcel series of one run."""

    path: Path  # of the table
    dataset: Path  # the derivatives dataset that it is in
    # Label, 01. The same in two datasets is taken for one person, so that nobody is in two splits.
    participant: str
    tr: float  # repetition time of the recording in seconds
    excluded: bool = False  # by --max-flagged of the participant level

    @property
    def name(self) -> str:
        """Name of the file up to its statistic: run, space and atlas."""
        return parcels_name(self.path.name)


def find_cohort(datasets: Sequence[Path], atlas: str, mix_trs: bool = False) -> list[CohortRun]:
    """Find the parcel series of an atlas in outputs of ``bids_brainfm ... participant``.

    Raises BrainfmError where a folder is no such output, a recording has series of another atlas
    only or in several spaces, versions of the results differ, or repetition times do (allowed with
    `mix_trs`).
    """
    runs, versions = [], dict[int | None, Record]()
    for dataset in dict.fromkeys(Path(path).resolve() for path in datasets):
        recordings: dict[str, dict[str | None, list[Record]]] = {}
        for record in find_records(dataset, 'timeseries', stat='mean', desc=None):
            by_atlas = recordings.setdefault(record.name, {})
            by_atlas.setdefault(record.entities.get('atlas'), []).append(record)
        if not recordings:
            raise BrainfmError(
                f'{dataset} holds no parcel series (sub-*/**/*_stat-mean_timeseries.tsv): give '
                f'the output of "bids_brainfm DATA OUT participant".'
            )
        check_settings(r for by_atlas in recordings.values() for r in by_atlas.get(atlas, ()))
        for name, by_atlas in recordings.items():
            if atlas not in by_atlas:
                raise BrainfmError(
                    f'{dataset}: {name} has parcel series of {", ".join(map(str, by_atlas))}, but '
                    f'the model takes {atlas}: atlases cannot be mixed; run "bids_brainfm" with '
                    f'a model of that atlas on all data first.'
                )
            record, *others = found = by_atlas[atlas]
            if others:
                raise BrainfmError(
                    f'{dataset}: {name} has parcel series of {atlas} in {len(found)} '
                    f'spaces ({", ".join(one.path.name for one in found)}): keep one of them.'
                )
            if (failure := record.failure) is not None:
                LOGGER.warning(
                    '%s is left out, since the last attempt to make it failed (%s): run the '
                    'participant level again.', record.path, failure.rstrip('.'),
                )  # fmt: skip
                continue
            sidecar = record.sidecar or {}
            if record.damage or 'RepetitionTime' not in sidecar:
                fault = record.damage or 'has no RepetitionTime in its sidecar'
                raise BrainfmError(f'{record.path} {fault}: run "bids_brainfm" on it again.')
            versions.setdefault(sidecar.get('ResultsVersion'), record)
            if None in versions:
                raise BrainfmError(
                    f'{record.path} was written by an earlier version of bids_brainfm, whose '
                    f'numbers differ: run the participant level again with --recompute.'
                )
            tr = float(sidecar['RepetitionTime'])
            excluded = bool(sidecar.get('Excluded'))
            runs.append(CohortRun(record.path, dataset, record.entities['sub'], tr, excluded))
    if not runs:
        raise BrainfmError(
            f'The last attempt at every run of {", ".join(map(str, datasets))} failed: run the '
            f'participant level again.'
        )
    if len(versions) > 1:
        one, other, *_ = versions.values()
        raise BrainfmError(
            f'{one.path} and {other.path} were written by versions of bids_brainfm whose numbers '
            f'differ: run the participant level again with --recompute.'
        )
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
    """What a head is to predict: a column of ``participants.tsv``."""

    column: str
    problem: str  # 'regression' or 'classification'
    values: dict[str, float]  # by participant: the value, or the number of its class
    classes: tuple[str, ...] = ()


def read_targets(
    runs: Sequence[CohortRun], column: str, problem: str | None = None, drop_missing: bool = False
) -> Targets:
    """Read the targets of the participants of a cohort from ``participants.tsv``.

    Where no `problem` is given, text and whatever has only two values is classified, and other
    numbers are regressed. Participants without a value are left out with `drop_missing`. Raises
    BrainfmError where there is no such column, values are missing, or all are the same.
    """
    texts: dict[str, str] = {}
    for dataset in dict.fromkeys(run.dataset for run in runs):
        found = read_column(dataset, column)
        for label in sorted({run.participant for run in runs if run.dataset == dataset}):
            text = plain_value(found.get(label, ''))
            texts[label] = texts.get(label) or text
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
    texts = {label: text for label, text in texts.items() if text}
    distinct = set(texts.values())
    if len(distinct) < 2:
        raise BrainfmError(
            f'--target {column}: all participants have the same value '
            f'({", ".join(distinct) or "none"}), so there is nothing to learn.'
        )
    no_numbers = [text for text in texts.values() if not is_number(_number(text))]
    regressed = len(distinct) > 2 and not no_numbers
    problem = problem or ('regression' if regressed else 'classification')
    if problem == 'regression':
        if no_numbers:
            raise BrainfmError(
                f'--target {column}: {no_numbers[0]!r} is no number, so it cannot be regressed; '
                f'say --problem classification.'
            )
        return Targets(column, problem, {label: _number(t) for label, t in texts.items()})
    classes = tuple(sorted(distinct, key=lambda text: (_number(text), text)))
    values = {label: float(classes.index(text)) for label, text in texts.items()}
    return Targets(column, problem, values, classes)


def plain_value(text: str) -> str:
    """Write equal numbers alike ('2.0' as '2'), and nothing where a value is missing."""
    text = text.strip()
    if text.lower() in MISSING:
        return ''
    return f'{_number(text):.10g}' if np.isfinite(_number(text)) else text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.inf  # text comes after numbers
