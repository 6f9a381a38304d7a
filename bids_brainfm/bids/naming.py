"""Names of BIDS files: taken apart, put together, and where our outputs lie."""

from pathlib import Path

from bids_brainfm.bids.run import BoldRun

LONG_NAMES = {
    'acq': 'acquisition', 'ce': 'ceagent', 'den': 'density', 'dir': 'direction',
    'rec': 'reconstruction', 'res': 'resolution', 'ses': 'session', 'sub': 'subject',
}  # fmt: skip
# Entities that name a version of a recording or an output of it, not another recording
OUTPUT_ENTITIES = ('space', 'cohort', 'res', 'den', 'atlas', 'stat', 'desc')


def parse_name(name: str) -> tuple[dict[str, str], str, str]:
    """Split a BIDS file name into entities, suffix and extension.

    >>> parse_name('sub-01_task-rest_run-01_space-fsLR_den-91k_bold.dtseries.nii')[0]
    {'sub': '01', 'task': 'rest', 'run': '01', 'space': 'fsLR', 'den': '91k'}
    >>> parse_name('sub-01_task-rest_bold.nii.gz')[1:]
    ('bold', '.nii.gz')
    """
    stem, dot, extension = name.partition('.')
    *pairs, suffix = stem.split('_')
    return dict(pair.split('-', 1) for pair in pairs if '-' in pair), suffix, dot + extension


def join_name(entities: dict[str, str], suffix: str = '', extension: str = '') -> str:
    """Join entities, in their order, to a file name.

    >>> join_name({'sub': '01', 'task': 'rest'}, 'bold', '.json')
    'sub-01_task-rest_bold.json'
    """
    parts = [f'{key}-{value}' for key, value in entities.items()] + ([suffix] if suffix else [])
    return '_'.join(parts) + extension


def parcels_name(name: str) -> str:
    """Run, space and atlas of an output, by its file name.

    >>> parcels_name('sub-01_task-rest_space-fsLR_atlas-A424_stat-mean_timeseries.tsv')
    'sub-01_task-rest_space-fsLR_atlas-A424'
    """
    entities = parse_name(name)[0]
    return join_name({key: v for key, v in entities.items() if key not in ('stat', 'desc')})


def derivative_path(
    output: Path, run: BoldRun, suffix: str, extension: str = '.tsv', *,
    atlas: str | None = None, stat: str | None = None, desc: str | None = None,
) -> Path:  # fmt: skip
    """Path of an output of a run; entities come in the order of BIDS, ``desc`` last.

    The space is kept from the input; resolution and density are in the sidecar.

    >>> run = BoldRun('sub-01_task-rest', {'sub': '01', 'task': 'rest', 'space': 'fsLR'}, 'p',
    ...               Path('/d'), Path('/d/b.nii'))
    >>> derivative_path(Path('/out'), run, 'timeseries', atlas='A424', stat='mean')
    PosixPath('/out/sub-01/func/sub-01_task-rest_space-fsLR_atlas-A424_stat-mean_timeseries.tsv')
    """
    added = {'space': run.space, 'atlas': atlas, 'stat': stat, 'desc': desc}
    entities = parse_name(f'{run.name}_x')[0]
    entities |= {key: label for key, label in added.items() if label}
    session = f'ses-{run.entities["ses"]}' if 'ses' in run.entities else ''
    folder = output / f'sub-{run.subject}' / session / 'func'
    return folder / join_name(entities, suffix, extension)


def failure_path(output: Path, run: str, step: str) -> Path:
    """File of the output dataset that says why a step failed for a run, by their names."""
    return output / run.partition('_')[0] / 'log' / f'failed-{run}_{step}.txt'


def own_uri(output: Path, path: Path) -> str:
    """BIDS URI of a file of the output dataset."""
    return f'bids::{path.relative_to(output).as_posix()}'
