"""Settings of one run of the command: one frozen dataclass, TOML both ways, passed explicitly."""

import dataclasses
import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from bids_brainfm.errors import BrainfmError


def available_cpus() -> int:
    """Number of CPUs this process may use: the Slurm allocation where there is one."""
    allocated = os.environ.get('SLURM_CPUS_PER_TASK', '')
    return int(allocated) if allocated.isdigit() else len(os.sched_getaffinity(0))


def absolute(text: str) -> str:
    """Make the paths of a card or preset of one's own (``FILE.yml``) and of weights absolute.

    >>> absolute('brainlm-111m'), absolute('/a/my.yml=/w'), absolute('simple')
    ('brainlm-111m', '/a/my.yml=/w', 'simple')
    """
    name, given, path = text.partition('=')
    if name.endswith(('.yml', '.yaml')):
        name = str(Path(name).absolute())
    return f'{name}={Path(path).absolute()}' if given else name


@dataclass(frozen=True)
class Settings:
    """What one run of ``bids_brainfm`` was asked to do.

    Every field but the first two has a default, and the name of its command line option.
    Labels are without their prefix (``01``, not ``sub-01``). ``mem`` is in GB, ``stride`` in
    samples at the model's TR, ``forecast_points`` too. None stands for what the model or the
    analysis has as its default; ``scale_stats`` is empty where statistics are to be fitted.
    """

    bids_dir: Path
    output_dir: Path
    analysis_level: str = 'participant'

    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    task_id: tuple[str, ...] = ()
    run_id: tuple[str, ...] = ()
    space: str | None = None
    bids_filter_file: Path | None = None
    derivatives: dict[str, str] = field(default_factory=dict)
    bids_database_dir: Path | None = None

    model: tuple[str, ...] = ('brainlm-111m',)
    denoise: str = 'card'
    min_coverage: float = 0.5
    scale: str = 'card'
    scale_stats: tuple[Path, ...] | None = None
    temporal: str = 'resample'
    stride: int | None = None
    short_runs: str = 'refuse'
    tokens: bool = False
    latent_prediction: str | None = None
    random_weights: bool = False

    outputs: tuple[str, ...] = ('embeddings',)
    mask_ratio: float | None = None
    aggregate: str | None = None
    write_bold: bool = False
    forecast_points: int | None = None
    forecast_mode: str | None = None
    network_clusters: str | None = None
    reference_networks: tuple[Path, ...] = ()
    perturb: str | None = None
    perturb_sd: float | None = None
    random_seed: int = 0
    contrast: tuple[str, ...] = ()
    stop_after: str | None = None

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

    def __post_init__(self):
        """Bring what TOML and the command line give into the declared types."""
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
        object.__setattr__(self, 'denoise', absolute(str(self.denoise)))
        object.__setattr__(self, 'model', tuple(map(absolute, self.model)))

    def to_toml(self) -> str:
        """TOML text that :func:`read_toml` reads back to equal settings."""
        lines = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            if isinstance(value, dict):
                pairs = ', '.join(f'{json.dumps(k)} = {json.dumps(v)}' for k, v in value.items())
                text = f'{{{pairs}}}'
            else:
                # JSON's strings and lists are TOML's, and a path is a string
                text = json.dumps(value, default=str)
            lines.append(f'{item.name} = {text}')
        return '\n'.join(lines) + '\n'


def read_toml(path: Path) -> dict:
    """Settings found in a TOML file, to be overridden by the command line.

    Raises
    ------
    BrainfmError
        The file is missing, is not TOML, or names a setting that does not exist.
    """
    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BrainfmError(f'--config-file {path} cannot be read: {error}.') from None
    known = {item.name for item in dataclasses.fields(Settings)}
    unknown = sorted(set(found) - known)
    if unknown:
        raise BrainfmError(
            f'--config-file {path} has the unknown setting {", ".join(unknown)}; '
            f'the settings are: {", ".join(sorted(known))}.'
        )
    return found
