"""Which mask, table and sidecars belong to a BOLD file, by comparison of their entities."""

from collections.abc import Collection, Iterable, Mapping

from bids_brainfm.bids.inputs.listing import File, Folder, is_regular, parse_file
from bids_brainfm.bids.naming import join_name

# What the names of some files leave out: an image without part is the magnitude
DEFAULTS = {'part': 'mag'}
# Entities that a table of confounds has in common with no image, or not with every one
VERSION_ENTITIES = ('space', 'cohort', 'res', 'den', 'desc', 'echo', 'hemi')


def contains(entities: Mapping[str, str], part: Mapping[str, str]) -> bool:
    """Whether all of `part` is among the entities of an image, whatever the order."""
    given = DEFAULTS | dict(entities)
    return all(given.get(key) == label for key, label in part.items())


def belongs(
    entities: Mapping[str, str], bold: Mapping[str, str], optional: Collection[str]
) -> bool:
    """Whether a file with these entities belongs to a BOLD file, of which it lacks only some.

    >>> bold = {'sub': '01', 'task': 'rest', 'part': 'mag', 'space': 'T1w'}
    >>> belongs({'sub': '01', 'task': 'rest'}, bold, ('part', 'space'))
    True
    >>> belongs({'sub': '01'}, bold, ('part', 'space'))
    False
    """
    return contains(bold, entities) and bold.keys() - entities.keys() <= set(optional)


def companions(
    bold: File, files: Iterable[File], endings: tuple[str, ...], optional: Collection[str]
) -> list[File]:
    """Files that belong to a BOLD file and end like one of `endings`, the best first.

    A file that shares more entities with the image comes first, then an earlier ending. An ending
    is description, suffix and extension: ``desc-brain_mask.nii.gz``.
    """
    ranked = [
        (-len(own), endings.index(ending(file)), file)
        for file in files
        if ending(file) in endings
        and belongs(own := without_desc(file), bold.entities, ('desc', 'part', *optional))
    ]
    return [file for _, _, file in sorted(ranked, key=lambda item: item[:2])]


def ending(file: File) -> str:
    """Description, suffix and extension of a file, as at the end of its name."""
    desc = {key: label for key, label in file.entities.items() if key == 'desc'}
    return join_name(desc, file.suffix, file.extension)


def without_desc(file: File) -> dict[str, str]:
    """Entities of a file other than its description."""
    return {key: label for key, label in file.entities.items() if key != 'desc'}


def sidecars(bold: File, folder: Folder) -> list[File]:
    """Sidecars of a BOLD file by BIDS's inheritance principle, the most specific last.

    At each level, from the root of the dataset down, it is the JSON file of the same suffix that
    shares most entities. fMRIPrep 20.1 wrote two for grayordinates, ``.json`` and
    ``.dtseries.json``.
    """
    found = []
    for level in (*folder.above, folder):
        stem = bold.path.name.partition('.')[0]
        best = [
            parse_file(level.path, name)  # its own, also where the name does not follow BIDS
            for name in (f'{stem}.json', f'{stem}.dtseries.json')
            if name in level.names
        ]
        names = [name for name in level.names if name.endswith('.json')]
        found += best or _most_specific(bold, [parse_file(level.path, name) for name in names])
    return found


def _most_specific(bold: File, files: Iterable[File]) -> list[File]:
    """JSON files that apply to a BOLD file and share most entities with it."""
    fitting = [
        file
        for file in files
        if is_regular(file)
        and file.suffix == bold.suffix
        and file.extension == '.json'
        and contains(bold.entities, file.entities)
    ]
    most = max((len(file.entities) for file in fitting), default=0)
    return [file for file in fitting if len(file.entities) == most]
