"""Confound regression at parcel level.

Averaging over a parcel and projecting confounds out are both linear and commute, so hundreds of
parcel series are regressed instead of hundreds of thousands of voxels; the result is the same.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import Condition, build, read_card

if TYPE_CHECKING:
    import pandas as pd

FOLDER = 'denoising'
Components = Annotated[
    dict[str, str], Condition(lambda value: set(value) <= {'mask'}, 'one with the one key mask')
]


@dataclass(frozen=True)
class Preset:
    """What is regressed out."""

    name: str
    description: str = ''  # prose for the methods section
    columns: tuple[str, ...] = ()  # names or regular expressions; each must match whole names
    optional_columns: tuple[str, ...] = ()  # may match nothing (such as cosines of a short run)
    # {'mask': NAME}: of the CompCor columns keep those retained from this mask.
    components: Components = field(default_factory=dict)
    outliers: dict[str, float] = field(default_factory=dict)  # volumes above these are flagged

    def __post_init__(self) -> None:
        for pattern in self.columns + self.optional_columns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise BrainfmError(
                    f'the column {pattern!r} is not a regular expression ({error}).'
                ) from error

    @property
    def touches_nothing(self) -> bool:
        """Whether the series are to stay exactly as they are."""
        return not (self.columns or self.optional_columns or self.outliers)


@dataclass(frozen=True)
class Confounds:
    """Confounds of one run."""

    regressors: np.ndarray  # (T, K) float64, one row per volume of the run, without gaps
    names: tuple[str, ...]  # the K columns
    flagged: np.ndarray  # (T,) bool, above an outlier threshold, or non-steady after the start
    dummy: int  # non-steady volumes at the start, to be dropped


def load_preset(name: str | Path) -> Preset:
    """Read a denoising preset: one of ours by name, or a user's YAML file of the same form."""
    path, content = read_card(name, FOLDER, 'denoising preset')
    return build(Preset, {'name': path.stem} | content, f'The denoising preset {path}')


def read_confounds(tsv: Path, json_path: Path | None, preset: Preset, n_volumes: int) -> Confounds:
    """Take a preset's columns out of an fMRIPrep confounds table and its sidecar.

    Derivatives have no value in the first volume; they get the second one's, as in nilearn's
    ``load_confounds``. Refused are a missing file, another number of rows than volumes, a required
    column that is absent, and values that are not numbers.
    """
    table = _read_table(tsv, n_volumes)
    names = _choose(list(table.columns), preset, tsv)
    if preset.components:
        names = _retained(names, preset.components['mask'], tsv, json_path)
    regressors = _numbers(table, names, tsv)

    non_steady, dummy = _non_steady(table, tsv)
    flagged: np.ndarray = non_steady & (np.arange(n_volumes) >= dummy)
    for column, limit in preset.outliers.items():
        if column not in table:
            raise BrainfmError(
                f'{tsv} has no column {column}, which the outlier threshold of the denoising '
                f'{preset.name} needs; use the confounds table as fMRIPrep wrote it.'
            )
        flagged |= _numbers(table, [column], tsv, fill=False)[:, 0] > limit
    return Confounds(regressors, tuple(names), flagged, dummy)


def count_dummy(tsv: Path, n_volumes: int) -> int:
    """Volumes at the start of a run that are not in steady state, from its confounds table."""
    return _non_steady(_read_table(tsv, n_volumes), tsv)[1]


def _non_steady(table: 'pd.DataFrame', tsv: Path) -> tuple[np.ndarray, int]:
    """(T,) bool, volumes that are not in steady state; how many of these are at the start."""
    columns = [c for c in table if c.startswith('non_steady_state_outlier')]
    non_steady = np.asarray(_numbers(table, columns, tsv).any(axis=1))
    dummy = len(table) if non_steady.all() else int(np.argmin(non_steady))
    return non_steady, dummy


