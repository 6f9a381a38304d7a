"""The files that describe a dataset: what made it, and from what."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bids_brainfm.bids.files import write_json, write_text
from bids_brainfm.bids.freshness import read_sidecar
from bids_brainfm.documents import read_json
from bids_brainfm.errors import BrainfmError

BIDS_VERSION = '1.10.1'
# Without trailing slashes: the validator does not hide a folder named with one
BIDSIGNORE = (
    '*.html', 'figures', 'log', 'group', '*_knn.*', '*_space-fsLR_desc-*', '*_dseg.*',
    '*_stat-coverage_bold.*',
)  # fmt: skip
CODE_URL = 'https://github.com/bids-brainfm/bids_brainfm'
AUTHORS = ('The bids_brainfm developers', 'The fMRIPrep developers')
README = """# Outputs of bids_brainfm

Embeddings of fMRI foundation models, the parcel series they were computed from, and the functional
connectome as the baseline to compare them with. `sub-*.html` are the reports; `logs/CITATION.md`
is the methods text with what to cite; the JSON file beside each table says how it was made.
"""


def read_description(folder: Path) -> dict[str, Any]:
    """Read ``dataset_description.json``; raises BrainfmError where it is missing or not JSON."""
    path = folder / 'dataset_description.json'
    if not folder.is_dir():
        raise BrainfmError(f'The input {folder} is not a folder: check the path.')
    try:
        return read_json(path)
    except FileNotFoundError:
        inside = sorted(found.parent.name for found in folder.glob(f'*/{path.name}'))
        raise BrainfmError(
            f'{path} is missing, so {folder} is not a BIDS dataset: give the folder that '
            f'fMRIPrep wrote, the one with dataset_description.json in it'
            f'{" (there is one in " + ", ".join(inside[:5]) + ")" if inside else ""}.'
        ) from None
    except (ValueError, OSError) as error:
        raise BrainfmError(f'{path} is not a JSON object ({error}): restore the file.') from None


def generators(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Programs that a dataset's description names; fMRIPrep 1.x used another field."""
    found = description.get('GeneratedBy') or description.get('PipelineDescription') or []
    found = [found] if isinstance(found, dict) else found
    return [entry for entry in found if isinstance(entry, dict)]


def write_dataset_files(
    output: Path, version: str, inputs: Mapping[str, Path], suffixes: Iterable[str]
) -> None:
    """Write ``dataset_description.json``, ``.bidsignore`` and ``README.md``.

    Authors that the user has entered are kept, and so is the user's own readme. `suffixes` are
    those of our outputs that the validator does not know.
    """
    described = [read_description(folder) for folder in inputs.values()]
    authors = (read_sidecar(output / 'dataset_description.json') or {}).get('Authors')
    if authors is None:
        given = (description.get('Authors') for description in described)
        # the validator warns of fewer than two authors
        lists = (names for names in given if isinstance(names, list) and len(names) > 1)
        authors = next(lists, list(AUTHORS))
    links = {name: folder.resolve().as_uri() for name, folder in inputs.items()}
    makers = [next(iter(generators(description)), {}) for description in described]
    sources = [
        {'URL': link} | {key: maker[key] for key in ('Version',) if key in maker}
        for link, maker in zip(links.values(), makers, strict=True)
    ]
    write_json(
        output / 'dataset_description.json',
        {
            'Name': 'bids_brainfm: fMRI foundation model outputs',
            'BIDSVersion': BIDS_VERSION,
            'DatasetType': 'derivative',
            'Authors': authors,
            'GeneratedBy': [{'Name': 'bids_brainfm', 'Version': version, 'CodeURL': CODE_URL}],
            'SourceDatasets': sources,
            'DatasetLinks': links,
            'HowToAcknowledge': 'Please cite the tools and models named in logs/CITATION.md.',
        },
    )
    ignored = [f'*_{suffix}.*' for suffix in suffixes]
    write_text(output / '.bidsignore', '\n'.join([*BIDSIGNORE, *ignored]) + '\n')
    if not (output / 'README.md').exists():
        write_text(output / 'README.md', README)
