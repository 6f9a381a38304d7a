"""The group level: fit the statistics that ``--scale cohort`` takes, over all finished runs."""

import hashlib
import json
import logging
from pathlib import Path

from tqdm import tqdm

from bids_brainfm.bids.files import read_matrix, write_json, write_table
from bids_brainfm.bids.freshness import read_sidecar
from bids_brainfm.bids.naming import join_name, own_uri
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.contrast import asked_of, finished
from bids_brainfm.signals.cohort_stats import CohortFit
from bids_brainfm.signals.scale import ScaleStats, check_stats, stats_content, unusable

LOGGER = logging.getLogger('bids_brainfm')
SERIES = 'stat-mean_timeseries'
# Quartiles of fewer people depend on each of them
FEW = 20
WHAT = {
    'cohort': 'median and interquartile range of all samples of runs with the grand mean at 10000 '
    "and the parcel's own mean taken out, and bounds at -3.6 and 3.7 SD, in interquartile ranges",
    'cohort-means': 'median and interquartile range over participants of the mean over time, in '
    'BOLD units',
}
# Entities that tell two files of one recording apart
_PLACE = ('space', 'res', 'den', 'atlas', 'stat')


def find_series(
    dataset: Path, filters: dict[str, tuple[str, ...]]
) -> dict[str, list[tuple[dict, Path]]]:
    """Parcel series that the participant level finished, by atlas.

    Parameters
    ----------
    dataset : Path
    filters : dict of str to tuple of str
        Labels of an entity to take; all where empty.

    Raises
    ------
    BrainfmError
        The dataset is not ours, has none, lacks a participant that was asked for, or has one
        recording in two spaces.
    """
    found: dict[str, list[tuple[dict, Path]]] = {}
    names: dict[str, Path] = {}
    for entities, path in finished(dataset, f'*_{SERIES}.tsv', filters):
        found.setdefault(entities['atlas'], []).append((entities, path))
        name = join_name({k: v for k, v in entities.items() if k not in _PLACE})
        first = names.setdefault(f'{name}_atlas-{entities["atlas"]}', path)
        if first != path:
            raise BrainfmError(
                f'{dataset} has {name} in two spaces ({first.name}, {path.name}), and it would '
                f'count twice: choose one with --space.'
            )
    if not found:
        raise BrainfmError(
            f'{dataset} has no parcel series{asked_of(filters)}: run the participant level first, '
            f'with --stop-after timeseries where the statistics are wanted before encoding.'
        )
    return found


def write_scale_stats(
    series: dict[str, list[tuple[dict, Path]]], dataset: Path, version: str
) -> list[tuple[str, Path]]:
    """Fit and write the statistics of every atlas, for both ways of scaling by a cohort.

    A file's name has its version, which follows from its numbers: other runs make another file,
    and outputs that were scaled by an older one still find it.

    Parameters
    ----------
    series : dict of str to list of (dict, Path)
        From :func:`find_series`.
    dataset : Path
        Where they are from, and where the folder ``group`` goes.
    version : str
        Of this program.

    Returns
    -------
    list of (str, Path)
        Way of scaling and file,
        ``group/scale/atlas-<A>_stat-<series|temporalmean>_desc-<version>_scale.json``.

    Raises
    ------
    BrainfmError
        A run is damaged or has no BOLD level, or no parcel can be scaled by what was found.
    """
    written = []
    for atlas, runs in series.items():
        fit, names, denoising, lengths = CohortFit(atlas), [], set(), []
        for entities, path in tqdm(runs, desc=f'Runs of {atlas}', unit='run', disable=None):
            data, names = read_matrix(path)
            facts_of = _facts(path)
            try:
                fit.add(entities['sub'], data, facts_of['BrainMean'])
            except BrainfmError as error:
                raise BrainfmError(f'{path.name}: {error}') from None
            denoising.add(facts_of['Denoising']['Name'])
            lengths.append(len(data))
        people = {entities['sub'] for entities, _ in runs}
        facts = {
            'NumberOfRuns': len(runs),
            'NumberOfParticipants': len(people),
            'Denoising': sorted(denoising),
            'SoftwareVersion': version,
            'Node': names,
        }
        if len(people) < FEW:
            LOGGER.warning(
                'The statistics of %s are of %d participants only: with fewer than %d they say '
                'more of these people than of a cohort.', atlas, len(people), FEW,
            )  # fmt: skip
        table = {'run': [path.name.partition(f'_{SERIES}')[0] for _, path in runs]}
        table['volumes'] = lengths
        for method, stats in {
            'cohort': fit.series(),
            'cohort-means': fit.temporal_means(),
        }.items():
            try:
                check_stats(stats, method)
            except BrainfmError as error:
                LOGGER.warning('Not written, for %s: %s', method, error)
                continue
            written.append((method, _write(dataset, method, stats, facts, table)))
    if not written:
        raise BrainfmError(
            f'The parcel series of {dataset} give no statistics that a model could be scaled by '
            f'(see the warnings): run the participant level on more participants first.'
        )
    return written


def _facts(path: Path) -> dict:
    """Sidecar of parcel series.

    Raises
    ------
    BrainfmError
        It lacks something.
    """
    sidecar = read_sidecar(path.with_suffix('.json'))
    try:
        complete = bool(sidecar['BrainMean'] and sidecar['Denoising']['Name'])
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise BrainfmError(
            f'The sidecar (.json) of {path} lacks the BrainMean or the Denoising: remove both and '
            f'run the participant level again.'
        )
    return sidecar


def _write(dataset: Path, method: str, stats: ScaleStats, facts: dict, table: dict) -> Path:
    """Write statistics, and beside them the table of runs that they are of."""
    content = stats_content(stats)
    digest = hashlib.sha256(json.dumps([content, table]).encode()).hexdigest()[:8]
    kind = stats.statistic.replace(' ', '')
    stem = f'atlas-{stats.atlas}_stat-{kind}_desc-{digest}_scale'
    runs = dataset / 'group' / 'scale' / f'{stem}.tsv'
    write_table(runs, table)
    head = {
        'Description': f'Statistics of the parcels of {stats.atlas} over runs: {WHAT[method]}.',
        'ScalesBy': method,
        'Version': digest,
        'Runs': own_uri(dataset, runs),
        'ParcelsWithout': [facts['Node'][i] for i in unusable(stats)],
    }
    return write_json(runs.with_suffix('.json'), head | facts | content)
