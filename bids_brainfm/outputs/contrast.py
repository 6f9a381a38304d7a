"""The group level: attention maps of two conditions, or of two groups, subtracted."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.analyses.contrast import Contrast, contrast_tokens
from bids_brainfm.atlases.export import find_exported
from bids_brainfm.bids.dataset import Record, describe_filters, find_whole, read_column
from bids_brainfm.bids.files import write_table
from bids_brainfm.bids.freshness import check_contents, write_sidecar
from bids_brainfm.bids.naming import LONG_NAMES, own_uri
from bids_brainfm.config import Settings
from bids_brainfm.documents import text_checksum
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.products import save_figure
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.outputs.words import described
from bids_brainfm.progress import track

LOGGER = logging.getLogger('bids_brainfm')
Filters = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class GroupMap:
    """Attention maps of one model in one space."""

    name: str  # entities that begin the names of outputs
    label: str  # of the model
    image: Path  # of the atlas, from the output dataset
    table: Path  # of the atlas
    records: list[Record]  # table of each run
    maps: np.ndarray  # of each run, (N, P) float, multiples of uniform attention
    token: np.ndarray  # (P,) int, number of the token that holds each parcel


def wanted(settings: Settings) -> bool:
    """Whether a contrast was asked for."""
    return bool(settings.options.get('contrast'))


def find(dataset: Path, filters: Filters, settings: Settings) -> list[GroupMap]:
    """Read the attention maps that the participant level wrote, by space, atlas and model.

    A BrainfmError says that the dataset is not ours, or lacks maps or participants asked for.
    """
    import pandas as pd

    attention = BY_NAME['attention']
    found: dict[tuple[str, ...], list[Record]] = {}
    version = attention.results_version
    for record in find_whole(dataset, attention.suffix, filters, version, stat=attention.stat):
        key = tuple(record.entities[name] for name in ('space', 'atlas', 'desc'))
        found.setdefault(key, []).append(record)
    if not found:
        raise BrainfmError(
            f'{dataset} has no attention maps{describe_filters(filters)} that can be used '
            '(warnings name those left out): run the participant level with --outputs networks '
            'first.'
        )
    groups = []
    for (space, atlas, label), records in found.items():
        image, table = find_exported(dataset, space, atlas)
        name = f'space-{space}_atlas-{atlas}_stat-{attention.stat}_desc-{label}'
        check_contents(image, table, *(record.path for record in records))
        tables = [
            pd.read_csv(r.path, sep='\t', na_values='n/a') for r in track(records, 'Maps', 'map')
        ]
        maps = np.array([t['attention'].to_numpy(float) for t in tables])
        token = tables[0]['token'].to_numpy()
        groups.append(GroupMap(name, label, image, table, records, maps, token))
    return groups


def sides(
    group: GroupMap, column: str, a: str, b: str, dataset: Path
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Maps of both sides of a contrast, (N, P) and (M, P), a mean over runs for each participant.

    They are paired, which is returned too, where rows of both are the same participants:
    conditions are compared within, groups between participants. BrainfmError: a side has nobody.
    """
    paired = any(column in record.entities for record in group.records)
    try:
        levels = {} if paired else read_column(dataset, column)
    except BrainfmError as error:
        raise BrainfmError(
            f'--contrast {column}: this is no entity of the runs (task, ses, run, acq, ...), and '
            f'{error}'
        ) from None
    found: dict[str, dict[str, list[np.ndarray]]] = {a: {}, b: {}}
    known = set()
    for record, values in zip(group.records, group.maps, strict=True):
        person = record.entities['sub']
        level = record.entities.get(column) if paired else levels.get(person)
        known.add(str(level))
        if level in found:
            found[level].setdefault(person, []).append(values)
    if missing := [level for level, people in found.items() if not people]:
        raise BrainfmError(
            f'--contrast {column} {a} {b}: no attention map of {group.label} is of {column} '
            f'{" or ".join(missing)}; the maps are of {", ".join(sorted(known))}.'
        )
    people = [set(found[level]) for level in (a, b)]
    if paired:
        people = [people[0] & people[1]] * 2
        if not people[0]:
            raise BrainfmError(
                f'--contrast {column} {a} {b}: no participant has runs of both; compare groups '
                f'of participants by a column of participants.tsv.'
            )
    first, second = (
        np.array([np.mean(found[level][person], axis=0) for person in sorted(who)])
        for level, who in zip((a, b), people, strict=True)
    )
    return first, second, paired


