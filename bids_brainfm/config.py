"""Settings of one run of the command: one frozen dataclass, TOML both ways, passed explicitly."""

import dataclasses
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bids_brainfm import documents
from bids_brainfm.errors import BrainfmError

# Of the matrix products of a network, from the highest to the lowest
PRECISIONS = ('float32', 'tf32', 'bfloat16')


def available_cpus() -> int:
    """Number of CPUs this process may use: the Slurm allocation where there is one."""
    allocated = os.environ.get('SLURM_CPUS_PER_TASK', '')
    return int(allocated) if allocated.isdigit() else len(os.sched_getaffinity(0))


def split_name(text: str) -> tuple[str, Path | None]:
    """Split ``NAME[=PATH]`` of ``--model``; the path is made absolute.

    >>> split_name('brainlm-111m=/w'), split_name('/lr=0.1/my.yml')
    (('brainlm-111m', PosixPath('/w')), ('/lr=0.1/my.yml', None))
    """
    match = re.fullmatch(r'(.+?\.ya?ml|[^=]*)(?:=(.*))?', text, re.DOTALL)
    assert match
    return match[1], None if match[2] is None else Path(match[2]).absolute()


def absolute(text: str) -> str:
    """Make the paths of a user's card or preset (``FILE.yml``) and of weights absolute.

    >>> absolute('brainlm-111m'), absolute('/a/my.yml=/w'), absolute('simple')
    ('brainlm-111m', '/a/my.yml=/w', 'simple')
    """
    name, path = split_name(text)
    if name.endswith(('.yml', '.yaml')):
        name = str(Path(name).absolute())
    return name if path is None else f'{name}={path}'


@dataclass(frozen=True)
class Settings:
    """What one run of ``bids_brainfm`` was asked to do.

    Every field but the first two has a default, and the name of its command line option.
    Labels are without their prefix (``01``, not ``sub-01``). ``mem`` is in GB, ``stride`` in
    samples at the model's TR. None means the model's default; ``scale_stats`` and the option
    ``covariance`` are empty where they are to be fitted. ``options`` are those of the products
    (:mod:`bids_brainfm.outputs.registry`) and of denoising that were given, by name.
    """

    bids_dir: Path
    output_dir: Path
    analysis_level: str = 'participant'

    participant_label: tuple[str, ...] = ()
    participants_file: Path | None = None
    part: str | None = None
    session_label: tuple[str, ...] = ()
    task_id: tuple[str, ...] = ()
    run_id: tuple[str, ...] = ()
    space: str | None = None
    bids_filter_file: Path | None = None
    derivatives: dict[str, str] = field(default_factory=dict)

    model: tuple[str, ...] = ('brainlm-111m',)
    denoise: str = 'card'
    min_coverage: float = 0.5
    max_flagged: float = 1.0
    parcel_voxels: str = 'mask'
    scale: str = 'card'
    scale_stats: tuple[Path, ...] | None = None
    temporal: str = 'resample'
    stride: int | None = None
    short_runs: str = 'refuse'
    tokens: bool = False
    random_weights: bool = False

    outputs: tuple[str, ...] = ('embeddings',)
    random_seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    stop_after: str | None = None
    recompute: bool = False

    device: str = 'auto'
    precision: str | None = None
    batch_size: int = 8
    nprocs: int = field(default_factory=available_cpus)
    omp_nthreads: int | None = None
    mem: float | None = None
    use_plugin: Path | None = None
    work_dir: Path = Path('work')
    clean_workdir: bool = False
    write_graph: bool = False
    stop_on_first_crash: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    offline: bool = False
    verbose: int = 0

    def __post_init__(self) -> None:
        """Bring what TOML and the command line give into the declared types."""
        settled = {name: _settle(value) for name, value in self.options.items()}
        object.__setattr__(self, 'options', {k: v for k, v in settled.items() if v is not None})
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            is_path = 'Path' in str(item.type)
            if 'tuple' in str(item.type):
                values = [value] if isinstance(value, (str, Path)) else value
                value = tuple(Path(v).absolute() if is_path else str(v) for v in values)
            elif is_path:
                value = Path(value).absolute()
            object.__setattr__(self, item.name, value)
        # nodes of the graph work in folders of their own, so relative paths would not be found
        file, plus, gsr = str(self.denoise).partition('+gsr')
        object.__setattr__(self, 'denoise', absolute(file) + plus + gsr)
        object.__setattr__(self, 'model', tuple(map(absolute, self.model)))

    def to_toml(self) -> str:
        """TOML text that :func:`read_toml` reads back to equal settings."""
        lines = []
        declared = [item.name for item in dataclasses.fields(self) if item.name != 'options']
        values = {name: getattr(self, name) for name in declared} | self.options
        for name, value in values.items():
            if value is None:
                continue
            text = json.dumps(value, default=str)  # JSON's strings and lists are TOML's
            if isinstance(value, dict):
                pairs = (f'{json.dumps(k)} = {json.dumps(v)}' for k, v in value.items())
                text = f'{{{", ".join(pairs)}}}'
            lines.append(f'{name} = {text}')
        return '\n'.join(lines) + '\n'


def _settle(value: Any) -> Any:
    """Make paths in the value of an option absolute."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_settle, value))
    return value.absolute() if isinstance(value, Path) else value


def read_toml(path: Path, options: Collection[str]) -> dict[str, Any]:
    """Settings found in a TOML file; names that are neither settings nor `options` are refused."""
    try:
        found = documents.read_toml(path)
    except (OSError, ValueError) as error:
        raise BrainfmError(f'--config-file {path} cannot be read: {error}.') from None
    known = {item.name for item in dataclasses.fields(Settings)} - {'options'} | set(options)
    if unknown := sorted(set(found) - known):
        raise BrainfmError(
            f'--config-file {path} has the unknown setting {", ".join(unknown)}; '
            f'the settings are: {", ".join(sorted(known))}.'
        )
    return found
