"""Reference networks: what the parcels of an atlas are known to belong to."""

from pathlib import Path

from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.documents import read_tsv
from bids_brainfm.errors import BrainfmError

NONE = 'n/a'
# The networks of Yeo et al. 2011 (doi:10.1152/jn.00338.2011) that the 17 of Schaefer's names make
# up; TempPar counts to the default mode.
SEVEN = {
    'Vis': 'Visual', 'SomMot': 'Somatomotor', 'DorsAttn': 'Dorsal attention',
    'SalVentAttn': 'Salience/ventral attention', 'Limbic': 'Limbic', 'Cont': 'Control',
    'Default': 'Default mode', 'TempPar': 'Default mode', 'Subcortex': NONE, 'Cortex': NONE,
}  # fmt: skip


def seven_networks(networks: tuple[str, ...]) -> tuple[str, ...]:
    """Seven networks (or 'n/a') out of the 17 of Schaefer's parcels; other names stay as they are.

    >>> seven_networks(('VisCent', 'ContA', 'TempPar', 'Subcortex', 'Sensorimotor'))
    ('Visual', 'Control', 'Default mode', 'n/a', 'Sensorimotor')
    """
    named = {full: short for short in SEVEN for full in (short, *(f'{short}{x}' for x in 'ABC'))}
    named |= {'VisCent': 'Vis', 'VisPeri': 'Vis'}
    return tuple(SEVEN[named[n]] if n in named else n for n in networks)


def reference_networks(atlas: Atlas, path: Path | None = None) -> tuple[str, ...] | None:
    """Reference networks of an atlas's parcels, ``'n/a'`` for a parcel without one.

    They are the atlas's own (None where it has none), or those of a user's table (TSV) with the
    columns ``name`` (of the parcel) and ``network``, in any order of rows.
    """
    if path is None:
        return None if atlas.networks is None else seven_networks(atlas.networks)
    found = _read(path)
    if not set(found) & set(atlas.names):
        raise BrainfmError(
            f'--reference-networks {path} names no parcel of the atlas {atlas.name}, whose '
            f'first is {atlas.names[0]}: give a table of this atlas.'
        )
    return tuple(found.get(name) or NONE for name in atlas.names)


def reference_for(atlas: Atlas, paths: tuple[Path, ...]) -> Path | None:
    """The table among several that names most parcels of an atlas, None where none does."""
    shared = {path: len(set(_read(path)) & set(atlas.names)) for path in paths}
    best = max(paths, key=shared.__getitem__, default=None)
    return best if best is not None and shared[best] else None


def _read(path: Path) -> dict[str, str]:
    """Network of each parcel that a table names."""
    try:
        frame = read_tsv(path, dtype=str, keep_default_na=False)
        names, networks = frame['name'], frame['network']
    except (OSError, ValueError, KeyError) as error:
        raise BrainfmError(
            f'--reference-networks {path} is not a table (TSV) with the columns name and network '
            f'({type(error).__name__}: {error}): correct the file.'
        ) from None
    if names.duplicated().any():
        raise BrainfmError(
            f'--reference-networks {path} names {names[names.duplicated()].iloc[0]} twice: name '
            f'each parcel once.'
        )
    return dict(zip(names, networks, strict=True))
