"""The command line of ``bids_brainfm``.

Every optional argument defaults to None, so that a configuration file is overridden by what was
typed and by nothing else; the real defaults are those of :class:`bids_brainfm.config.Settings`.
"""

import argparse
import dataclasses
import re
from pathlib import Path

from bids_brainfm.config import Settings, read_toml
from bids_brainfm.errors import BrainfmError

# as models.masking.BLOCKS, which is not imported here: --help is to be instant
BLOCKS = ('cross-time', 'cross-roi', 'double-cross')
OUTPUTS = ('embeddings', 'reconstruction', 'forecast', 'networks', 'perturbation')
# Options that say how an output is made, and of which outputs
USED_BY = {
    'mask_ratio': ('reconstruction', 'perturbation'),
    'aggregate': ('reconstruction',),
    'write_bold': ('reconstruction',),
    'forecast_points': ('forecast',),
    'forecast_mode': ('forecast',),
    'network_clusters': ('networks',),
    'reference_networks': ('networks', 'perturbation'),
    'perturb': ('perturbation',),
    'perturb_sd': ('perturbation',),
}
SCALINGS = ('card', 'none', 'run-robust', 'global-z', 'parcel-z', 'cohort')


def strip_prefix(prefix: str):
    """Argument type that takes a label with or without its BIDS prefix.

    >>> strip_prefix('sub')('sub-01'), strip_prefix('sub')('01')
    ('01', '01')
    """

    def label(text: str) -> str:
        bare = text.removeprefix(f'{prefix}-')
        if not re.fullmatch(r'[a-zA-Z0-9+]+', bare):
            raise argparse.ArgumentTypeError(
                f'{text!r} is not a BIDS label (letters and digits only)'
            )
        return bare

    return label


def memory_gb(text: str) -> float:
    """Memory in GB; a bare number is in MB, as in fMRIPrep.

    >>> memory_gb('8G'), memory_gb('1.5GB'), memory_gb('8000')
    (8.0, 1.5, 8.0)
    """
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([kMGT]?)B?\s*', text, flags=re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r} is not an amount of memory such as 8G or 8000')
    factor = {'K': 1e-6, '': 1e-3, 'M': 1e-3, 'G': 1.0, 'T': 1e3}[match[2].upper()]
    return float(match[1]) * factor


def number(kind: type, good, words: str):
    """Argument type for a number of which `good` holds; `words` say what it is.

    >>> number(float, lambda v: 0 <= v <= 1, 'a share from 0 to 1')('0.5')
    0.5
    """

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f'{text!r} is not {words}')
        return value

    return read


def positive(kind: type):
    """Argument type for a number above zero."""
    return number(kind, lambda value: value > 0, 'a number above zero')


share = number(float, lambda value: 0 <= value <= 1, 'a share from 0 to 1')
ratio = number(float, lambda value: 0 < value < 1, 'a number between 0 and 1')
finite = number(float, lambda v: 0 < abs(v) < float('inf'), 'a number other than zero')
# What NumPy takes
seed = number(int, lambda value: 0 <= value < 2**32, 'a whole number from 0 to 2**32 - 1')


def clusters(text: str) -> str:
    """Argument type for a number of clusters, or auto.

    >>> clusters('7'), clusters('auto')
    ('7', 'auto')
    """
    if text != 'auto' and not (text.isdigit() and int(text) > 1):
        raise argparse.ArgumentTypeError(f'{text!r} is not auto or a number above 1')
    return text


class _ShowVersion(argparse.Action):
    """Print the version; it is looked up only when asked for."""

    def __call__(self, parser, *_):
        from importlib.metadata import version

        parser.exit(message=f'bids_brainfm {version("bids-brainfm")}\n')


