"""Series of a whole cohort as a model takes them: on disk, mapped, never all in memory."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from isal import isal_zlib

from bids_brainfm.bids.files import write_json
from bids_brainfm.bids.freshness import read_sidecar, sealed
from bids_brainfm.errors import BrainfmError
from bids_brainfm.training.cohort import CohortRun

SHARD_BYTES = 2**30
INDEX = 'index.json'  # written last: a store with it is whole
FORMAT = 2  # of the store; the first had no flags

# (S, P) float32 scaled samples, and (S,) bool: those without a measured value
Samples = tuple[np.ndarray, np.ndarray]
Prepare = Callable[[CohortRun], Samples]
Prepared = tuple[str, str, str, Samples | str]  # as of write_store


@dataclass(frozen=True)
class StoredRun:
    """Where a run lies in a store."""

    name: str
    participant: str
    part: str
    shard: int  # number of its file
    start: int  # its first row there
    samples: int  # number of rows
    flagged: int = 0  # number of rows without a measured value
    checksum: int | None = None  # CRC-32 of its rows, None in stores of earlier versions


def write_store(
    folder: Path, parcels: int, series: Iterable[Prepared], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the scaled series of many runs, over what an interrupted attempt left.

    `series` are (name, participant, part, samples or text). Samples are scaled series (S, P)
    float32 and flags (S,) bool; a text says why the run cannot be used. A part without any run is
    refused. A file of series holds `shard_bytes`, and then the rest of its last run; a file of the
    same number holds the flags.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    runs: list[StoredRun] = []
    left_out: dict[str, str] = {}
    reasons: dict[str, str] = {}
    shard, row = 0, 0
    with contextlib.ExitStack() as stack:
        open_shard = lambda: [
            stack.enter_context(path.open('wb')) for path in _shard(folder, shard)
        ]
        files = open_shard()
        for name, participant, part, samples in series:
            reasons.setdefault(part, '')
            if isinstance(samples, str):
                left_out[name] = samples
                reasons[part] = reasons[part] or f'{name}: {samples}'
                continue
            if row * parcels * 4 >= shard_bytes:
                for file in files:
                    file.close()
                shard, row = shard + 1, 0
                files = open_shard()
            data, flagged = samples
            data, flagged = np.ascontiguousarray(data, '<f4'), np.ascontiguousarray(flagged, bool)
            data.tofile(files[0])
            flagged.tofile(files[1])
            where = name, participant, part, shard, row, len(data)
            n_flagged = int(np.count_nonzero(flagged))
            runs.append(StoredRun(*where, n_flagged, _checksum(data, flagged)))
            row += len(data)
    for part in sorted(set(reasons) - {run.part for run in runs}):
        raise BrainfmError(f'No run of the {part} part can be trained on ({reasons[part]})')
    index = {
        'format': FORMAT, 'parcels': parcels, 'runs': [asdict(run) for run in runs],
        'left_out': left_out,
    }  # fmt: skip
    write_json(folder / INDEX, sealed(index))


def _shard(folder: Path, number: int) -> tuple[Path, Path]:
    """Files of the series and of the flags."""
    return folder / f'shard-{number:04d}.f32', folder / f'shard-{number:04d}.flags'


def _checksum(series: np.ndarray, flags: np.ndarray) -> int:
    """CRC-32 of the rows of a run, both contiguous."""
    return isal_zlib.crc32(flags.view(np.uint8), isal_zlib.crc32(series.view(np.uint8)))


def is_complete(folder: Path) -> bool:
    """Whether a store is there, with an undamaged index and files of the right size."""
    index = read_sidecar(folder / INDEX)
    if index is None or index.get('format') != FORMAT:
        return index is not None  # Store says what is wrong with another format
    rows: dict[int, int] = {}
    for run in index['runs']:
        rows[run['shard']] = max(rows.get(run['shard'], 0), run['start'] + run['samples'])
    return all(
        path.is_file() and path.stat().st_size == rows[shard] * size
        for shard in rows
        for path, size in zip(_shard(folder, shard), (4 * index['parcels'], 1), strict=True)
    )


class Store:
    """A cohort on disk, from :func:`write_store`; ``left_out`` says why runs are not in it.

    Raises BrainfmError where another version of this program wrote it in another format.
    """

    def __init__(self, folder: Path):
        index = read_sidecar(folder / INDEX)
        if index is None:
            raise BrainfmError(
                f'{folder / INDEX} is missing or damaged: run the same command again, which '
                f'prepares the series anew.'
            )
        if index.get('format') != FORMAT:
            raise BrainfmError(
                f'{folder} was written by another version of bids_brainfm and does not say which '
                f'volumes are flagged: train in another folder.'
            )
        self.folder = folder
        self.runs = [StoredRun(**run) for run in index['runs']]
        self.left_out: dict[str, str] = index['left_out']
        self.parcels: int = index['parcels']
        self._mapped: dict[int, Samples] = {}
        self._checked: set[StoredRun] = set()

    def part(self, name: str) -> list[StoredRun]:
        """Runs of a part of the split."""
        return [run for run in self.runs if run.part == name]

    def flagged_proportion(self, part: str) -> float:
        """Proportion of samples without a measured value in a part."""
        runs = self.part(part)
        return sum(run.flagged for run in runs) / sum(run.samples for run in runs)

    def window(self, run: StoredRun, first: int, length: int, stride: int = 1) -> Samples:
        """Cut a window of `length` samples, every `stride`-th from `first` on.

        Returns its series (P, T) float32 and its flags (T,) bool. Raises BrainfmError where the
        run is damaged; the store is then prepared anew by the next command.
        """
        if run.shard not in self._mapped:
            series, flags = _shard(self.folder, run.shard)
            flat = np.memmap(series, dtype='<f4', mode='r')
            self._mapped[run.shard] = (
                flat.reshape(-1, self.parcels), np.memmap(flags, dtype=bool, mode='r')
            )  # fmt: skip
        data, flagged = self._mapped[run.shard]
        if run not in self._checked:
            self._check(run, data, flagged)
        start, stop = run.start + first, run.start + first + length * stride
        rows = slice(start, stop, stride)
        return np.ascontiguousarray(data[rows].T), np.array(flagged[rows])

    def _check(self, run: StoredRun, data: np.ndarray, flagged: np.ndarray) -> None:
        """Compare the rows of a run with their checksum, the first time that it is read."""
        rows = slice(run.start, run.start + run.samples)
        if run.checksum not in (None, _checksum(data[rows], flagged[rows])):
            (self.folder / INDEX).unlink(missing_ok=True)
            raise BrainfmError(
                f'The series of {run.name} in {self.folder} are not as they were written: run the '
                f'same command again, which prepares the series anew.'
            )
        self._checked.add(run)


def windows_in(run: StoredRun, length: int) -> range:
    """First samples of the windows that follow one another in a run."""
    return range(0, run.samples - length + 1, length)


def sample_seed(*numbers: int) -> int:
    """Mix numbers into one seed, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class WindowStream:
    """Random windows without end, in an order that follows from the seed alone.

    Position `p` is in epoch `p // len(runs)`, which takes one window of each run in a new order,
    whatever the number of processes and wherever training was interrupted. A window has `length`
    samples; `strides` augment the repetition time: it takes every sample, or every second, ... at
    random among those for which the run is long enough. `order` (P,) is that of its rows.
    """

    def __init__(
        self, store: Store, runs: list[StoredRun], length: int, seed: int,
        strides: tuple[int, ...] = (1,), order: np.ndarray | None = None,
    ):  # fmt: skip
        self.store, self.runs, self.length = store, runs, length
        self.seed, self.strides, self.order = seed, strides, order
        self._epoch, self._permutation = -1, np.empty(0, int)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Window (P, T) at a position, its flags (T,), and the number of its run."""
        epoch, place = divmod(position, len(self.runs))
        if self._epoch != epoch:
            rng = np.random.default_rng(sample_seed(self.seed, epoch))
            self._epoch, self._permutation = epoch, rng.permutation(len(self.runs))
        number = int(self._permutation[place])
        run, rng = self.runs[number], np.random.default_rng(sample_seed(self.seed, 1, position))
        span = lambda stride: (self.length - 1) * stride + 1
        stride = int(rng.choice([s for s in self.strides if span(s) <= run.samples] or [1]))
        first = int(rng.integers(run.samples - span(stride) + 1))
        window, flagged = self.store.window(run, first, self.length, stride)
        return (window if self.order is None else window[self.order]), flagged, number


def collect(
    runs: Sequence[CohortRun], prepare: Prepare, parts: dict[str, str], processes: int = 1
) -> Iterable[Prepared]:
    """Prepare runs for :func:`write_store`, in their order; unusable runs give the reason.

    With several processes, `prepare` and runs must be such as can be pickled.
    """
    attempt = partial(_attempt, prepare)
    with contextlib.ExitStack() as stack:
        if processes > 1:
            # not forked: a process with a GPU or threads must not be
            spawn = multiprocessing.get_context('spawn')
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=spawn))
            prepared = pool.map(attempt, runs, chunksize=4)
        else:
            prepared = map(attempt, runs)
        for run, data in zip(runs, prepared, strict=True):
            yield run.name, run.participant, parts[run.participant], data


def _attempt(prepare: Prepare, run: CohortRun) -> Samples | str:
    try:
        return prepare(run)
    except BrainfmError as error:
        return str(error)
