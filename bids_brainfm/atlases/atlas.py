"""What an atlas is: its parcels, and its images by space."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bids_brainfm.atlases import images as pictures
from bids_brainfm.atlases.cards import AtlasCard, AtlasImage, images_here, load_card, missing_files
from bids_brainfm.atlases.faults import Places, fault_of_names
from bids_brainfm.atlases.images import LabelImage, check_image, misfit, read_labels
from bids_brainfm.documents import ENCODING, read_tsv
from bids_brainfm.errors import BrainfmError
from bids_brainfm.images import FARTHEST_MM, axis_of
from bids_brainfm.resources import home as fetched_files

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Atlas:
    """P parcels in the order of their labels 1..P, and the images that show them."""

    name: str
    names: tuple[str, ...]  # P
    hemispheres: tuple[str, ...]  # P times 'L', 'R' or 'B' (midline)
    places: Places  # centre and structure of each parcel, and known wrong orders
    networks: tuple[str, ...] | None  # P
    licence: str
    citation: tuple[str, ...]
    images: tuple[AtlasImage, ...]  # those present on this machine

    @property
    def n_parcels(self) -> int:
        """Number of parcels P."""
        return len(self.names)

    @property
    def xyz(self) -> np.ndarray:
        """Centre of each parcel in mm (MNI, RAS), (P, 3) float."""
        return self.places.xyz

    @property
    def structures(self) -> tuple[str, ...] | None:
        """'subcortex' or 'cortex' for each parcel; None where the atlas does not say."""
        return self.places.structures

    @property
    def misorders(self) -> Mapping[str, np.ndarray]:
        """Known wrong orders by name: row i of such a file is parcel ``misorders[name][i]``."""
        return self.places.misorders

    def image_for(self, space: str, voxel_size_mm: float | None = None) -> AtlasImage:
        """Image of a space with the nearest voxel size, refused if it does not show this atlas."""
        here = [image for image in self.images if image.space == space]
        if not here:
            spaces = ', '.join(dict.fromkeys(image.space for image in self.images))
            raise BrainfmError(
                f'Atlas {self.name} has no image for space {space} on this machine, only for '
                f'{spaces}: choose one of these with --space, or run '
                f'`bids_brainfm_models fetch {self.name}`.'
            )
        wanted = voxel_size_mm or 0
        image = min(here, key=lambda image: abs((image.resolution or wanted) - wanted))
        check_image(image.path, self.name, self.places)
        return image

    def table(self) -> 'pd.DataFrame':
        """Data frame of the parcels in the columns of a BIDS ``dseg.tsv``."""
        import pandas as pd

        columns = {'index': np.arange(1, self.n_parcels + 1), 'name': self.names}
        columns |= {'hemisphere': self.hemispheres, **dict(zip('xyz', self.xyz.T, strict=True))}
        frame = pd.DataFrame(columns)
        return frame if self.networks is None else frame.assign(network=self.networks)


def load_atlas(name_or_path: str | Path, home: Path | None = None) -> Atlas:
    """Read an atlas by the name or path of its card.

    Parameters
    ----------
    name_or_path : str or path-like
        Name of an atlas (``'A424'``), or path of a card; its files lie next to it.
    home : Path, optional
        Folder of fetched files; by default :func:`bids_brainfm.resources.home`.

    Returns
    -------
    Atlas
        Of P parcels, with their centres ``xyz`` (P, 3) in mm.

    Raises
    ------
    BrainfmError
        There is no such atlas, or its files are missing or contradict the card or each other.
    """
    card, home = load_card(name_or_path), home or fetched_files()
    images = images_here(card, home)
    missing = missing_files(card, home, spaces=[])
    if missing or not images:
        missing = missing or missing_files(card, home)
        again = f'bids_brainfm_models fetch {card.name}'
        raise BrainfmError(
            f'Atlas {card.name} is not complete in {card.folder(home)} (missing: '
            f'{", ".join(missing)}): run `{again}`, or `{again} --from DIR` with the files in '
            'DIR on a machine without internet.'
        )
    names, hemispheres, places, networks = _read_parcels(card, home, images)
    if hemispheres is None:
        hemispheres = tuple(hemisphere(n, x) for n, x in zip(names, places.xyz[:, 0], strict=True))
    side = np.array([{'L': -1, 'R': 1}.get(h, 0) for h in hemispheres])
    for wrong in np.flatnonzero(side * places.xyz[:, 0] < -5):
        raise BrainfmError(
            f'Atlas {card.name} places {names[wrong]} at x = {places.xyz[wrong, 0]:.0f} mm, on '
            f'the other side than its name says: the coordinates in {card.folder(home)} are '
            'flipped or in another order.'
        )
    return Atlas(
        card.name, names, hemispheres, places, networks, card.licence, card.citation, images
    )


def hemisphere(name: str, x: float) -> str:
    """Hemisphere that a parcel's name gives, else the side of its centre."""
    for form in (r'(L|R)(?:eft|ight)?_', r'.*_(L|R)$', r'\d+Networks_(L|R)H_', r'.*-([lr])h$'):
        if named := re.match(form, name):
            return named[1].upper()
    if name.startswith('Vermis') or x == 0:
        return 'B'
    return 'L' if x < 0 else 'R'


def networks_of(
    names: Sequence[str], structures: Sequence[str] | None = None
) -> tuple[str, ...] | None:
    """Networks in the names of Schaefer's parcels (as ContA), None where no name has one."""
    named = [re.match(r'\d+Networks_[LR]H_([^_]+)', name) for name in names]
    if not any(named):
        return None
    others = [s.capitalize() for s in structures or ['n/a'] * len(named)]
    return tuple(n[1] if n else other for n, other in zip(named, others, strict=True))


