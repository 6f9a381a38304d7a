"""Whether an output is whole and still fits the inputs that it was made from.

A sidecar records the size and time of change of every input, the size of the data files that
share it, and the version of the results: outputs of an earlier version have other numbers.
"""

import functools
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bids_brainfm.bids.files import write_json
from bids_brainfm.bids.run import BoldRun


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
        state = path.stat()
        content = _parse(path, state.st_mtime_ns, state.st_size, state.st_ino)
    except (OSError, ValueError):
        return None
    return dict(content) if isinstance(content, dict) else None


@functools.lru_cache(64)  # the same few are read again and again while a run is looked at
def _parse(path: Path, *_: int) -> Any:
    return json.loads(path.read_text())


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


def is_current(data: Path, inputs: dict[str, dict], version: int) -> bool:
    """Whether an output is whole, of this version, and made from the inputs as they are now."""
    sidecar = read_sidecar(sidecar_path(data)) or {}
    return sidecar.get('ResultsVersion') == version and is_whole(data, inputs)


def is_whole(data: Path, inputs: dict[str, dict] | None = None) -> bool:
    """Whether output and sidecar are there, uncut, and (if given) made from these inputs."""
    sidecar = read_sidecar(sidecar_path(data))
    if sidecar is None or (inputs is not None and sidecar.get('InputFiles') != inputs):
        return False
    # outputs written before sizes were recorded are only known not to be empty
    written = sidecar.get('FileSizes', {}).get(_extension(data), 1)
    return data.is_file() and data.stat().st_size >= written
