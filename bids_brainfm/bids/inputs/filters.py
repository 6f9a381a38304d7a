"""Which BOLD files are asked for, by their entities."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bids_brainfm.bids.inputs.listing import File
from bids_brainfm.bids.naming import LONG_NAMES
from bids_brainfm.documents import read_json
from bids_brainfm.errors import BrainfmError

LOGGER = logging.getLogger('bids_brainfm')


def read_filters(path: Path | None) -> dict[str, Any]:
    """Filters of a ``--bids-filter-file`` for BOLD files: entity to value; none without ``bold``.

    Raises BrainfmError where the file is not JSON of the form ``{"bold": {entity: value}}``.
    """
    if path is None:
        return {}
    try:
        content = read_json(path)
        if 'bold' not in content:
            LOGGER.warning(
                '--bids-filter-file %s has no entry "bold", so all BOLD files are taken.', path
            )
        return dict(content.get('bold', {}))
    except (OSError, ValueError, TypeError) as error:
        raise BrainfmError(
            f'--bids-filter-file {path} is not JSON of the form {{"bold": {{"acquisition": '
            f'"mb8"}}}} ({error}): correct the file.'
        ) from None


def labels(file: File) -> dict[str, str]:
    """What filters can ask for: entities by short name and by PyBIDS's, and parts of the name."""
    known = file.entities | {LONG_NAMES.get(key, key): v for key, v in file.entities.items()}
    parts = {'suffix': file.suffix, 'extension': file.extension}
    return known | parts | {'datatype': file.path.parent.name}


def matches(found: Mapping[str, str], filters: Mapping[str, Any]) -> bool:
    """Whether `labels` of a file are what the filters ask for."""
    return all(_same(found.get(key), value) for key, value in filters.items())


def _same(found: str | None, wanted: Any) -> bool:
    """Whether a label is what a filter asks for; ``01`` and ``1`` are the same run."""
    if isinstance(wanted, (list, tuple)):
        return any(_same(found, one) for one in wanted)
    if wanted is None or found is None:
        return found is wanted
    if wanted == '*':
        return True
    text = str(wanted)
    return int(found) == int(text) if found.isdecimal() and text.isdecimal() else found == text


def check_names(names: Collection[str], root: Path) -> None:
    """Raise BrainfmError where filters name what is no entity; `names` are in no file name."""
    if not names:
        return
    from bids.layout.models import Config

    known = {name for config in ('bids', 'derivatives') for name in Config.load(config).entities}
    known |= LONG_NAMES.keys() | set(LONG_NAMES.values()) | {'cohort', 'hemi'}
    if unknown := sorted(set(names) - known):
        raise BrainfmError(
            f'The filter names {", ".join(unknown)}, which is no entity of {root}: choose among '
            f'{", ".join(sorted(known))}.'
        )
