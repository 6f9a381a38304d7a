"""Components of an ICA of the run, by ICA-AROMA or tedana: which are noise, which are signal."""

import re
from pathlib import Path

import numpy as np

from bids_brainfm.documents import read_tsv
from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import LARGEST

PROGRAMS = {'aroma': 'fMRIPost-AROMA or fMRIPrep with --use-aroma', 'tedana': 'tedana'}
FILES = {
    'aroma': ('desc-melodic_mixing.tsv', 'desc-aroma_metrics.tsv (or AROMAnoiseICs.csv)'),
    'tedana': ('desc-ICA_mixing.tsv', 'desc-tedana_metrics.tsv'),
}
OTHER_WAY = {
    'aroma': ', or choose --denoise aroma-aggressive, which takes the aroma_motion columns of the '
    'confounds table',
    'tedana': '',
}


def read_components(
    mixing: Path | None, metrics: Path | None, program: str, n_volumes: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read the time courses of the noise (T, N) and of the other (T, S) components of a run.

    The third value is the names of the noise components, N of them. Components that tedana
    ignored count as signal, as in tedana's own denoising.

    Raises BrainfmError where a table is missing, damaged, or does not fit the run.
    """
    wanted = zip((mixing, metrics), FILES[program], strict=True)
    if missing := [name for path, name in wanted if path is None]:
        raise BrainfmError(
            f'The denoising with components of {program} needs {" and ".join(missing)} of the '
            f'run, as {PROGRAMS[program]} writes: put '
            f'{"them" if len(missing) > 1 else "it"} next to the confounds table or into a '
            f'folder that --custom-confounds names{OTHER_WAY[program]}.'
        )
    assert mixing is not None
    assert metrics is not None
    courses, names = _read_mixing(mixing)
    noise = _noise(metrics, names, by_name=program == 'tedana')
    if len(courses) != n_volumes:
        raise BrainfmError(
            f'{mixing} has {len(courses)} rows but the run has {n_volumes} volumes; use the '
            'tables of the same run.'
        )
    labels = tuple(f'{program}_{name}' for name, is_noise in zip(names, noise, strict=True)
                   if is_noise)  # fmt: skip
    return courses[:, noise], courses[:, ~noise], labels


def _read_mixing(path: Path) -> tuple[np.ndarray, list[str]]:
    """Time courses (T, C) of all components and their names; MELODIC's have no header."""
    try:
        frame = read_tsv(path, sep=r'\s+', header=None)
        if frame.dtypes.iloc[0].kind not in 'if':
            frame = read_tsv(path)
        names = [f'{k + 1:02d}' if isinstance(k, int) else str(k) for k in frame.columns]
        courses = frame.to_numpy(dtype=float)
    except (OSError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise BrainfmError(f'The mixing matrix {path} cannot be read ({reason}).') from error
    if not (np.abs(courses) <= LARGEST).all():  # NaN is not, either
        raise BrainfmError(
            f'The mixing matrix {path} has missing values, or values above {LARGEST:g}; copy it '
            'again.'
        )
    return courses, names


def _noise(path: Path, names: list[str], by_name: bool) -> np.ndarray:
    """(C,) bool, components that were rejected."""
    if path.suffix == '.csv':  # numbers from 1, separated by commas
        try:
            text = path.read_text(encoding='utf-8-sig')
        except (OSError, ValueError) as error:
            raise BrainfmError(f'{path} cannot be read ({error}); copy it again.') from None
        numbers = [int(digits[:9]) for digits in re.findall(r'\d+', text)]
        if numbers and max(numbers) > len(names):
            raise BrainfmError(
                f'{path} names component {max(numbers)} of {len(names)}; use the tables of the '
                'same run.'
            )
        return np.isin(np.arange(1, len(names) + 1), numbers)
    try:
        table = read_tsv(path)
        classes = list(table['classification'].astype(str))
        components = list(table['Component']) if by_name else []
    except (OSError, ValueError, KeyError) as error:
        raise BrainfmError(
            f'The classification of components {path} cannot be read, or lacks the '
            'columns Component and classification; copy it again.'
        ) from error
    if by_name:  # ICA_4 in one table is ICA_04 in the other
        plain = lambda name: re.sub(r'_0*(\d+)$', r'_\1', str(name))
        known = dict(zip(map(plain, components), classes, strict=True))
        classes = [known.get(plain(name), '') for name in names]
    if len(classes) != len(names) or '' in classes:
        raise BrainfmError(
            f'{path} does not classify the {len(names)} components of the mixing matrix; use the '
            'tables of the same run.'
        )
    return np.array([each == 'rejected' for each in classes])
