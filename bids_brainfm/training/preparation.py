"""The data of a training: runs, the part of each participant, and series for the model."""

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bids_brainfm.bids.files import create, write_table
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.model import Model
from bids_brainfm.signals.series import read_series
from bids_brainfm.training import cohort as cohorts
from bids_brainfm.training.cohort import CohortRun, Targets
from bids_brainfm.training.settings import SETTINGS, TrainingSettings, claim_output
from bids_brainfm.training.split import PARTS, read_groups, split
from bids_brainfm.training.store import FORMAT, Samples, Store, collect, is_complete, write_store

PARTICIPANTS = 'participants.tsv'  # which part each participant is in
# Number of runs from which on it is worth starting processes to read them
MANY_RUNS = 100


@dataclass(frozen=True)
class Preparation:
    """Reads a run as the model takes it, at least one window, or refuses it."""

    model: Model
    # Proportion of flagged samples above which a run is refused; None: the participant level's
    max_flagged: float | None = None

    def __call__(self, run: CohortRun) -> Samples:
        atlas, contract = self.model.atlas, self.model.contract
        if self.max_flagged is None and run.excluded:
            raise BrainfmError(
                'more of its volumes are flagged than --max-flagged of the participant level '
                'allowed; give --max-flagged here to set another limit.'
            )
        series = read_series(run.path)
        if series.data.shape[1] != atlas.n_parcels:
            raise BrainfmError(
                f'{run.path} has {series.data.shape[1]} parcels, but {atlas.name} has '
                f'{atlas.n_parcels}: run "bids_brainfm" on it again.'
            )
        found = self.model.prepare_input(series)
        data, flagged = found.data, found.flagged
        if self.max_flagged is not None and flagged.mean() > self.max_flagged:
            raise BrainfmError(
                f'{flagged.mean():.1%} of its samples are flagged, more than --max-flagged '
                f'{self.max_flagged:g}.'
            )
        missing = contract.window - len(data)
        if missing > (1 - contract.min_real) * contract.window + 1e-9:
            raise BrainfmError(
                f'it has {len(data)} samples of {contract.tr:g} s, and a window takes '
                f'{contract.window}.'
            )
        if missing > 0:  # completed as for encoding, and not measured either
            data = np.concatenate([data, np.tile(data.mean(0), (missing, 1))])
            flagged = np.concatenate([flagged, np.ones(missing, bool)])
        return np.asarray(data, np.float32), flagged


@dataclass(frozen=True)
class Cohort:
    """Runs, the part of each participant, and what is to be predicted of them."""

    runs: list[CohortRun]
    parts: dict[str, str]
    targets: Targets | None = None
    groups: dict[str, int] | None = None  # of participants that must be in one part

    def part(self, name: str) -> list[str]:
        """Participants of a part."""
        return [label for label, part in self.parts.items() if part == name]

    @property
    def names(self) -> list[str]:
        """Names of the parts, in their order."""
        return [name for name in PARTS if name in self.parts.values()]

    def known(self, people: list[str]) -> tuple[np.ndarray, list[int] | None]:
        """Targets of participants, and the groups that they are kept with, if any."""
        assert self.targets is not None
        groups = None if self.groups is None else [self.groups[person] for person in people]
        return np.array([self.targets.values[person] for person in people]), groups


def prepare(settings: TrainingSettings, model: Model, cohort: Cohort) -> None:
    """Write settings, split and series of a training, unless they are there.

    Settings come first, so that the same command goes on where this was killed; the series' index
    comes last. Nothing is left where data are refused.
    """
    output, series = settings.output, settings.output / 'series'
    if not is_complete(series):
        record = {'settings': settings.recorded(), 'software': version('bids_brainfm')}
        text = json.dumps(record | {'format': FORMAT}, indent=2) + '\n'
        new = create(output / SETTINGS, text)
        if not new:  # by another command that was started together with this one, perhaps
            claim_output(settings)
        write_participants(output / PARTICIPANTS, cohort)
        runs = [run for run in cohort.runs if run.participant in cohort.parts]
        processes = settings.nthreads if len(runs) >= MANY_RUNS else 1
        preparation = Preparation(model, settings.max_flagged)
        found = collect(runs, preparation, cohort.parts, processes)
        bar = tqdm(found, total=len(runs), desc='Preparing', unit='run', disable=None)
        try:
            write_store(series, model.atlas.n_parcels, bar)
        except BrainfmError:
            # an earlier training, whose series were deleted, keeps what it made
            shutil.rmtree(output if new else series)
            raise
    store = Store(series)
    if left_out := store.left_out:
        path = output / 'left_out.tsv'
        write_table(path, {'run': list(left_out), 'reason': list(left_out.values())})
        print(f'{len(left_out)} of {len(store.runs) + len(left_out)} runs are left out: {path}')


def write_participants(path: Path, cohort: Cohort) -> None:
    """Write the part of each participant, and the number of the group that it was kept with."""
    table: dict[str, list[Any]] = {
        'participant_id': [f'sub-{label}' for label in cohort.parts],
        'part': list(cohort.parts.values()),
    }
    if cohort.groups is not None:
        table['group'] = [cohort.groups[label] for label in cohort.parts]
    write_table(path, table)


def gather_cohort(settings: TrainingSettings, atlas: str) -> Cohort:
    """Find runs, targets and the split, and report everything that is wrong with them."""
    runs = cohorts.find_cohort(settings.data, atlas, settings.mix_trs)
    people = [run.participant for run in runs]
    targets, classes, groups = None, None, None
    if settings.target is not None:
        column, problem = settings.target, settings.problem
        targets = cohorts.read_targets(runs, column, problem, settings.drop_missing)
        people = [person for person in people if person in targets.values]
        classes = targets.values if targets.problem == 'classification' else None
    if settings.group_column:
        groups = read_groups([r for r in runs if r.participant in people], settings.group_column)
    parts = split(people, settings.proportions, settings.seed, classes, groups)
    return Cohort(runs, parts, targets, groups)