def _read_table(tsv: Path, n_volumes: int) -> 'pd.DataFrame':
    import pandas as pd

    try:
        table = pd.read_csv(tsv, sep='\t', na_values='n/a')
    except FileNotFoundError:
        raise BrainfmError(
            f'The confounds table {tsv} does not exist; copy it from the fMRIPrep output, or '
            'choose --denoise none.'
        ) from None
    except (OSError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise BrainfmError(f'The confounds table {tsv} cannot be read ({reason}).') from error
    if len(table) != n_volumes:
        raise BrainfmError(
            f'The confounds table {tsv} has {len(table)} rows but the run has {n_volumes} '
            'volumes; use the table and the BOLD file of the same fMRIPrep run.'
        )
    return table


def _choose(header: list[str], preset: Preset, tsv: Path) -> list[str]:
    """Columns that match the preset's patterns, in the order of the header."""
    chosen = set()
    for pattern in preset.columns + preset.optional_columns:
        found = {column for column in header if re.fullmatch(pattern, column)}
        if not found and pattern in preset.columns:
            stem = re.split(r'\W', pattern)[0][:4].lower()
            kin = [c for c in header if stem and c.lower().startswith(stem)]
            raise BrainfmError(
                f'{tsv} has no column {pattern}, which the denoising {preset.name} needs (of this '
                f'kind it has {", ".join(kin[:6]) or "none"}); choose another --denoise.'
            )
        chosen |= found
    return [column for column in header if column in chosen]


def _retained(names: list[str], mask: str, tsv: Path, json_path: Path | None) -> list[str]:
    """Drop the CompCor columns that are not retained components of the mask."""
    try:
        described = json.loads(Path(json_path).read_text(encoding='utf-8')) if json_path else {}
    except (OSError, ValueError) as error:
        raise BrainfmError(
            f'The confounds sidecar {json_path} cannot be read ({error}); copy it again.'
        ) from error
    components = [name for name in names if '_comp_cor_' in name]
    entries = {name: described.get(name, {}) for name in components}
    wanted = [c for c, e in entries.items() if e.get('Mask') == mask and e.get('Retained') is True]
    if not wanted:
        raise BrainfmError(
            f'The sidecar of {tsv} ({json_path or "absent"}) describes no retained CompCor '
            f'component of the {mask} mask; copy it from the fMRIPrep output, or choose another '
            '--denoise.'
        )
    return [name for name in names if name not in components or name in wanted]


def _numbers(table: 'pd.DataFrame', names: list[str], tsv: Path, fill: bool = True) -> np.ndarray:
    """(T, K) float64 columns; the first row is filled from the second, or with 0."""
    columns = table[names]
    for name, kind in columns.dtypes.items():
        if kind.kind not in 'iufb':
            raise BrainfmError(
                f'Column {name} of {tsv} holds something that is not a number; '
                'use the confounds table as fMRIPrep wrote it.'
            )
    values = columns.to_numpy(dtype=float, copy=True)
    if len(values) > 1:
        values[0] = np.where(np.isnan(values[0]), values[1] if fill else 0, values[0])
    for row, column in np.argwhere(~np.isfinite(values)):
        raise BrainfmError(
            f'Column {names[column]} of {tsv} has no value in row {row + 1}; '
            'use the confounds table as fMRIPrep wrote it.'
        )
    return values


def denoise(data: np.ndarray, confounds: Confounds) -> np.ndarray:
    """Regress confounds out of parcel series and interpolate flagged volumes.

    The model (confounds and an intercept) is fitted by least squares on the volumes that are not
    flagged; fewer than it needs are refused. The fitted confounds are subtracted everywhere, each
    parcel keeps its mean over these volumes, and flagged volumes are then interpolated linearly in
    time (at the ends, the nearest value). Dummy volumes are dropped first: series (T, P) become
    (T - dummy, P) float32. A parcel that is NaN stays NaN.
    """
    data = np.asarray(data)
    series = data[confounds.dummy :].astype(float)
    regressors = confounds.regressors[confounds.dummy :]
    good = ~confounds.flagged[confounds.dummy :]
    n_good, needed = np.count_nonzero(good), regressors.shape[1] + 2
    if n_good < needed:
        raise BrainfmError(
            f'Only {n_good} of {len(data)} volumes are neither flagged as motion outliers nor '
            f'non-steady, but {regressors.shape[1]} confounds and the mean need at least '
            f'{needed}; choose a denoising with fewer confounds or leave this run out.'
        )
    # Everything is centred on the good volumes, so the parcel means stay. Unit size keeps the fit
    # well conditioned: squared rotations are 1e-8, squared tissue signals 1e8.
    regressors = regressors - regressors[good].mean(axis=0)
    size = np.abs(regressors[good]).max(axis=0)
    regressors /= np.where(size > 0, size, 1)
    parcels = np.isfinite(series).all(axis=0)
    fluctuation = series[np.ix_(good, parcels)]
    fluctuation -= fluctuation.mean(axis=0)
    weights = np.linalg.lstsq(regressors[good], fluctuation, rcond=None)[0]
    series[:, parcels] -= regressors @ weights

    rows, bad = np.flatnonzero(good), np.flatnonzero(~good)
    after = np.clip(np.searchsorted(rows, bad), 1, len(rows) - 1)
    left, right = rows[after - 1], rows[after]
    weight = np.clip((bad - left) / (right - left), 0, 1)[:, None]
    series[bad] = (1 - weight) * series[left] + weight * series[right]
    return series.astype(np.float32)
