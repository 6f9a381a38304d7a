"""fMRIPrep's derivatives, from 20.2 on."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_brainfm.bids.inputs.index import index
from bids_brainfm.bids.naming import LONG_NAMES, join_name, parse_name
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.errors import BrainfmError

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

FOLDER = 'fmriprep'  # below derivatives/ of a raw dataset
# How the methods text goes on after "Preprocessed BOLD series were taken from"
SOURCE = 'fMRIPrep (Esteban et al. 2019) derivatives'
# Entities that name a version or a part of the same recording, not another recording
VERSION_ENTITIES = ('space', 'cohort', 'res', 'den', 'desc', 'echo', 'hemi')
FLAGS = {
    'MNI152NLin6Asym': '--output-spaces MNI152NLin6Asym:res-2',
    'MNI152NLin2009cAsym': '--output-spaces MNI152NLin2009cAsym:res-2',
    'fsLR': '--cifti-output 91k',
}
open_dataset = index


def accepts(description: Mapping[str, Any]) -> bool:
    """Whether a dataset with this description is read by this adapter: the last one takes all."""
    return True


def find_runs(
    layout: 'BIDSLayout', dataset: str, spaces: tuple[str, ...], filters: Mapping[str, Any]
) -> tuple[list[BoldRun], dict[str, str]]:
    """Choose, for every recording, the file in the best space, and its companions.

    `dataset` is its name in BIDS URIs; `spaces` come the best first (``fsLR``: 91k grayordinates).
    `filters` map an entity (PyBIDS's long names or the short ones) to the value it must have: a
    label, a list of labels, None (absent) or ``'*'`` (any). Returns the runs, and by the name of
    each recording without a file in these spaces (or a broken link only) a sentence saying so.
    """
    root = Path(layout.root)
    recordings: dict[str, list[tuple[dict[str, str], str, Path]]] = {}
    unknown = filters.keys() - layout.get_entities().keys() - LONG_NAMES.keys()
    for path in map(Path, sorted(layout.get(suffix='bold', return_type='filename'))):
        entities, _, extension = parse_name(path.name)
        if 'nii' not in extension:
            continue
        by_name = entities | {LONG_NAMES.get(key, key): value for key, value in entities.items()}
        by_name |= {'datatype': path.parent.name, 'suffix': 'bold', 'extension': extension}
        unknown -= by_name.keys()
        if all(_same(by_name.get(key), value) for key, value in filters.items()):
            recordings.setdefault(recording_name(entities), []).append((entities, extension, path))
    if unknown:
        raise BrainfmError(
            f'The filter names {", ".join(sorted(unknown))}, which is no entity of {root}: '
            f'choose among {", ".join(sorted(layout.get_entities()))}.'
        )
    runs: list[BoldRun] = []
    without: dict[str, str] = {}
    for stem, files in recordings.items():
        if not re.fullmatch('[A-Za-z0-9_+-]+', stem):  # it becomes part of paths and of pages
            without[stem] = (
                f'{stem}: its name has other characters than letters and digits in a label, which '
                f'BIDS does not allow: rename its files.'
            )
            continue
        usable = [(e, path) for e, extension, path in files if _is_usable(e, extension, spaces)]
        if not usable:
            named = (f'{e.get("space", "native")} {e.get("den", "")}' for e, _, _ in files)
            found = sorted({name.rstrip() for name in named})
            without[stem] = (
                f'{stem}: there is no preprocessed BOLD in {" or ".join(spaces)} (found: '
                f'{", ".join(found)}); run fMRIPrep again with '
                f'{FLAGS.get(spaces[0], "--output-spaces " + spaces[0])}.'
            )
            continue
        _, path = min(usable, key=lambda item: _preference(item[0], spaces))
        if path.exists():
            runs.append(run_of(path, dataset, root))
        else:
            without[stem] = (
                f'{stem}: {path.name} is a link to a file that is not here: fetch its content '
                f'first (with DataLad: datalad get).'
            )
    return runs, without


def _same(found: str | None, wanted: Any) -> bool:
    """Whether a label is what a filter asks for; ``01`` and ``1`` are the same run."""
    if isinstance(wanted, (list, tuple)):
        return any(_same(found, one) for one in wanted)
    if wanted is None or found is None:
        return found is wanted
    if wanted == '*':
        return True
    text = str(wanted)
    return int(found) == int(text) if found.isdigit() and text.isdigit() else found == text


def _is_usable(entities: dict[str, str], extension: str, spaces: tuple[str, ...]) -> bool:
    """Whether a ``_bold`` file is a preprocessed series of the whole run in one of the spaces."""
    wanted = {'part': ('mag',), 'den': ('91k',), 'space': spaces}
    given = {'part': 'mag', 'den': '91k', 'space': None} | entities
    if 'echo' in entities or any(given[key] not in labels for key, labels in wanted.items()):
        return False
    if extension == '.dtseries.nii':
        return entities['space'] == 'fsLR'
    return extension in ('.nii', '.nii.gz') and entities.get('desc') == 'preproc'


def _preference(entities: dict[str, str], spaces: tuple[str, ...]) -> tuple[int, int, str]:
    """Sort key of a candidate: the space's rank, then 2 mm, native and other resolutions."""
    resolution = entities.get('res')
    rank = {'2': 0, '02': 0, None: 1}.get(resolution, 2)
    return spaces.index(entities['space']), rank, str(resolution)


def recording_name(entities: Mapping[str, str]) -> str:
    """Name of a recording, whatever the space: its entities without those of a version of it."""
    return join_name({k: v for k, v in entities.items() if k not in VERSION_ENTITIES})


def run_of(bold: Path, dataset: str = 'preprocessed', root: Path = Path()) -> BoldRun:
    """Return a BOLD file with what fMRIPrep writes next to it."""
    entities = parse_name(bold.name)[0]
    stem = recording_name(entities)

    def existing(*names: str) -> Path | None:
        return next((bold.parent / n for n in names if (bold.parent / n).exists()), None)

    others = {key: label for key, label in entities.items() if key != 'desc'}
    mask = join_name(others | {'desc': 'brain'}, 'mask')
    base = bold.name.partition('.')[0]
    confounds = f'{stem}_desc-confounds'
    return BoldRun(
        stem, entities, dataset, root, bold,
        mask=existing(f'{mask}.nii.gz', f'{mask}.nii'),
        # older fMRIPrep names the sidecar of grayordinates after the whole extension
        sidecar=existing(f'{base}.json', f'{base}.dtseries.json'),
        # up to 20.1 fMRIPrep called the table regressors
        confounds=existing(f'{confounds}_timeseries.tsv', f'{confounds}_regressors.tsv'),
        confounds_json=existing(f'{confounds}_timeseries.json', f'{confounds}_regressors.json'),
    )  # fmt: skip
