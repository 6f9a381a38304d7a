"""The group level: fit the statistics that ``--scale cohort`` takes, over all finished runs."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.bids.dataset import Record, describe_filters, find_whole
from bids_brainfm.bids.files import read_matrix, write_table
from bids_brainfm.bids.freshness import check_contents, write_sidecar
from bids_brainfm.bids.naming import own_uri, parcels_name
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.progress import track
from bids_brainfm.resources import sha256_of
from bids_brainfm.signals.cohort_stats import CohortFit
from bids_brainfm.signals.scale import ScaleStats, check_stats, stats_content, unusable

LOGGER = logging.getLogger('bids_brainfm')
# Quartiles of fewer people depend on each of them
FEW = 20
WHAT = {
    'cohort': 'median and interquartile range of all samples of runs with the grand mean at 10000 '
    "and the parcel's own mean taken out, and bounds at -3.6 and 3.7 SD, in interquartile ranges",
    'cohort-means': 'median and interquartile range over participants of the mean over time, with '
    'the grand mean of each run at 10000',
}
Filters = dict[str, tuple[str, ...]]


def wanted(settings: Settings) -> bool:
    """Whether statistics are to be fitted: the option was given without a file."""
    return settings.scale_stats == ()


def find(dataset: Path, filters: Filters, settings: Settings) -> dict[str, list[Record]]:
    """Find the parcel series that the participant level finished, by atlas.

    A BrainfmError says that the dataset is not ours, has no series, lacks a participant that was
    asked for, or has one recording in two spaces.
    """
    series = BY_NAME['series']
    found: dict[str, list[Record]] = {}
    first: dict[tuple[str, str], Record] = {}
    version = series.results_version
    for record in find_whole(dataset, series.suffix, filters, version, stat=series.stat):
        atlas = record.entities['atlas']
        found.setdefault(atlas, []).append(record)
        other = first.setdefault((record.name, atlas), record)
        if other is not record:
            raise BrainfmError(
                f'{dataset} has {record.name} in two spaces ({other.path.name}, '
                f'{record.path.name}), and it would count twice: choose one with --space.'
            )
    if not found:
        raise BrainfmError(
            f'{dataset} has no parcel series{describe_filters(filters)} that can be used '
            '(warnings name those left out): run the participant level first, with --stop-after '
            'timeseries where the statistics are wanted before encoding.'
        )
    return found


def selection(settings: Settings) -> dict[str, Any] | None:
    """Entry of a sidecar on the table that selected the participants, None for all of them."""
    path = settings.participants_file
    if path is None:
        return None
    return {'Name': path.name, 'SHA256': sha256_of(path), 'Part': settings.part}


def write(
    series: Mapping[str, Sequence[Record]], dataset: Path, settings: Settings, version: str
) -> list[Path]:
    """Fit and write the statistics of every atlas, for both ways of scaling by a cohort.

    A file's name, ``group/scale/atlas-<A>_stat-<series|temporalmean>_desc-<version>_scale.json``,
    has its version, which follows from its numbers: other runs make another file, and outputs that
    were scaled by an older one still find it. BrainfmError: a run is damaged or has no BOLD level,
    or no parcel can be scaled by what was found.
    """
    written = []
    for atlas, records in series.items():
        fit, names, denoising, lengths = CohortFit(atlas), list[str](), set[str](), list[int]()
        for record in track(records, f'Runs of {atlas}'):
            check_contents(record.path)
            data, names = read_matrix(record.path)
            sidecar = record.sidecar or {}
            level, cleaning = sidecar.get('BrainMean'), sidecar.get('Denoising')
            if not (level and isinstance(cleaning, dict) and cleaning.get('Name')):
                raise BrainfmError(
                    f'The sidecar (.json) of {record.path} lacks the BrainMean or the Denoising: '
                    f'remove both and run the participant level again.'
                )
            # flagged volumes hold interpolated values
            data = np.delete(data, sidecar.get('FlaggedVolumes', []), axis=0)
            try:
                fit.add(record.entities['sub'], data, level)
            except BrainfmError as error:
                raise BrainfmError(f'{record.path.name}: {error}') from None
            denoising.add(cleaning['Name'])
            lengths.append(len(data))
        people = {record.entities['sub'] for record in records}
        facts = {
            'NumberOfRuns': len(records), 'NumberOfParticipants': len(people),
            'ParticipantsFile': selection(settings), 'Denoising': sorted(denoising),
            'SoftwareVersion': version, 'Node': names,
        }  # fmt: skip
        if len(people) < FEW:
            LOGGER.warning(
                'The statistics of %s are of %d participants only: with fewer than %d they say '
                'more of these people than of a cohort.', atlas, len(people), FEW,
            )  # fmt: skip
        runs = [parcels_name(record.path.name) for record in records]
        table = {'run': runs, 'unflagged_volumes': lengths}
        fitted = {'cohort': fit.series(), 'cohort-means': fit.temporal_means()}
        for method, stats in fitted.items():
            try:
                check_stats(stats, method)
            except BrainfmError as error:
                LOGGER.warning('Not written, for %s: %s', method, error)
                continue
            written.append(_write_stats(dataset, method, stats, facts, table))
            LOGGER.info('Statistics for models scaled by %s: %s', method, written[-1])
    if not written:
        raise BrainfmError(
            f'The parcel series of {dataset} give no statistics that a model could be scaled by '
            f'(see the warnings): run the participant level on more participants first.'
        )
    LOGGER.info('Use them with --scale cohort --scale-stats FILE ..., those of your models.')
    return written


def _write_stats(
    dataset: Path, method: str, stats: ScaleStats, facts: dict[str, Any], table: dict[str, Any]
) -> Path:
    """Write statistics, and next to them the table of their runs."""
    content = stats_content(stats)
    digest = hashlib.sha256(json.dumps([content, table]).encode()).hexdigest()[:8]
    kind, folder = stats.statistic.replace(' ', ''), dataset / 'group' / 'scale'
    runs = folder / f'atlas-{stats.atlas}_stat-{kind}_desc-{digest}_scale.tsv'
    write_table(runs, table)
    head = {
        'Description': f'Statistics of the parcels of {stats.atlas} over runs: {WHAT[method]}.',
        'ScalesBy': method, 'Version': digest, 'Runs': own_uri(dataset, runs),
        'ParcelsWithout': [facts['Node'][i] for i in unusable(stats)],
    }  # fmt: skip
    return write_sidecar(runs, head | facts | content)
