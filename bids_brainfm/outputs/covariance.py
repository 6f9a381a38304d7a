"""The group level: the covariance between parcels that reconstructions are compared with."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bids_brainfm.bids.dataset import Record
from bids_brainfm.bids.files import atomic, write_table
from bids_brainfm.bids.freshness import check_contents, write_sidecar
from bids_brainfm.bids.naming import own_uri, parcels_name
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.scale_stats import FEW, selection
from bids_brainfm.outputs.scale_stats import find as find
from bids_brainfm.outputs.words import described
from bids_brainfm.progress import track
from bids_brainfm.signals.covariance import moments, positive_definite, shrunk, standardised
from bids_brainfm.signals.series import read_series
from bids_brainfm.validation import MOST

if TYPE_CHECKING:
    import h5py

LOGGER = logging.getLogger('bids_brainfm')
NAME = 'covariance'
# Groups that participants are divided into; each is predicted by the others
FOLDS = 10


def wanted(settings: Settings) -> bool:
    """Whether a covariance is to be fitted: the option was given without a file."""
    return settings.options.get(NAME) == ()


def write(
    series: Mapping[str, Sequence[Record]], dataset: Path, settings: Settings, version: str
) -> list[Path]:
    """Fit and write the covariance of every atlas.

    A file's name, ``group/covariance/atlas-<A>_desc-<version>_covariance.h5``, has its version,
    which follows from its numbers. It holds the sums of each of `FOLDS` groups of participants, so
    that nobody is scored by a covariance that contains their own runs. BrainfmError: a run is
    damaged, or an atlas has runs of one participant only.
    """
    written = []
    for atlas, records in series.items():
        people = list(dict.fromkeys(record.entities['sub'] for record in records))
        if len(people) < 2:
            raise BrainfmError(
                f'{dataset} has series of {atlas} of one participant only, and nobody may be '
                f'predicted from their own runs: select more participants, or run the '
                f'participant level on others first.'
            )
        fold_of = {person: number % FOLDS for number, person in enumerate(people)}
        sums, volumes = None, []
        for record in track(records, f'Runs of {atlas}'):
            run = read_series(record.path)
            of_run = moments(standardised(run.data, ~run.flagged))
            if sums is None:
                sums = np.zeros((min(len(people), FOLDS), *of_run.shape))
            sums[fold_of[record.entities['sub']]] += of_run
            volumes.append(int((~run.flagged).sum()))
        assert sums is not None
        digest = hashlib.sha256(sums.astype('<f4').tobytes()).hexdigest()[:8]
        path = dataset / 'group' / NAME / f'atlas-{atlas}_desc-{digest}_{NAME}.h5'
        _write_sums(path, atlas, sums, fold_of)
        whose = [record.entities['sub'] for record in records]
        table = {
            'run': [parcels_name(record.path.name) for record in records],
            'participant_id': [f'sub-{person}' for person in whose],
            'fold': [fold_of[person] for person in whose], 'volumes': volumes,
        }  # fmt: skip
        write_table(path.with_suffix('.tsv'), table)
        content = {
            'Description': f'Covariance between the parcels of {atlas} over runs that were each '
            'standardised: sums for each of the folds of participants, without flagged volumes.',
            'Atlas': atlas, 'Version': digest, 'Runs': own_uri(dataset, path.with_suffix('.tsv')),
            'NumberOfRuns': len(records), 'NumberOfParticipants': len(people),
            'ParticipantsFile': selection(settings), 'NumberOfFolds': len(sums),
            'SoftwareVersion': version,
        } | described(
            run='Parcel series', participant_id='Participant',
            fold='Group of participants, which is predicted by the other groups',
            volumes='Volumes that are not flagged',
        )  # fmt: skip
        write_sidecar(path, content)
        if len(people) < FEW:
            LOGGER.warning(
                'The covariance of %s is of %d participants only: as a baseline it may be worse '
                'than that of each run, which is the default.', atlas, len(people),
            )  # fmt: skip
        written.append(path)
        LOGGER.info('Covariance of %s (%d participants): %s', atlas, len(people), path)
    LOGGER.info('Use it with --outputs reconstruction --covariance FILE ..., one for each atlas.')
    return written


def _write_sums(path: Path, atlas: str, sums: np.ndarray, fold_of: Mapping[str, int]) -> None:
    import h5py

    with atomic(path) as temporary, h5py.File(temporary, 'w') as file:
        file.attrs['atlas'] = atlas
        file.create_dataset('sums', data=sums.astype('<f4'), compression='gzip')
        file['participants'], file['folds'] = list(fold_of), list(fold_of.values())


@dataclass(frozen=True)
class CohortCorrelation:
    """Correlation between parcels over other people than the one to be predicted."""

    values: np.ndarray  # (P, P)
    participants: int  # number of these people
    left_out: int  # number of people left out with the participant, 0 if not in the file


@contextlib.contextmanager
def _open(path: Path) -> Iterator['h5py.File']:
    """Open a file of sums; refused where another program wrote it, or it changed since."""
    import h5py

    check_contents(path, remedy='fit it again')
    try:
        with h5py.File(path) as file:
            yield file
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError):
        raise BrainfmError(
            f'--covariance {path} is not a file that bids_brainfm OUT OUT group --covariance '
            f'wrote: check the path.'
        ) from None


def atlas_of(path: Path) -> str:
    """Atlas of a file; refused where another program wrote it."""
    with _open(path) as file:
        return str(file.attrs['atlas'])


def choose(files: Sequence[Path], atlas: str) -> Path | None:
    """The file that is of an atlas, None where no file is given at all."""
    of_atlas = [path for path in files if atlas_of(path) == atlas]
    if files and len(of_atlas) != 1:
        raise BrainfmError(
            f'{len(of_atlas) or "None"} of the files of --covariance are of the atlas {atlas}: '
            f'give one for the atlas of each model that reconstructs.'
        )
    return of_atlas[0] if files else None


def load(path: Path, participant: str, n_parcels: int) -> CohortCorrelation:
    """Read the correlation between parcels over the folds without a participant (``01``)."""
    with _open(path) as file:
        (n_folds, *form), (n_people,) = file['sums'].shape, file['folds'].shape
        if form[-1] != n_parcels:
            raise BrainfmError(
                f'--covariance {path} has {form[-1]} parcels, and the atlas {n_parcels}: fit it '
                f'again.'
            )
        if form != [3, n_parcels, n_parcels] or n_folds > FOLDS or n_people > MOST:
            raise ValueError('shape')
        sums = file['sums'][:]
        folds, people = file['folds'][:], list(file['participants'].asstr()[:])
        if len(people) != len(folds) or not np.isfinite(sums).all():
            raise ValueError('values')
    own = folds[people.index(participant)] if participant in people else -1
    others = folds != own
    covariance = positive_definite(shrunk(sums[np.arange(len(sums)) != own].sum(0, dtype=float)))
    sd = np.sqrt(np.diag(covariance))
    return CohortCorrelation(
        covariance / np.outer(sd, sd), int(others.sum()), int((~others).sum())
    )
