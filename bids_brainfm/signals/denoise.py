"""Confound regression at parcel level.

Averaging over a parcel and projecting confounds out are both linear and commute, so hundreds of
parcel series are regressed instead of hundreds of thousands of voxels; the result is the same.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError

PRESETS = Path(__file__).resolve().parents[1] / 'data' / 'denoising'
_PATTERNS = ('columns', 'optional_columns')


@dataclass(frozen=True)
class Preset:
    """What is regressed out.

    Attributes
    ----------
    name, description : str
        The description is prose for the methods section.
    columns : tuple of str
        Names or regular expressions; each must match at least one whole column name.
    optional_columns : tuple of str
        The same, but may match nothing (fMRIPrep writes no cosines for a very short run).
    components : dict
        ``{'mask': NAME}``: of the CompCor columns keep those retained from this mask.
    outliers : dict
        Column name to threshold; volumes above one of them are flagged.
    """

    name: str
    description: str = ''
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()
    components: dict[str, str] = field(default_factory=dict)
    outliers: dict[str, float] = field(default_factory=dict)

    @property
    def touches_nothing(self) -> bool:
        """Whether the series are to stay exactly as they are."""
        return not (self.columns or self.optional_columns or self.outliers)


@dataclass(frozen=True)
class Confounds:
    """Confounds of one run.

    Attributes
    ----------
    regressors : (T, K) float64
        One row per volume of the run, without gaps.
    names : tuple of str
        The K columns.
    flagged : (T,) bool
        Volumes above an outlier threshold or marked as non-steady after the start.
    dummy : int
        Non-steady volumes at the start, to be dropped.
    """

    regressors: np.ndarray
    names: tuple[str, ...]
    flagged: np.ndarray
    dummy: int


def load_preset(name_or_path) -> Preset:
    """Read a denoising preset: one of ours by name, or a user's YAML file of the same form.

    Parameters
    ----------
    name_or_path : str or path-like
        ``'none'``, ``'simple'``, ``'36P'``, ``'acompcor'`` or a ``.yml`` file.

    Returns
    -------
    Preset

    Raises
    ------
    BrainfmError
        Unknown name, missing file, unknown or malformed entries.

    Examples
    --------
    >>> load_preset('none').touches_nothing
    True
    >>> load_preset('simple').columns[-2:]
    ('white_matter', 'csf')
    """
    import yaml

    path = Path(name_or_path)
    if path.suffix not in {'.yml', '.yaml'}:
        path = PRESETS / f'{name_or_path}.yml'
        if not path.is_file():
            known = ', '.join(sorted(p.stem for p in PRESETS.glob('*.yml')))
            raise BrainfmError(
                f'There is no denoising preset {str(name_or_path)!r}; '
                f'choose one of {known}, or give a .yml file.'
            )
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise BrainfmError(f'The denoising file {path} does not exist.') from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split())
        raise BrainfmError(f'The denoising file {path} cannot be read ({reason}).') from error
    return _preset(content, path)


def _preset(content, path):
    known = {
        'name': str,
        'description': str,
        'columns': list,
        'optional_columns': list,
        'components': dict,
        'outliers': dict,
    }
    if not isinstance(content, dict):
        raise BrainfmError(f'The denoising file {path} must hold the keys {", ".join(known)}.')
    for key, value in content.items():
        if key not in known:
            raise BrainfmError(
                f'The denoising file {path} has an unknown key {key!r}; '
                f'known keys are {", ".join(known)}.'
            )
        if not isinstance(value, known[key]):
            raise BrainfmError(
                f'In the denoising file {path} the value of {key!r} must be a '
                f'{known[key].__name__}.'
            )
    components, outliers = content.get('components', {}), content.get('outliers', {})
    if components and set(components) != {'mask'}:
        raise BrainfmError(
            f"In the denoising file {path} 'components' must have the one key 'mask'."
        )
    if not all(isinstance(limit, int | float) for limit in outliers.values()):
        raise BrainfmError(
            f"In the denoising file {path} the thresholds under 'outliers' must be numbers."
        )
    patterns = {key: tuple(map(str, content.get(key, ()))) for key in _PATTERNS}
    for pattern in sum(patterns.values(), ()):
        try:
            re.compile(pattern)
        except re.error as error:
            raise BrainfmError(
                f'In the denoising file {path} the column {pattern!r} is not a regular '
                f'expression ({error}).'
            ) from error
    return Preset(
        name=content.get('name', path.stem),
        description=content.get('description', ''),
        components=components,
        outliers=outliers,
        **patterns,
    )


def read_confounds(tsv, json_path, preset, n_volumes) -> Confounds:
    """Take a preset's columns out of an fMRIPrep confounds table.

    Parameters
    ----------
    tsv : path-like
        ``*_desc-confounds_timeseries.tsv``. Not opened if the preset touches nothing.
    json_path : path-like or None
        Its sidecar, which tells the CompCor components apart.
    preset : Preset
        From :func:`load_preset`.
    n_volumes : int
        Volumes T of the run.

    Returns
    -------
    Confounds

    Raises
    ------
    BrainfmError
        Missing file, another number of rows than volumes, a required column that is absent, or
        values that are not numbers.

    Notes
    -----
    Derivatives have no value in the first volume; they get the second one's, as in nilearn's
    ``load_confounds``.
    """
    if preset.touches_nothing:
        return Confounds(np.empty((n_volumes, 0)), (), np.zeros(n_volumes, bool), 0)
    table = _read_table(tsv, n_volumes)
    names = _choose(list(table.columns), preset, tsv)
    if preset.components:
        names = _retained(names, preset.components['mask'], tsv, json_path)
    regressors = _numbers(table, names, tsv)

    steady = _numbers(table, [c for c in table if c.startswith('non_steady_state_outlier')], tsv)
    non_steady = steady.any(axis=1)
    dummy = n_volumes if non_steady.all() else int(np.argmin(non_steady))
    flagged = non_steady.copy()
    flagged[:dummy] = False
    for column, limit in preset.outliers.items():
        if column not in table:
            raise BrainfmError(
                f'{tsv} has no column {column}, which the outlier threshold of the denoising '
                f'{preset.name} needs; use the confounds table as fMRIPrep wrote it.'
            )
        flagged |= _numbers(table, [column], tsv, fill=False)[:, 0] > limit
    return Confounds(regressors, tuple(names), flagged, dummy)


def _read_table(tsv, n_volumes):
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


def _choose(header, preset, tsv):
    """Columns that match the preset's patterns, in the order of the header."""
    chosen = set()
    for pattern in preset.columns + preset.optional_columns:
        found = {column for column in header if re.fullmatch(pattern, column)}
        if not found and pattern in preset.columns:
            stem = re.match(r'\w*', pattern).group()[:4].lower()
            kin = [c for c in header if stem and c.lower().startswith(stem)]
            kin = (
                f'of this kind it has {", ".join(kin[:6])}' if kin else 'it has none of this kind'
            )
            raise BrainfmError(
                f'{tsv} has no column {pattern}, which the denoising {preset.name} needs '
                f'({kin}); choose another --denoise.'
            )
        chosen |= found
    return [column for column in header if column in chosen]


