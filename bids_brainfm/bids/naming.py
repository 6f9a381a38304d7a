"""Names of BIDS files: taken apart, put together, and where our outputs lie."""

from pathlib import Path

from bids_brainfm.bids.run import BoldRun

LONG_NAMES = {
    'acq': 'acquisition',
    'ce': 'ceagent',
    'den': 'density',
    'dir': 'direction',
    'rec': 'reconstruction',
    'res': 'resolution',
    'ses': 'session',
    'sub': 'subject',
}


def parse_name(name: str) -> tuple[dict[str, str], str, str]:
    """Split a BIDS file name into entities, suffix and extension.

    >>> parse_name('sub-01_task-rest_run-01_space-fsLR_den-91k_bold.dtseries.nii')[0]
    {'sub': '01', 'task': 'rest', 'run': '01', 'space': 'fsLR', 'den': '91k'}
    >>> parse_name('sub-01_task-rest_bold.nii.gz')[1:]
    ('bold', '.nii.gz')
    """
    stem, dot, extension = name.partition('.')
    *pairs, suffix = stem.split('_')
    entities = dict(pair.split('-', 1) for pair in pairs if '-' in pair)
    return entities, suffix, dot + extension


def join_name(entities: dict[str, str], suffix: str = '', extension: str = '') -> str:
    """Join entities, in their order, to a file name.

    >>> join_name({'sub': '01', 'task': 'rest'}, 'bold', '.json')
    'sub-01_task-rest_bold.json'
    """
    parts = [f'{key}-{value}' for key, value in entities.items()] + ([suffix] if suffix else [])
    return '_'.join(parts) + extension


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


def own_uri(output: Path, path: Path) -> str:
    """BIDS URI of a file of the output dataset."""
    return f'bids::{path.relative_to(output).as_posix()}'