def _read_parcels(
    card: AtlasCard, home: Path, images: Sequence[AtlasImage]
) -> tuple[tuple[str, ...], tuple[str, ...] | None, Places, tuple[str, ...] | None]:
    """Names, hemispheres (or None), places and networks (or None) of a card's parcels."""
    names: tuple[str, ...] = ()
    hemispheres, xyz, networks, places, source = None, None, None, None, card.path
    for file in card.files:
        path = card.path_of(file, home)
        try:
            if file.role == 'labels':
                names, source = _label_names(read_labels(path, card.name)[0]), path
            elif file.role == 'coordinates':
                rows = np.loadtxt(path, encoding=ENCODING)
                _check_order(rows[:, 0], card, path)
                xyz = rows[:, 1:4].astype(np.float32)
            elif file.role == 'places':
                places = _read_places(path, card)
            elif file.role == 'table':
                frame, source = _read_table(path, card), path
                names = tuple(frame['name'])
                hemispheres = tuple(frame['hemisphere']) if 'hemisphere' in frame else None
                networks = tuple(frame['network']) if 'network' in frame else None
                xyz = _centres(frame) if {'x', 'y', 'z'} <= set(frame) else None
            elif file.role == 'networks' and path.is_file():  # one can do without
                networks = tuple(_read_table(path, card)[file.column])
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise BrainfmError(
                f'{path} of atlas {card.name} cannot be read ({error}): fetch or write it anew.'
            ) from None
    if len(names) != card.parcels:
        raise BrainfmError(
            f'The card of atlas {card.name} says {card.parcels} parcels, but {source} names '
            f'{len(names)}: give a table (TSV with index, name) or a dlabel file that fits.'
        )
    if xyz is not None and not (np.abs(xyz) <= FARTHEST_MM).all():  # NaN is not, either
        raise BrainfmError(
            f'{source} of atlas {card.name} has a coordinate that is missing or more than '
            f'{FARTHEST_MM:g} mm from the origin: fetch or write it anew.'
        )
    if places is None:
        places = Places(_image_centres(card, images, source) if xyz is None else xyz)
    if card.order and (fault := fault_of_names(names, card.patterns, places)):
        raise misfit(source, card.name, fault)
    return names, hemispheres, places, networks or networks_of(names, places.structures)


def _image_centres(card: AtlasCard, images: Sequence[AtlasImage], source: Path) -> np.ndarray:
    volume = next((image for image in images if image.resolution), None)
    if volume is None:
        raise BrainfmError(
            f'Atlas {card.name} has neither coordinates nor a volume to take them from: '
            f'add columns x, y, z (mm) to {source}.'
        )
    image, labels = read_labels(volume.path, card.name)
    pictures.check_complete(labels, volume.path, card.name, card.parcels)
    return pictures.label_centres(*pictures.in_voxels(image, labels), card.parcels)


def _check_order(index: np.ndarray, card: AtlasCard, path: Path | str) -> None:
    if not np.array_equal(index, np.arange(1, card.parcels + 1)):
        raise BrainfmError(
            f'{path} must list the parcels 1 to {card.parcels} of atlas {card.name} in order.'
        )


def _label_names(image: LabelImage) -> tuple[str, ...]:
    """Names of the labels 1..P in a dlabel image's table, in the order of the labels."""
    from nibabel.cifti2 import Cifti2Image, LabelAxis

    if not isinstance(image, Cifti2Image):
        raise ValueError('it is not a CIFTI file')
    axis = axis_of(image, 0)
    if not isinstance(axis, LabelAxis):
        raise ValueError('it has no table of labels')
    table = axis.label[0]
    return tuple(table[key][0] for key in sorted(table) if key > 0)


def _read_table(path: Path, card: AtlasCard) -> 'pd.DataFrame':
    """A table with one row per parcel, in order, all of it as text."""
    frame = read_tsv(path, dtype=str, keep_default_na=False)
    _check_order(frame['index'].to_numpy(float), card, path)
    return frame.set_index('index')


def _centres(frame: 'pd.DataFrame') -> np.ndarray:
    return frame[['x', 'y', 'z']].to_numpy(float).astype(np.float32)


def _read_places(path: Path, card: AtlasCard) -> Places:
    """Centres, structures and misorders; the columns after these are numbers in wrong orders."""
    frame = _read_table(path, card)
    wrong = frame.drop(columns=['x', 'y', 'z', 'structure']).astype(int)
    for name, numbers in wrong.items():
        _check_order(np.sort(numbers), card, f'Column {name} of {path}')
    # A column gives the position of parcel i in the wrong order, argsort the parcel at position i.
    misorders = {str(name): np.argsort(numbers.to_numpy()) for name, numbers in wrong.items()}
    return Places(_centres(frame), tuple(frame['structure']), misorders)


def check_lookalike(path: Path, card: AtlasCard, home: Path) -> None:
    """Refuse a file that is an atlas in a wrong order, by its names (CIFTI) and its places."""
    file = next(file for file in card.files if file.role == 'places')
    places = _read_places(card.path_of(file, home), card)
    image, _ = read_labels(path, card.name)
    is_dlabel = path.name.endswith('.dlabel.nii')
    if is_dlabel and (fault := fault_of_names(_label_names(image), card.patterns, places)):
        raise misfit(path, card.name, fault)
    check_image(path, card.name, places)
