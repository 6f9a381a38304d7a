"""fMRIPrep's derivatives, from 1.2 on."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bids_brainfm.bids.inputs import filters as asked
from bids_brainfm.bids.inputs.listing import (
    File,
    Folder,
    Listing,
    list_around,
    list_dataset,
    parse_file,
)
from bids_brainfm.bids.inputs.pairing import DEFAULTS, VERSION_ENTITIES, companions, sidecars
from bids_brainfm.bids.naming import LONG_NAMES, join_name
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.errors import BrainfmError, abridge

FOLDER = 'fmriprep'  # below derivatives/ of a raw dataset
# How the methods text goes on after "Preprocessed BOLD series were taken from"
SOURCE = 'fMRIPrep (Esteban et al. 2019) derivatives'
FLAGS = {
    'MNI152NLin6Asym': '--output-spaces MNI152NLin6Asym:res-2',
    'MNI152NLin2009cAsym': '--output-spaces MNI152NLin2009cAsym:res-2',
    'fsLR': '--cifti-output 91k',
}
MASKS = ('desc-brain_mask.nii.gz', 'desc-brain_mask.nii')
# Up to 20.1 fMRIPrep called the table of confounds regressors
CONFOUNDS = ('desc-confounds_timeseries.tsv', 'desc-confounds_regressors.tsv')
EXTENSIONS = ('.dtseries.nii', '.nii.gz', '.nii')  # the first is read where there are several
TRACES = ('boldref', 'mask', 'preproc')  # suffixes of images that lie next to the series
OF_FILES = {'datatype', 'extension', 'part', 'suffix', *VERSION_ENTITIES} | {
    LONG_NAMES[key] for key in VERSION_ENTITIES if key in LONG_NAMES
}
open_dataset = list_dataset


def accepts(description: Mapping[str, Any]) -> bool:
    """Whether a dataset with this description is read by this adapter: the last one takes all."""
    return True


def find_runs(
    listing: Listing, dataset: str, spaces: tuple[str, ...], filters: Mapping[str, Any]
) -> tuple[list[BoldRun], dict[str, str]]:
    """Choose, for every recording, the file in the best space, and its companions.

    `dataset` is its name in BIDS URIs; `spaces` come the best first (``fsLR``: 91k grayordinates).
    `filters` map an entity (PyBIDS's long names or the short ones) to the value it must have: a
    label, a list of labels, None (absent) or ``'*'`` (any). Returns the runs, and by the name of
    each recording that cannot be read a sentence that says why.
    """
    runs: list[BoldRun] = []
    without: dict[str, str] = {}
    unseen = set(filters)
    for folder in listing.folders:
        for files in _recordings(folder):
            found = _asked_for(files, filters, unseen)
            if not found:
                continue
            stem = recording_name(found[0].entities)
            try:
                _check_label(stem)
                bold, notes = _choose(found, spaces)
                runs.append(_pair(bold, folder, files, dataset, listing.root, notes))
            except BrainfmError as error:
                without[stem] = f'{stem}: {error}'
    asked.check_names(unseen, listing.root)
    return runs, without


def _recordings(folder: Folder) -> Iterable[list[File]]:
    """Files of each recording: all parts, echoes and versions are of one recording."""
    groups: dict[frozenset[tuple[str, str]], list[File]] = {}
    versions = {'part', *VERSION_ENTITIES}
    for file in [*folder.files, *_old_images(folder)]:
        key = frozenset(item for item in file.entities.items() if item[0] not in versions)
        groups.setdefault(key, []).append(file)
    return groups.values()


def _asked_for(files: list[File], filters: Mapping[str, Any], unseen: set[str]) -> list[File]:
    """BOLD images of a recording that the filters take, or other files where there is no image.

    Names of filters that are in the name of an image are taken out of `unseen`.
    """
    images = [file for file in files if _is_image(file)]
    if not images:
        own = {key: value for key, value in filters.items() if key not in OF_FILES}
        return [f for f in files if _is_trace(f) and asked.matches(asked.labels(f), own)]
    labels = [asked.labels(file) for file in images]
    unseen.difference_update(*labels)
    return [f for f, known in zip(images, labels, strict=True) if asked.matches(known, filters)]


def _is_image(file: File) -> bool:
    return file.suffix == 'bold' and 'nii' in file.extension


def _is_trace(file: File) -> bool:
    """Whether a file shows that fMRIPrep has processed a recording."""
    shows = file.suffix in TRACES or file.entities.get('desc') == 'confounds'
    return shows and 'task' in file.entities


def _old_images(folder: Folder) -> list[File]:
    """Images by fMRIPrep 1.0 and 1.1, whose names are not those of BIDS."""
    names = [name for name in folder.names if '_bold_' in name and '_preproc.nii' in name]
    return [parse_file(folder.path, name) for name in names]


def _check_label(stem: str) -> None:
    # it becomes part of paths and of pages
    if not re.fullmatch('[A-Za-z0-9_+-]+', stem) or '-_' in f'{stem}_':
        raise BrainfmError(
            'its name has a label that is empty, or has other characters than letters and digits, '
            'which BIDS does not allow: rename its files.'
        )


def _choose(files: list[File], spaces: tuple[str, ...]) -> tuple[File, list[str]]:
    """Choose the image of a recording in the best space, and say what else there was there."""
    images = [file for file in files if _is_image(file)]
    if not images:
        raise BrainfmError(_no_image(files))
    usable = [file for file in images if _is_usable(file, spaces)]
    combined = [file for file in usable if 'echo' not in file.entities]
    echoes = {file.entities['echo'] for file in images if 'echo' in file.entities}
    usable = usable if len(echoes) == 1 and not combined else combined
    if not usable:
        raise BrainfmError(_no_usable(images, spaces, len(echoes)))
    ranked = sorted(usable, key=lambda file: _preference(file, spaces))
    best, *others = [f for f in ranked if f.entities['space'] == ranked[0].entities['space']]
    if others and _preference(best, spaces) == _preference(others[0], spaces):
        raise BrainfmError(
            f'{best.path} and {others[0].path.name} are both a series of this run, and no rule '
            f'prefers one of them: choose with --bids-filter-file, or move one away.'
        )
    return best, _notes([best, *others])


def _notes(candidates: list[File]) -> list[str]:
    """Say that the first of several candidates was taken."""
    names = [file.path.name for file in candidates]
    return [f'{names[0]} was read, and not {abridge(names[1:])}.'] if len(names) > 1 else []


def _is_usable(file: File, spaces: tuple[str, ...]) -> bool:
    """Whether it is a series by fMRIPrep, in one of the spaces, and not denoised."""
    entities = DEFAULTS | {'den': '91k'} | file.entities
    grayordinates = file.extension == '.dtseries.nii'
    return (
        entities.get('space') in spaces
        and (entities['space'] == 'fsLR') == grayordinates
        and entities['part'] == 'mag'
        and entities['den'] == '91k'
        and not _other_description(file)
        and file.extension in EXTENSIONS
    )


def _other_description(file: File) -> str:
    """Description of an image that is not the preprocessed series; empty for one that is."""
    desc = file.entities.get('desc')
    if desc == 'preproc' or (desc is None and file.extension == '.dtseries.nii'):
        return ''
    return f'desc-{desc}' if desc else 'without desc'


def _preference(file: File, spaces: tuple[str, ...]) -> tuple[int, int, str, int]:
    """Sort key: the space's rank, then 2 mm, native and other resolutions, then the extension."""
    resolution = file.entities.get('res')
    rank = {'2': 0, '02': 0, None: 1}.get(resolution, 2)
    extension = EXTENSIONS.index(file.extension)
    return spaces.index(file.entities['space']), rank, str(resolution), extension


def _no_image(files: list[File]) -> str:
    names = abridge(sorted(file.path.name for file in files), 3)
    if any(file.suffix == 'preproc' for file in files):
        return f'{names} has a name of fMRIPrep 1.0 or 1.1: run fMRIPrep 20.2 or later.'
    return (
        f'there is no preprocessed BOLD image, but {names}: copy the image too or, if fMRIPrep '
        f'wrote none (--level minimal or resampling), run it again with --level full.'
    )


def _no_usable(images: list[File], spaces: tuple[str, ...], n_echoes: int) -> str:
    """Why none of the images of a recording is read."""
    lack = f'there is no preprocessed BOLD in {" or ".join(spaces)}'
    found = f'(found: {abridge(sorted({_describe(file) for file in images}))})'
    in_space = [file for file in images if file.entities.get('space') in spaces]
    if any(_other_description(file) for file in in_space):
        return (
            f'{lack} {found}; only desc-preproc is read, and not data that were denoised already: '
            f'give the output of fMRIPrep itself.'
        )
    if n_echoes > 1 and any('echo' in file.entities for file in in_space):
        return f'{lack} that combines the echoes {found}: run fMRIPrep on all echoes at once.'
    flag = FLAGS.get(spaces[0], f'--output-spaces {spaces[0]}')
    return f'{lack} {found}; run fMRIPrep again with {flag}.'


def _describe(file: File) -> str:
    """Space of an image, and what else is particular about it."""
    usual = DEFAULTS | {'den': '91k'}
    given = ((key, file.entities[key]) for key in ('echo', 'part', 'den') if key in file.entities)
    unusual = [f'{key}-{label}' for key, label in given if label != usual.get(key)]
    ending = file.extension if file.extension not in EXTENSIONS else ''
    words = (file.entities.get('space', 'native'), *unusual, _other_description(file), ending)
    return ' '.join(word for word in words if word)


def recording_name(entities: Mapping[str, str]) -> str:
    """Name of a recording, whatever the space: its entities without those of a version of it."""
    return join_name({k: v for k, v in entities.items() if k not in VERSION_ENTITIES})


def _pair(
    bold: File, folder: Folder, files: list[File], dataset: str, root: Path,
    notes: list[str],
) -> BoldRun:  # fmt: skip
    """Return an image with its companions; raises BrainfmError for links without their file."""
    masks = companions(bold, files, MASKS, ('echo',))
    tables = companions(bold, files, CONFOUNDS, VERSION_ENTITIES)
    described = [table.path.with_suffix('.json') for table in tables[:1]]
    run = BoldRun(
        recording_name(bold.entities), bold.entities, dataset, root, bold.path,
        mask=masks[0].path if masks else None,
        sidecars=tuple(file.path for file in sidecars(bold, folder)),
        confounds=tables[0].path if tables else None,
        confounds_json=next((p for p in described if p.name in folder.names), None),
        notes=(*notes, *_notes(masks[:2]), *_notes(tables[:2])),
    )  # fmt: skip
    for path in run.companions():
        if not path.exists():
            raise BrainfmError(
                f'{path.name} is a link to a file that is not here: fetch its content first (with '
                f'DataLad: datalad get).'
            )
    return run


def run_of(bold: Path) -> BoldRun:
    """Return a BOLD file with what fMRIPrep writes next to it."""
    folder, file = list_around(bold), parse_file(bold.parent, bold.name)
    files = [other for other in folder.files if 'sub' in file.entities]
    return _pair(file, folder, files, 'preprocessed', Path(), [])
