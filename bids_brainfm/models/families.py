"""Families of networks, which packages declare as entry points; ours are declared the same way.

In the ``pyproject.toml`` of a package, the name of the family and its class::

    [project.entry-points."bids_brainfm.families"]
    vit_mae = "bids_brainfm.models.brainlm_vitmae:BrainLMViT"

The name is the ``model_type`` of configurations and model cards. What the class must provide is
written in :mod:`bids_brainfm.models.protocol`. Nothing is imported before a family is used.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from bids_brainfm.errors import BrainfmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bids_brainfm.models.protocol import Network

GROUP = 'bids_brainfm.families'


def family_names() -> list[str]:
    """Names of all families that installed packages declare."""
    return sorted(entry_points(group=GROUP).names)


def family(model_type: str) -> 'type[Network]':
    """Import the class of a family.

    Raises BrainfmError: none or several packages declare it, or its class cannot be used.
    """
    from bids_brainfm.models.protocol import missing_members

    declared = {entry.value: entry for entry in entry_points(group=GROUP, name=model_type)}
    if not declared:
        raise BrainfmError(
            f'The configuration has model_type {model_type!r}, which is not known here; '
            f'known are {", ".join(family_names()) or "none: install bids_brainfm again"}.'
        )
    if len(declared) > 1:
        packages = ' and '.join(map(_package, declared.values()))
        raise BrainfmError(
            f'The family {model_type} is declared by {packages}, so it is not clear '
            'which is meant: uninstall all but one.'
        )
    (entry,) = declared.values()
    try:
        found = entry.load()
    except Exception as error:  # whatever a package of somebody else raises
        raise BrainfmError(
            f'The family {model_type} of the package {_package(entry)} cannot be imported from '
            f'{entry.value} ({type(error).__name__}: {error}): update or uninstall that package.'
        ) from error
    lacking = missing_members(found)
    if lacking or found.model_type != model_type:
        fault = f'lacks {", ".join(lacking)}' if lacking else f'has model_type {found.model_type}'
        raise BrainfmError(
            f'The family {model_type} of the package {_package(entry)} does not implement the '
            f'protocol of bids_brainfm.models.protocol: {entry.value} {fault}; update that '
            'package.'
        )
    return found


def working_families() -> 'Iterator[type[Network]]':
    """Classes of all families but those that cannot be used."""
    for name in family_names():
        try:
            yield family(name)
        except BrainfmError:
            continue


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value
