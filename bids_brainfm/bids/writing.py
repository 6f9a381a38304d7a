"""Write BIDS derivatives: names, sidecars, tables and the files that every job shares.

Many processes write one output folder, and any of them may be killed. So a file is written under
a temporary name and renamed when it is whole, and a data file's sidecar comes after it: where the
sidecar stands, the data are complete. What a killed process leaves under a temporary name is
removed by the next one.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from bids_brainfm.bids.reading import (
    BoldRun,
    generators,
    join_name,
    parse_name,
    read_description,
)
from bids_brainfm.errors import BrainfmError

BIDS_VERSION = '1.10.1'
TEMPORARY = '.brainfm'  # begins the names of temporary files
# Without trailing slashes: the validator does not hide a folder named with one
BIDSIGNORE = (
    '*.html',
    'figures',
    'log',
    'group',
    '*_timeseries.*',
    '*_relmat.*',
    '*_boldmap.*',
    '*_embedding.*',
    '*_prediction.*',
    '*_forecast.*',
    '*_knn.*',
    '*_space-fsLR_desc-*',
    '*_dseg.*',
    '*_stat-coverage_bold.*',
)
CODE_URL = 'https://github.com/bids-brainfm/bids_brainfm'
AUTHORS = ('The bids_brainfm developers', 'The fMRIPrep developers')
README = """# Outputs of bids_brainfm

Embeddings of fMRI foundation models, the parcel series they were computed from, and the functional
connectome as the baseline to compare them with. `sub-*.html` are the reports; `logs/CITATION.md`
is the methods text with what to cite; the JSON file beside each table says how it was made.
"""


@contextlib.contextmanager
def atomic(path: Path):
    """Yield a temporary path beside `path` and rename it when the block ends well.

    Raises
    ------
    BrainfmError
        The folder cannot be written, or the disk is full.
    """
    path = Path(path)
    owner = f'{_machine()}-{os.getpid()}'
    # same extension, since writers such as h5py and matplotlib look at it
    extension = ''.join(path.suffixes[-2:])
    temporary = path.with_name(f'{TEMPORARY}-{owner}-{uuid.uuid4().hex}{extension}')
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


@functools.cache
def _machine() -> str:
    """Name of what gives processes their numbers: a machine, its boot, the container in it."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # not on Linux
        parts.append(Path('/proc/sys/kernel/random/boot_id').read_text())
        parts.append(str(Path('/proc/self/ns/pid').readlink()))
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:8]


def remove_leftovers(output: Path, subjects: Iterable[str]) -> None:
    """Remove the temporary files of processes that were killed.

    Parameters
    ----------
    output : Path
    subjects : iterable of str
        Participants whose folders are looked through, beside what belongs to all.
    """
    name = f'{TEMPORARY}-*'
    for folder in (output, *(output / 'logs' / part for part in ('', 'settings', 'methods'))):
        _remove_dead(folder.glob(name))
    folders = ('sourcedata', 'group', *(f'sub-{label}' for label in subjects))
    for folder in folders:
        _remove_dead((output / folder).rglob(name))


def _remove_dead(temporaries: Iterable[Path]) -> None:
    """Remove those whose process has ended; elsewhere, where that cannot be told, after a day."""
    for path in temporaries:
        _, machine, process, _ = path.name.split('-', 3)
        with contextlib.suppress(OSError):  # gone, or another user's: no reason not to go on
            if machine == _machine():
                dead = not _runs(int(process))
            else:
                dead = time.time() - path.stat().st_mtime > 86_400
            if dead:
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
        return True
    return True


def write_text(path: Path, text: str) -> Path:
    """Write text, unless the file says just that already (its date is then kept)."""
    path = Path(path)
    if path.is_file() and path.read_text() == text:
        return path
    with atomic(path) as temporary:
        temporary.write_text(text)
    return path


def write_json(path: Path, content: dict) -> Path:
    """Write a sidecar; entries that are None are left out."""
    known = {key: value for key, value in content.items() if value is not None}
    return write_text(path, json.dumps(known, indent=2, default=_plain) + '\n')


