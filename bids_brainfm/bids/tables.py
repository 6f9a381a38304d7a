"""Tables that belong to the confounds of a run: further confounds, and components of an ICA."""

from pathlib import Path

from bids_brainfm.bids.inputs.listing import File, parse_file
from bids_brainfm.bids.inputs.pairing import belongs, ending, without_desc
from bids_brainfm.bids.naming import parse_name

# How their names end; the newest programs first
ICA_TABLES = {
    'aroma': (
        # fMRIPost-AROMA, and fMRIPrep up to 23.0
        ('desc-melodic_mixing.tsv', 'desc-MELODIC_mixing.tsv'),
        ('desc-aroma_metrics.tsv', 'AROMAnoiseICs.csv'),
    ),
    'tedana': (('desc-ICA_mixing.tsv',), ('desc-tedana_metrics.tsv',)),
}
# A component has no space, but the series that was decomposed has
OF_IMAGES = ('part', 'space', 'cohort', 'res', 'den')


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
    places = [
        place for place in (*_folders(confounds, folder), confounds.parent) if place.is_dir()
    ]
    files = [parse_file(place, path.name) for place in places for path in sorted(place.iterdir())]
    run = without_desc(parse_file(confounds.parent, confounds.name))
    own = [file for file in files if belongs(run, without_desc(file), OF_IMAGES)]
    mixing, metrics = (_first(own, endings) for endings in ICA_TABLES[program])
    return mixing, metrics


def _first(files: list[File], endings: tuple[str, ...]) -> Path | None:
    """Take the first file that has one of the endings."""
    return next((f.path for form in endings for f in files if ending(f) == form), None)
