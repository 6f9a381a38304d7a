"""The methods text, for a paper."""

import logging
from pathlib import Path

from bids_brainfm.bids.files import listed, write_json, write_text
from bids_brainfm.bids.freshness import read_sidecar, sealed

LOGGER = logging.getLogger('bids_brainfm')
DATA = Path(__file__).parents[1] / 'data' / 'reports'


def methods_path(output: Path) -> Path:
    """File of the methods text."""
    return output / 'logs' / 'CITATION.md'


def read_methods(output: Path) -> str:
    """Methods text of an output dataset, empty where there is none."""
    path = methods_path(output)
    return path.read_text('utf-8', errors='backslashreplace') if path.is_file() else ''


def write_methods(
    output: Path, parts: dict[str, tuple[str, list[str]]], record: bool = True
) -> Path:
    """Write ``logs/CITATION.md``, from the parts of this run and of those before it.

    `parts` has, by the name of each kind of output as in ``logs/settings``, what was done and what
    to cite for it; the tools that the text names are added. `record` says whether the outputs are
    now written, so that the parts stay for later runs' texts.
    """
    folder = output / 'logs' / 'methods'
    own = {name: {'Text': text, 'References': list(c)} for name, (text, c) in parts.items()}
    if record:
        for name, part in own.items():
            write_json(folder / f'{name}.json', sealed(part))
    written, parts_now = None, _recorded(folder) | own
    while written != parts_now:  # once more where another process has added its part meanwhile
        write_text(methods_path(output), _text(parts_now))
        written, parts_now = parts_now, _recorded(folder) | own
    return methods_path(output)


def _recorded(folder: Path) -> dict[str, dict]:
    """Recorded parts of the methods text, by name."""
    parts = {path: read_sidecar(path) for path in listed(folder, '*.json')}
    for path in [path for path, part in parts.items() if part is None]:
        LOGGER.warning(
            '%s is damaged, so what it describes is not in the methods text: remove it, and run '
            'the command that made these outputs again.', path,
        )  # fmt: skip
    return {path.stem: part for path, part in parts.items() if part is not None}


def _text(parts: dict[str, dict]) -> str:
    """Methods and references of all parts."""
    import yaml

    ordered = [part for _, part in sorted(parts.items())]
    texts = '\n\n'.join(part['Text'].strip() for part in ordered)
    references = [citation for part in ordered for citation in part['References']]
    references += yaml.safe_load((DATA / 'references.yml').read_text())
    listed = '\n'.join(f'- {reference}' for reference in dict.fromkeys(references))
    return f'# Methods\n\n{texts}\n\n# References\n\n{listed}\n'