def _plain(value):
    """What JSON cannot write by itself."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def write_table(path: Path, columns: dict) -> Path:
    """Write a TSV, with ``n/a`` for NaN and floats that read back to the same float32.

    Parameters
    ----------
    path : Path
    columns : dict of str to sequence
        Heading to values, all of one length.
    """
    import pandas as pd

    with atomic(path) as temporary:
        pd.DataFrame(columns).to_csv(
            temporary, sep='\t', index=False, na_rep='n/a', float_format='%.9g'
        )
    return Path(path)


def write_matrix(path: Path, matrix: np.ndarray, header: list[str], index: list | None = None):
    """Write a wide float table as TSV; quicker than :func:`write_table` for many columns.

    Parameters
    ----------
    path : Path
    matrix : (R, C) array
    header : list of str
        C headings, or C + 1 where there is an index.
    index : list, optional
        First entry of each row, already text.
    """
    row_format = '\t'.join(['%.9g'] * matrix.shape[1])
    with atomic(path) as temporary, temporary.open('w') as file:
        file.write('\t'.join(header) + '\n')
        for i, row in enumerate(matrix):
            text = (row_format % tuple(row.tolist())).replace('nan', 'n/a')
            file.write(f'{index[i]}\t{text}\n' if index is not None else f'{text}\n')
    return Path(path)


def read_matrix(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read a TSV of numbers.

    Returns
    -------
    values : (R, C) float32
        NaN where the table says ``n/a``.
    header : list of str
    """
    import pandas as pd

    frame = pd.read_csv(path, sep='\t', na_values='n/a', dtype=np.float32)
    return frame.to_numpy(), list(frame.columns)


def read_relmat(path: Path) -> np.ndarray:
    """Read a square table between parcels, (P, P) float32; the first column is their names."""
    import pandas as pd

    return pd.read_csv(path, sep='\t', na_values='n/a', index_col=0).to_numpy(np.float32)


def derivative_path(output: Path, run: BoldRun, suffix: str, extension: str, **entities) -> Path:
    """Path of an output of a run; entities come in the order of BIDS, ``desc`` last.

    The space is kept from the input; resolution and density are in the sidecar.

    Examples
    --------
    >>> from pathlib import Path
    >>> run = BoldRun('sub-01_task-rest', {'sub': '01', 'task': 'rest', 'space': 'fsLR'}, 'p',
    ...               Path('/d'), Path('/d/b.nii'), None, None, None, None)
    >>> derivative_path(Path('/out'), run, 'timeseries', '.tsv', atlas='A424', stat='mean')
    PosixPath('/out/sub-01/func/sub-01_task-rest_space-fsLR_atlas-A424_stat-mean_timeseries.tsv')
    """
    order = ('atlas', 'stat', 'desc')
    named = {key: entities[key] for key in order if key in entities}
    name = join_name(
        parse_name(run.name + '_x')[0] | {'space': run.space} | named, suffix, extension
    )
    folder = output / f'sub-{run.subject}'
    if 'ses' in run.entities:
        folder /= f'ses-{run.entities["ses"]}'
    return folder / 'func' / name


def fingerprint(path: Path) -> dict:
    """Size in bytes and time of change of a file: enough to see that it is another one."""
    state = path.stat()
    changed = datetime.fromtimestamp(state.st_mtime, UTC).isoformat(timespec='microseconds')
    return {'Size': state.st_size, 'Modified': changed}


def input_fingerprints(run: BoldRun) -> dict[str, dict]:
    """Fingerprints of all files that the outputs of a run depend on, by BIDS URI."""
    return {run.uri(path): fingerprint(path) for path in run.companions().values()}