def _retained(names, mask, tsv, json_path):
    """Drop the CompCor columns that are not retained components of the mask."""
    try:
        described = json.loads(Path(json_path).read_text(encoding='utf-8')) if json_path else {}
    except (OSError, ValueError) as error:
        raise BrainfmError(
            f'The confounds sidecar {json_path} cannot be read ({error}); copy it again.'
        ) from error

    def wanted(name):
        entry = described.get(name, {})
        return entry.get('Mask') == mask and entry.get('Retained') is True

    components = [name for name in names if '_comp_cor_' in name]
    if not any(map(wanted, components)):
        raise BrainfmError(
            f'The sidecar of {tsv} ({json_path or "absent"}) describes no retained CompCor '
            f'component of the {mask} mask; copy it from the fMRIPrep output, or choose another '
            '--denoise.'
        )
    return [name for name in names if name not in components or wanted(name)]


def _numbers(table, names, tsv, fill=True):
    """(T, K) float64 columns without gaps.

    The first row, which has no change since the volume before, is filled from the second, or is 0
    where nothing should be made of it.
    """
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
    gaps = ~np.isfinite(values)
    if gaps.any():
        row, column = np.argwhere(gaps)[0]
        raise BrainfmError(
            f'Column {names[column]} of {tsv} has no value in row {row + 1}; '
            'use the confounds table as fMRIPrep wrote it.'
        )
    return values


def denoise(data, confounds) -> np.ndarray:
    """Regress confounds out of parcel series and interpolate flagged volumes.

    The model (confounds and an intercept) is fitted by least squares on the volumes that are not
    flagged. The fitted confounds are subtracted everywhere, each parcel keeps its mean over these
    volumes, and flagged volumes are then interpolated linearly in time (at the ends, the nearest
    value). Dummy volumes are dropped first.

    Parameters
    ----------
    data : (T, P) array
        Parcel series; a parcel that is NaN stays NaN.
    confounds : Confounds
        From :func:`read_confounds`.

    Returns
    -------
    (T - dummy, P) float32

    Raises
    ------
    BrainfmError
        Fewer usable volumes than the fit needs.
    """
    data = np.asarray(data)
    if not (confounds.names or confounds.flagged.any() or confounds.dummy):
        return data.astype(np.float32)
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
    series[:, parcels] -= (
        regressors @ np.linalg.lstsq(regressors[good], fluctuation, rcond=None)[0]
    )
    _interpolate(series, good)
    return series.astype(np.float32)


def _interpolate(series, good):
    """Replace, in place, the rows that are not good by linear interpolation between the others."""
    rows, bad = np.flatnonzero(good), np.flatnonzero(~good)
    after = np.clip(np.searchsorted(rows, bad), 1, len(rows) - 1)
    left, right = rows[after - 1], rows[after]
    share = np.clip((bad - left) / (right - left), 0, 1)[:, None]
    series[bad] = (1 - share) * series[left] + share * series[right]
