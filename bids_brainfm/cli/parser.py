"""The command line of ``bids_brainfm``.

Every optional argument defaults to None, so that a configuration file is overridden by what was
typed and by nothing else; the real defaults are those of :class:`bids_brainfm.config.Settings`.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from bids_brainfm.arguments import label, memory_gb, positive, proportion, seed
from bids_brainfm.config import PRECISIONS, Settings, read_toml
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.registry import (
    ALL,
    DENOISING,
    OUTPUTS,
    about_outputs,
    options,
    used_by,
)

SCALINGS = ('card', 'none', 'run-robust', 'global-z', 'parcel-z', 'cohort')


class _ShowVersion(argparse.Action):
    """Print the version; it is looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        parser.exit(message=f'bids_brainfm {version("bids-brainfm")}\n')


# fmt: off
def get_parser() -> argparse.ArgumentParser:
    """Build the parser of the ``bids_brainfm`` command."""
    parser = argparse.ArgumentParser(
        prog='bids_brainfm',
        description='Run fMRI foundation models on fMRIPrep derivatives: parcel series, windows '
        'in the shape each model expects, embeddings and a report, as BIDS derivatives.',
        epilog='Model weights and atlases are fetched once, by bids_brainfm_models.')
    switch: dict[str, Any] = {'action': 'store_true', 'default': None}
    add = parser.add_argument
    add('bids_dir', type=Path,
        help='fMRIPrep derivatives, or a raw BIDS dataset with derivatives/fmriprep inside; at '
        'the group level what the participant level wrote')
    add('output_dir', type=Path, help='folder of the BIDS derivatives to write')
    add('analysis_level', choices=['participant', 'group'],
        help='level of the analysis; group fits statistics of the cohort (--scale-stats, '
        '--covariance) or subtracts attention maps (--contrast)')
    add('--version', action=_ShowVersion, nargs=0, help='print the version')

    add = parser.add_argument_group('Options for filtering BIDS queries').add_argument
    add('--participant-label', '--participant_label', nargs='+', type=label('sub'),
        metavar='LABEL', help='participants, with or without sub- (default: all)')
    add('--participants-file', '--participants_file', type=Path, metavar='TSV',
        help='at the group level, only the participants that this table lists (column '
        'participant_id), such as the participants.tsv of a training')
    add('--part', metavar='NAME',
        help='of these, only those of one part (column part), such as train: statistics of a '
        'cohort must not see the participants that a model is tested on')
    add('--session-label', '--session_label', '--session-id', '--session_id', nargs='+',
        type=label('ses'), metavar='LABEL', help='sessions (default: all)')
    add('-t', '--task-id', '--task_id', nargs='+', type=label('task'), metavar='LABEL',
        help='tasks (default: all)')
    add('--run-id', '--run_id', nargs='+', type=label('run'), metavar='LABEL',
        help='runs (default: all)')
    add('--space', metavar='SPACE',
        help='space to read, such as MNI152NLin6Asym (default: the first that the model takes)')
    add('--bids-filter-file', '--bids_filter_file', type=Path, metavar='FILE',
        help='JSON of PyBIDS entities that BOLD files must have, in the form of fMRIPrep: '
        '{"bold": {"acquisition": "mb8"}}; null means absent, "*" any value')
    add('-d', '--derivatives', nargs='+', metavar='NAME=PATH',
        help='fMRIPrep derivatives to read in place of bids_dir')

    add = parser.add_argument_group('Options for models and their input').add_argument
    add('-m', '--model', nargs='+', metavar='NAME[=PATH]',
        help='model cards to run (see bids_brainfm_models list) or paths to cards of your own; '
        'PATH is a local checkpoint, its folder or its file (default: brainlm-111m)')
    add('--max-flagged', '--max_flagged', type=proportion, metavar='PROPORTION',
        help='proportion of flagged volumes above which a window, or all windows of a run, are '
        'marked as excluded: they stay in the tables, and summaries and the group level leave '
        'them out (default: 1, no limit)')
    add('--min-coverage', '--min_coverage', type=proportion, metavar='PROPORTION',
        help="least proportion of a parcel's voxels that are inside the brain mask and vary over "
        'the run; below it the parcel is n/a (default: 0.5)')
    add('--parcel-voxels', '--parcel_voxels', choices=['mask', 'all'],
        help='voxels that parcel means are taken over: those inside the brain mask, or all; '
        'constant voxels are left out of both, and grayordinates have no mask (default: mask)')
    add('--scale', choices=SCALINGS,
        help='scaling of the parcel series before the encoder; none leaves the values as they are '
        '(default: what the model card says)')
    add('--scale-stats', '--scale_stats', nargs='*', type=Path, metavar='FILE',
        help='fitted statistics for --scale cohort, one file for each atlas and way of scaling; '
        'at the group level, without a file: fit them over all runs in the output folder')
    add('--temporal', choices=['resample', 'official'],
        help="how a run is brought to the model's repetition time: resample with an anti-aliasing "
        'filter, or pick frames as the official code of Brain-JEPA does (default: resample)')
    add('--stride', type=positive(int), metavar='SAMPLES',
        help="samples, at the model's TR, from one window's start to the next (default: the "
        "window's length)")
    add('--short-runs', '--short_runs', choices=['refuse', 'pad', 'tile'],
        help='what to do with less than one window of data: refuse a shorter run and leave out '
        'the end of a longer one (Brain-JEPA takes a window that lacks at most a tenth), pad with '
        "the parcel's mean, or tile the run (default: refuse)")
    add('--tokens', **switch, help='also write the embedding of every token as HDF5')
    add('--random-weights', '--random_weights', **switch,
        help='control: the same network with random, untrained weights')

    denoising = parser.add_argument_group('Options for denoising')
    denoising.add_argument('--denoise', metavar='STRATEGY[+gsr]',
        help='confounds to regress out of the parcel series: simple, scrubbing, compcor (names as '
        'in nilearn), acompcor, 36P (as in XCP-D), aroma, aroma-aggressive, tedana, none, or '
        'FILE.yml; +gsr adds the global signal. none neither regresses nor interpolates, but '
        'volumes that are not in steady state are dropped (see --keep-nonsteady) (default: what '
        'the model card says)')
    for option in DENOISING:
        option.add_to(denoising)

    outputs = parser.add_argument_group('Options for what is computed with a model')
    add = outputs.add_argument
    add('--outputs', nargs='+', choices=[*OUTPUTS, ALL],
        help='what to write in addition to embeddings, each with its baselines. '
        f'{about_outputs()}; all: whatever the models can (default: embeddings, which are always '
        'written)')
    for option in options().values():
        if option not in DENOISING:
            option.add_to(outputs)
    add('--random-seed', '--random_seed', type=seed, metavar='SEED',
        help='of masks, sham targets and clusters (default: 0)')

    add = parser.add_argument_group('Options to handle performance').add_argument
    add('--device', choices=['auto', 'cpu', 'cuda'],
        help='where the encoder runs (default: auto, the GPU if there is one)')
    add('--precision', choices=PRECISIONS,
        help='precision of matrix products in the encoder (default: float32 on CPU, tf32 on GPU); '
        'below float32, the error is measured on the first windows')
    add('--batch-size', '--batch_size', type=positive(int), metavar='WINDOWS',
        help='windows encoded at once (default: 8)')
    add('--nprocs', '--nthreads', '--n-cpus', '--n_cpus', type=positive(int), metavar='N',
        help='CPUs to use (default: all that are available)')
    add('--omp-nthreads', '--omp_nthreads', type=positive(int), metavar='N',
        help='threads of one encoder on the CPU (default: as --nprocs)')
    add('--mem', '--mem-mb', '--mem_mb', '--mem-gb', type=memory_gb, metavar='AMOUNT',
        help='memory to plan with, such as 8G; a bare number is in MB (default: 90%% of all)')
    add('--use-plugin', '--nipype-plugin-file', '--use_plugin', type=Path, metavar='FILE',
        help='YAML with the Nipype plugin and plugin_args to run the graph with')

    add = parser.add_argument_group('Other options').add_argument
    add('-w', '--work-dir', '--work_dir', type=Path, metavar='PATH',
        help='folder for intermediate files (default: ./work)')
    add('--clean-workdir', '--clean_workdir', **switch, help='empty the work directory first')
    add('--config-file', '--config_file', type=Path, metavar='FILE',
        help='TOML with settings, such as one written by an earlier run; what is typed wins')
    add('--write-graph', '--write_graph', **switch,
        help='write the Nipype graph into the work directory')
    add('--stop-on-first-crash', '--stop_on_first_crash', **switch,
        help='stop at the first run that fails')
    add('--stop-after', '--stop_after', choices=['timeseries'],
        help='stop when the parcel series are written: that needs neither weights nor a GPU, and '
        'the same command without it goes on from there')
    add('--recompute', **switch,
        help='make outputs again that an earlier version of the program wrote with other numbers '
        '(default: refuse to add to them)')
    add('--reports-only', '--reports_only', **switch,
        help='only write the reports again, from the output folder')
    add('--boilerplate-only', '--boilerplate_only', **switch, help='only write the methods text')
    add('--offline', **switch,
        help='forbid the libraries the network; no run needs it, since everything is looked for '
        'on this machine before anything starts')
    add('-v', '--verbose', action='count', default=None, help='say more')
    return parser