def read_sidecar(path: Path) -> dict | None:
    """Content of a sidecar, None where it is missing or not whole."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def sidecar_path(data: Path) -> Path:
    """Path of the sidecar of a data file; files that differ in their extension share one.

    >>> sidecar_path(Path('sub-01_desc-brainlm111m_bold.nii.gz')).name
    'sub-01_desc-brainlm111m_bold.json'
    """
    return data.with_name(data.name.partition('.')[0] + '.json')


def write_sidecar(data: Path, content: dict) -> Path:
    """Write the sidecar of files that are whole, `data` and those that share it, with their sizes.

    By these, in bytes and by extension, :func:`is_whole` sees what was cut off since.
    """
    path = sidecar_path(data)
    files = sorted(file for file in path.parent.glob(f'{path.stem}.*') if file != path)
    sizes = {_extension(file): file.stat().st_size for file in files}
    return write_json(path, content | {'FileSizes': sizes})


def _extension(data: Path) -> str:
    return data.name.removeprefix(sidecar_path(data).stem)


def is_current(data: Path, inputs: dict[str, dict]) -> bool:
    """Whether an output stands whole and was made from the inputs as they are now."""
    said = read_sidecar(sidecar_path(data))
    return said is not None and said.get('InputFiles') == inputs and _not_cut(data, said)


def is_whole(data: Path) -> bool:
    """Whether an output and its sidecar stand, and nothing was cut off since they were written."""
    said = read_sidecar(sidecar_path(data))
    return said is not None and _not_cut(data, said)


def _not_cut(data: Path, said: dict) -> bool:
    # of what was written before sizes were, it is only known that it was not empty
    written = said.get('FileSizes', {}).get(_extension(data), 1)
    return data.is_file() and data.stat().st_size >= written


def claim_settings(output: Path, name: str, settings: dict, pattern: str) -> None:
    """Record the settings behind one kind of output, or check that they are the recorded ones.

    The first process to write the record wins; all others must agree with it, as long as there
    are outputs of this kind.

    Parameters
    ----------
    output : Path
    name : str
        What the settings are for, e.g. ``atlas-A424`` or ``desc-brainlm111m``.
    settings : dict
        What JSON can hold.
    pattern : str
        Glob of the outputs of this kind below a participant's folder.

    Raises
    ------
    BrainfmError
        There are outputs made with other settings; the sentence gives both.
    """
    path = output / 'logs' / 'settings' / f'{name}.json'
    text = json.dumps(settings, indent=2, default=_plain) + '\n'
    wanted = json.loads(text)
    if not path.is_file():
        with atomic(path.with_name(f'{name}.{uuid.uuid4().hex}')) as temporary:
            temporary.write_text(text)
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
            temporary.unlink()
    known = read_sidecar(path)
    recorded = known or {}
    differences = [
        f'{key} was {recorded.get(key)!r:.60} and is now {wanted.get(key)!r:.60}'
        for key in {**recorded, **wanted}
        if recorded.get(key) != wanted.get(key)
    ]
    if not differences:
        return
    if next(output.glob(f'sub-*/**/{pattern}'), None) is not None:
        if known is None:
            raise BrainfmError(
                f'{path} is damaged, and says no longer with which settings the outputs of {name} '
                f'were made: if with those of now, remove this file; if not, use another output '
                f'folder.'
            )
        raise BrainfmError(
            f'{output} holds outputs of {name} made with other settings '
            f'({"; ".join(differences)}): use the same settings, or another output folder.'
        )
    write_text(path, text)


def write_dataset_files(output: Path, version: str, inputs: dict[str, Path]) -> None:
    """Write ``dataset_description.json``, ``.bidsignore`` and ``README.md``.

    Authors that the user has entered are kept, and so is the user's own readme.

    Parameters
    ----------
    output : Path
    version : str
        Version of this program.
    inputs : dict of str to Path
        Name and folder of the datasets that were read.
    """
    described = [read_description(folder) for folder in inputs.values()]
    authors = (read_sidecar(output / 'dataset_description.json') or {}).get('Authors')
    if authors is None:
        given = (description.get('Authors') or [] for description in described)
        # the validator warns of fewer than two authors
        authors = next((names for names in given if len(names) > 1), list(AUTHORS))
    sources = []
    for folder, description in zip(inputs.values(), described, strict=True):
        generator = next(iter(generators(description)), {})
        made_by = {'Version': generator['Version']} if 'Version' in generator else {}
        sources.append({'URL': folder.resolve().as_uri()} | made_by)
    write_json(
        output / 'dataset_description.json',
        {
            'Name': 'bids_brainfm: fMRI foundation model outputs',
            'BIDSVersion': BIDS_VERSION,
            'DatasetType': 'derivative',
            'Authors': authors,
            'GeneratedBy': [{'Name': 'bids_brainfm', 'Version': version, 'CodeURL': CODE_URL}],
            'SourceDatasets': sources,
            'DatasetLinks': {name: folder.resolve().as_uri() for name, folder in inputs.items()},
            'HowToAcknowledge': 'Please cite the tools and models named in logs/CITATION.md.',
        },
    )
    write_text(output / '.bidsignore', '\n'.join(BIDSIGNORE) + '\n')
    if not (output / 'README.md').exists():
        write_text(output / 'README.md', README)


def own_uri(output: Path, path: Path) -> str:
    """BIDS URI of a file of the output dataset."""
    return f'bids::{path.relative_to(output).as_posix()}'