def get_parser() -> argparse.ArgumentParser:
    """Build the parser of the ``bids_brainfm`` command."""
    parser = argparse.ArgumentParser(
        prog='bids_brainfm',
        description='Run fMRI foundation models on fMRIPrep derivatives: parcel series, windows '
        'in the shape each model expects, embeddings and a report, as BIDS derivatives.',
        epilog='Model weights and atlases are fetched once, by bids_brainfm_models.',
        argument_default=None,
    )
    parser.add_argument(
        'bids_dir',
        type=Path,
        help='fMRIPrep derivatives, or a raw BIDS dataset with derivatives/fmriprep inside; at '
        'the group level what the participant level wrote',
    )
    parser.add_argument('output_dir', type=Path, help='folder of the BIDS derivatives to write')
    parser.add_argument(
        'analysis_level', choices=['participant', 'group'],
        help='level of the analysis; group fits statistics of the cohort (--scale-stats) or '
        'subtracts attention maps (--contrast)',
    )  # fmt: skip
    parser.add_argument('--version', action=_ShowVersion, nargs=0, help='print the version')

    bids = parser.add_argument_group('Options for filtering BIDS queries')
    bids.add_argument(
        '--participant-label', '--participant_label', nargs='+', type=strip_prefix('sub'),
        metavar='LABEL', help='participants, with or without sub- (default: all)',
    )  # fmt: skip
    bids.add_argument(
        '--session-label', '--session_label', '--session-id', '--session_id', nargs='+',
        type=strip_prefix('ses'), metavar='LABEL', help='sessions (default: all)',
    )  # fmt: skip
    bids.add_argument(
        '-t', '--task-id', '--task_id', nargs='+', type=strip_prefix('task'), metavar='LABEL',
        help='tasks (default: all)',
    )  # fmt: skip
    bids.add_argument(
        '--run-id', '--run_id', nargs='+', type=strip_prefix('run'), metavar='LABEL',
        help='runs (default: all)',
    )  # fmt: skip
    bids.add_argument(
        '--space', metavar='SPACE',
        help='space to read, such as MNI152NLin6Asym (default: the first that the model takes)',
    )  # fmt: skip
    bids.add_argument(
        '--bids-filter-file', '--bids_filter_file', type=Path, metavar='FILE',
        help='JSON of PyBIDS entities that BOLD files must have, in the form of fMRIPrep: '
        '{"bold": {"acquisition": "mb8"}}; null means absent, "*" any value',
    )  # fmt: skip
    bids.add_argument(
        '-d', '--derivatives', nargs='+', metavar='NAME=PATH',
        help='fMRIPrep derivatives to read in place of bids_dir',
    )  # fmt: skip
    bids.add_argument(
        '--bids-database-dir', '--bids_database_dir', type=Path, metavar='PATH',
        help='PyBIDS index to reuse between runs (default: a fresh one in the work directory)',
    )  # fmt: skip

    model = parser.add_argument_group('Options for models and their input')
    model.add_argument(
        '-m', '--model', nargs='+', metavar='NAME[=PATH]',
        help='model cards to run (see bids_brainfm_models list) or paths to cards of your own; '
        'PATH is a local checkpoint, its folder or its file (default: brainlm-111m)',
    )  # fmt: skip
    model.add_argument(
        '--denoise', metavar='{card,none,simple,36P,acompcor,FILE.yml}',
        help='confounds to regress out of the parcel series; none touches nothing: no '
        'regression, no interpolation, no volumes dropped (default: what the model card says)',
    )  # fmt: skip
    model.add_argument(
        '--min-coverage', '--min_coverage', type=share, metavar='SHARE',
        help='least share of a parcel inside the field of view; below it the parcel is n/a '
        '(default: 0.5)',
    )  # fmt: skip
    model.add_argument(
        '--scale', choices=SCALINGS,
        help='scaling of the parcel series before the encoder; none leaves the values as they '
        'are (default: what the model card says)',
    )  # fmt: skip
    model.add_argument(
        '--scale-stats', '--scale_stats', nargs='*', type=Path, metavar='FILE',
        help='fitted statistics for --scale cohort, one file for each atlas and way of scaling; '
        'at the group level, without a file: fit them over all runs in the output folder',
    )  # fmt: skip
    model.add_argument(
        '--temporal', choices=['resample', 'official'],
        help="how a run is brought to the model's repetition time: resample with an "
        'anti-aliasing filter, or pick frames as the official code of Brain-JEPA does '
        '(default: resample)',
    )  # fmt: skip
    model.add_argument(
        '--stride', type=positive(int), metavar='SAMPLES',
        help="samples, at the model's TR, from one window's start to the next (default: the "
        "window's length)",
    )  # fmt: skip
    model.add_argument(
        '--short-runs', '--short_runs', choices=['refuse', 'pad', 'tile'],
        help='what to do with less than one window of data: refuse a shorter run and leave out '
        "the end of a longer one (Brain-JEPA takes a window that lacks at most a tenth), pad with "
        "the parcel's mean, or tile the run (default: refuse)",
    )  # fmt: skip
    model.add_argument(
        '--tokens', action='store_true', default=None,
        help='also write the embedding of every token as HDF5',
    )  # fmt: skip
    model.add_argument(
        '--latent-prediction', '--latent_prediction', choices=[*BLOCKS, 'none'],
        help='block of the window that Brain-JEPA predicts from the rest, as a map of quality: '
        'the last time patches, every second parcel, or both (default: cross-time)',
    )  # fmt: skip
    model.add_argument(
        '--random-weights', '--random_weights', action='store_true', default=None,
        help='control: the same network with random, untrained weights',
    )  # fmt: skip

    outputs = parser.add_argument_group('Options for what is computed with a model')
    outputs.add_argument(
        '--outputs', nargs='+', choices=[*OUTPUTS, 'all'],
        help='what to write beside embeddings, each with its baselines: reconstruction and '
        'forecast of the run and perturbation (BrainLM), attention maps and functional networks '
        '(all models, and connectivity); all: whatever the models can (default: embeddings, '
        'which are always written)',
    )  # fmt: skip
    outputs.add_argument(
        '--mask-ratio', '--mask_ratio', type=ratio, metavar='SHARE',
        help='share of tokens hidden in a pass of reconstruction and perturbation (default: '
        'what the model was trained with)',
    )  # fmt: skip
    outputs.add_argument(
        '--aggregate', choices=['first', 'mean'],
        help='what to take where several passes hid a token: the first one, or the mean of all '
        '(default: first)',
    )  # fmt: skip
    outputs.add_argument(
        '--write-bold', '--write_bold', action='store_true', default=None,
        help='also write the reconstruction as BOLD on the grid of the input: NIfTI, or CIFTI',
    )  # fmt: skip
    outputs.add_argument(
        '--forecast-points', '--forecast_points', type=positive(int), metavar='SAMPLES',
        help="samples to forecast, at the model's TR (default: 20)",
    )  # fmt: skip
    outputs.add_argument(
        '--forecast-mode', '--forecast_mode', choices=['predict_last_pixel', 'predict_last'],
        help='hide exactly these samples, or all tokens that hold any of them (default: '
        'predict_last_pixel)',
    )  # fmt: skip
    outputs.add_argument(
        '--network-clusters', '--network_clusters', type=clusters, metavar='{N,auto}',
        help='number of networks to find; auto: that with the best silhouette (default: as many '
        'as there are reference networks, else auto)',
    )  # fmt: skip
    outputs.add_argument(
        '--reference-networks', '--reference_networks', nargs='+', type=Path, metavar='FILE',
        help='table (TSV) with the columns name and network of the parcels, one for each atlas '
        '(default: the networks that come with the atlas)',
    )  # fmt: skip
    outputs.add_argument(
        '--perturb', metavar='NAME',
        help='parcel or reference network to perturb (default: the parcel nearest to the left '
        'primary visual cortex)',
    )  # fmt: skip
    outputs.add_argument(
        '--perturb-sd', '--perturb_sd', type=finite, metavar='K',
        help='where to hold it: its mean plus so many SD, negative for down (default: 2)',
    )  # fmt: skip
    outputs.add_argument(
        '--random-seed', '--random_seed', type=seed, metavar='SEED',
        help='of masks, sham targets and clusters (default: 0)',
    )  # fmt: skip

    outputs.add_argument(
        '--contrast', nargs=3, metavar=('WHAT', 'A', 'B'),
        help='at the group level, attention maps of A minus those of B, where WHAT is an entity '
        'of the runs (task nback rest) or a column of participants.tsv (sex F M)',
    )  # fmt: skip

    perf = parser.add_argument_group('Options to handle performance')
    perf.add_argument(
        '--device', choices=['auto', 'cpu', 'cuda'],
        help='where the encoder runs (default: auto, the GPU if there is one)',
    )  # fmt: skip
    perf.add_argument(
        '--precision', choices=['float32', 'bfloat16'],
        help='precision of the encoder (default: float32 on CPU, bfloat16 on GPU)',
    )  # fmt: skip
    perf.add_argument(
        '--batch-size', '--batch_size', type=positive(int), metavar='WINDOWS',
        help='windows encoded at once (default: 8)',
    )  # fmt: skip
    perf.add_argument(
        '--nprocs', '--nthreads', '--n-cpus', '--n_cpus', type=positive(int), metavar='N',
        help='CPUs to use (default: all that are available)',
    )  # fmt: skip
    perf.add_argument(
        '--omp-nthreads', '--omp_nthreads', type=positive(int), metavar='N',
        help='threads of one encoder on the CPU (default: as --nprocs)',
    )  # fmt: skip
    perf.add_argument(
        '--mem', '--mem-mb', '--mem_mb', '--mem-gb', type=memory_gb, metavar='AMOUNT',
        help='memory to plan with, such as 8G; a bare number is in MB (default: 90%% of all)',
    )  # fmt: skip
    perf.add_argument(
        '--use-plugin', '--nipype-plugin-file', '--use_plugin', type=Path, metavar='FILE',
        help='YAML with the Nipype plugin and plugin_args to run the graph with',
    )  # fmt: skip

    other = parser.add_argument_group('Other options')
    other.add_argument(
        '-w', '--work-dir', '--work_dir', type=Path, metavar='PATH',
        help='folder for intermediate files (default: ./work)',
    )  # fmt: skip
    other.add_argument(
        '--clean-workdir', '--clean_workdir', action='store_true', default=None,
        help='empty the work directory first',
    )  # fmt: skip
    other.add_argument(
        '--config-file', '--config_file', type=Path, metavar='FILE',
        help='TOML with settings, such as one written by an earlier run; what is typed wins',
    )  # fmt: skip
    other.add_argument(
        '--write-graph', '--write_graph', action='store_true', default=None,
        help='write the Nipype graph into the work directory',
    )  # fmt: skip
    other.add_argument(
        '--stop-on-first-crash', '--stop_on_first_crash', action='store_true', default=None,
        help='stop at the first run that fails',
    )  # fmt: skip
    other.add_argument(
        '--stop-after', '--stop_after', choices=['timeseries'],
        help='stop when the parcel series are written: that needs neither weights nor a GPU, and '
        'the same command without it goes on from there',
    )  # fmt: skip
    other.add_argument(
        '--reports-only', '--reports_only', action='store_true', default=None,
        help='only write the reports again, from the output folder',
    )  # fmt: skip
    other.add_argument(
        '--boilerplate-only', '--boilerplate_only', action='store_true', default=None,
        help='only write the methods text',
    )  # fmt: skip
    other.add_argument(
        '--offline', action='store_true', default=None,
        help='forbid the libraries the network; no run needs it, since everything is looked for '
        'on this machine before anything starts',
    )  # fmt: skip
    other.add_argument('-v', '--verbose', action='count', default=None, help='say more')
    return parser


