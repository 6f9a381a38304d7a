"""Find the runs of an fMRIPrep derivatives dataset and what belongs to each."""

import contextlib
import hashlib
import json
import re
import shutil
import sqlite3
import uuid
from pathlib import Path

from bids_brainfm.bids.description import is_derivative, read_description
from bids_brainfm.bids.naming import LONG_NAMES, join_name, parse_name
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.errors import BrainfmError

# Entities that name a version of the same recording, not another recording
VERSION_ENTITIES = ('space', 'cohort', 'res', 'den', 'desc')
FMRIPREP_FLAGS = {
    'MNI152NLin6Asym': '--output-spaces MNI152NLin6Asym:res-2',
    'MNI152NLin2009cAsym': '--output-spaces MNI152NLin2009cAsym:res-2',
    'fsLR': '--cifti-output 91k',
}


def find_datasets(bids_dir: Path, derivatives: dict[str, str]) -> dict[str, Path]:
    """Name the fMRIPrep datasets to read.

    Parameters
    ----------
    bids_dir : Path
        fMRIPrep derivatives, or a raw dataset with ``derivatives/fmriprep`` inside.
    derivatives : dict
        Name and path of datasets to read in its place.

    Returns
    -------
    dict of str to Path
    """
    if derivatives:
        for name in derivatives:
            if not re.fullmatch('[A-Za-z0-9_-]+', name):
                raise BrainfmError(
                    f'--derivatives names a dataset {name!r}, which becomes part of paths and of '
                    f'BIDS URIs: use letters, digits, - and _ only.'
                )
        datasets = {name: Path(path) for name, path in derivatives.items()}
        for folder in datasets.values():
            read_description(folder)
        return datasets
    if is_derivative(bids_dir):
        return {'preprocessed': bids_dir}
    nested = bids_dir / 'derivatives' / 'fmriprep'
    if nested.is_dir():
        read_description(nested)
        return {'fmriprep': nested}
    raise BrainfmError(
        f'{bids_dir} is a raw BIDS dataset without derivatives/fmriprep: run fMRIPrep first, or '
        f'name its output with --derivatives fmriprep=PATH.'
    )


def known_participants(root: Path) -> set[str]:
    """Labels of the participants of a dataset."""
    return {path.name.removeprefix('sub-') for path in root.glob('sub-*') if path.is_dir()}


def check_participants(datasets: dict[str, Path], participants: tuple[str, ...]) -> None:
    """Refuse participants that no dataset has.

    Raises
    ------
    BrainfmError
        A participant is unknown (the known ones are named), or there is none.
    """
    known = set().union(*map(known_participants, datasets.values()))
    unknown = sorted(set(participants) - known)
    where = ', '.join(map(str, datasets.values()))
    if not known:
        raise BrainfmError(
            f'There is no participant (no sub-* folder) in {where}: check the path.'
        )
    if unknown:
        raise BrainfmError(
            f'There is no participant {", ".join(unknown)} in {where}; it has '
            f'{", ".join(sorted(known))}.'
        )


