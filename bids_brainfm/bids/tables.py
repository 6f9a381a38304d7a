"""Tables that belong to the confounds of a run: further confounds, and components of an ICA."""

import re
from collections.abc import Iterable
from pathlib import Path

from bids_brainfm.bids.naming import parse_name

# Names after the entities of the run; the newest programs first
ICA_TABLES = {
    'aroma': (
        # fMRIPost-AROMA, and fMRIPrep up to 23.0
        (r'desc-melodic_mixing\.tsv', r'desc-MELODIC_mixing\.tsv'),
        (r'desc-aroma_metrics\.tsv', r'AROMAnoiseICs\.csv'),
    ),
    'tedana': ((r'desc-ICA_mixing\.tsv',), (r'desc-tedana_metrics\.tsv',)),
}
# A component has no space, but the series that was decomposed has
ENTITIES = r'(_(?:part|space|cohort|res|den)-[A-Za-z0-9]+)*'


def _folders(confounds: Path, folder: Path | None) -> list[Path]:
    """Where tables of a run may lie in a `folder`: in it, or where BIDS puts them."""
    if folder is None:
        return []
    entities = parse_name(confounds.name)[0]
    parts = [f'{key}-{entities[key]}' for key in ('sub', 'ses') if key in entities]
    return [folder, folder.joinpath(*parts, 'func')]


def custom_table(confounds: Path, folder: Path) -> Path | None:
    """Table in a `folder` with the name of the confounds of a run, as XCP-D had them."""
    found = (each / confounds.name for each in _folders(confounds, folder))
    return next((path for path in found if path.is_file()), None)


def ica_tables(
    confounds: Path, program: str, folder: Path | None = None
) -> tuple[Path | None, Path | None]:
    """Mixing matrix and classification of the components of a run, None where there is none.

    They are those of ICA-AROMA or tedana (`program`), in a `folder` or next to the `confounds`.
    """
    stem = re.split(r'_desc-|_[A-Za-z]+\.', confounds.name)[0]
    places = [*_folders(confounds, folder), confounds.parent]
    files = [path for place in places if place.is_dir() for path in sorted(place.iterdir())]
    mixing, metrics = (_first(files, stem, names) for names in ICA_TABLES[program])
    return mixing, metrics


def _first(files: Iterable[Path], stem: str, names: Iterable[str]) -> Path | None:
    """Take the first file that has one of the names."""
    forms = [re.compile(re.escape(stem) + ENTITIES + '_' + name) for name in names]
    return next((path for form in forms for path in files if form.fullmatch(path.name)), None)