# fmt: on


def named_paths(pairs: list[str]) -> dict[str, str]:
    """Split NAME=PATH pairs; a bare PATH takes its folder's name.

    >>> named_paths(['fmriprep=/d/prep', '/d/other'])
    {'fmriprep': '/d/prep', 'other': '/d/other'}
    """
    named: dict[str, str] = {}
    for pair in pairs:
        name, _, path = pair.rpartition('=') if '=' in pair else ('', '', pair)
        name = name or Path(path).absolute().name
        if name in named:
            advice = 'give each dataset its own name, NAME=PATH.'
            raise BrainfmError(f'--derivatives names {name} twice: {advice}')
        named[name] = str(Path(path).absolute())
    return named


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the command line, over the configuration file if one is named.

    Raises BrainfmError where settings contradict each other or a file that is named is not there.
    """
    typed = {k: v for k, v in vars(get_parser().parse_args(argv)).items() if v is not None}
    config_file = typed.pop('config_file', None)
    found = _as_typed(read_toml(config_file, options()), config_file) if config_file else {}
    if 'derivatives' in typed:
        typed['derivatives'] = named_paths(typed['derivatives'])
    given = found | typed
    of_products = {name: given.pop(name) for name in options() if name in given}
    settings = Settings(**given, options=of_products)
    if settings.omp_nthreads is None:
        settings = dataclasses.replace(settings, omp_nthreads=settings.nprocs)
    _check(settings)
    return settings


def _as_typed(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Hold the values of a configuration file to what the command line accepts."""
    checked = dict(found)
    for action in get_parser()._actions:
        name, nargs = action.dest, action.nargs
        if name not in found or name == 'derivatives':
            continue
        value, kind = found[name], cast(Callable[[str], Any] | None, action.type)
        try:
            if nargs == 0 and name != 'verbose':
                good = isinstance(value, bool)
            elif nargs:
                values = value if isinstance(value, list) else [value]
                checked[name] = made = [kind(str(v)) if kind else v for v in values]
                good = all(isinstance(v, str) or v == m for v, m in zip(values, made, strict=True))
                good &= not action.choices or set(values) <= set(action.choices)
                good &= not isinstance(nargs, int) or len(values) in (0, nargs)
            else:
                # memory is written in GB, as a number
                if kind is not None and not (kind is memory_gb and value == float(value)):
                    checked[name] = kind(str(value))
                good = not action.choices or value in action.choices
                good &= not isinstance(value, (list, dict, bool))
        except (argparse.ArgumentTypeError, ValueError, TypeError):
            good = False
        if not good:
            fault = f'{name} = {value!r} is not what {[name, *action.option_strings][-1]} takes'
            raise BrainfmError(f'--config-file {path}: {fault}: see bids_brainfm --help.')
    named = found.get('derivatives', {})
    if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
        form = 'a table of names and paths, such as {fmriprep = "/data/fmriprep"}'
        raise BrainfmError(f'--config-file {path}: derivatives must be {form}.')
    return checked