def index(root: Path, participants: tuple[str, ...], database_dir: Path):
    """Index a dataset with PyBIDS, without metadata, other participants or anatomy.

    The index is kept in `database_dir`, never in the dataset, and apart from those of other
    datasets and participants: PyBIDS takes both from an index that it finds.

    Raises
    ------
    BrainfmError
        The index cannot be made or read.
    """
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    of = json.dumps([str(root.resolve()), sorted(participants)])
    folder = database_dir / hashlib.sha256(of.encode()).hexdigest()[:12]
    kept = folder / 'layout_index.sqlite'

    ignore = ['code', 'logs', 'sourcedata', 'derivatives']
    ignore.append(re.compile(r'/(anat|dwi|figures|fmap|log)/'))
    if participants:
        wanted = '|'.join(re.escape(label) for label in participants)
        ignore.append(re.compile(rf'^/sub-(?!({wanted})(/|$))'))
    indexer = BIDSLayoutIndexer(validate=False, index_metadata=False, ignore=ignore)

    def layout(place: Path):
        return BIDSLayout(
            root,
            validate=False,
            config=['bids', 'derivatives'],
            database_path=place,
            indexer=indexer,
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_index(kept):
            # under another name, or a process beside this one would find half of it
            part = folder / uuid.uuid4().hex
            layout(part)
            (part / kept.name).replace(kept)
            shutil.rmtree(part)
        return layout(folder)
    except Exception as error:  # of the database and of the file system below it
        reason = str(error).partition('\n')[0]
        raise BrainfmError(
            f'The PyBIDS index in {database_dir} cannot be used ({reason}): remove it, make space '
            f'there, or name another place with --bids-database-dir.'
        ) from error


def _is_index(path: Path) -> bool:
    """Whether a file is a whole index: no damaged database, and one with files in it."""
    if not path.is_file():
        return False
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            (state,) = database.execute('PRAGMA quick_check(1)').fetchone()
            return state == 'ok' and bool(database.execute('SELECT 1 FROM files').fetchone())
    except sqlite3.DatabaseError:
        return False


def _same(found: str | None, wanted) -> bool:
    """Whether a label is what a filter asks for; ``01`` and ``1`` are the same run."""
    if wanted is None:
        return found is None
    if wanted == '*':
        return found is not None
    if isinstance(wanted, (list, tuple)):
        return any(_same(found, one) for one in wanted)
    if found is None:
        return False
    found, wanted = str(found), str(wanted)
    if found.isdigit() and wanted.isdigit():
        return int(found) == int(wanted)
    return found == wanted


def read_filters(path: Path | None) -> dict:
    """Filters of a ``--bids-filter-file`` for BOLD files: entity to value.

    Raises
    ------
    BrainfmError
        The file is not JSON of the form ``{"bold": {entity: value}}``.
    """
    if path is None:
        return {}
    try:
        filters = json.loads(path.read_text())['bold']
        return dict(filters)
    except (ValueError, TypeError, KeyError):
        raise BrainfmError(
            f'--bids-filter-file {path} is not JSON of the form {{"bold": {{"acquisition": '
            f'"mb8"}}}}: mend the file.'
        ) from None


def _is_candidate(entities: dict, extension: str) -> bool:
    """Whether a ``_bold`` file is a preprocessed series of the whole run in a standard space."""
    if 'echo' in entities or entities.get('part', 'mag') != 'mag' or 'space' not in entities:
        return False
    if extension == '.dtseries.nii':
        return entities['space'] == 'fsLR'
    return extension in ('.nii', '.nii.gz') and entities.get('desc') == 'preproc'


def _preference(entities: dict, spaces: tuple[str, ...]) -> tuple:
    """Sort key of a candidate: the space's rank, then 2 mm, native and other resolutions."""
    resolution = entities.get('res')
    rank = {'2': 0, '02': 0, None: 1}.get(resolution, 2)
    return spaces.index(entities['space']), rank, str(resolution)


def _describe(entities: dict) -> str:
    label = entities.get('space', 'native')
    return label + (f' {entities["den"]}' if 'den' in entities else '')


def find_runs(layout, dataset: str, spaces: tuple[str, ...], filters: dict):
    """Choose, for every recording, the file in the best space, and its companions.

    Parameters
    ----------
    layout : bids.BIDSLayout
        Index of the dataset.
    dataset : str
        Its name in BIDS URIs.
    spaces : tuple of str
        Spaces that will do, the best first (``fsLR`` means 91k grayordinates).
    filters : dict
        Entity (PyBIDS's long names or the short ones) to the value it must have: a label, a list
        of labels, None (absent) or ``'*'`` (any).

    Returns
    -------
    runs : list of BoldRun
    without : dict of str to str
        Name of every recording that has no file in these spaces, or only a broken link, and the
        sentence that says so.
    """
    root = Path(layout.root)
    recordings: dict[str, list] = {}
    unknown = filters.keys() - layout.get_entities().keys() - LONG_NAMES.keys()
    for path in sorted(layout.get(suffix='bold', return_type='filename')):
        path = Path(path)
        entities, _, extension = parse_name(path.name)
        if 'nii' not in extension:
            continue
        by_name = entities | {LONG_NAMES.get(key, key): value for key, value in entities.items()}
        by_name |= {'datatype': path.parent.name, 'suffix': 'bold', 'extension': extension}
        unknown -= by_name.keys()
        if not all(_same(by_name.get(key), value) for key, value in filters.items()):
            continue
        stem = join_name(
            {k: v for k, v in entities.items() if k not in (*VERSION_ENTITIES, 'echo', 'hemi')}
        )
        recordings.setdefault(stem, []).append((entities, extension, path))

    if unknown:
        raise BrainfmError(
            f'The filter names {", ".join(sorted(unknown))}, which is no entity of {root}: '
            f'choose among {", ".join(sorted(layout.get_entities()))}.'
        )

    runs, without = [], {}
    for stem, files in recordings.items():
        if not re.fullmatch('[A-Za-z0-9_+-]+', stem):  # it becomes part of paths and of pages
            without[stem] = (
                f'{stem}: its name has other characters than letters and digits in a label, which '
                f'BIDS does not allow: rename its files.'
            )
            continue
        usable = [
            (entities, path)
            for entities, extension, path in files
            if _is_candidate(entities, extension)
            and entities['space'] in spaces
            and entities.get('den', '91k') == '91k'
        ]
        if usable:
            entities, path = min(usable, key=lambda item: _preference(item[0], spaces))
            if path.exists():
                runs.append(_with_companions(stem, entities, path, dataset, root))
            else:
                without[stem] = (
                    f'{stem}: {path.name} is a link to a file that is not here: fetch its content '
                    f'first (with DataLad: datalad get).'
                )
        else:
            found = sorted({_describe(entities) for entities, _, _ in files})
            without[stem] = (
                f'{stem}: there is no preprocessed BOLD in {" or ".join(spaces)} (found: '
                f'{", ".join(found)}); run fMRIPrep again with '
                f'{FMRIPREP_FLAGS.get(spaces[0], "--output-spaces " + spaces[0])}.'
            )
    return runs, without


def _with_companions(stem: str, entities: dict, bold: Path, dataset: str, root: Path) -> BoldRun:
    def existing(*names: str) -> Path | None:
        return next((bold.parent / n for n in names if (bold.parent / n).exists()), None)

    mask_entities = {k: v for k, v in entities.items() if k != 'desc'} | {'desc': 'brain'}
    base = bold.name.partition('.')[0]
    confounds = f'{stem}_desc-confounds'
    return BoldRun(
        name=stem,
        entities=entities,
        dataset=dataset,
        root=root,
        bold=bold,
        mask=existing(
            *(join_name(mask_entities, 'mask', extension) for extension in ('.nii.gz', '.nii'))
        ),
        # older fMRIPrep names the sidecar of grayordinates after the whole extension
        sidecar=existing(f'{base}.json', f'{base}.dtseries.json'),
        # up to 20.1 fMRIPrep called the table regressors
        confounds=existing(f'{confounds}_timeseries.tsv', f'{confounds}_regressors.tsv'),
        confounds_json=existing(f'{confounds}_timeseries.json', f'{confounds}_regressors.json'),
    )


def repetition_time(run: BoldRun) -> float:
    """Repetition time in seconds, from the run's sidecar.

    Raises
    ------
    BrainfmError
        There is no sidecar, or no repetition time in it, or it cannot be in seconds.
    """
    if run.sidecar is None:
        raise BrainfmError(
            f'{run.name}: {run.bold.name} has no JSON sidecar beside it, which must give the '
            f'RepetitionTime: copy it from the fMRIPrep output.'
        )
    try:
        metadata = json.loads(run.sidecar.read_text())
        tr = metadata.get('RepetitionTime')
    except (ValueError, AttributeError) as error:
        raise BrainfmError(
            f'{run.name}: {run.sidecar.name} is not readable JSON ({error}): restore the file.'
        ) from None
    if tr is None and 'VolumeTiming' in metadata:
        raise BrainfmError(
            f'{run.name}: {run.sidecar.name} gives VolumeTiming instead of RepetitionTime, and '
            f'unevenly spaced volumes cannot be windowed: leave this run out.'
        )
    if isinstance(tr, bool) or not isinstance(tr, (int, float)) or not tr > 0:
        found = 'no RepetitionTime' if tr is None else f'RepetitionTime {tr!r}'
        raise BrainfmError(
            f'{run.name}: {run.sidecar.name} has {found}: write the repetition time in seconds.'
        )
    if tr > 30:
        raise BrainfmError(
            f'{run.name}: RepetitionTime {tr:g} in {run.sidecar.name} looks like milliseconds: '
            f'write it in seconds ({tr / 1000:g}).'
        )
    return float(tr)
