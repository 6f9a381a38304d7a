"""What is in a dataset: our own outputs, and its participants."""

import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from bids_brainfm.bids.description import generators, read_description
from bids_brainfm.bids.files import first_line
from bids_brainfm.bids.freshness import damage, read_sidecar, sidecar_path
from bids_brainfm.bids.naming import OUTPUT_ENTITIES, failure_path, join_name, parse_name
from bids_brainfm.bids.settings import SETTINGS
from bids_brainfm.documents import read_tsv
from bids_brainfm.errors import BrainfmError, abridge
from bids_brainfm.progress import track

if TYPE_CHECKING:
    import pandas as pd

LOGGER = logging.getLogger('bids_brainfm')


@dataclass(frozen=True)
class Record:
    """One file that the program wrote."""

    path: Path
    entities: dict[str, str]  # by their short names, in the order of the file name
    suffix: str
    extension: str

    @property
    def name(self) -> str:
        """Name of the run, without what an output adds: ``sub-01_task-rest``."""
        return join_name({k: v for k, v in self.entities.items() if k not in OUTPUT_ENTITIES})

    @cached_property
    def sidecar(self) -> dict[str, Any] | None:
        """Content of its sidecar, None where that is missing or damaged."""
        return read_sidecar(sidecar_path(self.path))

    @cached_property
    def damage(self) -> str | None:
        """What is wrong with it or its sidecar, see :func:`bids_brainfm.bids.freshness.damage`."""
        return damage(self.path)

    @property
    def whole(self) -> bool:
        """Whether it and its sidecar are there and undamaged."""
        return self.damage is None

    @property
    def failure(self) -> str | None:
        """Why the last attempt to make it failed, None where it did not."""
        participant = f'sub-{self.entities["sub"]}'
        root = next(path.parent for path in self.path.parents if path.name == participant)
        atlas, label = (self.entities.get(key, '') for key in ('atlas', 'desc'))
        return find_failure(root, self.name, atlas, label)


def find_failure(output: Path, run: str, atlas: str, label: str | None) -> str | None:
    """Why the last attempt at the parcel series of a run, or at one model, failed, if it did.

    What an earlier attempt wrote is still there, and does not fit the input or the settings.
    """
    for step in (f'atlas-{atlas}', f'atlas-{atlas}_desc-{label}'):
        with contextlib.suppress(FileNotFoundError):
            return first_line(failure_path(output, run, step)).removeprefix(f'{run}: ')
    return None


Labels = str | Collection[str] | None


def iterate_records(
    root: Path, suffix: str, *,
    subjects: Collection[str] = (), extension: str = '.tsv', **entities: Labels,
) -> Iterator[Record]:  # fmt: skip
    """Find outputs of the participant level, participant by participant.

    They are of the BIDS `suffix` (``*`` for any) and of `subjects` (all where empty). An entity
    must have the label that is given, or one of the labels, or where None be absent.
    """
    wanted = {k: [v] if v is None or isinstance(v, str) else v for k, v in entities.items()}
    folders = [root / f'sub-{label}' for label in sorted(set(subjects))] or sorted(
        root.glob('sub-*/')
    )
    for folder in folders:
        paths = [p for func in ('func', 'ses-*/func') for p in folder.glob(f'{func}/*{extension}')]
        for path in sorted(paths):
            own, found, ending = parse_name(path.name)
            fits = all(own.get(name) in labels for name, labels in wanted.items())
            if fits and ending == extension and suffix in ('*', found):
                yield Record(path, own, found, ending)


def find_records(root: Path, suffix: str, **wanted: Any) -> list[Record]:
    """List what :func:`iterate_records` finds, sorted by path within each participant."""
    return list(iterate_records(root, suffix, **wanted))


def find_whole(
    root: Path, suffix: str, filters: dict[str, tuple[str, ...]], version: int,
    **entities: Labels,
) -> list[Record]:  # fmt: skip
    """Find the outputs of a dataset that group results are made from; warnings name the others.

    They are whole, of this `version` of the results, not excluded for their flagged volumes, and
    the last attempt to make them did not fail.
    `filters` are the labels of an entity to take, all where empty; for the rest see
    :func:`iterate_records`. Raises BrainfmError where the dataset was not written by this
    program, lacks a participant that was asked for, or has outputs of one model that were
    computed in different precisions, which no statistic over participants may mix.
    """
    makers = [program.get('Name') for program in generators(read_description(root))]
    if 'bids_brainfm' not in makers:
        raise BrainfmError(
            f'{root} was not written by bids_brainfm: the group level takes what the '
            f'participant level wrote, bids_brainfm OUT OUT group.'
        )
    subjects = filters.get('sub', ())
    check_participants({'outputs': root}, subjects)
    asked = {name: labels for name, labels in filters.items() if labels and name != 'sub'}
    wanted: dict[str, Any] = asked | entities
    people = sorted(set(subjects) or {path.name[4:] for path in root.glob('sub-*/')})
    records = (
        iterate_records(root, suffix, subjects=[label], **wanted)
        for label in track(people, f'Looking through {root}', 'participant')
    )
    kept = []
    for record in chain.from_iterable(records):
        sidecar = record.sidecar or {}
        if not record.whole:
            reason = f'it {record.damage}: run the participant level again'
        elif sidecar.get('ResultsVersion') != version:
            reason = 'another version of bids_brainfm wrote it, with other numbers: run the '
            reason += 'participant level again with --recompute'
        elif (failure := record.failure) is not None:
            reason = f'the last attempt to make it failed ({failure.rstrip(".")}): run the '
            reason += 'participant level again, or leave the run out'
        elif sidecar.get('Excluded'):
            reason = 'more of its volumes are flagged than --max-flagged allows'
        else:
            kept.append(record)
            continue
        LOGGER.warning('%s is left out, since %s.', record.path, reason)
    _check_precision(kept)
    check_settings(kept)
    return kept