def _check(settings: Settings) -> None:
    """See that the settings go together and that the files they name exist."""
    group, contrast = settings.analysis_level == 'group', bool(settings.options.get('contrast'))
    stats, cohort = settings.scale_stats, settings.scale == 'cohort'
    listed, part = settings.participants_file is not None, settings.part
    twice = listed and settings.participant_label
    fitted = {'--scale-stats': stats, '--covariance': settings.options.get('covariance')}
    fits = [flag for flag, files in fitted.items() if files == ()]
    refused = {
        'The group level does one thing at a time: bids_brainfm OUT OUT group --scale-stats fits '
        'statistics and --covariance a covariance (name no file), --contrast WHAT A B subtracts '
        'maps.': group and contrast + len(fits) != 1,
        'The participant level has no --contrast: bids_brainfm OUT OUT group --contrast WHAT A B '
        'subtracts maps that it has written.': not group and contrast,
        f'At the participant level {fits[0] if fits else ""} takes a FILE, as bids_brainfm OUT '
        'OUT group writes it with this option.': not group and bool(fits),
        '--scale cohort needs the fitted statistics: add --scale-stats FILE (made by '
        'bids_brainfm OUT OUT group --scale-stats).': not group and cohort and not stats,
        '--scale-stats is used by --scale cohort only: add --scale cohort.': stats and not cohort,
        '--participants-file is an option of the group level: name participants with '
        '--participant-label.': not group and listed,
        '--participants-file and --participant-label both name participants: use one.': twice,
        '--part selects from a table of participants: add --participants-file TSV.': part
        and not listed,
    }
    for sentence, holds in refused.items():
        if holds:
            raise BrainfmError(sentence)
    for name, option in options().items():
        outputs = used_by(name)
        given = settings.options.get(name) not in (None, False, ())
        if given and outputs and not {ALL, *outputs} & set(settings.outputs):
            users = f'--outputs {" or ".join(outputs)} only'
            raise BrainfmError(f'{option.flag} is used by {users}: add --outputs {outputs[0]}.')
    for flag, path in named_files(settings):
        if not (path.is_dir() if flag == '--custom-confounds' else path.is_file()):
            raise BrainfmError(f'{flag} {path} does not exist: check the path.')


def named_files(settings: Settings) -> list[tuple[str, Path]]:
    """Files and folders that must exist, each with the option that names it."""
    given = {option.flag: settings.options.get(name) for name, option in options().items()}
    given |= {
        '--scale-stats': settings.scale_stats,
        '--participants-file': settings.participants_file,
        '--bids-filter-file': settings.bids_filter_file,
        '--use-plugin': settings.use_plugin,
    }
    lists = {flag: v if isinstance(v, tuple) else (v,) for flag, v in given.items()}
    return [(flag, v) for flag, values in lists.items() for v in values if isinstance(v, Path)]
