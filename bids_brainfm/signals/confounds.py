"""Confounds of a run: columns of its tables, components of an ICA, and outlier volumes."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bids_brainfm.documents import read_json, read_tsv
from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.ica import read_components
from bids_brainfm.signals.motion import (
    ROTATIONS,
    TRANSLATIONS,
    flag_short_segments,
    with_own_motion,
)
from bids_brainfm.signals.strategy import FD, CompCor, Strategy
from bids_brainfm.validation import LARGEST, is_number

if TYPE_CHECKING:
    import pandas as pd

COSINE = re.compile(r'cosine_?\d+')


@dataclass(frozen=True)
class Confounds:
    """Confounds of one run, all of them with one row per volume of the run, without gaps."""

    regressors: np.ndarray  # (T, K) float64, removed together with what others share with them
    names: tuple[str, ...]  # the K columns
    flagged: np.ndarray  # (T,) bool, above an outlier threshold, or non-steady after the start
    dummy: int  # volumes at the start to be dropped
    # Components of an ICA: noise (T, N) is removed, but nothing that signal (T, S) explains
    noise: np.ndarray
    signal: np.ndarray
    noise_names: tuple[str, ...] = ()
    # (T,) framewise displacement in mm that outliers are found with, NaN at the start
    displacement: np.ndarray | None = None

    def until(self, stop: int) -> 'Confounds':
        """Return the part for the volumes before `stop`."""
        rows = slice(stop)
        moved = self.displacement
        return dataclasses.replace(
            self, regressors=self.regressors[rows], flagged=self.flagged[rows],
            noise=self.noise[rows], signal=self.signal[rows],
            displacement=None if moved is None else moved[rows],
        )  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """Files that the confounds of one run come from, None for those that there are not."""

    confounds: Path | None = None  # fMRIPrep's desc-confounds_timeseries.tsv
    sidecar: Path | None = None  # its JSON, which CompCor needs
    custom: Path | None = None  # further regressors
    mixing: Path | None = None  # time courses of ICA components
    metrics: Path | None = None  # their classification


def read_confounds(tables: Tables, strategy: Strategy, n_volumes: int, tr: float) -> Confounds:
    """Take what a strategy removes out of the confounds tables of a run.

    Derivatives have no value in the first volume; they get the second one's, as in nilearn's
    ``load_confounds``. `tr` is the repetition time in seconds.

    Raises
    ------
    BrainfmError
        A file is missing or has another number of rows than volumes, a required column is absent,
        or values are not numbers.
    """
    import pandas as pd

    tsv = tables.confounds
    table = pd.DataFrame(index=range(n_volumes))
    if tsv is not None:
        table = _read_table(tsv, n_volumes)
        if strategy.motion_filter or strategy.head_radius:
            parameters = [name for name in (*TRANSLATIONS, *ROTATIONS) if name in table]
            table[parameters] = _floats(table, parameters, tsv)
            table = with_own_motion(table, strategy, tr)
    elif strategy.needs_table:
        raise BrainfmError(
            f'The denoising "{strategy.name}" needs the confounds of the run: give its '
            "desc-confounds_timeseries.tsv as confounds=, or choose 'none'."
        )
    names = _choose(list(table.columns), strategy, tsv)
    if strategy.compcor:
        chosen = _components(list(table.columns), strategy.compcor, tsv, tables.sidecar)
        names = [column for column in table if column in {*names, *chosen}]
    regressors = _numbers(table, names, tsv)
    if tables.custom is not None:
        custom = _read_custom(tables.custom, n_volumes)
        names += list(custom.columns)
        values = _numbers(custom, list(custom.columns), tables.custom)
        regressors = np.hstack([regressors, values])
    noise = signal = np.empty((n_volumes, 0))
    noise_names: tuple[str, ...] = ()
    if strategy.ica:
        components = tables.mixing, tables.metrics
        noise, signal, noise_names = read_components(*components, strategy.ica, n_volumes)
    dummy, flagged = _find_outliers(table, strategy, tsv)
    return Confounds(
        regressors, tuple(names), flagged, dummy, noise, signal, noise_names,
        _floats(table, [FD], tsv)[:, 0] if FD in table else None,
    )  # fmt: skip


def _find_outliers(
    table: 'pd.DataFrame', strategy: Strategy, tsv: Path | None
) -> tuple[int, np.ndarray]:
    """Volumes to drop at the start, and (T,) bool the flagged ones."""
    n_volumes = len(table)
    non_steady, dummy = _non_steady(table, tsv)
    if strategy.keep_nonsteady:
        non_steady, dummy = np.zeros_like(non_steady), 0
    dummy = dummy if strategy.dummy_scans is None else strategy.dummy_scans
    if dummy >= n_volumes:
        raise BrainfmError(
            f'All {n_volumes} volumes would be dropped at the start of the run: check '
            '--dummy-scans and the columns non_steady_state_outlier of the confounds table.'
        )
    flagged: np.ndarray = non_steady & (np.arange(n_volumes) >= dummy)
    if not (strategy.regresses or strategy.outliers):
        flagged[:] = False  # nothing is interpolated
    for column, limit in strategy.outliers.items():
        if column not in table:
            raise BrainfmError(
                f'{tsv} has no column {column}, which the outlier threshold of the denoising '
                f'{strategy.name} needs; use the confounds table as fMRIPrep wrote it.'
            )
        flagged |= _numbers(table, [column], tsv, fill=False)[:, 0] > limit
    if strategy.scrub:
        flagged[dummy:] = flag_short_segments(flagged[dummy:], strategy.scrub)
    return dummy, flagged


def count_dummy(tsv: Path, n_volumes: int) -> int:
    """Volumes at the start of a run that are not in steady state, from its confounds table."""
    return _non_steady(_read_table(tsv, n_volumes), tsv)[1]


def measure(tsv: Path, name: str) -> np.ndarray:
    """Return a column (T,) of the confounds of a run, NaN where it has no value; empty: absent."""
    table = _read_table(tsv)
    return _floats(table, [name], tsv)[:, 0] if name in table else np.array([])


def _non_steady(table: 'pd.DataFrame', tsv: Path | None) -> tuple[np.ndarray, int]:
    """(T,) bool, volumes that are not in steady state; how many of these are at the start."""
    columns = [c for c in table if c.startswith('non_steady_state_outlier')]
    non_steady = np.asarray(_numbers(table, columns, tsv).any(axis=1))
    dummy = len(table) if non_steady.all() else int(np.argmin(non_steady))
    return non_steady, dummy


def _read_table(tsv: Path, n_volumes: int | None = None) -> 'pd.DataFrame':
    try:
        table = read_tsv(tsv, na_values='n/a')
    except FileNotFoundError:
        raise BrainfmError(
            f'The confounds table {tsv} does not exist; copy it if fMRIPrep wrote one, or '
            'choose --denoise none with --keep-nonsteady.'
        ) from None
    except (OSError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise BrainfmError(f'The confounds table {tsv} cannot be read ({reason}).') from error
    if n_volumes is not None and len(table) != n_volumes:
        raise BrainfmError(
            f'The confounds table {tsv} has {len(table)} rows but the run has {n_volumes} '
            'volumes; use the table and the BOLD file of the same fMRIPrep run.'
        )
    return table


def _read_custom(path: Path, n_volumes: int) -> 'pd.DataFrame':
    """Read a table of further regressors; all of its columns are regressed out."""
    table = _read_table(path, n_volumes)
    if kept := [name for name in table if name.startswith('signal__')]:
        raise BrainfmError(
            f'{path} has the column {kept[0]}: columns of signal, which XCP-D keeps, are not '
            'supported, and all others are regressed out; leave it out.'
        )
    return table.rename(columns=lambda name: f'custom_{name}')


def _choose(header: list[str], strategy: Strategy, tsv: Path | None) -> list[str]:
    """Columns that match the patterns of a strategy, in the order of the header."""
    chosen = set()
    for pattern in strategy.columns + strategy.optional_columns:
        found = {column for column in header if re.fullmatch(pattern, column)}
        if not found and pattern in strategy.columns:
            stem = re.split(r'\W', pattern)[0][:4].lower()
            kin = [c for c in header if stem and c.lower().startswith(stem)]
            raise BrainfmError(
                f'{tsv} has no column {pattern}, which the denoising {strategy.name} needs (of '
                f'this kind it has {", ".join(kin[:6]) or "none"}); choose another --denoise.'
            )
        chosen |= found
    if strategy.replaces_cosines:
        chosen = {column for column in chosen if not COSINE.fullmatch(column)}
    return [column for column in header if column in chosen]


def _components(
    header: list[str], wanted: CompCor, tsv: Path | None, json_path: Path | None
) -> list[str]:
    """Retained anatomical CompCor components of the masks that are wanted."""
    try:
        described = read_json(Path(json_path)) if json_path else {}
    except (OSError, ValueError) as error:
        raise BrainfmError(
            f'The confounds sidecar {json_path} cannot be read ({error}); copy it again.'
        ) from error
    columns = [column for column in header if re.fullmatch(r'[acw]_comp_cor_\d+', column)]
    columns.sort(key=lambda name: (name[0], int(name.rpartition('_')[2])))
    chosen: list[str] = []
    for mask in wanted.masks:
        entry = {name: _mapping(described.get(name)) for name in columns}
        found = [n for n in columns if entry[n].get('Mask') == mask and entry[n].get('Retained')]
        if not found:
            raise BrainfmError(
                f'The sidecar of {tsv} ({json_path or "absent"}) describes no retained CompCor '
                f'component of the {mask} mask; copy it if fMRIPrep wrote one, or choose '
                'another --denoise.'
            )
        if wanted.variance:
            given: list[Any] = [entry[n].get('CumulativeVarianceExplained') for n in found]
            explained = [float(value) if is_number(value) else 0.0 for value in given]
            if explained[-1] < wanted.variance:
                raise BrainfmError(
                    f'The retained CompCor components of the {mask} mask in {tsv} explain '
                    f'{explained[-1]:.0%} of the variance, less than the {wanted.variance:.0%} '
                    'that are asked for: ask for less, or let fMRIPrep retain all components '
                    '(--return-all-components).'
                )
            found = found[: int(np.searchsorted(explained, wanted.variance)) + 1]
        chosen += found[: wanted.number]
    return chosen


def _mapping(entry: Any) -> dict[str, Any]:
    """Description of a column, empty where there is none."""
    return entry if isinstance(entry, dict) else {}


def _numbers(
    table: 'pd.DataFrame', names: list[str], tsv: Path | None, fill: bool = True
) -> np.ndarray:
    """(T, K) float64 columns; the first row is filled from the second, or with 0."""
    values = _floats(table, names, tsv)
    if empty := [names[column] for column in np.flatnonzero(np.isnan(values).all(axis=0))]:
        raise BrainfmError(
            f'Every value of {", ".join(empty[:4])} in {tsv} is n/a, as where fMRIPrep found no '
            f'voxel in a mask: choose another --denoise, or a threshold of 0 for a column that '
            f'only flags volumes.'
        )
    if len(values) > 1:
        values[0] = np.where(np.isnan(values[0]), values[1] if fill else 0, values[0])
    for row, column in np.argwhere(np.isnan(values)):
        raise BrainfmError(
            f'Column {names[column]} of {tsv} has no value in row {row + 1}; choose another '
            f'--denoise, or run fMRIPrep again for this run.'
        )
    return values


def _floats(table: 'pd.DataFrame', names: list[str], tsv: Path | None) -> np.ndarray:
    """(T, K) float64 columns, NaN where there is no value; refused if they are no numbers."""
    columns = table[names]
    for name, kind in columns.dtypes.items():
        if kind.kind not in 'iufb':
            raise BrainfmError(
                f'Column {name} of {tsv} holds something that is not a number; '
                'use the confounds table as fMRIPrep wrote it.'
            )
    values = columns.to_numpy(dtype=float, copy=True)
    for row, column in np.argwhere(np.abs(values) > LARGEST):
        raise BrainfmError(
            f'Column {names[column]} of {tsv} has the value {values[row, column]:g} in row '
            f'{row + 1}, beyond {LARGEST:g}; use the confounds table as fMRIPrep wrote it.'
        )
    return values
