"""Whether an output is whole and still fits the inputs that it was made from.

A sidecar records the size and time of change of every input, size and checksum of the data files
that share it and of itself, and the version of the results: outputs of an earlier version have
other numbers.
"""

import contextlib
import functools
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isal import isal_zlib

from bids_brainfm.bids.files import as_json, write_json
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.documents import CHECKSUMS, checksum_of, is_intact, read_json
from bids_brainfm.errors import BrainfmError

SIZES = 'FileSizes'  # entry of a sidecar, by extension
CHECKSUMS_FILE = 'checksums.json'  # of all files of a folder


def fingerprint(path: Path) -> dict:
    """Size in bytes and time of change of a file: enough to see that it is another one."""
    state = path.stat()
    changed = datetime.fromtimestamp(state.st_mtime, UTC).isoformat(timespec='microseconds')
    return {'Size': state.st_size, 'Modified': changed}


def input_fingerprints(run: BoldRun) -> dict[str, dict]:
    """Fingerprints of all files that the outputs of a run depend on, by BIDS URI."""
    return {run.uri(path): fingerprint(path) for path in run.companions()}


def check_unchanged(run: BoldRun, before: Mapping[str, dict]) -> None:
    """Raise BrainfmError where an input of a run is another one than `before` it was read."""
    there = [path for path in run.companions() if path.is_file()]
    after = {run.uri(path): fingerprint(path) for path in there}
    if changed := [uri for uri, state in before.items() if after.get(uri) != state]:
        raise BrainfmError(
            f'{run.name}: {", ".join(changed)} changed while it was read: run the same command '
            f'again when the file is complete.'
        )


def checksum(path: Path) -> str:
    """CRC-32 of a file, eight hexadecimal digits."""
    value = 0
    with path.open('rb') as file:
        while chunk := file.read(2**20):
            value = isal_zlib.crc32(chunk, value)
    return f'{value:08x}'


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file with the checksum of that content among its checksums."""
    plain = as_json(content)
    return plain | {CHECKSUMS: plain.get(CHECKSUMS, {}) | {'.json': checksum_of(plain)}}


def read_sidecar(path: Path) -> dict | None:
    """Content of a sidecar, None where it is missing, not whole, or changed since it was written.

    Sidecars of earlier versions have no checksum, and are taken as they are.
    """
    try:
        state = path.stat()
        content = _parse(path, state.st_mtime_ns, state.st_size, state.st_ino)
    except (OSError, ValueError, AttributeError):
        return None
    return None if content is None else dict(content)


@functools.lru_cache(64)  # the same few are read again and again while a run is looked at
def _parse(path: Path, *_: int) -> dict[str, Any] | None:
    content = read_json(path)
    return content if is_intact(content) else None


def sidecar_path(data: Path) -> Path:
    """Path of the sidecar of a data file; files that differ in their extension share one.

    >>> sidecar_path(Path('sub-01_desc-brainlm111m_bold.nii.gz')).name
    'sub-01_desc-brainlm111m_bold.json'
    """
    return data.with_name(data.name.partition('.')[0] + '.json')


def write_sidecar(data: Path, content: dict) -> Path:
    """Write the sidecar of files that are whole: `data` and those that share it.

    It has their sizes in bytes and their checksums, by extension. By these :func:`damage` sees
    what changed since.
    """
    path = sidecar_path(data)
    files = sorted(file for file in path.parent.glob(f'{path.stem}.*') if file != path)
    content = content | {
        SIZES: {_extension(file): file.stat().st_size for file in files},
        CHECKSUMS: {_extension(file): checksum(file) for file in files},
    }
    write_json(path, sealed(content))
    _touch(path)
    return path


def _extension(data: Path) -> str:
    return data.name.removeprefix(sidecar_path(data).stem)


def is_current(data: Path, inputs: dict[str, dict], version: int, contents: bool = False) -> bool:
    """Whether an output is whole, of this version, and made from the inputs as they are now.

    For `contents` see :func:`damage`.
    """
    sidecar = read_sidecar(sidecar_path(data)) or {}
    fits = sidecar.get('ResultsVersion') == version and sidecar.get('InputFiles') == inputs
    return fits and damage(data, contents, sidecar) is None


def is_whole(data: Path, contents: bool = False) -> bool:
    """Whether an output and its sidecar are there and undamaged; see :func:`damage`."""
    return damage(data, contents) is None


def damage(
    data: Path, contents: bool = False, sidecar: Mapping[str, Any] | None = None
) -> str | None:
    """Say what is wrong with an output or its sidecar, None where nothing is.

    The contents of the file are compared with the checksum that the sidecar records. Without
    `contents`, they are read only where the file is newer than its sidecar, which is written last.
    A `sidecar` that has just been read is not read again.
    """
    path = sidecar_path(data)
    sidecar = read_sidecar(path) if sidecar is None else sidecar
    if sidecar is None:
        return f'has no valid sidecar ({path.name})'
    if not data.is_file():
        return 'is missing'
    extension, state = _extension(data), data.stat()
    # outputs written before sizes were recorded are only known not to be empty
    size = sidecar.get(SIZES, {}).get(extension, max(state.st_size, 1))
    if state.st_size != size:
        return f'has {state.st_size} bytes in place of {size}'
    newer = state.st_mtime_ns > path.stat().st_mtime_ns
    recorded = sidecar.get(CHECKSUMS, {}).get(extension)
    if recorded is not None and (contents or newer):
        if checksum(data) != recorded:
            return 'has other contents than were written (its checksum differs)'
        if newer:  # as in a copy; it need not be read again
            _touch(path)
    return None


def _touch(sidecar: Path) -> None:
    """Give a sidecar a date that is not before that of its data."""
    with contextlib.suppress(OSError):  # another user's
        os.utime(sidecar)


def check_contents(*files: Path, remedy: str = 'run the participant level again') -> None:
    """Raise BrainfmError where outputs that are about to be read are not as they were written.

    A file without any sidecar, such as a table that was copied, has nothing to be compared with.
    """
    for data in files:
        if sidecar_path(data).is_file() and (found := damage(data, contents=True)):
            raise BrainfmError(f'{data} {found}: remove it, and {remedy}.')


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files of a folder, such as a checkpoint, into it."""
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    found = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    write_json(folder / CHECKSUMS_FILE, sealed({'Files': found}))


def check_checksums(folder: Path, remedy: str) -> None:
    """Raise BrainfmError where files of a folder are not those of :func:`write_checksums`."""
    path = folder / CHECKSUMS_FILE
    if not path.is_file():  # of an earlier version
        return
    recorded = (read_sidecar(path) or {'Files': {path.name: None}})['Files']
    for name, known in recorded.items():
        if not (folder / name).is_file() or checksum(folder / name) != known:
            raise BrainfmError(f'{folder / name} is not as it was written: {remedy}.')
