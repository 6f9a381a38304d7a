"""Write tables and JSON to a shared output folder without leaving half-written files.

Many processes write one output folder, and any of them may be killed. So a file is written under
a temporary name and renamed when it is whole, and a data file's sidecar comes after it: where
there is a sidecar, the data are complete. What a killed process leaves under a temporary name is
removed by the next one.
"""

import contextlib
import fnmatch
import functools
import hashlib
import json
import math
import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.errors import BrainfmError

TEMPORARY = '.brainfm'  # begins the names of temporary files


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` and rename it when the block ends well.

    Raises BrainfmError where the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    # same extension, since writers such as h5py and matplotlib look at it
    extension = ''.join(path.suffixes[-2:])
    temporary = path.with_name(f'{TEMPORARY}-{owner()}-{uuid.uuid4().hex}{extension}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.exists():
            temporary.replace(path)
    except OSError as error:
        raise BrainfmError(
            f'{path} cannot be written ({error.strerror or error}): check the permissions and the '
            f'free space of the output folder.'
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def owner() -> str:
    """Name of this process, which no process of another machine shares."""
    return f'{_machine()}-{os.getpid()}'


def has_ended(owner: str) -> bool | None:
    """Whether a process has ended, None where it is of another machine."""
    machine, _, process = owner.partition('-')
    return not _runs(int(process)) if machine == _machine() else None


@functools.cache
def _machine() -> str:
    """Name of what gives processes their numbers: a machine, its boot, the container in it."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # not on Linux
        parts.append(Path('/proc/sys/kernel/random/boot_id').read_text())
        parts.append(str(Path('/proc/self/ns/pid').readlink()))
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:8]


def remove_leftovers(output: Path, subjects: Iterable[str]) -> None:
    """Remove temporary files of killed processes from what belongs to all and to `subjects`."""
    name = f'{TEMPORARY}-*'
    for folder in (output, *(output / 'logs' / part for part in ('', 'settings', 'methods'))):
        _remove_dead(folder.glob(name))
    for part in ('sourcedata', 'group', *(f'sub-{label}' for label in subjects)):
        _remove_dead((output / part).rglob(name))


def _remove_dead(temporaries: Iterable[Path]) -> None:
    """Remove those whose process has ended, or those a day old from other machines."""
    for path in temporaries:
        ended = has_ended('-'.join(path.name.split('-', 3)[1:3]))
        with contextlib.suppress(OSError):  # gone, or another user's: no reason not to go on
            if ended or (ended is None and time.time() - path.stat().st_mtime > 86_400):
                path.unlink()


def _runs(process: int) -> bool:
    with contextlib.suppress(OSError):  # where there is /proc
        state = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0]
        return state not in 'XZ'  # dead, though nobody has asked for its exit code
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def create(path: Path, text: str) -> bool:
    """Write a file unless there is one; returns whether it was written.

    It is whole from the first moment, except on a file system without hard links.
    """
    with atomic(path.with_name(f'{path.stem}.new')) as temporary:
        temporary.write_text(text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # no hard links here; what else is wrong is raised again
            try:
                with path.open('x') as file:
                    file.write(text)
            except FileExistsError:
                return False
        finally:
            temporary.unlink()
    return True


def listed(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder whose names match, sorted; none where there is no such folder."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    return [folder / name for name in sorted(fnmatch.filter(names, pattern))]


def first_line(path: Path) -> str:
    """First line of a text file; bytes that are not UTF-8 are shown as such."""
    return path.read_text('utf-8', errors='backslashreplace').partition('\n')[0]


def write_text(path: Path, text: str) -> Path:
    """Write text, unless the file has that text already (its date is then kept)."""
    path = Path(path)
    # a name of a file may be in another encoding
    content = text.encode(errors='backslashreplace')
    if path.is_file() and path.read_bytes() == content:
        return path
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_json(path: Path, content: dict) -> Path:
    """Write a sidecar, without entries that are None; numbers that are not finite become null."""
    return write_text(path, json.dumps(as_json(content), indent=2, allow_nan=False) + '\n')


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Content as JSON has it, without entries that are None."""
    return dict(_finite({key: value for key, value in content.items() if value is not None}))


def as_plain(value: Any) -> Any:
    """What JSON cannot write by itself."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _finite(value: Any) -> Any:
    """Convert a value to what JSON can write, with None for NaN and infinity.

    >>> _finite({'a': np.array([1.0, np.nan]), 'b': Path('x')})
    {'a': [1.0, None], 'b': 'x'}
    """
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _finite(as_plain(value))


def write_table(path: Path, columns: dict) -> Path:
    """Write a TSV, with ``n/a`` for NaN and floats that read back to the same float32.

    `columns` maps each heading to its values, all of one length.
    """
    import pandas as pd

    form: dict[str, Any] = {'sep': '\t', 'index': False, 'na_rep': 'n/a', 'float_format': '%.9g'}
    with atomic(path) as temporary:
        pd.DataFrame(columns).to_csv(temporary, **form)
    return Path(path)


def write_matrix(
    path: Path, matrix: np.ndarray, header: Sequence[str], index: Sequence[str] | None = None
) -> Path:
    """Write a wide (R, C) table of floats as TSV, quicker than :func:`write_table`.

    `header` has C headings, or C + 1 where there is an `index`, the first entry of each row.
    """
    row_format = '\t'.join(['%.9g'] * matrix.shape[1])
    with atomic(path) as temporary, temporary.open('w') as file:
        file.write('\t'.join(header) + '\n')
        for i, row in enumerate(matrix):
            text = (row_format % tuple(row.tolist())).replace('nan', 'n/a')
            file.write(f'{index[i]}\t{text}\n' if index is not None else f'{text}\n')
    return Path(path)


def read_matrix(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read a TSV of numbers: (R, C) float32, NaN where it says ``n/a``, and the headings."""
    import pandas as pd

    frame = pd.read_csv(path, sep='\t', na_values='n/a', dtype=np.float32)
    return frame.to_numpy(), list(frame.columns)


def read_relmat(path: Path) -> np.ndarray:
    """Read a square table between parcels, (P, P) float32; the first column is their names."""
    import pandas as pd

    return pd.read_csv(path, sep='\t', na_values='n/a', index_col=0).to_numpy(np.float32)
