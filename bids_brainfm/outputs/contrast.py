"""The group level: attention maps of two conditions, or of two groups, subtracted."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.bids.description import generators, read_description
from bids_brainfm.bids.files import write_table
from bids_brainfm.bids.freshness import is_whole, write_sidecar
from bids_brainfm.bids.naming import LONG_NAMES, own_uri, parse_name
from bids_brainfm.bids.participants import read_column
from bids_brainfm.bids.reading import check_participants
from bids_brainfm.errors import BrainfmError

LOGGER = logging.getLogger('bids_brainfm')
SUFFIX = 'stat-attention'


@dataclass(frozen=True)
class GroupMap:
    """Attention maps of one model in one space.

    Attributes
    ----------
    name : str
        Entities that begin the names of outputs.
    label : str
        Of the model.
    image, table : Path
        Image and table of the atlas, beside the outputs.
    values : list of (dict, (P,) float)
        Entities of each run, and its map.
    paths : list of Path
        Tables that the maps were read from.
    """

    name: str
    label: str
    image: Path
    table: Path
    values: list
    paths: list


def read_maps(dataset: Path, filters: dict[str, tuple[str, ...]]) -> list[GroupMap]:
    """Attention maps that the participant level wrote, by space, atlas and model.

    Parameters
    ----------
    dataset : Path
    filters : dict of str to tuple of str
        Labels of an entity to take; all where empty.

    Raises
    ------
    BrainfmError
        The dataset is not ours, or has none, or lacks a participant that was asked for.
    """
    import pandas as pd

    found: dict[tuple, list] = {}
    for entities, path in finished(dataset, f'*_{SUFFIX}_*_boldmap.tsv', filters):
        values = pd.read_csv(path, sep='\t', na_values='n/a')['attention'].to_numpy(float)
        key = tuple(entities[name] for name in ('space', 'atlas', 'desc'))
        found.setdefault(key, []).append((entities, values, path))
    if not found:
        raise BrainfmError(
            f'{dataset} has no attention maps{asked_of(filters)}: run the participant level with '
            f'--outputs networks first.'
        )
    return [_group_map(dataset, *key, maps) for key, maps in found.items()]


def finished(dataset: Path, pattern: str, filters: dict[str, tuple[str, ...]]) -> list:
    """Whole tables that the participant level wrote; a warning names those that are not.

    Parameters
    ----------
    dataset : Path
    pattern : str
        Glob of their names.
    filters : dict of str to tuple of str
        Labels of an entity to take; all where empty.

    Returns
    -------
    list of (dict, Path)
        Entities and path of each, participant by participant.

    Raises
    ------
    BrainfmError
        The dataset is not ours, or lacks a participant that was asked for.
    """
    makers = [program.get('Name') for program in generators(read_description(dataset))]
    if 'bids_brainfm' not in makers:
        raise BrainfmError(
            f'{dataset} was not written by bids_brainfm: the group level takes what the '
            f'participant level wrote, bids_brainfm OUT OUT group.'
        )
    check_participants({'outputs': dataset}, filters.get('sub', ()))
    found = []
    for path in sorted(dataset.glob(f'sub-*/**/{pattern}')):
        entities = parse_name(path.name)[0]
        if any(labels and entities.get(name) not in labels for name, labels in filters.items()):
            continue
        if is_whole(path):
            found.append((entities, path))
        else:
            LOGGER.warning(
                '%s is left out, since it or its sidecar (.json) is not whole: run the '
                'participant level on it again.', path,
            )  # fmt: skip
    return found


def asked_of(filters: dict[str, tuple[str, ...]]) -> str:
    """Words that say what was asked for, empty where everything was."""
    asked = ', '.join(' '.join(labels) for labels in filters.values() if labels)
    return f' of {asked}' if asked else ''


def _group_map(dataset: Path, space: str, atlas: str, label: str, maps: list) -> GroupMap:
    folder = dataset / 'sourcedata' / 'atlases' / f'tpl-{space}'
    images = sorted(folder.glob(f'tpl-{space}_atlas-{atlas}_*_dseg*.nii*'))
    if not images:
        raise BrainfmError(
            f'The image of atlas {atlas} is not in {folder}, where the participant level puts '
            f'it: run that again.'
        )
    table = images[0].with_name(images[0].name.partition('.')[0] + '.tsv')
    name = f'space-{space}_atlas-{atlas}_{SUFFIX}_desc-{label}'
    values = [(entities, values) for entities, values, _ in maps]
    return GroupMap(name, label, images[0], table, values, [path for *_, path in maps])


def sides(of: GroupMap, column: str, a: str, b: str, dataset: Path) -> tuple:
    """Maps of both sides of a contrast, a mean over runs for each participant.

    Returns
    -------
    a, b : (N, P) and (M, P) float
    paired : bool
        Whether rows of both are the same participants: conditions are compared within, groups
        between participants.

    Raises
    ------
    BrainfmError
        A side has nobody.
    """
    paired = any(column in entities for entities, _ in of.values)
    try:
        group = {} if paired else read_column(dataset, column)
    except BrainfmError as error:
        raise BrainfmError(
            f'--contrast {column}: this is no entity of the runs (task, ses, run, acq, ...), and '
            f'{error}'
        ) from None
    found: dict[str, dict[str, list]] = {a: {}, b: {}}
    known = set()
    for entities, values in of.values:
        level = entities.get(column) if paired else group.get(entities['sub'])
        known.add(str(level))
        if level in found:
            found[level].setdefault(entities['sub'], []).append(values)
    missing = [level for level, people in found.items() if not people]
    if missing:
        raise BrainfmError(
            f'--contrast {column} {a} {b}: no attention map of {of.label} is of {column} '
            f'{" or ".join(missing)}; there are {", ".join(sorted(known))}.'
        )
    people = [set(found[level]) for level in (a, b)]
    if paired:
        people = [people[0] & people[1]] * 2
        if not people[0]:
            raise BrainfmError(
                f'--contrast {column} {a} {b}: no participant has runs of both; compare groups '
                f'of participants by a column of participants.tsv.'
            )
    maps = (
        np.array([np.mean(found[level][person], axis=0) for person in sorted(who)])
        for level, who in zip((a, b), people, strict=True)
    )
    return *maps, paired


def write_contrasts(
    maps: list[GroupMap], dataset: Path, contrast: tuple[str, str, str], version: str = ''
) -> list[Path]:
    """Write a minus b for each model and space: table, image, figure, sidecar.

    Parameters
    ----------
    maps : list of GroupMap
    dataset : Path
        Where they are from, and where the folder ``group`` goes.
    contrast : tuple of str
        An entity of runs or a column of ``participants.tsv``, and its two levels.
    version : str
        Version of this program.

    Returns
    -------
    list of Path
        The tables.

    Raises
    ------
    BrainfmError
        Both levels are one, or no model has maps of both.
    """
    import pandas as pd

    from bids_brainfm.analyses.contrast import contrast as compare
    from bids_brainfm.reports import analysis_figures, figures
    from bids_brainfm.signals.paint import paint_map

    column, a, b = contrast
    plain = lambda text: re.sub('[^a-zA-Z0-9]', '', text)
    if a == b:
        raise BrainfmError(f'--contrast {column} {a} {b} subtracts {a} from itself: name two.')
    column = {long: short for short, long in LONG_NAMES.items()}.get(column, column)
    folder = dataset / 'group' / f'{plain(column)}-{plain(a)}-minus-{plain(b)}'
    written, lacking = [], []
    for of in maps:
        try:
            first, second, paired = sides(of, column, a, b, dataset)
        except BrainfmError as error:  # another model may have both sides
            lacking.append(error)
            continue
        found = compare(first, second, paired)
        parcels = pd.read_csv(of.table, sep='\t', dtype={'name': str})
        table = folder / f'{of.name}_boldmap.tsv'
        columns = {name: getattr(found, name) for name in ('difference', 't', 'p', 'q')}
        write_table(table, {'Node': list(parcels['name'])} | columns)
        extension = '.dscalar.nii' if of.image.name.endswith('.dlabel.nii') else '.nii.gz'
        paint_map(table.with_suffix(extension), of.image, found.difference)
        figure = analysis_figures.contrast(
            parcels[['x', 'y', 'z']].to_numpy(), found.difference, found.q, a, b, found.n_a,
            found.n_b,
        )  # fmt: skip
        figures.save(figure, table.with_suffix('.svg'))
        write_sidecar(
            table,
            {
                'Description': f'Share of the attention of {of.label} that falls on each parcel: '
                f'{column} {a} minus {b}, a mean over runs for each participant.',
                'Contrast': {'Of': column, 'Minuend': a, 'Subtrahend': b},
                'Test': 'paired t-test' if paired else "Welch's t-test",
                'NumberOfParticipants': {a: found.n_a, b: found.n_b},
                'Sources': [own_uri(dataset, p) for p in (*of.paths, of.image)],
                'SoftwareVersion': version,
                'Node': {'Description': 'Parcel of the atlas'},
                'difference': {'Description': f'{a} minus {b}'},
                't': {'Description': 'Statistic of the test'},
                'p': {'Description': 'Two-sided'},
                'q': {
                    'Description': 'p by false discovery rate over parcels (Benjamini & Hochberg)'
                },
            },
        )
        written.append(table)
    if not written:
        raise lacking[0]
    for error in lacking:
        LOGGER.warning('%s', error)
    return written
