"""What is in a dataset: our own outputs, the settings behind them, and its participants."""

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from bids_brainfm.bids.description import generators, read_description
from bids_brainfm.bids.files import as_plain, atomic, write_text
from bids_brainfm.bids.freshness import is_whole, read_sidecar, sidecar_path
from bids_brainfm.bids.naming import OUTPUT_ENTITIES, join_name, parse_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.progress import track

LOGGER = logging.getLogger('bids_brainfm')
VERSION = 'results_version'  # key of the settings records


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

    @property
    def whole(self) -> bool:
        """Whether it and its sidecar are there, and nothing was cut off since."""
        return is_whole(self.path)


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

    They are whole, of this `version` of the results, and not excluded for their flagged volumes.
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
            reason = 'it or its sidecar (.json) is not whole: run the participant level again'
        elif sidecar.get('ResultsVersion') != version:
            reason = 'another version of bids_brainfm wrote it, with other numbers: run the '
            reason += 'participant level again with --recompute'
        elif sidecar.get('Excluded'):
            reason = 'more of its volumes are flagged than --max-flagged allows'
        else:
            kept.append(record)
            continue
        LOGGER.warning('%s is left out, since %s.', record.path, reason)
    _check_precision(kept)
    return kept


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
    import pandas as pd

    try:
        frame = pd.read_csv(path, sep='\t', dtype=str, keep_default_na=False)
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
            f'There is no participant {", ".join(unknown)} in {where}; it has '
            f'{", ".join(sorted(known))}.'
        )


def read_column(dataset: Path, column: str) -> dict[str, str]:
    """Text of a column of ``participants.tsv``, by the participant's label (``01``).

    The file is searched for in the dataset, in those that it was made from, and in the raw
    datasets that these lie in. Raises BrainfmError where no such table has the column.
    """
    import pandas as pd

    links = read_description(dataset).get('DatasetLinks', {}).values()
    sources = [Path(unquote(urlsplit(link).path)) for link in links]
    raw = [path.parents[1] for path in sources if path.parent.name == 'derivatives']
    folders, columns = [dataset, *sources, *raw], []
    for folder in folders:
        if (path := folder / 'participants.tsv').is_file():
            frame = pd.read_csv(path, sep='\t', dtype=str, keep_default_na=False)
            if column in frame and 'participant_id' in frame:
                labels = frame['participant_id'].str.removeprefix('sub-')
                return dict(zip(labels, frame[column], strict=True))
            columns += list(frame)
    raise BrainfmError(
        f'no participants.tsv has a column {column} (the columns are '
        f'{", ".join(dict.fromkeys(columns)) or "none"}); looked for it in '
        f'{", ".join(map(str, folders))}.'
    )


def claim_settings(
    output: Path, name: str, settings: Mapping[str, Any], records: Iterable[Record],
    recompute: bool = False,
) -> None:  # fmt: skip
    """Record the settings behind one kind of output, or check that they are the recorded ones.

    The first process to write the record wins; all others must agree with it, as long as there
    are outputs of this kind, the `records`, read only where settings differ. The `name` says what
    the settings are for, e.g. ``atlas-A424`` or ``desc-brainlm111m``. Their ``results_version``
    says which version of the results the outputs are of; with `recompute`, a record of another
    version is replaced.

    Raises
    ------
    BrainfmError
        There are outputs made with other settings; the sentence gives both.
    """
    path = output / 'logs' / 'settings' / f'{name}.json'
    text = json.dumps(settings, indent=2, default=as_plain) + '\n'
    wanted = json.loads(text)
    if not path.is_file():
        with atomic(path.with_name(f'{name}.{uuid.uuid4().hex}')) as temporary:
            temporary.write_text(text)
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
            temporary.unlink()
    recorded = (known := read_sidecar(path)) or {}
    differences = [
        f'{key} was {recorded.get(key)!r:.60} and is now {wanted.get(key)!r:.60}'
        for key in {**recorded, **wanted}
        if recorded.get(key) != wanted.get(key)
    ]
    if not differences:
        return
    outdated = known is not None and recorded.get(VERSION) != wanted.get(VERSION)
    if not (outdated and recompute) and next(iter(records), None) is not None:
        if outdated:
            raise BrainfmError(
                f'{output} holds outputs of {name} by another version of bids_brainfm, whose '
                f'numbers differ (results version {recorded.get(VERSION, 1)}, now '
                f'{wanted.get(VERSION)}): add --recompute to make them again, or use another '
                f'output folder.'
            )
        if known is None:
            raise BrainfmError(
                f'{path} is damaged, and says no longer with which settings the outputs of {name} '
                f'were made: if with those of now, remove this file; if not, use another output '
                f'folder.'
            )
        raise BrainfmError(
            f'{output} holds outputs of {name} made with other settings '
            f'({"; ".join(differences)}): use the same settings, or another output folder.'
        )
    write_text(path, text)