def named_paths(pairs: list[str]) -> dict[str, str]:
    """Split NAME=PATH pairs; a bare PATH takes its folder's name.

    >>> named_paths(['fmriprep=/d/prep', '/d/other'])
    {'fmriprep': '/d/prep', 'other': '/d/other'}
    """
    named = {}
    for pair in pairs:
        name, _, path = pair.rpartition('=') if '=' in pair else ('', '', pair)
        name = name or Path(path).absolute().name
        if name in named:
            raise BrainfmError(
                f'--derivatives names {name} twice: give each dataset its own name, NAME=PATH.'
            )
        named[name] = str(Path(path).absolute())
    return named


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the command line, over the configuration file if one is named.

    Raises
    ------
    BrainfmError
        Two settings contradict each other, or a file that was named is not there.
    """
    typed = {k: v for k, v in vars(get_parser().parse_args(argv)).items() if v is not None}
    config_file = typed.pop('config_file', None)
    found = _as_typed(read_toml(config_file), config_file) if config_file else {}
    if 'derivatives' in typed:
        typed['derivatives'] = named_paths(typed['derivatives'])
    settings = Settings(**{**found, **typed})
    if settings.omp_nthreads is None:
        settings = dataclasses.replace(settings, omp_nthreads=settings.nprocs)
    _check(settings)
    return settings


def _as_typed(found: dict, path: Path) -> dict:
    """Hold the values of a configuration file to what the command line accepts."""
    checked = dict(found)
    for action in get_parser()._actions:
        if action.dest not in found or action.dest == 'derivatives':
            continue
        value = found[action.dest]
        try:
            if action.nargs == 0 and action.dest != 'verbose':
                good = isinstance(value, bool)
            elif action.nargs in ('+', '*', 3):
                values = value if isinstance(value, list) else [value]
                checked[action.dest] = [action.type(str(v)) if action.type else v for v in values]
                good = all(isinstance(v, str) for v in values)
                good &= not action.choices or set(values) <= set(action.choices)
                good &= action.nargs != 3 or len(values) in (0, 3)
            else:
                # memory is written in GB, as a number
                takes_text = action.type and not (
                    action.type is memory_gb and value == float(value)
                )
                checked[action.dest] = action.type(str(value)) if takes_text else value
                good = not action.choices or value in action.choices
                good &= not isinstance(value, (list, dict, bool))
        except (argparse.ArgumentTypeError, ValueError, TypeError):
            good = False
        if not good:
            raise BrainfmError(
                f'--config-file {path}: {action.dest} = {value!r} is not what '
                f'{action.option_strings[-1] if action.option_strings else action.dest} takes: '
                f'see bids_brainfm --help.'
            )
    named = found.get('derivatives', {})
    if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
        raise BrainfmError(
            f'--config-file {path}: derivatives must be a table of names and paths, such as '
            f'{{fmriprep = "/data/fmriprep"}}.'
        )
    return checked


def _check(settings: Settings) -> None:
    fits = settings.scale_stats == ()
    if settings.analysis_level == 'group':
        if bool(settings.contrast) == fits:
            raise BrainfmError(
                'The group level does one of two things: bids_brainfm OUT OUT group '
                '--scale-stats fits statistics (name no file), and bids_brainfm OUT OUT group '
                '--contrast WHAT A B subtracts maps.'
            )
    elif settings.contrast:
        raise BrainfmError(
            'The participant level has no --contrast: bids_brainfm OUT OUT group --contrast '
            'WHAT A B subtracts maps that it has written.'
        )
    elif fits:
        raise BrainfmError(
            'At the participant level --scale-stats takes a FILE, as bids_brainfm OUT OUT group '
            '--scale-stats writes it.'
        )
    elif settings.scale == 'cohort' and not settings.scale_stats:
        raise BrainfmError(
            '--scale cohort needs the fitted statistics: add --scale-stats FILE (made by '
            'bids_brainfm OUT OUT group --scale-stats).'
        )
    if settings.scale_stats and settings.scale != 'cohort':
        raise BrainfmError('--scale-stats is used by --scale cohort only: add --scale cohort.')
    for name, outputs in USED_BY.items():
        asked = getattr(settings, name) not in (None, False, ())
        if asked and not {'all', *outputs} & set(settings.outputs):
            raise BrainfmError(
                f'--{name.replace("_", "-")} is used by --outputs {" or ".join(outputs)} only: '
                f'add --outputs {outputs[0]}.'
            )
    for option, path in (
        *(('--reference-networks', path) for path in settings.reference_networks),
        *(('--scale-stats', path) for path in settings.scale_stats or ()),
        ('--bids-filter-file', settings.bids_filter_file),
        ('--use-plugin', settings.use_plugin),
    ):
        if path is not None and not path.is_file():
            raise BrainfmError(f'{option} {path} does not exist: check the path.')