def check_settings(records: Iterable[Record]) -> None:
    """Raise BrainfmError where outputs of one dataset were made with different settings."""
    first: dict[str, tuple[str, Record]] = {}
    for record in records:
        for name, digest in (record.sidecar or {}).get(SETTINGS, {}).items():
            known, other = first.setdefault(name, (digest, record))
            if known != digest:
                raise BrainfmError(
                    f'{other.path} and {record.path} were made with different settings of {name}: '
                    f'remove the outputs of settings other than those in logs/settings, and run '
                    f'the participant level again.'
                )


def _check_precision(records: Iterable[Record]) -> None:
    """Raise BrainfmError where outputs of one model were computed in different precisions."""
    first: dict[str | None, Record] = {}
    for record in records:
        other = first.setdefault(record.entities.get('desc'), record)
        one, two = (
            (each.sidecar or {}).get('Precision', 'an unknown precision')
            for each in (other, record)
        )
        if one != two:
            raise BrainfmError(
                f'{other.path.name} was computed in {one} and {record.path.name} in {two}: a '
                f'difference between these could be one of precision; run the participant level '
                f'with one --precision on all participants, in another output folder.'
            )


def select_participants(dataset: Path, path: Path, part: str | None) -> tuple[str, ...]:
    """Labels (``01``) of the participants of a dataset that a table lists, or of a part of them.

    The table is a TSV with the column ``participant_id``, and ``part`` where one is asked for, as
    a training writes it; a warning says how many of it the dataset lacks. Raises BrainfmError
    where there is no such column or part, or the dataset has none of them.
    """
    try:
        frame = read_tsv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise BrainfmError(f'--participants-file {path} cannot be read ({error}).') from None
    for column in ('participant_id', 'part')[: 1 if part is None else 2]:
        if column not in frame:
            raise BrainfmError(
                f'--participants-file {path} has no column {column}; its columns are '
                f'{", ".join(frame)}.'
            )
    if part is not None:
        known = sorted(set(frame['part']))
        if part not in known:
            raise BrainfmError(
                f'--part {part}: {path} lists nobody of this part; its parts are '
                f'{", ".join(known) or "none"}.'
            )
        frame = frame[frame['part'] == part]
    listed = dict.fromkeys(frame['participant_id'].str.removeprefix('sub-'))
    found = tuple(label for label in listed if (dataset / f'sub-{label}').is_dir())
    if not found:
        raise BrainfmError(
            f'{dataset} has none of the {len(listed)} participants that --participants-file '
            f'{path} lists{f" as {part}" if part else ""}: give a table of this dataset.'
        )
    if len(found) < len(listed):
        LOGGER.warning(
            '%s has %d of the %d participants that %s lists.', dataset, len(found), len(listed),
            path,
        )  # fmt: skip
    return found


def describe_filters(filters: dict[str, tuple[str, ...]]) -> str:
    """Words that say what was asked for, empty where everything was."""
    asked = ', '.join(' '.join(labels) for labels in filters.values() if labels)
    return f' of {asked}' if asked else ''


def check_participants(datasets: dict[str, Path], participants: Collection[str]) -> None:
    """Raise BrainfmError where no dataset has one of the participants, or there are none."""
    folders = [path for root in datasets.values() for path in root.glob('sub-*') if path.is_dir()]
    known = {path.name.removeprefix('sub-') for path in folders}
    unknown = sorted(set(participants) - known)
    where = ', '.join(map(str, datasets.values()))
    if not known:
        raise BrainfmError(
            f'There is no participant (no sub-* folder) in {where}: check the path.'
        )
    if unknown:
        raise BrainfmError(
            f'There is no participant {abridge(unknown)} in {where}; it has '
            f'{abridge(sorted(known))}.'
        )


def read_column(dataset: Path, column: str) -> dict[str, str]:
    """Text of a column of ``participants.tsv``, by the participant's label (``01``).

    The file is searched for in the dataset, in those that it was made from, and in the raw
    datasets that these lie in. Raises BrainfmError where no such table has the column.
    """
    links = read_description(dataset).get('DatasetLinks', {}).values()
    sources = [Path(unquote(urlsplit(link).path)) for link in links]
    raw = [path.parents[1] for path in sources if path.parent.name == 'derivatives']
    folders, columns = [dataset, *sources, *raw], []
    for folder in folders:
        if (path := folder / 'participants.tsv').is_file():
            frame = _read_participants(path)
            if column in frame and 'participant_id' in frame:
                labels = frame['participant_id'].str.removeprefix('sub-')
                return dict(zip(labels, frame[column], strict=True))
            columns += list(frame)
    raise BrainfmError(
        f'no participants.tsv has a column {column} (the columns are '
        f'{", ".join(dict.fromkeys(columns)) or "none"}); looked for it in '
        f'{", ".join(map(str, folders))}.'
    )


def _read_participants(path: Path) -> 'pd.DataFrame':
    try:
        return read_tsv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise BrainfmError(f'{path} cannot be read ({error}): restore the file.') from None