def write(
    groups: Sequence[GroupMap], dataset: Path, settings: Settings, version: str
) -> list[Path]:
    """Write a minus b for each model and space: table, image, figure, sidecar; return the tables.

    The option ``contrast`` is an entity of runs or a column of ``participants.tsv``, and two
    levels of it. BrainfmError: both levels are one, or no model has maps of both.
    """
    column, a, b = settings.options['contrast']
    if a == b:
        raise BrainfmError(f'--contrast {column} {a} {b} subtracts {a} from itself: name two.')
    column = {long: short for short, long in LONG_NAMES.items()}.get(column, column)
    folder = dataset / 'group' / f'{_plain(column)}-{_plain(a)}-minus-{_plain(b)}'
    written, lacking = [], []
    for group in groups:
        try:
            first, second, paired = sides(group, column, a, b, dataset)
        except BrainfmError as error:  # another model may have both sides
            lacking.append(error)
            continue
        table = folder / f'{group.name}_{BY_NAME["attention"].suffix}.tsv'
        found = contrast_tokens(first, second, paired, group.token)
        _write_map(table, group, found, a, b)
        paths = [*(record.path for record in group.records), group.image]
        content = {
            'Description': f'Attention of {group.label} to the token of each parcel, as a '
            f'multiple of uniform attention: {column} {a} minus {b}. Runs were averaged within '
            'participants. Each token was tested once; its parcels share the result.',
            'Contrast': {'Of': column, 'Minuend': a, 'Subtrahend': b},
            'Test': 'paired t-test' if paired else "Welch's t-test",
            'NumberOfParticipants': {a: found.n_a, b: found.n_b},
            'TokensTested': len(np.unique(group.token[np.isfinite(found.q)])),
            'TokensBelowQ05': len(np.unique(group.token[found.q < 0.05])),
            'Sources': [own_uri(dataset, path) for path in paths], 'SoftwareVersion': version,
        } | described(
            Node='Parcel of the atlas', token='Number of the token that holds the parcel',
            difference=f'{a} minus {b}', t='Test statistic', p='Two-sided p value',
            q='p adjusted for the false discovery rate over tokens (Benjamini & Hochberg)',
        )  # fmt: skip
        write_sidecar(table, content)
        written.append(table)
        LOGGER.info('Contrast written: %s', table)
    if not written:
        raise lacking[0]
    for reason in lacking:
        LOGGER.warning('%s', reason)
    return written


def _plain(text: str) -> str:
    """Return letters and digits for the name of a folder, different ones for different texts.

    >>> _plain('F'), _plain('M+') == _plain('M-')
    ('F', False)
    """
    kept = re.sub('[^a-zA-Z0-9]', '', text)
    return kept if kept == text else kept + text_checksum(text)


def _write_map(table: Path, group: GroupMap, found: Contrast, a: str, b: str) -> None:
    """Write table, image and figure of a contrast."""
    import pandas as pd

    from bids_brainfm.reports.figures import contrast as figures
    from bids_brainfm.signals.paint import paint_map

    parcels = pd.read_csv(group.table, sep='\t', dtype={'name': str})
    columns: dict[str, Any] = {'Node': list(parcels['name']), 'token': group.token}
    columns |= {name: getattr(found, name) for name in ('difference', 't', 'p', 'q')}
    write_table(table, columns)
    extension = '.dscalar.nii' if group.image.name.endswith('.dlabel.nii') else '.nii.gz'
    paint_map(table.with_suffix(extension), group.image, found.difference)
    xyz = parcels[['x', 'y', 'z']].to_numpy()
    values = found.difference, found.q, group.token
    figure = figures.contrast(xyz, *values, a, b, found.n_a, found.n_b)
    save_figure(figure, table.with_suffix('.svg'))
