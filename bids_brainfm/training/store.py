"""Series of a whole cohort as a model takes them: on disk, mapped, never all in memory."""

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError

SHARD_BYTES = 2**30
INDEX = 'index.json'  # written last: a store with it is whole


@dataclass(frozen=True)
class StoredRun:
    """Where a run lies in a store.

    Attributes
    ----------
    name, participant : str
    part : str
        Part of the split.
    shard, start, samples : int
        File, first row in it, and number of rows.
    """

    name: str
    participant: str
    part: str
    shard: int
    start: int
    samples: int


def write_store(
    folder: Path,
    parcels: int,
    series: Iterable[tuple[str, str, str, np.ndarray | str]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the scaled series of many runs, one after the other.

    Parameters
    ----------
    folder : Path
        Of the store; what an interrupted attempt left there is written over.
    parcels : int
    series : iterable of (name, participant, part, (S, P) float32 or str)
        A text says why the run cannot be taken, and is kept.
    shard_bytes : int
        A file holds so much, and then the rest of its last run.

    Raises
    ------
    BrainfmError
        A part has no run that can be taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    runs, left_out, reasons, parts = [], {}, {}, set()
    shard = row = 0
    file = None
    try:
        for name, participant, part, data in series:
            parts.add(part)
            if isinstance(data, str):
                left_out[name] = data
                reasons.setdefault(part, f'{name}: {data}')
                continue
            if file is None or row * parcels * 4 >= shard_bytes:
                if file is not None:
                    file.close()
                    shard, row = shard + 1, 0
                file = _shard(folder, shard).open('wb')
            np.ascontiguousarray(data, '<f4').tofile(file)
            runs.append(StoredRun(name, participant, part, shard, row, len(data)))
            row += len(data)
    finally:
        if file is not None:
            file.close()
    for part in sorted(parts - {run.part for run in runs}):
        raise BrainfmError(f'No run of the {part} part can be trained on ({reasons[part]})')
    index = {'parcels': parcels, 'runs': [asdict(run) for run in runs], 'left_out': left_out}
    temporary = folder / f'.{INDEX}'
    temporary.write_text(json.dumps(index))
    temporary.replace(folder / INDEX)


def _shard(folder: Path, number: int) -> Path:
    return folder / f'shard-{number:04d}.f32'


class Store:
    """A cohort on disk.

    Parameters
    ----------
    folder : Path
        From :func:`write_store`.

    Attributes
    ----------
    runs : list of StoredRun
    left_out : dict of str to str
        Runs that could not be taken, and why.
    parcels : int
    """

    def __init__(self, folder: Path):
        index = json.loads((folder / INDEX).read_text())
        self.folder = folder
        self.runs = [StoredRun(**run) for run in index['runs']]
        self.left_out = index['left_out']
        self.parcels = index['parcels']
        self._mapped: dict[int, np.ndarray] = {}

    def part(self, name: str) -> list[StoredRun]:
        """Runs of a part of the split."""
        return [run for run in self.runs if run.part == name]

    def window(self, run: StoredRun, first: int, length: int, stride: int = 1) -> np.ndarray:
        """Cut a window (P, T) float32 of `length` samples, every `stride`-th from `first` on."""
        if run.shard not in self._mapped:
            flat = np.memmap(_shard(self.folder, run.shard), dtype='<f4', mode='r')
            self._mapped[run.shard] = flat.reshape(-1, self.parcels)
        start = run.start + first
        rows = self._mapped[run.shard][start : start + length * stride : stride]
        return np.ascontiguousarray(rows.T)


def windows_in(run: StoredRun, length: int) -> range:
    """First samples of the windows that follow one another in a run."""
    return range(0, run.samples - length + 1, length)


def sample_seed(*numbers: int) -> int:
    """Mix numbers into one seed, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class WindowStream:
    """Random windows without end, in an order that follows from the seed alone.

    Position `p` of the stream is in epoch `p // len(runs)`, which takes one window of each run in
    a new order. What stands at a position depends on nothing else: not on how many processes
    there are, nor on where training was interrupted.

    Parameters
    ----------
    store : Store
    runs : list of StoredRun
    length : int
        Samples of a window.
    seed : int
    strides : tuple of int
        Augmentation of the repetition time: a window takes every sample, or every second, ... at
        random among those for which the run is long enough.
    order : (P,) int, optional
        Order of rows that the network takes.
    """

    def __init__(
        self,
        store: Store,
        runs: list[StoredRun],
        length: int,
        seed: int,
        strides: tuple[int, ...] = (1,),
        order: np.ndarray | None = None,
    ):
        self.store, self.runs, self.length = store, runs, length
        self.seed, self.strides, self.order = seed, strides, order
        self._epoch: tuple[int, np.ndarray | None] = (-1, None)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Window (P, T) at a position, and the number of its run."""
        epoch, place = divmod(position, len(self.runs))
        if self._epoch[0] != epoch:
            rng = np.random.default_rng(sample_seed(self.seed, epoch))
            self._epoch = epoch, rng.permutation(len(self.runs))
        number = int(self._epoch[1][place])
        run, rng = self.runs[number], np.random.default_rng(sample_seed(self.seed, 1, position))
        span = lambda stride: (self.length - 1) * stride + 1
        stride = int(rng.choice([s for s in self.strides if span(s) <= run.samples] or [1]))
        first = int(rng.integers(run.samples - span(stride) + 1))
        window = self.store.window(run, first, self.length, stride)
        return (window if self.order is None else window[self.order]), number


def collect(
    runs: Sequence, prepare: Callable, parts: dict[str, str], processes: int = 1
) -> Iterable[tuple[str, str, str, np.ndarray | str]]:
    """Prepare runs for :func:`write_store`, in their order; what cannot be taken says why.

    With several processes, `prepare` and runs must be such as can be pickled.
    """
    attempt = partial(_attempt, prepare)
    with contextlib.ExitStack() as stack:
        if processes > 1:
            # not forked: a process with a GPU or threads must not be
            spawn = multiprocessing.get_context('spawn')
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=spawn))
            found = pool.map(attempt, runs, chunksize=4)
        else:
            found = map(attempt, runs)
        for run, data in zip(runs, found, strict=True):
            yield run.name, run.participant, parts[run.participant], data


def _attempt(prepare: Callable, run) -> np.ndarray | str:
    try:
        return prepare(run)
    except BrainfmError as error:
        return str(error)
